"""A trained detector on pictures and videos."""
