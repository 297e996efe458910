"""Figures, returned and not written; `save` writes one so that the same input gives the same bytes.

Colours are Okabe and Ito's, told apart by the colour-blind and, with the markers, in grey print. The baseline is black.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from analysis.intervals import band
from analysis.powerlaw import Fit
from analysis.runlog import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.multiplier import Multiplier

BLACK = "#000000"
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = ("s", "^", "D", "v", "P", "X", "<")
STYLE: Any = {  # matplotlib types the keys as a union of literals
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelsize": 9,
    "figure.dpi": 150,
    "savefig.dpi": 200,
    "svg.hashsalt": "dynconv",  # else the ids in an SVG are random
    "path.simplify": False,
}


def save(figure: Figure, path: Path) -> None:
    """Write a figure as path's suffix says, without a date, so that equal figures are equal files."""
    kind = path.suffix.lstrip(".")
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}
    if kind not in metadata:
        raise ValueError(f"{path}: figures are written as {', '.join(metadata)}")
    with mpl.rc_context(STYLE):
        write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind, metadata=metadata[kind]))


def loss_against_compute(law: Fit, multipliers: Sequence[Multiplier], convention: str) -> Figure:
    """Loss of every run against training FLOPs, the law of each arm with its 95% band, and the residuals below."""
    if law.form != "c":
        raise ValueError(f"loss against compute needs a law in C; got form {law.form}")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 5.6), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        compute = law.points.x["C"]
        grid = np.geomspace(compute.min(), compute.max(), 100)
        styles = arm_styles(law.points.arm, law.points.baseline)
        answers = {item.arm: item for item in multipliers}
        labels = []
        for arm, (colour, marker) in styles.items():
            mine = np.array([name == arm for name in law.points.arm])
            curve = law.predict({"C": grid}, arm)
            top.plot(grid, curve, color=colour, lw=1.2)
            if law.draws is not None:
                top.fill_between(grid, *band(law, {"C": grid}, arm), color=colour, alpha=0.15, lw=0)
            dots = {"color": colour, "marker": marker, "ls": "", "ms": 4.5, "mfc": "none" if marker == "o" else colour}
            top.plot(compute[mine], law.points.loss[mine], **dots)
            expected = law.predict({"C": compute[mine]}, arm)
            bottom.plot(compute[mine], 100 * np.log(law.points.loss[mine] / expected), **dots)
            labels.append((float(curve[-1]), f"{arm}{_advantage(answers.get(arm))}", colour))
        bottom.axhline(0, color=BLACK, lw=0.6)
        top.set(xscale="log", ylabel="held-out loss (nats/token)")
        bottom.set(xlabel=f"training FLOPs ({convention})", ylabel="residual (%)")
        _label_ends(top, float(compute.max()), labels)
        top.set_title(f"E = {law.parameter('E', law.points.baseline):.3f}, shared; bands: 95%", fontsize=8, loc="left")
    return figure


def local_multipliers(multipliers: Sequence[Multiplier]) -> Figure:
    """m at each size against compute, and the headline's interval as a band."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        styles = arm_styles([multipliers[0].baseline, *(item.arm for item in multipliers)], multipliers[0].baseline)
        labels = []
        for item in multipliers:
            colour, marker = styles[item.arm]
            compute = np.array([row["compute_baseline"] for row in item.local])
            values = np.array([row["m"] for row in item.local])
            axes.plot(compute, values, color=colour, marker=marker, ms=4.5, lw=0.8, ls=":")
            line = np.array([[point.m, *(point.ci or (math.nan, math.nan))] for point in item.curve])
            if len(line):
                grid = np.array([point.compute for point in item.curve])
                axes.plot(grid, line[:, 0], color=colour, lw=1.2)
                axes.fill_between(grid, line[:, 1], line[:, 2], color=colour, alpha=0.15, lw=0)
            labels.append((float(values[-1]), f"{item.arm}{_advantage(item)}", colour))
        axes.axhline(1, color=BLACK, lw=0.6)
        axes.set(xscale="log", xlabel=f"training FLOPs ({multipliers[0].convention})", ylabel="compute multiplier m")
        _label_ends(axes, float(compute.max()), labels)
    return figure


def forest(multipliers: Sequence[Multiplier]) -> Figure:
    """Every arm's m with its interval, one a row; hollow where not resolved."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.9 + 0.34 * len(multipliers)), layout="constrained")
        axes = figure.subplots()
        for row, item in enumerate(reversed(multipliers)):
            hollow = item.status.startswith("not resolved")
            if item.ci:
                axes.plot(item.ci, (row, row), color=BLACK, lw=1.2)
            axes.plot(item.m, row, "o", color=BLACK, mfc="white" if hollow else BLACK, ms=5)
        axes.axvline(1, color=BLACK, lw=0.6, ls=":")
        axes.set_yticks(range(len(multipliers)), [item.arm for item in reversed(multipliers)])
        axes.set(xlabel=f"compute multiplier m over {multipliers[0].baseline} (95%; hollow: not resolved)")
        axes.set_ylim(-0.6, len(multipliers) - 0.4)
    return figure


def arm_styles(arms: Sequence[str], baseline: str) -> dict[str, tuple[str, str]]:
    """Colour and marker of each arm, baseline first, the others by name."""
    others = sorted(set(arms) - {baseline})
    marks = {arm: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, arm in enumerate(others)}
    return {baseline: (BLACK, "o"), **marks}


def _advantage(item: Multiplier | None) -> str:
    if item is None:
        return ""
    interval = f" [{item.ci[0]:.2f}, {item.ci[1]:.2f}]" if item.ci else ""
    return f"\n{item.m:.2f}x{interval}"


def _label_ends(axes: Axes, x: float, labels: Sequence[tuple[float, str, str]]) -> None:
    """Name the curves at their right ends, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = 0.052 * (high - low)
    at = -math.inf
    for y, text, colour in sorted(labels):
        lines = 1 + text.count("\n")
        at = max(y - gap * (lines - 1) / 2, at + gap)
        axes.annotate(
            text,
            (x, y),
            xytext=(x * 1.12, at + gap * (lines - 1) / 2),
            textcoords="data",
            color=colour,
            fontsize=8,
            va="center",
            annotation_clip=False,
        )
        at += gap * (lines - 1)
