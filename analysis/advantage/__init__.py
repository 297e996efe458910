"""Compute advantage: which runs may be compared, the estimators of the multiplier m, and the planning of sweeps."""
