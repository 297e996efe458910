"""The one error of the analysis that is not the user's: the command line turns it into exit code 1.

A request that was wrong is a plain ValueError (exit code 2), of one line.
"""


class WorkFailed(RuntimeError):
    """The request was right and the work still failed."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class where there is no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
