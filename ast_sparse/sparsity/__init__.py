"""Masks, sparse layers, SLoRB, one-shot pruning, and the selection of layers in a model."""
