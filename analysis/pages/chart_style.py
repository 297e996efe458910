"""What the report's charts share: their look, their tooltips and clicks, and their JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from bokeh.document import Document
from bokeh.models import (
    BasicTickFormatter,
    BoxZoomTool,
    FullscreenTool,
    HoverTool,
    LogTicker,
    NoOverlap,
    OpenURL,
    PanTool,
    ResetTool,
    SaveTool,
    Span,
    TapTool,
    Toolbar,
    WheelZoomTool,
)
from bokeh.plotting import figure

from analysis.pages import style
from analysis.pages.style import BLACK, Mark

Plot = Any  # bokeh.plotting.figure, whose glyph methods are made at run time and have no types
INK = "ink"  # tag of the baseline's glyphs, to which the page gives the colour of its text
GREY = "#888888"  # legible on a light and on a dark page, until the page's script sets the colours
SHAPES = {
    "o": "circle",
    "s": "square",
    "^": "triangle",
    "D": "diamond",
    "v": "inverted_triangle",
    "P": "star",
    "X": "square_x",
    "<": "hex",
    "h": "square_pin",
}
DASHES = ("dashed", "dashdot", "dotted", [7, 2], [3, 1, 1, 1, 1, 1])  # those of style.DASHES
FORMATS: dict[str, Any] = {  # how tick labels of a logarithmic axis are written
    "counts": {"precision": 1, "power_limit_high": 4},  # 2.0e+11: Bokeh's own writes 1.000e+11
    "time": {"power_limit_high": 6},
}
DIGITS = {  # number formats in tooltips
    "budget": "%.3e FLOPs",
    "tokens": "%.3e",
    "parameters": "%.3e",
    "m": "%.3f",
    "loss": "%.4f",
    "baseline's loss": "%.4f",
}


def plot(x_label: str, y_label: str, x: str = "counts", y: str = "linear", height: int = 340, **more: Any) -> Plot:
    """An empty plot as wide as its place in the page; it scrolls with the page and zooms only by its tools.

    Axes are "linear", or logarithmic: of "counts" (FLOPs, tokens, parameters) or of "time". More is Bokeh's.
    """
    tools = [PanTool(), BoxZoomTool(), WheelZoomTool(), ResetTool(), SaveTool(), FullscreenTool()]
    kinds = {"x_axis_type": "log" if x in FORMATS else "auto", "y_axis_type": "log" if y in FORMATS else "linear"}
    made: Plot = figure(
        height=height,
        sizing_mode="stretch_width",
        tools="",
        toolbar=Toolbar(tools=tools, logo=None, autohide=True, active_drag=None, active_scroll=None),
        toolbar_location="above",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        **kinds,
        **more,
    )
    made.xaxis.axis_label, made.yaxis.axis_label = x_label, y_label
    made.axis.axis_label_text_font_style = "normal"
    made.axis.minor_tick_line_color = None
    made.xgrid.visible = False
    for axis, kind in ((made.xaxis[0], x), (made.yaxis[0], y)):
        if kind in FORMATS:
            axis.ticker = LogTicker(mantissas=[1, 2, 5], desired_num_ticks=10)  # with few, none stand at the low end
            axis.formatter = BasicTickFormatter(**FORMATS[kind])
            axis.major_label_policy = NoOverlap()
    return made


def colour(mark: Mark) -> str:
    return GREY if mark.colour == BLACK else mark.colour


def dots(mark: Mark, size: float = 8) -> dict[str, Any]:
    """How an arm's runs are drawn; the baseline's markers are hollow, so that others remain visible under them."""
    return {
        "marker": SHAPES[mark.marker],
        "size": size,
        "line_color": colour(mark),
        "fill_color": colour(mark),
        "line_width": 1.2,
        "fill_alpha": 0.0 if mark.marker == "o" else 0.75,
        "nonselection_alpha": 0.35,
    }


def stroke(mark: Mark, width: float = 1.6) -> dict[str, Any]:
    """How an arm's lines are drawn."""
    dash = "solid" if mark.dash == "-" else DASHES[style.DASHES.index(mark.dash)]
    return {"line_color": colour(mark), "line_width": width, "line_dash": dash}


def rule(made: Plot, at: float, dimension: str = "width", dash: str = "solid") -> None:
    """A thin line across the plot."""
    made.add_layout(Span(location=at, dimension=dimension, line_color=GREY, line_width=1, line_dash=dash))


def answers_to_pointer(made: Plot, renderers: Sequence[Any], names: Sequence[str], leads: bool = True) -> None:
    """Show the columns `names` in a tooltip; a click goes to the row of the table of runs that column `row` names."""
    tips = [(name, f"@{{{name}}}{{{DIGITS[name]}}}" if name in DIGITS else f"@{{{name}}}") for name in names]
    formatters = {f"@{{{name}}}": "printf" for name in DIGITS}
    made.add_tools(HoverTool(renderers=list(renderers), tooltips=tips, formatters=formatters))
    if leads:
        to_row = OpenURL(url="#run-@row", same_tab=True)
        made.add_tools(
            TapTool(renderers=list(renderers), callback=to_row, mode="replace")
        )  # a second click leads there, too


def document(plots: Iterable[Plot]) -> tuple[str, list[str]]:
    """Plots as the JSON of one document, and the ids of its roots.

    Equal plots give equal text: Bokeh numbers models by how many the process has made, so they are numbered anew.
    """
    whole = Document(title="")
    for made in plots:
        whole.add_root(made)
    numbers: dict[str, str] = {}
    content = _renumbered(whole.to_json(deferred=False), numbers)
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text, [numbers[made.id] for made in whole.roots]


def _renumbered(value: Any, numbers: dict[str, str]) -> Any:
    """Data never stand under a key "id": Bokeh writes mappings as lists of entries."""
    if isinstance(value, dict):
        return {
            key: numbers.setdefault(item, f"m{len(numbers)}")
            if key == "id" and isinstance(item, str)
            else _renumbered(item, numbers)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_renumbered(item, numbers) for item in value]
    return value
