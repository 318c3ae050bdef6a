"""CUDA: fused kernels, matrix products and the device that runs them."""
