"""Weights in and out: opening checkpoints, foreign formats, loading, downloading."""
