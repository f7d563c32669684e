"""A trained classifier on videos."""
