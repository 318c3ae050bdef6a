"""Checks and measurements of the CUDA backend on a GPU, by section: run.sh, docs/gpu.md."""
