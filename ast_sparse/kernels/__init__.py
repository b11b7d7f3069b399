"""Masks, optimizer updates and masked weights in one pass over memory, by torch.compile; each with an eager twin.

`choice.py` says which of the two a run uses.
"""
