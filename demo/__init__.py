"""The two embedded datasets of ``make demo`` and the tests, made of photographs. Not installed."""
