"""The 2:4 product on NVIDIA GPUs, in Triton. Not measured on a GPU yet."""
