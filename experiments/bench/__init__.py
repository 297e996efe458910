"""Measure time and memory of the convolutions on a GPU."""
