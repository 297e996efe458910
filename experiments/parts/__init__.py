"""What a model is made of, without torch: one file a part."""
