"""Checkpoint formats: encode, write, verify, load."""
