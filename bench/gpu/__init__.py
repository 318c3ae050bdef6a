"""The CUDA backend checked and measured on a GPU, section by section: run.sh, docs/gpu.md."""
