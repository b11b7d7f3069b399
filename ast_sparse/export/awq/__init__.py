"""Rounding to few bits: AWQ (Lin et al. 2024), one decoder block at a time."""
