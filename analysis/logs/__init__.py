"""The log of a run: its schema, its writer and reader; stores of runs, and other people's tables of points."""
