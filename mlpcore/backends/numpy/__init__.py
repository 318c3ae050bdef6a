"""NumPy: the reference for every operation."""
