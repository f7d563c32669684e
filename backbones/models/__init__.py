"""Rev-ViT, Rev-MViT, their twins, and the layers that they are built from."""
