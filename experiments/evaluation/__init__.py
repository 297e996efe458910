"""A trained run by itself: held-out text, tasks of lm-evaluation-harness, generation, and export to transformers."""
