"""Masks, optimizer updates and products: each in a compiled or faster version, and in a plain one that does the same.

`choice.py` decides between compiled and eager kernels, `cpu/setting.py` whether the functions for one CPU are used.
"""
