"""What a model is trained on: batches, targets with a mask, and metrics by name."""
