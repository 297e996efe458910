"""The HTML of a report: one file that loads nothing from the network, with sortable tables and charts."""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from io import BytesIO
from typing import TYPE_CHECKING

from analysis.pages.style import BLACK, Mark, write
from analysis.pages.tables import NONE, Cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONG = 40  # characters, from which a cell's text is broken into lines
LARGEST_SVG = 250_000  # bytes; a larger figure is embedded as PNG, so that the page stays small
SHOWN_BY_CHARTS = ("isoflop-growth",)  # figures without charts whose content the charts of another figure show
SCREEN = 110  # dots per inch of such a PNG
SHAPES = {  # markers of style.MARKERS as SVG paths around the origin
    "o": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
    "s": "M-4 -4h8v8h-8z",
    "^": "M0 -5L5 4H-5z",
    "D": "M0 -5.5L5.5 0L0 5.5L-5.5 0z",
    "v": "M0 5L5 -4H-5z",
    "P": "M0 -6L1.5 -2H5.5L2.3 .7L3.5 5L0 2.4L-3.5 5L-2.3 .7L-5.5 -2H-1.5z",
    "X": "M-4 -4h8v8h-8zM-4 -4l8 8M4 -4l-8 8",
    "<": "M-5 0L-2.5 -4.3H2.5L5 0L2.5 4.3H-2.5z",
    "h": "M-4.5 -4.5Q0 -1.5 4.5 -4.5Q1.5 0 4.5 4.5Q0 1.5 -4.5 4.5Q-1.5 0 -4.5 -4.5z",
}


@dataclass(frozen=True)
class Link:
    """A number that links to its source; `to` is the HTML id of that place in the page."""

    text: str
    to: str

    def html(self) -> str:
        return f"<a href=#{self.to}>{escape(self.text)}</a>"


def page(title: str, parts: Sequence[str], charts: str | None) -> str:
    """The whole document; `parts` are HTML, `charts` JSON for Bokeh.

    A content security policy allows only the page's own scripts, by their hashes, and no network access. So a name in
    the data could do no harm even if it were not escaped.
    """
    own = files("analysis.pages")
    script = own.joinpath("page.js").read_text(encoding="utf-8")
    packed = {"library": _bokeh(), "charts": charts} if charts else {}
    hashes = " ".join(_hash(text) for text in (script, *([packed["library"]] if packed else [])))
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'"
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}; form-action \'none\'">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{own.joinpath('page.css').read_text(encoding='utf-8')}</style>"
    )
    data = [f'<script type="text/plain" id="{name}">{_packed(text)}</script>' for name, text in packed.items()]
    body = "\n".join([*parts, *data, f"<script>{script}</script>"])
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _bokeh() -> str:
    """The charting library's core, as its package ships it."""
    from bokeh.resources import Resources

    return "\n".join(Resources(mode="inline", components=["bokeh"], log_level="error").js_raw)


def _hash(text: str) -> str:
    """The hash of a script, as a content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _packed(text: str) -> str:
    """Compressed text, which the page's script unpacks. The library shrinks to a third, the charts to a tenth."""
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def table(
    name: str, columns: Sequence[str], rows: Iterable[Sequence[Cell | Link]], ids: Sequence[str] | None = None
) -> str:
    """A table that is sorted by a click on a column's head; `ids` are the HTML ids of its rows, to link to."""
    head = "".join(f"<th><button type=button>{escape(column)}</button></th>" for column in columns)
    lines = []
    for place, row in enumerate(rows):
        name_of_row = f" id={ids[place]}" if ids else ""
        lines.append(f"<tr{name_of_row}>{''.join(map(_cell, row))}</tr>")
    body = "\n".join(lines)
    return f'<div class="scroll"><table id="{name}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: Cell | Link) -> str:
    """A table cell with its sort key: numbers sort as numbers, intervals by their lower end, missing values last."""
    text = NONE if cell is None else cell.text if isinstance(cell, Link) else cell
    html = cell.html() if isinstance(cell, Link) else escape(text)
    first = text.removeprefix("[").partition(",")[0]
    try:
        value = "Infinity" if text == NONE else repr(float(first))
    except ValueError:
        return f'<td class="long">{html}</td>' if len(text) > LONG else f"<td>{html}</td>"
    return f"<td>{html}</td>" if text == first else f'<td data-value="{value}">{html}</td>'


def chips(mark_of: Mapping[str, Mark]) -> str:
    """The legend of all charts: a button for each arm, in the order of `mark_of`, which shows or hides the arm."""
    buttons = "".join(
        f'<button type=button data-arm="{place}" aria-pressed="true" title="click: show or hide; twice: only this one">'
        f"{_shape(mark)}<span>{escape(arm)}</span></button>"
        for place, (arm, mark) in enumerate(mark_of.items())
    )
    both = '<button type=button data-all="1">all</button><button type=button data-all="0">none</button>'
    return f'<div class="chips" role=group aria-label="arms shown in the charts">{buttons}{both}</div>'


def _shape(mark: Mark) -> str:
    colour = "currentColor" if mark.colour == BLACK else mark.colour
    face = "none" if mark.marker == "o" else colour
    path = f'<path d="{SHAPES[mark.marker]}" fill="{face}" stroke="{colour}" stroke-width="1.3"/>'
    return f'<svg viewBox="-6 -6 12 12" aria-hidden="true">{path}</svg>'


def figure(name: str, title: str, caption: str, still: Figure, places: Sequence[str], extra: str) -> str:
    """A still figure, which the charts at `places` replace once a script has drawn them; `extra` is HTML above them.

    What has the class "still" is hidden then, what belongs to the charts before (page.css).
    """
    head = f"<h3>{escape(title)}</h3><figcaption>{escape(caption)}</figcaption>"
    if not places:
        replaced = ' class="still"' if name in SHOWN_BY_CHARTS else ""
        return f'<figure id="{name}"{replaced}>{head}{image(still, caption)}</figure>'
    plots = "".join(f'<div id="{place}"></div>' for place in places)
    wide = ' class="wide"' if len(places) > 1 and name != "loss-against-compute" else ""
    replaced = f'<div class="still">{image(still, caption)}</div>'
    return f'<figure id="{name}"{wide}>{head}{extra}{replaced}<div class="plots">{plots}</div></figure>'


def image(still: Figure, caption: str) -> str:
    """A figure as an embedded picture."""
    drawn, mime = BytesIO(), "svg+xml"
    write(still, drawn, "svg")
    if drawn.tell() > LARGEST_SVG:
        drawn, mime = BytesIO(), "png"
        write(still, drawn, "png", dpi=SCREEN)
    data = base64.b64encode(drawn.getvalue()).decode()
    return f'<img alt="{escape(caption)}" src="data:image/{mime};base64,{data}">'


def note(html: str) -> str:
    return f'<p class="note">{html}</p>'


def code(text: str) -> str:
    return f"<code>{escape(text)}</code>"
