"""Notebook 10_benchmark: how fast each part is against the straightforward way to the same result."""
