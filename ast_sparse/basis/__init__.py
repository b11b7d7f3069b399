"""Function-preserving changes of basis of a dense model before it is pruned."""
