"""Masks, optimizer updates and products: a compiled or faster way each, and a plain one that does the same.

`choice.py` decides between compiled and eager kernels, `cpu/setting.py` whether the functions for one CPU are used.
"""
