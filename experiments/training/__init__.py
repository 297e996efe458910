"""One run: the trainer, optimizers, schedules, parallelism, checkpoints."""
