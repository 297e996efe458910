"""Tasks on which a model is trained: batches, targets with a mask, and metrics by name."""
