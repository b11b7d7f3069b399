"""Kernels for NVIDIA GPUs, in Triton. Not measured on a GPU yet."""
