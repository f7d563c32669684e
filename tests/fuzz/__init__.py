"""Broken input of several kinds: ``python -m tests.fuzz``."""
