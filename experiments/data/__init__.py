"""Corpus -> tokenizer -> shards -> batches that depend on (seed, step) alone."""
