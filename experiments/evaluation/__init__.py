"""Load trained runs."""
