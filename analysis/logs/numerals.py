"""Numbers as people write them: 91M, 1.3B, 1,024,000, 3,50 and 1.024,5.

"1,234" may be 1234 or 1.234, depending on the decimal mark. Other numbers of the table decide, if any of them is
unambiguous; otherwise the table is refused with the row and the column.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}  # 91M parameters, 1.3B or 1.3G, 15T tokens
NUMBER_MISSING = frozenset({"none", "nan", "na", "n/a", "null", "<na>", "#n/a", ""})
_FORM = re.compile(r"([+-]?)([\d.,\s_]*\d[.,]?)(e[+-]?\d+)?\s*([kmbgt]?)", re.IGNORECASE)
_GROUPS = r"[1-9]\d{0,2}(?:[%s]\d{3})+"
_THOUSANDS = {mark: re.compile(_GROUPS % re.escape(mark)) for mark in ",."}
_SPACED = re.compile(_GROUPS % r"\s_")


def decimal_mark(cells: Mapping[str, Sequence[Any]]) -> str:
    """ "," where the numbers of a table are written with decimal commas, else ".".

    `cells` are the columns that hold numbers, by name. Raises ValueError, without the file's name, where the numbers
    contradict one another or could be read either way.
    """
    certain: dict[str, str] = {}  # decimal mark -> the first cell that requires it
    open_cell = ""
    for name, column in cells.items():
        for row, cell in enumerate(column, 1):
            if not isinstance(cell, str) or (
                "," not in cell and ("." not in cell or ("." in certain and cell.count(".") == 1))
            ):
                continue
            mark, where = _mark_of(cell), f"{cell!r} in row {row} of column {name}"
            if mark:
                certain.setdefault(mark, where)
            elif mark is None:
                open_cell = open_cell or where
    if len(certain) == 2:
        raise ValueError(f"decimals are points in {certain['.']} and commas in {certain[',']}; write them in one way")
    if open_cell and not certain:
        raise ValueError(
            f"{open_cell} may be a decimal comma or a thousands separator; write decimals with points and no separators"
        )
    return next(iter(certain), ".")


def _mark_of(cell: str) -> str | None:
    """The decimal mark that a number requires; None if it can be read with either, "" if it is not a number."""
    form = _FORM.fullmatch(cell.strip())
    if not form:
        return ""
    digits, exponent = form[2], form[3]
    points, commas = digits.count("."), digits.count(",")
    if points and commas:  # the last sign is the decimal mark, the other one separates thousands
        return "," if digits.rindex(",") > digits.rindex(".") else "."
    sign = "." if points else ","
    if max(points, commas) > 1:
        return {",": ".", ".": ","}[sign]
    return None if sign == "," and not exponent and _THOUSANDS[sign].fullmatch(digits) else sign


def number(cell: Any, mark: str = ".") -> float:
    """A cell as a number, NaN where it is missing. Raises ValueError if it is not a number with this decimal mark."""
    if not isinstance(cell, str):
        if cell is None or cell != cell:
            return math.nan
        if isinstance(cell, bool) or not (isinstance(cell, Real) or hasattr(cell, "__float__")):
            raise ValueError(f"{cell!r} is no number")
        return float(cell)
    text = cell.strip()
    try:
        if mark == "." and "_" not in text:
            return float(text)
    except ValueError:
        pass
    if text.lower() in NUMBER_MISSING:
        return math.nan
    form = _FORM.fullmatch(text)
    if not form:
        return float(text)  # reads "inf", and raises ValueError for anything else
    sign, digits, exponent, scale = form[1], form[2], form[3] or "", form[4].lower()
    whole, point, fraction = digits.partition(mark)
    separator = {",": ".", ".": ","}[mark]
    if _THOUSANDS[separator].fullmatch(whole) or _SPACED.fullmatch(whole):
        whole = re.sub(r"[.,\s_]", "", whole)
    value = float(f"{sign}{whole}{'.' if point else ''}{fraction}{exponent}") * SCALES[scale]
    if exponent and scale:
        raise ValueError(f"{cell!r} has an exponent and a letter")
    return value


def wrong_cells(cells: Iterable[Any], mark: str) -> list[tuple[int, Any]]:
    """The rows, from 1, whose cells are no numbers, and these cells."""
    wrong = []
    for row, cell in enumerate(cells, 1):
        try:
            number(cell, mark)
        except (ValueError, TypeError):
            wrong.append((row, cell))
    return wrong
