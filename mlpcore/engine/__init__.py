"""Planned steps: all buffers planned before the first row, chunks of rows, recorded calls."""
