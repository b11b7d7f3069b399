"""SparseTrainer, its loss and its checkpoints."""
