"""Errors, and checks of the numbers and arrays that users pass."""
