"""Arms compared on a metric, and measured beside published rows, as text: Markdown, CSV, LaTeX or JSON.

No number is computed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from analysis.pages.tables import Cell, interval_text, left_out, render, short, to_json, value_table

if TYPE_CHECKING:
    from analysis.advantage.outcomes import Outcome, Outcomes
    from analysis.advantage.published import Beside


def outcome_table(found: Outcomes, form: str) -> str:
    """Arms compared on a metric, one row for each arm and size, the baseline's without a difference."""
    if form == "json":
        return to_json(found)
    if form == "csv":
        rows = [_values(row) for row in found.rows]
        return value_table(list(rows[0]), [list(row.values()) for row in rows], form)
    cells = [_cells(row) for row in found.rows]
    columns = [name for name in cells[0] if name == "arm" or any(row[name] is not None for row in cells)]
    first = found.rows[0]
    lines = [
        f"{first.metric}: the difference is from {first.baseline}, paired by size and seed; intervals are 95%.",
        *found.notes,
        *left_out(found.excluded),
    ]
    mark = "% " if form == "latex" else ""
    text = render(columns, [[row[name] for name in columns] for row in cells], form)
    return text + "\n" * (1 if mark else 2) + "\n".join(mark + " ".join(line.split()) for line in lines)


def _cells(row: Outcome) -> dict[str, Cell]:
    won = row.success
    return {
        "task": row.task or None,
        "size": row.size,
        "budget": row.budget or None,
        "arm": row.arm,
        "seeds": str(row.seeds),
        "mean": short(row.mean),
        "median": short(row.median),
        "range": f"{short(row.least)} to {short(row.most)}" if row.most > row.least else None,
        "difference": None if row.difference is None else f"{row.difference:+.4g}",
        "95% interval": interval_text(row.ci, "{:+.4g}"),
        "all at once": interval_text(row.family_ci, "{:+.4g}") if row.family > 1 else None,
        "successes": None if won is None else f"{won.successes} of {won.of} {interval_text(won.ci)}",
        "loss": None if row.loss is None else short(row.loss),
        "status": row.status if row.difference is not None or row.status != "ok" else None,
    }


def _values(row: Outcome) -> dict[str, Any]:
    """Every field of a row, intervals as two columns."""
    values: dict[str, Any] = {}
    for item in fields(row):
        value = getattr(row, item.name)
        if item.name in ("ci", "family_ci"):
            values |= dict(zip((f"{item.name}_low", f"{item.name}_high"), value or (None, None), strict=True))
        elif item.name == "success":
            values |= {"successes": value and value.successes, "tried": value and value.of}
        else:
            values[item.name] = value
    return values


def published_table(found: Sequence[Beside], form: str) -> str:
    """Published rows and the measured ones beside them. Differences are from the ablation's reference."""
    if form in ("json", "csv"):
        names = [item.name for item in fields(found[0])]
        rows = [{name: getattr(row, name) for name in names} for row in found]
        if form == "json":
            return to_json(rows)
        flat = [row | {"ci": interval_text(row["ci"], "{:.6g}")} for row in rows]
        return value_table(names, [list(row.values()) for row in flat], form)
    columns = ("ablation", "setting", "published", "its difference", "size", "arm", "seeds", "loss", "difference")
    cells = [
        [
            row.ablation,
            row.setting,
            f"{row.perplexity:.2f}",
            _signed(row.published_difference),
            row.size,
            row.arm,
            None if row.seeds is None else str(row.seeds),
            None if row.loss is None else f"{row.loss:.4f}",
            _signed(row.difference),
            interval_text(row.ci, "{:+.4f}"),
            "; ".join(filter(None, (row.status, row.differs and f"with {row.differs}"))),
        ]
        for row in found
    ]
    mark = "% " if form == "latex" else ""
    legend = (
        "published: perplexity; its difference: of log perplexity from the ablation's reference, in nats a token. Then "
        "the measured runs with the same facts: mean held-out loss, and its difference from that of the reference, "
        "paired by seed, with its 95% interval. Other models on other text: compare differences, not levels."
    )
    text = render([*columns, "95% interval", "status"], cells, form)
    return text + "\n" * (1 if mark else 2) + mark + legend


def _signed(value: float | None) -> Cell:
    return None if value is None else f"{value:+.4f}"
