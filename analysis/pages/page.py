"""The HTML of a report: one file that needs no network, with tables that sort and figures that enlarge."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING

from analysis.pages.style import write
from analysis.pages.tables import NONE, Cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #111;
  background: #fff; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; margin-bottom: .3rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; margin: .6rem 0; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
td.long { white-space: normal; min-width: 15rem; } td.number { font-variant-numeric: tabular-nums; }
th { border-bottom: 2px solid #333; cursor: pointer; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid #0072b2; }
th[aria-sort=ascending]::after { content: " \\2191"; } th[aria-sort=descending]::after { content: " \\2193"; }
td a { color: inherit; text-decoration: underline dotted #777; text-underline-offset: 3px; }
:target { background: #fff3bf; scroll-margin-top: 1rem; }
figure { margin: 1.5rem 0; } figure button { all: unset; cursor: zoom-in; display: block; }
figure button:focus-visible { outline: 2px solid #0072b2; } figure img { max-width: 100%; width: 44rem; }
figcaption, .note { color: #444; font-size: 13px; max-width: 60rem; } code { font-size: 12px; }
dialog { width: 95vw; height: 95vh; overflow: auto; border: 1px solid #333; }
dialog img { width: 100%; cursor: zoom-out; }
@media print { figure img { width: 100%; } }
"""
SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  table.querySelectorAll("th").forEach((head, column) => head.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)], difference = x - y, missing = (x === "Infinity") - (y === "Infinity");
      const order = Number.isNaN(difference) ? x.localeCompare(y, undefined, {numeric: true}) : difference;
      return missing || order * (down ? -1 : 1);
    });
    table.tBodies[0].append(...rows);
  }));
}
const dialog = document.querySelector("dialog"), large = dialog.querySelector("img");
const zoom = factor => {
  const width = parseFloat(large.style.width) * factor;
  large.style.width = Math.min(Math.max(width, 50), 800) + "%";
};
for (const button of document.querySelectorAll("figure button"))
  button.addEventListener("click", () => {
    large.src = button.querySelector("img").src;
    large.style.width = "100%";
    dialog.showModal();
  });
dialog.addEventListener("click", () => dialog.close());
dialog.addEventListener("keydown", event => {
  if (event.key === "+" || event.key === "=") zoom(1.15);
  if (event.key === "-") zoom(1 / 1.15);
});
dialog.addEventListener("wheel", event => {
  event.preventDefault();
  zoom(event.deltaY < 0 ? 1.15 : 1 / 1.15);
}, { passive: false });
"""
LONG = 40  # characters, from which a cell's text is broken into lines


@dataclass(frozen=True)
class Link:
    """A number that leads to where it comes from, by the id of that place."""

    text: str
    to: str

    def html(self) -> str:
        return f"<a href=#{self.to}>{escape(self.text)}</a>"


def page(title: str, parts: Sequence[str]) -> str:
    """The whole document; `parts` are HTML."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    dialog = '<dialog aria-label="the figure, enlarged"><img alt="the figure, enlarged"></dialog>'
    body = "\n".join([*parts, dialog, f"<script>{SCRIPT}</script>"])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def table(
    name: str, columns: Sequence[str], rows: Iterable[Sequence[Cell | Link]], ids: Sequence[str] | None = None
) -> str:
    """A table whose heads sort it; `ids` names its rows, as places to link to."""
    head = "".join(f"<th><button type=button>{escape(column)}</button></th>" for column in columns)
    lines = []
    for place, row in enumerate(rows):
        name_of_row = f" id={ids[place]}" if ids else ""
        lines.append(f"<tr{name_of_row}>{''.join(map(_cell, row))}</tr>")
    body = "\n".join(lines)
    return f'<div class="scroll"><table id="{name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: Cell | Link) -> str:
    """Numbers sort as numbers, an interval by its lower end, what does not exist last."""
    text = NONE if cell is None else cell.text if isinstance(cell, Link) else cell
    html = cell.html() if isinstance(cell, Link) else escape(text)
    try:
        value = "Infinity" if text == NONE else repr(float(text.removeprefix("[").partition(",")[0]))
    except ValueError:
        return f'<td class="long">{html}</td>' if len(text) > LONG else f"<td>{html}</td>"
    return f'<td class="number" data-value="{value}">{html}</td>'


def figure(name: str, drawn: Figure, caption: str, note: str) -> str:
    """A figure as an embedded SVG, with what it shows and, as HTML, where it comes from."""
    svg = BytesIO()
    write(drawn, svg, "svg")
    data = base64.b64encode(svg.getvalue()).decode()
    image = f'<img alt="{escape(caption)}" src="data:image/svg+xml;base64,{data}">'
    return (
        f'<figure id="{name}"><button type=button aria-label="enlarge">{image}</button>'
        f"<figcaption>{escape(caption)} {note}</figcaption></figure>"
    )


def note(html: str) -> str:
    return f'<p class="note">{html}</p>'


def code(text: str) -> str:
    return f"<code>{escape(text)}</code>"
