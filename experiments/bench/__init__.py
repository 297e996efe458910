"""What the convolutions cost on a GPU."""
