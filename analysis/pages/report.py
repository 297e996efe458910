"""One self-contained HTML page of a store's answers: tables, figures, and where every number comes from.

A number leads to its place under "Where the numbers come from": the estimator, the convention, the runs with their
commit, device and data, and the command that prints it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import astuple, fields
from html import escape
from typing import TYPE_CHECKING

from analysis.logs.schema import CONVENTIONS
from analysis.pages.drawing import Answers, answers, draw
from analysis.pages.page import Link, code, figure, note, page, table
from analysis.pages.tables import (
    Cell,
    answer_cells,
    check_cells,
    clock_cells,
    fit_cells,
    interval_text,
    is_missing,
    numbered_notes,
    short,
)

if TYPE_CHECKING:
    import pandas as pd

    from analysis.advantage.answers import Multiplier
    from analysis.logs.store import Store

CAPTIONS = {
    "loss-against-compute": "Held-out loss against training compute. Lines: one law with irreducible loss and exponent "
    "shared; bands: 68%. Arrow, where resolved: the compute the baseline needs for the arm's loss. Below: residuals.",
    "multiplier-against-compute": "The multiplier at each size, and the line of m(C) with its 95% band.",
    "multipliers": "Multipliers with 95% intervals; hollow where not resolved.",
    "isoflop": "Loss against size at equal compute, and the best size and tokens of each budget; hollow where the "
    "optimum does not count.",
    "wall-clock": "What compute costs in measured training time, and what that time buys.",
    "loss-curves": "Held-out loss over training, by size.",
    "ablations": "Arms that differ in one fact alone; dotted: the baseline.",
}
PROVENANCE = ("device", "gpus", "dtype", "torch", "code_commit", "data_sha256", "tokenizer_sha256")
HOW = {  # column -> how its number is made, and its key in the JSON of `dynconv table`
    "m": ("the compute of the baseline that reaches the arm's loss, over the arm's", "m"),
    "95% interval": ("of m", "ci"),
    "sizes x seeds": ("paired sizes, and paired seeds at the size with fewest", "n_sizes, n_seeds"),
    "joint fit": ("the constant m of one law for both arms, a cross-check", "joint"),
    "at Cmax": ("m at the largest compute, on the line of local ln m", "m_at_cmax"),
    "leave one out": ("range of m with each size left out in turn", "loso"),
    "p(constant)": ("test that m is the same at every size", "constant_m_p"),
    "other E": ("range of m with the irreducible loss moved", "floor_sensitivity"),
}


def report(store: Store, baseline: str | None = None, convention: str | None = None) -> str:
    """The page. Raises ValueError on data that support no claim, and where there is no answer at all."""
    answer = answers(store, baseline, convention)
    drawn = draw(store, answer)  # first: it may find problems with the evaluations
    title = f"Compute advantage over {answer.baseline}" if answer.found else f"Scaling of {store.path.name}"
    parts = [f"<h1>{escape(title)}</h1>"]
    if answer.found:
        parts += _multipliers(answer)
    parts.append(_left_out(answer.found, [*answer.notes, *store.problems]))
    command = code(_command("plot", store, answer, "-o", "figures"))
    parts += [figure(name, one, CAPTIONS[name], f"From all finished runs: {command}.") for name, one in drawn.items()]
    parts.append(note("Click a figure to enlarge it; wheel or +, - zooms."))
    parts += _law(store, answer) + _optima(store, answer)
    if answer.found:
        parts.append("<h2>Where the numbers come from</h2>")
        parts += [_source(store, answer, place) for place in range(len(answer.found))]
    rows = [["finished runs", f"{(store.runs['status'] == 'complete').sum()} of {len(store.runs)}"]]
    parts += ["<h2>Provenance</h2>", table("provenance", ["what", "value"], rows + _origin(_done(store.runs)))]
    parts += ["<h2>Runs</h2>", _runs(store, CONVENTIONS[answer.convention])]
    return page(f"{store.path.name}: {title}", parts)


def _command(verb: str, store: Store, answer: Answers, *more: str) -> str:
    """What to type for the same numbers."""
    compared = ["--baseline", answer.baseline] if answer.found and verb != "isoflop" else []
    return shlex.join(["dynconv", verb, str(store.path), *compared, "--convention", answer.convention, *more])


def _done(runs: pd.DataFrame) -> pd.DataFrame:
    return runs[runs["status"] == "complete"]


def _multipliers(answer: Answers) -> list[str]:
    """The answers in sentences, and both tables; each number leads to its source."""
    found = answer.found
    sentences = [f"<p>{_sentence(item, place)}</p>" for place, item in enumerate(found) if _resolved(item)]
    columns, rows = answer_cells(found, numbered_notes(found))
    whole = [[*row[:-1], item.status] for row, item in zip(rows, found, strict=True)]
    return [
        *(sentences or ["<p>No arm's advantage is resolved.</p>"]),
        table("multipliers", columns, _linked(columns, whole)),
        note(f"FLOPs counted as {escape(answer.convention)}; 95% intervals; paired by size and seed."),
        table("checks", check_cells(found)[0], _linked(*check_cells(found))),
        *([table("clocks", *clock_cells(found))] if clock_cells(found)[1] else []),
    ]


def _resolved(item: Multiplier) -> bool:
    return not item.status.startswith("not resolved")


def _sentence(item: Multiplier, place: int) -> str:
    interval = f" (95% interval {interval_text(item.ci)})" if item.ci else ""
    remark = "" if item.status == "ok" else f" Note: {item.status}."
    seeds = f"{item.n_seeds} seed{'s' if item.n_seeds > 1 else ''}"
    text = f"{item.arm} has a {item.m:.2f}x compute advantage{interval}, from {item.n_sizes} sizes with {seeds} each."
    return f"{escape(text + remark)} {Link('Where from?', _anchor(place, 'm')).html()}"


def _anchor(place: int, column: str) -> str:
    """The id of a number's source: of the arm at `place`, in `column`."""
    return f"from-{place}-{''.join(char if char.isalnum() else '-' for char in column)}"


def _linked(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[list[Cell | Link]]:
    """Rows of arms in the order found, their numbers linked to their sources."""
    return [
        [
            cell if cell is None or column in ("arm", "status") else Link(cell, _anchor(place, column))
            for column, cell in zip(columns, row, strict=True)
        ]
        for place, row in enumerate(rows)
    ]


def _source(store: Store, answer: Answers, place: int) -> str:
    """Of one arm's numbers: how each is made, the runs behind them, and the command that prints them."""
    item = answer.found[place]
    left_out = {row.run_id for row in item.excluded}
    used = _done(store.runs)
    used = used[used["arm"].isin([item.arm, item.baseline]) & ~used["run_id"].isin(left_out)]
    cells: dict[str, Cell] = {}
    for columns, rows in (answer_cells(answer.found, numbered_notes(answer.found)), check_cells(answer.found)):
        cells |= dict(zip(columns, rows[place], strict=True))
    numbers = {column: cell for column, cell in cells.items() if cell is not None and column not in ("arm", "status")}
    rows = [[column, cell, *_how(item, column)] for column, cell in numbers.items()]
    links = ", ".join(Link(str(run_id), f"run-{at}").html() for at, run_id in used["run_id"].items())
    origin = "; ".join(f"{escape(str(what))} {escape(str(value))}" for what, value in _origin(used))
    return "\n".join(
        [
            f"<h3>{escape(item.arm)}</h3>",
            note(f"{code(_command('table', store, answer, '--json'))} prints these under the keys named."),
            table(f"from-{place}", ["number", "value", "how", "key"], rows, [_anchor(place, name) for name in numbers]),
            note(f"FLOPs counted as {escape(item.convention)} unless said; {origin}. {len(used)} runs: {links}."),
        ]
    )


def _how(item: Multiplier, column: str) -> tuple[str, str]:
    if column == "m":
        return f"{HOW[column][0]}; {item.method}", HOW[column][1]
    if column in HOW:
        return HOW[column]
    if column.endswith("at once"):
        return "the intervals of all arms hold the truth at once with 95%", "family_ci"
    if column in item.conventions:
        return f"m with FLOPs counted as {column}", f"conventions, {column}"
    return "m at this irreducible loss with FLOPs so counted", "floor_sensitivity"


def _law(store: Store, answer: Answers) -> list[str]:
    if answer.law is None:
        return []
    law = answer.law
    columns, rows = fit_cells(law)
    certificate = ", ".join(f"{name} {short(value)}" for name, value in law.certificate.items())
    arms = ", ".join(dict.fromkeys(law.points.arm))
    command = _command("fit", store, answer, "--form", "c")
    linked = [[row[0], *(cell and Link(cell, "from-law") for cell in row[1:])] for row in rows]
    return [
        "<h2>The law of loss in compute</h2>",
        table("law", columns, linked),
        f"<div id=from-law>{note(f'{code(command)}; {len(law.points.loss)} finished runs of {escape(arms)}.')}</div>",
        note(f"Status: {escape(law.status)}. {escape(certificate)}."),
    ]


def _optima(store: Store, answer: Answers) -> list[str]:
    if not answer.optima:
        return []
    command = _command("isoflop", store, answer)
    tables = [
        table(
            name,
            [item.name for item in fields(rows[0])],
            [[v if isinstance(v, str) else _isoflop_cell(v) for v in astuple(row)] for row in rows],
        )
        for name, rows in (("optima", answer.optima), ("allocations", answer.allocations))
    ]
    return ["<h2>Compute-optimal sizes</h2>", *tables, f"<div id=from-isoflop>{note(code(command))}</div>"]


def _isoflop_cell(value: float | tuple[float, float] | None) -> Link | None:
    return None if value is None else Link(short(value), "from-isoflop")


def _left_out(found: Sequence[Multiplier], notes: Sequence[str]) -> str:
    rows = {f"{item.run_id}: {item.reason}": None for answer in found for item in answer.excluded}
    lines = [*notes, *rows]
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<details><summary>{len(lines)} left out or without an answer</summary><ul>{items}</ul></details>"


def _origin(runs: pd.DataFrame) -> list[list[str]]:
    """What runs ran on and from; more than one value of a thing is shown with its count."""
    rows = []
    for name in [*PROVENANCE, *(["source"] if "source" in runs else [])]:
        counts = runs[name].value_counts(dropna=False, sort=False)
        values = [f"{short(value)}{f' ({count} runs)' if len(counts) > 1 else ''}" for value, count in counts.items()]
        rows.append([name, "; ".join(values)])
    return rows


def _runs(store: Store, flops: str) -> str:
    """Every run, with its FLOPs from column `flops`."""
    columns = ["run_id", "arm", "size", "seed", "parameters", "tokens", flops, "loss", "train_seconds", "status"]
    columns += ["device", "gpus", "code_commit"]
    shown = store.runs.sort_values(["arm", "parameters", "seed"], kind="stable")[columns]
    shown = shown.assign(code_commit=shown["code_commit"].str.slice(0, 12))
    rows = [[None if is_missing(value) else short(value) for value in row] for row in shown.itertuples(index=False)]
    query = shlex.join(["dynconv", "query", str(store.path), "select * from runs"])
    place = "STORE/RUN_ID/run.json" if store.run_dirs else store.path.name
    return table("runs", columns, rows, [f"run-{at}" for at in shown.index]) + note(
        f"A row's numbers are those of {escape(place)}, by the commit and on the device that it names; {code(query)}."
    )
