"""Datasets in COCO format: normalised once, then only read."""
