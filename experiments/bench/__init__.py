"""What a convolution costs: kernels on a GPU beside their floor, and whole training steps."""
