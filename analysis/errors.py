"""Errors of the analysis: work that failed, and data that do not allow the answer.

A request that was wrong is a plain ValueError of one line (exit code 2).
"""


class WorkFailed(RuntimeError):
    """The request was right and the work still failed."""


class Refusal(ValueError):
    """The data do not allow what was asked: too few sizes, no pair, configurations that differ.

    Where one of several answers is refused, as that of one arm of a table, its line becomes the reason why it is not
    there. Only this type may: a ValueError of NumPy or pandas is a fault of ours, and must not pass for a property of
    the data."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class where there is no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
