"""What figures share: the marks of arms, ticks, labels beside curves, and how a figure becomes a file.

Colours are those of Okabe and Ito, which colour-blind readers can distinguish; markers and dashes distinguish arms in
grey print. The baseline is black, with round markers and solid lines.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter, StrMethodFormatter

from analysis.logs.columns import loss_unit
from analysis.logs.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

LOSS = "held-out loss (nats/token)"  # for runs from logs; `loss_label` has the unit of any run table
MANY = 8  # more arms than this get a panel each, since more colours are hard to distinguish
BLACK = "#000000"
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = ("s", "^", "D", "v", "P", "X", "<", "h")  # as many as have no factor in common with the colours
DASHES = ("--", "-.", (0, (1, 1)), (0, (7, 2)), (0, (3, 1, 1, 1, 1, 1)))
BUDGETS = (
    "#46327E",
    "#365C8D",
    "#277F8E",
    "#1FA187",
    "#4AC16D",
    "#A0C52C",
)  # small to large: viridis, without its ends
PALE = "0.78"
HATCHES = ("", "//", "..", "xx", "--", "oo")
STYLE: Any = {  # matplotlib types the keys as a union of literals
    "font.family": "DejaVu Sans",  # matplotlib brings it along
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "figure.dpi": 150,
    "svg.hashsalt": "dynconv",  # else the ids in an SVG are random
    "path.simplify": False,
}
NARROW = 1.01  # a log axis that spans less is widened
STEPS = (tuple(range(1, 10)), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,))  # tick labels in a decade, densest first
LABEL = (0.7, 0.2)  # inches that a tick's label takes, across and down
METADATA: Any = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}


@dataclass(frozen=True)
class Mark:
    """How one arm is drawn everywhere."""

    colour: str
    marker: str
    dash: Any  # as matplotlib's linestyle

    def line(self, **changes: Any) -> dict[str, Any]:
        return {"color": self.colour, "ls": self.dash, "lw": 1.2} | changes

    def dots(self, **changes: Any) -> dict[str, Any]:
        """How an arm's points are drawn; the baseline's are hollow, so that others remain visible under them."""
        face = "none" if self.marker == "o" else self.colour
        return {"color": self.colour, "marker": self.marker, "ls": "", "ms": 4.5, "mfc": face} | changes


def loss_label(runs: pd.DataFrame) -> str:
    """The axis of a run table's loss, in its own unit."""
    return f"held-out loss ({loss_unit(runs)})"


def budget_shades(count: int = 64) -> list[str]:
    """The colour scale of budgets, small to large, as #rrggbb."""
    scale = LinearSegmentedColormap.from_list("budgets", BUDGETS)
    return [to_hex(colour) for colour in scale(np.linspace(0, 1, count))]


def printable(name: object, longest: int = 28) -> str:
    """A name as matplotlib can draw it: at most `longest` characters, all in the font, not read as mathematics, and not
    hidden from legends as names with a leading underscore are. Long names lose their middle, since those of arms and
    runs mostly differ at the end."""
    font = get_font(findfont(STYLE["font.family"]))
    text = str(name)
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[longest // 2 - longest + 1 :]}"
    text = "".join(char if font.get_char_index(ord(char)) else "?" for char in text)
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def by_name(arms: Iterable[str]) -> list[str]:
    """Arms in the order of their names, rank-8 before rank-16."""
    return sorted(arms, key=lambda arm: re.sub(r"\d+", lambda digits: digits[0].zfill(9), arm))


def marks(arms: Sequence[str], baseline: str) -> dict[str, Mark]:
    """The mark of each arm: the baseline's first, then the others in the order of their names. Up to 56 arms have
    marks that all differ."""
    others = enumerate(by_name(set(arms) - {baseline}))
    cycle = {arm: Mark(_of(COLOURS, i), _of(MARKERS, i), _of(DASHES, i)) for i, arm in others}
    return {baseline: Mark(BLACK, "o", "-"), **cycle}


def _of(choices: Sequence[Any], place: int) -> Any:
    return choices[place % len(choices)]


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the path's suffix. Raises ValueError for an unknown one."""
    kind = path.suffix.lstrip(".")
    if kind not in METADATA:
        raise ValueError(f"{path}: figures are written as {', '.join(METADATA)}")
    write_atomically(path, lambda temporary: write(figure, temporary, kind))


def write(figure: Figure, target: Path | BytesIO, kind: str, dpi: int = 200) -> None:
    """Write a figure as svg, pdf or png, without a date, so that equal figures are equal bytes."""
    with mpl.rc_context(STYLE):
        figure.savefig(target, format=kind, metadata=METADATA[kind], dpi=dpi)


def settled(figure: Figure) -> Figure:
    """Fix the layout of the figure; otherwise each save would compute it again, with slightly different results."""
    with mpl.rc_context(STYLE):
        figure.draw_without_rendering()
        for axes in figure.axes:
            box = axes.get_window_extent()
            for axis, length, label in ((axes.xaxis, box.width, LABEL[0]), (axes.yaxis, box.height, LABEL[1])):
                if axis.get_scale() == "log":
                    _space_ticks(axis, length / figure.dpi / label)
        figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def _space_ticks(axis: Axis, room: float) -> None:
    """At most `room` tick labels, as plain numbers where these are short; matplotlib's default labels overlap."""
    low, high = axis.get_view_interval()
    if high / low < NARROW:  # runs of matched compute alone; matplotlib would label its sixth digit, over and over
        low, high = low / math.sqrt(10), high * math.sqrt(10)
        axis.set_view_interval(low, high, ignore=True)
    closest = math.log10(high / low) / room  # of two labels, in decades
    steps = next((steps for steps in STEPS if _closest(steps, low, high) >= closest), STEPS[-1])
    axis.set_major_locator(LogLocator(subs=steps))
    powers = LogFormatterSciNotation(minor_thresholds=(math.inf, math.inf))
    axis.set_major_formatter(StrMethodFormatter("{x:g}") if low > 1e-3 and high < 1e5 else powers)
    axis.set_minor_formatter(NullFormatter())


def _closest(steps: Sequence[int], low: float, high: float) -> float:
    """Decades between the two nearest ticks of a log axis; infinite where it has fewer."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [math.log10(step) + decade for decade in decades for step in steps]
    shown = [tick for tick in ticks if math.log10(low) <= tick <= math.log10(high)]
    return min((after - before for before, after in itertools.pairwise(shown)), default=math.inf)


def grid_of_panels(titles: Sequence[str], x_label: str, y_label: str) -> tuple[Figure, list[Axes]]:
    """Small multiples: a panel for each title, all with the same axes, in a nearly square grid.

    Placed by hand: matplotlib's constrained layout takes a second for each ten panels.
    """
    across = min(max(3, math.ceil(math.sqrt(1.2 * len(titles)))), len(titles))
    down = math.ceil(len(titles) / across)
    width, height = 0.75 + 1.45 * across, 0.9 + 1.3 * down
    figure = Figure(figsize=(width, height))
    panels = list(np.ravel(figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)))
    edges = {"left": 0.7 / width, "right": 1 - 0.1 / width, "bottom": 0.5 / height, "top": 1 - 0.4 / height}
    figure.subplots_adjust(**edges, wspace=0.08, hspace=0.25)
    for axes, title in zip(panels, titles, strict=False):
        axes.set_title(printable(title, 22), loc="left", fontsize=7, pad=2)
        axes.tick_params(labelsize=6)
    for axes in panels[len(titles) :]:
        axes.remove()
    for axes in panels[max(len(titles) - across, 0) : len(titles)]:
        axes.tick_params(labelbottom=True)  # the last panel of a column that has one fewer
    figure.text((edges["left"] + edges["right"]) / 2, 0.08 / height, x_label, ha="center", fontsize=9)
    figure.text(0.08 / width, 0.5, y_label, va="center", rotation=90, fontsize=9)
    return figure, panels[: len(titles)]


Curve = tuple[Any, Any]  # x and y, each [points]


def arm_panels(
    curves: Mapping[str, Curve],
    dots: Mapping[str, Curve],
    baseline: str,
    labels: tuple[str, str],
    advantages: Mapping[str, str],
) -> tuple[Figure, dict[str, Axes]]:
    """A panel for each arm but the baseline, with a logarithmic x axis: the arm in colour, the baseline in black, the
    other arms pale in the background. `advantages` are texts by arm, written into the arm's panel."""
    arms = [arm for arm in by_name(curves) if arm != baseline]
    black = f"; black: {printable(baseline)}" if baseline in curves else ""
    figure, panels = grid_of_panels(arms, labels[0] + black, labels[1])
    panels[0].set_xscale("log")
    for at, (arm, axes) in enumerate(zip(arms, panels, strict=True)):
        others = [curves[other] for other in arms if other != arm]
        pale = [np.concatenate([np.append(curve[axis], np.nan) for curve in others]) for axis in (0, 1)]
        axes.plot(*pale, color=PALE, lw=0.5, zorder=1)
        for name, colour in ((baseline, BLACK), (arm, _of(COLOURS, at))):
            if name in curves:
                axes.plot(*curves[name], color=colour, lw=1.1, zorder=3)
            if name in dots:
                axes.plot(*dots[name], "o", ms=2, color=colour, mew=0, zorder=3)
        text: Any = {"transform": axes.transAxes, "fontsize": 6, "va": "top", "ha": "right", "zorder": 4}
        axes.text(0.98, 0.97, advantages.get(arm, ""), **text)
    return figure, dict(zip(arms, panels, strict=True))


def label_ends(axes: Axes, labels: Sequence[tuple[float, str, Mark]]) -> None:
    """Label curves to the right of the axes, given (height, text, mark); labels that would overlap are moved apart."""
    low, high = axes.get_ylim()
    labels = sorted(labels, key=lambda label: label[0])
    line = 0.045 * (high - low)
    half = [line * (1 + text.count("\n")) / 2 + 0.2 * line for _, text, _ in labels]
    at = [y for y, _, _ in labels]
    for _ in range(50):  # neighbours that overlap push each other apart by equal parts
        for i in range(len(at) - 1):
            overlap = at[i] + half[i] + half[i + 1] - at[i + 1]
            if overlap > 0:
                at[i], at[i + 1] = at[i] - overlap / 2, at[i + 1] + overlap / 2
    beyond = max(low + half[0] - at[0], 0) or min(high - half[-1] - at[-1], 0)
    for y, (_, text, mark) in zip(at, labels, strict=True):
        place: Any = {"transform": axes.get_yaxis_transform(), "clip_on": False}
        axes.plot(1.035, y + beyond, **mark.dots(), **place)
        axes.text(1.06, y + beyond, text, fontsize=8, va="center", **place)
    axes.set_ylim(low, high)
