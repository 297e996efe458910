"""Results as text: Markdown that is also readable in a terminal, CSV, LaTeX or JSON. No number is computed here."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from analysis.advantage.unresolved import UNRESOLVED
from analysis.laws import rates
from analysis.logs.schema import CONVENTIONS
from analysis.logs.selection import some

if TYPE_CHECKING:
    from analysis.advantage.answers import Answer, AskedAt, Multiplier
    from analysis.logs.selection import Excluded

FORMATS = ("md", "csv", "latex", "json")
MOST_SIZES = 12  # that are listed one by one
NONE = "-"  # how a number that does not exist is printed; CSV leaves it empty, JSON has null

Cell = str | None
Table = tuple[Sequence[str], Sequence[Sequence[Cell]]]


def to_json(value: Any) -> str:
    """JSON of dataclasses, mappings and sequences; numbers that are not finite become null."""
    return json.dumps(_plain(value), indent=2)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        named = {item.name: getattr(value, item.name) for item in fields(value) if item.metadata.get("json", True)}
        return {name: _plain(own) for name, own in named.items()}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float | Decimal):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "item"):  # NumPy's integers
        return value.item()
    if isinstance(value, Iterable):
        return [_plain(item) for item in value]
    return None if is_missing(value) else str(value)  # dates and the like, from SQL


def render(columns: Sequence[str], rows: Sequence[Sequence[Cell]], form: str) -> str:
    """A table of text cells as md, csv or latex (which needs the package booktabs)."""
    if form == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([columns, *rows])
        return out.getvalue().rstrip("\n")
    mark = _latex if form == "latex" else _markdown
    lines = [[mark(NONE if cell is None else " ".join(cell.split())) for cell in line] for line in [columns, *rows]]
    if form == "latex":
        # A line that begins with [ would be read as an option of the line break before it.
        text = [("{}" if line[0].startswith("[") else "") + " & ".join(line) + r" \\" for line in lines]
        body = "\n".join([r"\toprule", text[0], r"\midrule", *text[1:], r"\bottomrule"])
        return rf"\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}" + f"\n{body}\n" + r"\end{tabular}"
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([padded[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *padded[1:]])


def _markdown(text: str) -> str:
    return text.replace("|", r"\|")


LATEX = {
    **{char: "\\" + char for char in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
}


def _latex(text: str) -> str:
    return "".join(LATEX.get(char, char) for char in text)


def multiplier_table(found: Sequence[Multiplier], form: str = "md") -> str:
    """Multipliers against one baseline, then their checks. JSON holds every field."""
    if form == "json":
        return to_json(found)
    if form == "csv":
        return value_table(*multiplier_rows(found), form)
    notes = numbered_notes(found)
    (columns, answers), (check_columns, checks) = answer_cells(found, notes), check_cells(found)
    clocks, asked = clock_cells(found), asked_cells(found)
    if form == "latex":
        columns = [*columns, *check_columns[1:]]
        rows = [[*row, *check[1:]] for row, check in zip(answers, checks, strict=True)]
        if any(item.wall_clock for item in found):
            columns += ["wall clock", "95% interval"]
            for row, clock in zip(rows, (item.wall_clock for item in found), strict=True):
                row += [_m(clock), interval_text(clock.ci if clock else None)]
        whole = [render(columns, rows, form), *([render(*asked, form)] if asked[1] else [])]
        return "\n\n".join(whole) + "".join(f"\n% {line}" for line in _legend(found, notes))
    tables = [
        render(columns, answers, form),
        *([render(check_columns, checks, form)] if len(check_columns) > 1 else []),
        *([render(*clocks, form)] if clocks[1] else []),
        *([render(*asked, form)] if asked[1] else []),
    ]
    return "\n\n".join([*tables, "\n".join(_legend(found, notes))])


def answer_cells(found: Sequence[Multiplier], notes: Mapping[str, int]) -> Table:
    """The main table, one row for each arm. It includes m at the largest compute for arms whose m is not shown to be
    constant."""
    family = max(item.family for item in found)
    cells: dict[str, list[Cell]] = {
        "arm": [item.arm for item in found],
        "m": [ratio_text(item.m) for item in found],
        "95% interval": [interval_text(item.ci) for item in found],
        f"all {family} at once": [interval_text(item.family_ci) for item in found],
        "m at Cmax": [_at_largest(item) for item in found],
        "sizes x seeds": [f"{item.n_sizes} x {item.n_seeds}" for item in found],
        "did not learn": [_unlearned(item) for item in found],
        "status": [verdict(item, notes) for item in found],
    }
    left_out = {name for name in ("m at Cmax", "did not learn") if not any(cells[name])}
    left_out |= {f"all {family} at once"} if family == 1 else set()
    columns = [name for name in cells if name not in left_out]
    return columns, list(zip(*(cells[name] for name in columns), strict=True))


def _unlearned(item: Multiplier) -> Cell:
    """How many runs of the arm did not learn, of how many; where there are none of the comparison, nothing."""
    counts = {each.arm: f"{each.runs} of {each.of}" for each in item.did_not_learn}
    if item.baseline in counts:
        return f"{counts.get(item.arm, '0')}; {counts[item.baseline]} of {item.baseline}"
    return counts.get(item.arm)


def _at_largest(item: Multiplier) -> Cell:
    if item.constancy != "not shown":
        return None
    return f"{ratio_text(item.m_at_cmax)} {interval_text(item.m_at_cmax_ci)}"


def numbered_notes(found: Sequence[Multiplier]) -> dict[str, int]:
    """The distinct remarks of all statuses, numbered from 1 in order of appearance."""
    remarks = dict.fromkeys(remark for item in found if item.status != "ok" for remark in item.status.split("; "))
    return {remark.removeprefix(UNRESOLVED): number for number, remark in enumerate(remarks, 1)}


def verdict(item: Multiplier, notes: Mapping[str, int]) -> str:
    """The status in short ("ok", "see" or "not resolved"), with the numbers of its notes."""
    if item.status == "ok":
        return "ok"
    numbers = ", ".join(str(notes[remark.removeprefix(UNRESOLVED)]) for remark in item.status.split("; "))
    return f"{'not resolved' if item.status.startswith(UNRESOLVED) else 'see'} [{numbers}]"


def check_cells(found: Sequence[Multiplier]) -> Table:
    """m by other estimators, FLOP conventions and irreducible losses, one row for each arm; columns without any value
    are left out."""
    cells: dict[str, list[Cell]] = {
        "arm": [item.arm for item in found],
        "joint fit": [_m(item.joint) for item in found],
        "at Cmax": [ratio_text(item.m_at_cmax) if item.n_sizes > 2 else None for item in found],
        "leave one out": [interval_text(item.loso) for item in found],
        "p(constant)": [None if item.constant_m_p is None else f"{item.constant_m_p:.3f}" for item in found],
        "other E": [_over_irreducible_losses(item) for item in found],
    }
    names = dict.fromkeys(name for item in found for name in item.conventions)
    for name in names:
        cells[name] = [_m(item.conventions.get(name)) if item.n_sizes > 2 else None for item in found]
    for irreducible_loss in sorted(
        {row["E"] for item in found if item.n_sizes < 3 for row in item.irreducible_loss_sensitivity}
    ):
        for name in (found[0].convention, *names):
            cells[f"E={irreducible_loss:g} {name}"] = [
                _at_irreducible_loss(item, irreducible_loss, name) for item in found
            ]
    columns = [name for name, column in cells.items() if any(cell is not None for cell in column)]
    return columns, list(zip(*(cells[name] for name in columns), strict=True))


def clock_cells(found: Sequence[Multiplier]) -> Table:
    """m in measured seconds, and in GPU seconds where that differs; arms without either have no row."""
    columns = ["arm", "clock", "m", "95% interval", "at Cmax", "p(constant)", "status"]
    rows: list[list[Cell]] = []
    for item in found:
        for name, clock in (("wall", item.wall_clock), ("GPU", item.gpu_cost)):
            if clock is None or (name == "GPU" and clock == item.wall_clock):
                continue
            p = None if clock.constant_m_p is None else f"{clock.constant_m_p:.3f}"
            top = None if clock.m_at_cmax is None else ratio_text(clock.m_at_cmax)
            status = "not constant" if "not constant" in clock.status else clock.status.partition(":")[0]
            rows.append([item.arm, name, ratio_text(clock.m), interval_text(clock.ci), top, p, status])
    return columns, rows


def asked_cells(found: Sequence[Multiplier]) -> Table:
    """m at the computes asked for, each row with how far it is from what was trained."""
    columns = ["arm", "compute", "m", "95% if the laws hold", "measured?"]
    rows = [
        [item.arm, f"{at.compute:.4g}", ratio_text(at.m), interval_text(at.ci), _how_far(at)]
        for item in found
        for at in item.asked
    ]
    return columns, rows


def _how_far(at: AskedAt) -> str:
    if at.times_largest > 1:
        return f"no: extrapolated {at.times_largest:.3g} times beyond the largest compute"
    if at.times_smallest < 1:
        return f"no: extrapolated {1 / at.times_smallest:.3g} times below the smallest compute"
    return "interpolated"


def _m(answer: Answer | None) -> Cell:
    return None if answer is None else ratio_text(answer.m)


def _over_irreducible_losses(item: Multiplier) -> Cell:
    """The range of m over the irreducible losses tried."""
    values = [row["m"] for row in item.irreducible_loss_sensitivity]
    return interval_text((min(values), max(values))) if values and item.n_sizes > 2 else None


def _at_irreducible_loss(item: Multiplier, irreducible_loss: float, convention: str) -> Cell:
    """m at a stated irreducible loss under a convention, for an arm with too few sizes to fit it."""
    for row in item.irreducible_loss_sensitivity if item.n_sizes < 3 else ():
        if row["E"] == irreducible_loss:
            m = {item.convention: row["m"], **row["conventions"]}.get(convention)
            return None if m is None else ratio_text(m)
    return None


def notes_of(found: Sequence[Multiplier]) -> list[str]:
    """How runs were selected and what they share, each sentence once."""
    tuned = dict.fromkeys(each for item in found for each in item.rates)
    of_pairs = {note for item in found for note in rates.notes(item.rates)}  # each repeats the baseline's rates
    told = [note for item in found for note in item.notes if note not in of_pairs]
    return list(dict.fromkeys(f"{capitalised(note)}." for note in [*rates.notes(list(tuned)), *told]))


def _legend(found: Sequence[Multiplier], notes: Mapping[str, int]) -> list[str]:
    lines = [
        f"m: compute of {found[0].baseline} over the arm's at equal loss, FLOPs counted as {found[0].convention}; "
        f"paired by size{', budget' if any(item.budgets for item in found) else ''} and seed.",
        *_paired_at(found),
        *notes_of(found),
        *(f"[{number}] {remark}" for remark, number in notes.items()),
    ]
    if any(item.asked for item in found):
        lines.append(
            "m at a compute that was asked for is by laws in which it changes; beyond the largest compute no run tells "
            "whether they go on."
        )
    sources = dict.fromkeys(item.wall_clock.source for item in found if item.wall_clock)
    lines += [f"Clock: {source}." for source in sources]
    reasons = list(dict.fromkeys(item.no_clock for item in found if item.no_clock))
    if reasons:
        others = f"; for {len(reasons) - 1} more reasons see --json" if len(reasons) > 1 else ""
        lines.append(f"No wall clock: {reasons[0]}{others}.")
    lines += left_out(item for answer in found for item in answer.excluded)
    return [" ".join(line.split()) for line in lines]


def _paired_at(found: Sequence[Multiplier]) -> list[str]:
    """A line on the sizes behind each m, and the paired seeds at each; arms with the same stand together."""
    arms: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for item in found:
        if item.local:
            arms.setdefault(tuple((str(row["size"]), int(row["seeds"])) for row in item.local), []).append(item.arm)
    if len(arms) < 2:
        return [f"Paired at {_listed(places)}." for places in arms]
    return [f"Paired: {'; '.join(f'{some(names)} at {_listed(places)}' for places, names in arms.items())}."]


def _listed(places: Sequence[tuple[str, int]]) -> str:
    """Sizes with their seeds; of a grid of many sizes the ends."""
    each = len({seeds for _, seeds in places}) == 1
    names = [size if each else f"{size} x {seeds}" for size, seeds in places]
    if len(names) > MOST_SIZES:
        names = [*names[:3], f"{len(names) - 6} more", *names[-3:]]
    return ", ".join(names) + (f" (seeds: {places[0][1]})" if each else "")


def left_out(excluded: Iterable[Excluded]) -> list[str]:
    """A line on the rows that were left out, by reason; of each row the first reason."""
    reasons: dict[str, str] = {}
    for item in excluded:
        reasons.setdefault(item.run_id, item.reason)
    by_reason: dict[str, list[str]] = {}
    for run_id, reason in reasons.items():
        by_reason.setdefault(reason, []).append(run_id)
    shown = "; ".join(f"{some(run_ids)} ({reason})" for reason, run_ids in by_reason.items())
    return [f"Left out: {len(reasons)} rows: {shown}"] if reasons else []


def multiplier_rows(found: Sequence[Multiplier]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of all scalar results, one row for each arm; missing values are None."""

    def ends(name: str, interval: tuple[float, float] | None) -> dict[str, float | None]:
        low, high = interval or (None, None)
        return {f"{name}_low": low, f"{name}_high": high}

    def by_convention(item: Multiplier) -> dict[str, float | None]:
        answers = {item.convention: item.m} | {name: answer.m for name, answer in item.conventions.items()}
        return {f"m_{column.removeprefix('flops_')}": answers.get(name) for name, column in CONVENTIONS.items()}

    rows = [
        {
            "arm": item.arm,
            "baseline": item.baseline,
            "convention": item.convention,
            "m": item.m,
            **ends("ci", item.ci),
            **ends("family", item.family_ci),
            "method": item.method,
            "constancy": item.constancy,
            "constant_m_p": item.constant_m_p,
            "m_at_cmax": item.m_at_cmax,
            **ends("m_at_cmax", item.m_at_cmax_ci),
            **ends("loso", item.loso),
            **by_convention(item),
            "joint_m": item.joint.m if item.joint else None,
            **ends("joint", item.joint.ci if item.joint else None),
            **ends("wild_cluster", item.wild_cluster),
            "noise_floor": item.noise_floor,
            "wall_clock_m": item.wall_clock.m if item.wall_clock else None,
            **ends("wall_clock", item.wall_clock.ci if item.wall_clock else None),
            "gpu_cost_m": item.gpu_cost.m if item.gpu_cost else None,
            **dict.fromkeys(name for each in found for name in _asked_values(each)),
            **_asked_values(item),
            "irreducible_loss": item.irreducible_loss,
            "exponent": item.exponent,
            "n_sizes": item.n_sizes,
            "n_seeds": item.n_seeds,
            "did_not_learn": sum(each.runs for each in item.did_not_learn if each.arm == item.arm),
            "baseline_did_not_learn": sum(each.runs for each in item.did_not_learn if each.arm == item.baseline),
            "excluded": len(item.excluded),
            "status": item.status,
        }
        for item in found
    ]
    return list(rows[0]), [list(row.values()) for row in rows]


def _asked_values(item: Multiplier) -> dict[str, float]:
    """m at the computes asked for, in columns that say where it is not measured."""
    found: dict[str, float] = {}
    for at in item.asked:
        name = f"{'' if at.times_largest <= 1 <= at.times_smallest else 'extrapolated_'}m_at_{at.compute:.4g}"
        found |= {name: at.m, f"{name}_low": at.ci[0], f"{name}_high": at.ci[1]}
    return found


def value_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], form: str) -> str:
    """Any table of values; numbers are shortened in md and latex only."""
    if form == "json":
        repeated = [name for name, count in Counter(columns).items() if count > 1]
        if repeated:
            raise ValueError(f"two columns are named {repeated[0]!r}, which JSON cannot hold; name one with AS")
        return to_json([dict(zip(columns, row, strict=True)) for row in rows])
    cell = str if form == "csv" else short
    return render(columns, [[None if is_missing(value) else cell(value) for value in row] for row in rows], form)


def short(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(short, value))}]"
    return NONE if is_missing(value) else f"{value:.5g}" if isinstance(value, float) else str(value)


def is_missing(value: Any) -> bool:
    """Whether a value is missing: None, or what pandas and databases use in its place."""
    return value is None or (not isinstance(value, str) and str(value) in ("nan", "<NA>", "NaT"))


def capitalised(text: str) -> str:
    """The text as the beginning of a sentence; m, the multiplier, stays small."""
    return text if text.startswith("m ") else text[:1].upper() + text[1:]


def ratio_text(value: float, decimals: int = 3) -> str:
    """A ratio with so many decimals, and with more where these would make it 1, which the end of an interval must not
    seem to be if the interval does not hold 1."""
    if not 0.0005 <= value < 100:
        return f"{value:.2g}"
    text = f"{value:.{decimals}f}"
    return text if float(text) != 1 or abs(value - 1) < 1e-8 else ratio_text(value, decimals + 1)


def interval_text(interval: tuple[float, float] | None, number: str = "") -> Cell:
    """[low, high], as ratios unless `number` formats them."""
    if interval is None or any(math.isnan(end) for end in interval):
        return None
    low, high = (number.format(end) if number else ratio_text(end) for end in interval)
    return f"[{low}, {high}]"
