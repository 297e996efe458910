"""Compute advantage: which runs may be compared, the estimators, and planning."""
