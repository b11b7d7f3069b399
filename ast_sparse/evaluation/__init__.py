"""Perplexity and tables."""
