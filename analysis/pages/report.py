"""One self-contained HTML page with a store's results: findings, charts, tables, and the source of every number.

Each number links to its entry under "Where the numbers come from", which names the estimator, the FLOP convention, the
runs with their commit, device and data, and the command that prints the number.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import astuple, fields
from html import escape
from typing import TYPE_CHECKING

from analysis.logs.learning import unlearned
from analysis.logs.provenance import short_commits
from analysis.logs.schema import CONVENTIONS
from analysis.pages.chart_style import document
from analysis.pages.charts import charts
from analysis.pages.drawing import Answers, Material, answers, draw, material
from analysis.pages.glance import glance, headline
from analysis.pages.law_tables import fit_cells
from analysis.pages.page import Link, chips, code, figure, note, page, table
from analysis.pages.style import marks
from analysis.pages.tables import (
    Cell,
    answer_cells,
    check_cells,
    clock_cells,
    is_missing,
    notes_of,
    numbered_notes,
    short,
)

if TYPE_CHECKING:
    import pandas as pd

    from analysis.advantage.answers import Multiplier
    from analysis.logs.store import Store

CAPTIONS = {  # title and caption of each figure; one that is not here has no place in the report
    "loss-against-compute": (
        "Loss against compute",
        "Lines: one law with irreducible loss and exponent shared; bands: 68%. Below: residuals.",
    ),
    "multiplier-against-compute": (
        "The multiplier against compute",
        "Dots: each size. Lines: m(C) with its 95% band, extrapolated beyond an arm's last dot (of all, the rule).",
    ),
    "isoflop": (
        "Loss against size at equal compute",
        "Curves: the fit of each budget. Beside: the best size of each, hollow where it does not count.",
    ),
    "isoflop-growth": ("The best size against compute", "N* of each budget; hollow where it does not count."),
    "loss-against-tokens": ("Loss against tokens", "Final loss of every run."),
    "wall-clock": ("Wall clock", "What compute costs in measured training time, and the loss that the time buys."),
    "accuracy": (
        "Accuracy on the task",
        "Dots: runs, at their last evaluation. Lines: medians over seeds, as runs solve a recall task or do not.",
    ),
    "loss-curves": ("Loss over training", "Held-out loss of every run."),
    "ablations": (
        "One fact at a time",
        "Arms that differ in one fact alone, at one size; dotted: the baseline.",
    ),
    "expert-load": (
        "Load of the experts",
        "Tokens that chose each expert, over the mean of its layer, after the last step of one run of each arm.",
    ),
}
PROVENANCE = ("device", "gpus", "dtype", "torch", "code_commit", "data_sha256", "tokenizer_sha256")
HOW = {  # column -> how its number is computed, and its key in the JSON of `dynconv table`
    "m": ("the compute of the baseline that reaches the arm's loss, over the arm's", "m"),
    "95% interval": ("of m", "ci"),
    "m at Cmax": ("m at the largest compute, by the law of a changing m alone", "m_at_cmax, m_at_cmax_ci"),
    "sizes x seeds": ("paired sizes, and paired seeds at the size with fewest", "n_sizes, n_seeds"),
    "joint fit": ("the constant m of one law for both arms, a cross-check", "joint"),
    "at Cmax": ("m at the largest compute, on the line of local ln m", "m_at_cmax"),
    "did not learn": ("runs that did not learn, which keep m from being resolved", "did_not_learn"),
    "leave one out": ("range of m with each size left out in turn", "loso"),
    "p(constant)": ("test that m is the same at every size", "constant_m_p"),
    "other E": ("range of m over several values of the irreducible loss", "irreducible_loss_sensitivity"),
}


def report(store: Store, baseline: str | None = None, convention: str | None = None) -> str:
    """The HTML page. Raises ValueError on data that support no claim, and where there is no result at all."""
    answer = answers(store, baseline, convention)
    of = material(store)  # called before `store.problems` is shown, since reading evaluations may add to it
    name = store.name
    title = f"Compute advantage over {answer.baseline}" if answer.found else f"Scaling of {name}"
    figures, data = _figures(store, answer, of)
    parts = [f"<header><h1>{escape(title)} <span>· {escape(name)}</span></h1>", *_first_screen(answer, of, store.runs)]
    parts += [_left_out(answer.found, [*answer.notes, *store.problems]), _contents(answer), "</header>", *figures]
    if answer.found:
        parts += ['<h2 id="numbers">The numbers</h2>', *_multipliers(answer)]
    parts += _law(store, answer) + _optima(store, answer)
    if answer.found:
        parts.append('<h2 id="sources">Where the numbers come from</h2>')
        parts += [_source(store, answer, place) for place in range(len(answer.found))]
    rows = [["finished runs", f"{(store.runs['status'] == 'complete').sum()} of {len(store.runs)}"]]
    rows += [["did not learn", each.remark] for each in unlearned(store.runs).values()]
    parts += ["<h2>Provenance</h2>", table("provenance", ["what", "value"], rows + _origin(_done(store.runs)))]
    parts += ['<h2 id="all-runs">Runs</h2>', _runs(store, CONVENTIONS[answer.convention])]
    return page(f"{name}: {title}", parts, data)


def _first_screen(answer: Answers, of: Material, everything: pd.DataFrame) -> list[str]:
    """The first screen: the headline, one row for each arm, and a legend."""
    failed = sum(each.runs for each in unlearned(everything).values())
    runs = f"{len(of.done)} finished runs{f', and {failed} that did not learn' if failed else ''}"
    runs += f"; FLOPs counted as {answer.convention}"
    if not answer.found:
        return [f'<p class="headline">{escape(_scaling(answer))}</p>', note(f"{escape(runs)}.")]
    family = max(item.family for item in answer.found)
    together = f" of each arm, the sentences by those that hold for all {family} at once" if family > 1 else ""
    links = [_anchor(place, "m") for place in range(len(answer.found))]
    legend = (
        f"m: the compute of {answer.baseline} that reaches an arm's loss, over the arm's; above 1 the arm saves. "
        f"Intervals: 95%{together}; hollow: no difference shown. Paired by size and seed. {runs}."
    )
    return [
        f'<p class="headline">{escape(headline(answer.found))}</p>',
        glance(answer.found, links),
        note(escape(legend)),
    ]


def _scaling(answer: Answers) -> str:
    """The headline of a store without multipliers: how the best size grows, or the law of loss in compute."""
    known = [law for law in answer.allocations if law.N_exponent is not None]
    if len(known) == 1 and known[0].ci is not None:
        low, high = known[0].ci
        return (
            f"The best size grows as C^{known[0].N_exponent:.2f} (95% interval {low:.2f} to {high:.2f}), by "
            f"{known[0].budgets} budgets."
        )
    if known:
        exponents = [float(law.N_exponent or 0) for law in known]
        return (
            f"The best size grows as C^{min(exponents):.2f} to C^{max(exponents):.2f} over {len(known)} arms; the "
            "intervals stand in the table."
        )
    if answer.optima:
        return "No law of the best size: too few budgets have an optimum that counts."
    law = answer.law
    if law is None:
        return "These runs allow no comparison of arms and no law yet; they are drawn below."
    text = f"Loss falls towards {law.values['E']:.3f} as C^-{law.values['alpha']:.3f}"
    return f"{text}." if law.status == "ok" else f"{text}; the fit is not to be trusted as it stands: {law.status}."


def _contents(answer: Answers) -> str:
    places = {"figures": "Figures", "numbers": "All numbers", "from-law": "The law", "sources": "Sources"}
    absent = {*([] if answer.found else ["numbers", "sources"]), *([] if answer.law else ["from-law"])}
    links = [f"<a href=#{to}>{text}</a>" for to, text in places.items() if to not in absent]
    return f'<nav aria-label="contents">{"".join(links)}<a href=#all-runs>Runs</a></nav>'


def _figures(store: Store, answer: Answers, of: Material) -> tuple[list[str], str | None]:
    """The figures' HTML, and the JSON of their charts."""
    still = {name: one for name, one in draw(of, answer).items() if name in CAPTIONS}
    moving = charts(still, of, answer)
    text, roots = document(plot for plots in moving.values() for plot in plots)
    ids = iter(roots)
    place_of = {name: [f"plot-{next(ids)}" for _ in plots] for name, plots in moving.items()}
    command = code(_command("plot", store, answer, "-o", "figures"))
    captions = dict(CAPTIONS)
    if answer.law is None:
        captions["loss-against-compute"] = ("Loss against compute", "Final loss of every run.")
    parts = [
        figure(name, *captions[name], one, place_of.get(name, []), _arm_choice(answer) if name == "isoflop" else "")
        for name, one in still.items()
    ]
    how = (
        "Point at a run to see what it is; click it for its row among the runs. The tools at a chart's corner zoom. "
        f"From all finished runs; {command} draws these figures for print."
    )
    mark_of = marks(list(of.done["arm"]), answer.baseline)
    legend = chips(mark_of) if len(mark_of) > 1 else ""
    body = ['<h2 id="figures">Figures</h2>', note(how), legend, f'<div class="figures">{"".join(parts)}</div>']
    places = dict(zip(roots, (place for places in place_of.values() for place in places), strict=True))
    return body, f'{{"document":{text},"places":{json.dumps(places)}}}' if roots else None


def _arm_choice(answer: Answers) -> str:
    """A menu of arms for the isoFLOP chart, which shows the budgets of one arm at a time; "" for a single arm."""
    if len(answer.allocations) < 2:
        return ""
    options = "".join(f"<option value={at}>{escape(law.arm)}</option>" for at, law in enumerate(answer.allocations))
    return f"<label>budgets of <select data-panels>{options}</select></label>"


def _command(verb: str, store: Store, answer: Answers, *more: str) -> str:
    """The command line that prints the same numbers."""
    compared = ["--baseline", answer.baseline] if answer.found and verb != "isoflop" else []
    return shlex.join(["dynconv", verb, *store.arguments, *compared, "--convention", answer.convention, *more])


def _done(runs: pd.DataFrame) -> pd.DataFrame:
    return runs[runs["status"] == "complete"]


def _multipliers(answer: Answers) -> list[str]:
    """The tables of `dynconv table`, with each number linked to its source."""
    found = answer.found
    columns, rows = answer_cells(found, numbered_notes(found))
    whole = [[*row[:-1], item.status] for row, item in zip(rows, found, strict=True)]
    return [
        table("multipliers", columns, _linked(columns, whole)),
        table("checks", check_cells(found)[0], _linked(*check_cells(found))),
        *([table("clocks", *clock_cells(found))] if clock_cells(found)[1] else []),
        *(note(escape(each)) for each in notes_of(found)),
    ]


def _anchor(place: int, column: str) -> str:
    """The HTML id of the source of the number in `column` for the arm at `place`."""
    return f"from-{place}-{''.join(char if char.isalnum() else '-' for char in column)}"


def _linked(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[list[Cell | Link]]:
    """The rows, one for each arm in the order of `Answers.found`, with numbers linked to their sources."""
    return [
        [
            cell if cell is None or column in ("arm", "status") else Link(cell, _anchor(place, column))
            for column, cell in zip(columns, row, strict=True)
        ]
        for place, row in enumerate(rows)
    ]


def _source(store: Store, answer: Answers, place: int) -> str:
    """The sources of one arm's numbers: how each is computed, the runs used, and the command that prints them."""
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
    return "m at this irreducible loss with FLOPs so counted", "irreducible_loss_sensitivity"


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
            [[None if is_missing(value) else short(value) for value in astuple(row)] for row in rows],
        )
        for name, rows in (("optima", answer.optima), ("allocations", answer.allocations))
    ]
    return ["<h2>Compute-optimal sizes</h2>", note(f"{code(command)} prints these."), *tables]


def _left_out(found: Sequence[Multiplier], notes: Sequence[str]) -> str:
    rows = {f"{item.run_id}: {item.reason}": None for answer in found for item in answer.excluded}
    lines = [*notes, *rows]
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<details><summary>{len(lines)} left out or without an answer</summary><ul>{items}</ul></details>"


def _origin(runs: pd.DataFrame) -> list[list[str]]:
    """Hardware, versions, commit and data of the runs; where runs differ, each value with its number of runs."""
    rows = []
    for name in [*PROVENANCE, *(["source"] if "source" in runs else [])]:
        counts = runs[name].value_counts(dropna=False, sort=False)
        values = [f"{short(value)}{f' ({count} runs)' if len(counts) > 1 else ''}" for value, count in counts.items()]
        rows.append([name, "; ".join(values)])
    return rows


def _runs(store: Store, flops: str) -> str:
    """Every run, with its FLOPs from column `flops`."""
    columns = ["run_id", "arm", "size", "seed", "parameters", "tokens", flops, "loss", "train_seconds", "status"]
    columns += ["did_not_learn", "device", "gpus", "code_commit"]
    shown = store.runs.sort_values(["arm", "parameters", "seed"], kind="stable")[columns]
    shown = shown.assign(code_commit=shown["code_commit"].map(short_commits, na_action="ignore")).dropna(
        axis="columns", how="all"
    )
    rows = [[None if is_missing(value) else short(value) for value in row] for row in shown.itertuples(index=False)]
    query = shlex.join(["dynconv", "query", *store.arguments, "select * from runs"])
    place = "STORE/RUN_ID/run.json" if store.run_dirs else store.path.name
    return table("runs", list(shown), rows, [f"run-{at}" for at in shown.index]) + note(
        f"A row's numbers are those of {escape(place)}, by the commit and on the device that it names; {code(query)}."
    )
