"""Where runs go, and where they stand: submission, this machine, Slurm."""
