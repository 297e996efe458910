"""Answers as text: Markdown that also reads in a terminal, CSV, LaTeX, JSON. No number is computed here."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.multiplier import Answer, Multiplier
    from analysis.powerlaw import Fit

FORMATS = ("md", "csv", "latex", "json")
NONE = "-"  # how a number that does not exist is printed; CSV leaves it empty, JSON has null


def to_json(value: Any) -> str:
    """JSON of dataclasses, mappings and sequences; what is not finite becomes null."""
    return json.dumps(_plain(value), indent=2)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "item"):  # NumPy's integers
        return value.item()
    if isinstance(value, Iterable):
        return [_plain(item) for item in value]
    return None if _missing(value) else str(value)  # dates and the like, from SQL


def render(columns: Sequence[str], rows: Sequence[Sequence[str]], form: str) -> str:
    """A table of text cells as md, csv or latex."""
    if form == "csv":
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerows([columns, *[["" if cell == NONE else cell for cell in row] for row in rows]])
        return out.getvalue().rstrip("\n")
    if form == "latex":
        lines = [" & ".join(map(_escape, line)) + r" \\" for line in [columns, *rows]]
        body = "\n".join([r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"])
        return rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}" + f"\n{body}\n" + r"\end{tabular}"
    widths = [max(len(line[i]) for line in [columns, *rows]) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in [columns, *rows]
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _escape(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(char, "\\" + char if char in "&%$#_{}" else char) for char in text)


def multiplier_table(found: Sequence[Multiplier], form: str = "md") -> str:
    """Multipliers against one baseline. JSON holds everything; the others what fits a page."""
    if form == "json":
        return to_json(found)
    if form == "csv":
        return value_table(*multiplier_rows(found), form)
    text = render(*multiplier_cells(found), form)
    return text if form == "latex" else f"{text}\n\n{_legend(found)}"


def multiplier_cells(found: Sequence[Multiplier]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Columns and rows as read by people; columns without a value are left out."""
    cells = {
        "arm": [item.arm for item in found],
        "m": [_ratio(item.m) for item in found],
        "95% interval": [interval_text(item.ci) for item in found],
        "stated E": [_by_floor(item) if item.n_sizes < 3 else NONE for item in found],
        "other FLOPs": [_by_convention(item) for item in found],
        "joint fit": [_ratio(item.joint.m) if item.joint else NONE for item in found],
        "at most C": [_ratio(item.m_at_cmax) if item.n_sizes > 2 else NONE for item in found],
        "leave one out": [interval_text(item.loso) for item in found],
        "p(constant)": [NONE if item.constant_m_p is None else f"{item.constant_m_p:.3f}" for item in found],
        "wall clock": [_ratio(item.wall_clock.m) if item.wall_clock else NONE for item in found],
        "sizes x seeds": [f"{item.n_sizes} x {item.n_seeds}" for item in found],
        "status": [item.status for item in found],
    }
    columns = [name for name, column in cells.items() if any(cell != NONE for cell in column)]
    return columns, list(zip(*(cells[name] for name in columns), strict=True))


def _by_floor(item: Multiplier) -> str:
    return ", ".join(f"{row['m']:.3f} at {row['E']:g}" for row in item.floor_sensitivity)


def _by_convention(item: Multiplier) -> str:
    """m under the other conventions, where any differs by half a percent."""
    if all(abs(other.m / item.m - 1) < 0.005 for other in item.conventions.values()):
        return NONE
    return ", ".join(f"{other.m:.3f} by {name}" for name, other in item.conventions.items())


def _legend(found: Sequence[Multiplier]) -> str:
    lines = [
        f"m: compute of {found[0].baseline} over the arm's at equal loss, FLOPs counted as {found[0].convention}; "
        "paired by size and seed."
    ]
    left_out = {item.run_id: item.reason for answer in found for item in answer.excluded}
    if left_out:
        shown = "; ".join(f"{run_id} ({reason})" for run_id, reason in list(left_out.items())[:5])
        lines.append(f"Left out: {len(left_out)} rows: {shown}{' ...' if len(left_out) > 5 else ''}")
    return "\n".join(lines)


FLAT_COLUMNS = (
    *("arm", "baseline", "convention", "m", "ci_low", "ci_high", "method", "constant_m_p", "m_at_cmax"),
    *("loso_low", "loso_high", "joint_m", "joint_low", "joint_high", "wall_clock_m", "gpu_cost_m"),
    *("n_sizes", "n_seeds", "excluded", "status"),
)


def multiplier_rows(found: Sequence[Multiplier]) -> tuple[Sequence[str], list[list[Any]]]:
    """Columns and rows of the numbers that fit one line an arm; what does not exist is None."""

    def pair(interval: tuple[float, float] | None) -> tuple[float | None, float | None]:
        return interval or (None, None)

    def m(answer: Answer | None) -> float | None:
        return answer.m if answer else None

    rows = [
        [
            *(item.arm, item.baseline, item.convention, item.m, *pair(item.ci), item.method, item.constant_m_p),
            *(item.m_at_cmax, *pair(item.loso), m(item.joint), *pair(item.joint.ci if item.joint else None)),
            *(m(item.wall_clock), m(item.gpu_cost), item.n_sizes, item.n_seeds, len(item.excluded), item.status),
        ]
        for item in found
    ]
    return FLAT_COLUMNS, rows


def value_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], form: str) -> str:
    """Any table of values; numbers are shortened in md and latex only."""
    if form == "json":
        return to_json([dict(zip(columns, row, strict=True)) for row in rows])
    cell = _exact if form == "csv" else short
    return render(columns, [[cell(value) for value in row] for row in rows], form)


def fit_table(fit: Fit, form: str = "md") -> str:
    """A law's parameters in raw units with intervals, and its certificate."""
    if form == "json":
        return to_json(fit_object(fit))
    text = render(*fit_cells(fit), form)
    if form != "md":
        return text
    certificate = ", ".join(f"{key} {_brief(value)}" for key, value in fit.certificate.items())
    objective = f"objective: {fit.objective:.6g} over {len(fit.points.loss)} points"
    return f"{text}\n\nstatus: {fit.status}\n{objective}\n{certificate}"


def fit_cells(fit: Fit) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a law's parameters."""
    ci = fit.ci or {}
    rows = [[name, f"{value:.6g}", interval_text(ci.get(name), "{:.4g}")] for name, value in fit.values.items()]
    return ["parameter", "value", "95% interval"], rows


def fit_object(fit: Fit) -> dict[str, Any]:
    """The JSON object of `dynconv fit`: with several arms, A (and B) at the top are the baseline's."""
    names = [name for name in ("E", "A", "alpha", "B", "beta") if name in "EAalpha" or fit.form == "nd"]
    arms = list(dict.fromkeys(fit.points.arm))
    ci = fit.ci or {}
    base = {name: fit.parameter(name, fit.points.baseline) for name in names}
    top_ci = {name: ci.get(name) or ci.get(f"{name}[{fit.points.baseline}]") for name in names}
    per_arm = {}
    for arm in arms if len(arms) > 1 else []:
        own = {name: fit.parameter(name, arm) for name in names}
        own |= {key: fit.values[f"{key}[{arm}]"] for key in ("m", "rho_N", "rho_D") if f"{key}[{arm}]" in fit.values}
        per_arm[arm] = own | {"ci": {key: ci.get(f"{key}[{arm}]") or ci.get(key) for key in own} if ci else None}
    return base | {
        "objective": fit.objective,
        "ci": top_ci if ci else None,
        "certificate": fit.certificate,
        "status": fit.status,
        "form": fit.form,
        "loss": "lsq" if fit.loss.delta is None else "huber",
        "delta": fit.loss.delta,
        "points": len(fit.points.loss),
        "baseline": fit.points.baseline if len(arms) > 1 else None,
        "arms": per_arm,
    }


def _exact(value: Any) -> str:
    return NONE if _missing(value) else str(value)


def short(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(short, value))}]"
    return NONE if _missing(value) else f"{value:.5g}" if isinstance(value, float) else str(value)


def _missing(value: Any) -> bool:
    return value is None or value != value or str(value) == "<NA>"  # NaN is the one value that differs from itself


def _brief(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:.2g}"


def interval_text(interval: tuple[float, float] | None, number: str = "") -> str:
    """[low, high], as ratios unless `number` formats them."""
    if interval is None:
        return NONE
    low, high = (number.format(end) if number else _ratio(end) for end in interval)
    return f"[{low}, {high}]"
