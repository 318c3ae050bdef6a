"""Errors, and checks of numbers and arrays that users pass."""
