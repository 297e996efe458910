"""The one error of the analysis that is not the user's: the command line turns it into exit code 1.

A request that was wrong is a plain ValueError (exit code 2).
"""


class WorkFailed(RuntimeError):
    """The request was right and the work still failed."""
