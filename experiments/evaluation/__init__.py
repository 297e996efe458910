"""A trained run, loaded by name."""
