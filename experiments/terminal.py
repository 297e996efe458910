"""Numbers, tables, warnings and progress bars as a person reads them in a terminal."""

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `plan` and `status` draw no bar, and start faster without it
    from tqdm import tqdm

QUIET_SECONDS = 2.0  # work that is done sooner shows no bar
FILE_SECONDS = 30.0  # between two states of a bar that goes to a file


def bar(name: str, total: int | None, unit: str, items: Iterable[bytes] | None = None) -> "tqdm[bytes]":
    """A bar on standard error, for `items` or to be updated by hand. In a file it is a line now and then."""
    from tqdm import tqdm

    often = 0.1 if sys.stderr.isatty() else FILE_SECONDS
    return tqdm(items, desc=name, total=total, unit=unit, unit_scale=True, delay=QUIET_SECONDS, mininterval=often)


def warn(*lines: str) -> None:
    """Say lines on standard error, each as the command's own."""
    for line in lines:
        print(f"dynconv: {line}", file=sys.stderr)


def align(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side: the first to the left, numbers to the right."""
    columns = list(zip(headings, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    lines = []
    for row in (headings, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def short(count: int) -> str:
    """1234567 -> 1.235M."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.4g}{unit}"
    return str(count)


def span(hours: float) -> str:
    """A forecast: three digits in a unit that suits it."""
    for unit, size in (("h", 1.0), ("min", 1 / 60)):
        if hours >= size:
            return f"{hours / size:,.0f} {unit}" if hours / size >= 1000 else f"{hours / size:.3g} {unit}"
    return f"{hours * 3600:.2g} s"


def duration(seconds: float | None) -> str:
    """3725 -> 1h02m."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{rest:02d}s"
