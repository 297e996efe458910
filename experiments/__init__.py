"""What is trained, how, and where: sweeps, models, data, the trainer and the launcher."""
