"""One self-contained HTML page of a store's answers: tables, figures, and where every number comes from."""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from analysis.drawing import answers, draw
from analysis.style import write
from analysis.tables import NONE, Cell, answer_cells, check_cells, fit_cells, interval_text, numbered_notes, short

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from analysis.multiplier import Multiplier
    from analysis.store import Store

CAPTIONS = {
    "loss-against-compute": "Held-out loss against training compute. Lines: one law with irreducible loss and exponent "
    "shared; bands: 95%. Arrow: the compute that the baseline needs for the arm's loss. Below: residuals.",
    "multiplier-against-compute": "The multiplier at each size, and its 95% interval.",
    "multipliers": "Multipliers with 95% intervals; hollow where not resolved.",
    "wall-clock": "Loss against counted compute, and against measured training time.",
    "loss-curves": "Held-out loss over training, by size.",
    "ablations": "Ablations; dotted: the baseline.",
    "isoflop": "Loss against size at equal compute, and the best size and tokens at each.",
}
RUN_COLUMNS = (
    "run_id",
    "arm",
    "size",
    "seed",
    "parameters",
    "tokens",
    "flops_exact",
    "loss",
    "train_seconds",
    "status",
)
PROVENANCE = ("device", "gpus", "dtype", "torch", "code_commit", "data_sha256", "tokenizer_sha256")

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #111; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
th { cursor: pointer; border-bottom: 2px solid #333; } th[aria-sort=ascending]::after { content: " \\2191"; }
th[aria-sort=descending]::after { content: " \\2193"; } td.number { font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; } figure img { max-width: 100%; width: 44rem; cursor: zoom-in; }
figcaption, .note { color: #444; font-size: 13px; } code { font-size: 12px; overflow-wrap: anywhere; }
dialog { width: 95vw; height: 95vh; overflow: auto; border: 1px solid #333; }
dialog img { width: 100%; cursor: zoom-out; }
@media print { figure img { width: 100%; } details { display: none; } }
"""
SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  table.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)], difference = x - y;
      return (Number.isNaN(difference) ? x.localeCompare(y) : difference) * (down ? -1 : 1);
    });
    table.tBodies[0].append(...rows);
  }));
}
const dialog = document.querySelector("dialog"), large = dialog.querySelector("img");
for (const image of document.querySelectorAll("figure img"))
  image.addEventListener("click", () => { large.src = image.src; large.style.width = "100%"; dialog.showModal(); });
dialog.addEventListener("click", () => dialog.close());
dialog.addEventListener("wheel", event => {
  event.preventDefault();
  const width = parseFloat(large.style.width) * (event.deltaY < 0 ? 1.15 : 1 / 1.15);
  large.style.width = Math.min(Math.max(width, 50), 800) + "%";
}, { passive: false });
"""


def report(store: Store, baseline: str | None = None, convention: str | None = None) -> str:
    """The page. Raises ValueError if no arm can be compared."""
    answer = answers(store, baseline, convention)
    found, law, notes = answer.found, answer.law, answer.notes
    options = ["--baseline", found[0].baseline, "--convention", found[0].convention]
    command = shlex.join(["dynconv", "table", str(store.path), *options])
    parts = [
        f"<h1>Compute advantage over {escape(found[0].baseline)}</h1>",
        *(f"<p>{_sentence(item)}</p>" for item in found if not item.status.startswith("not resolved")),
        _table("multipliers", *answer_cells(found, numbered_notes(found))),
        _table("checks", *check_cells(found)),
        f'<p class="note">FLOPs counted as {escape(found[0].convention)}; 95% intervals; paired by size and seed. '
        f"Command: <code>{escape(command)}</code></p>",
        _left_out(found, [*notes, *store.problems]),
        *(_figure(name, figure) for name, figure in draw(store, answer).items()),
    ]
    if law is not None:
        certificate = ", ".join(f"{name} {short(value)}" for name, value in law.certificate.items())
        parts += [
            "<h2>The law of loss in compute</h2>",
            _table("law", *fit_cells(law)),
            f'<p class="note">Status: {escape(law.status)}. {escape(certificate)}.</p>',
        ]
    parts += ["<h2>Provenance</h2>", _provenance(store.runs), "<h2>Runs</h2>", _run_table(store.runs)]
    head = f'<meta charset="utf-8"><title>{escape(store.path.name)}: compute advantage</title><style>{STYLE}</style>'
    body = "\n".join([*parts, '<dialog><img alt="the figure, enlarged"></dialog>', f"<script>{SCRIPT}</script>"])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _sentence(item: Multiplier) -> str:
    interval = f" (95% interval {interval_text(item.ci)})" if item.ci else ""
    remark = "" if item.status == "ok" else f" Note: {item.status}."
    return escape(
        f"{item.arm} has a {item.m:.2f}x compute advantage{interval}, from {item.n_sizes} sizes with {item.n_seeds} "
        f"seed{'s' if item.n_seeds > 1 else ''} each.{remark}"
    )


def _left_out(found: Sequence[Multiplier], notes: Sequence[str]) -> str:
    rows = {f"{item.run_id}: {item.reason}": None for answer in found for item in answer.excluded}
    lines = [*notes, *rows]
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<details><summary>{len(lines)} left out or without an answer</summary><ul>{items}</ul></details>"


def _figure(name: str, figure: Figure) -> str:
    svg = io.BytesIO()
    write(figure, svg, "svg")
    data = base64.b64encode(svg.getvalue()).decode()
    caption = escape(CAPTIONS[name])
    return (
        f'<figure id="{name}"><img alt="{caption}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{caption} (click to enlarge, wheel to zoom)</figcaption></figure>"
    )


def _provenance(runs: pd.DataFrame) -> str:
    """What the finished runs ran on and from; more than one value of a thing is shown with its count."""
    done = runs[runs["status"] == "complete"]
    rows = [["finished runs", f"{len(done)} of {len(runs)}"]]
    for name in PROVENANCE:
        counts = done[name].value_counts(dropna=False, sort=False)
        text = "; ".join(
            f"{short(value)}{f' ({count} runs)' if len(counts) > 1 else ''}" for value, count in counts.items()
        )
        rows.append([name, text])
    return _table("provenance", ["what", "value"], rows)


def _run_table(runs: pd.DataFrame) -> str:
    rows = [[short(value) for value in row] for row in runs[list(RUN_COLUMNS)].itertuples(index=False)]
    return _table("runs", RUN_COLUMNS, rows)


def _table(name: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table id="{name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: Cell) -> str:
    """Numbers sort as numbers, what does not exist last."""
    text = NONE if cell is None else cell
    try:
        value = "Infinity" if text == NONE else repr(float(text))
    except ValueError:
        return f"<td>{escape(text)}</td>"
    return f'<td class="number" data-value="{value}">{escape(text)}</td>'
