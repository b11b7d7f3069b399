"""Products with 2:4 weights that stay compressed, in C: `src/` has the kernels, `compiling.py` compiles them once."""
