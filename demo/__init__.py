"""Two small datasets made of the photographs that scikit-image ships: no download, seconds."""
