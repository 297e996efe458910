"""Submitting runs to this machine or Slurm, and the state of submitted runs."""
