"""The torch modules of the parts, a file of the same name for each, and the decoder that stacks them."""
