"""Triton kernels for NVIDIA GPUs. Not measured on a GPU yet."""
