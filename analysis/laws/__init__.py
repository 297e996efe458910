"""Power laws of loss: the solver, the fits, their intervals, and compute-optimal sizes."""
