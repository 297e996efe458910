"""The configurations of a model's parts, without torch: one file for each part."""
