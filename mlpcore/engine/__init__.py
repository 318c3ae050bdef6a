"""Planned steps: every buffer before the first row, chunks of rows, recorded calls."""
