"""Memory policies and the reversible engine. Read ``reversible.py`` first."""
