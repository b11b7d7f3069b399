"""SparseTrainer and what drives it."""
