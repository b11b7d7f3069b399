"""The checks of `scripts/checks/gpu.py`: one file a subject."""
