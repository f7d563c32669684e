"""``python -m backbones zoo | memory | drift | evaluate | predict``."""
