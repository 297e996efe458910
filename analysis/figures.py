"""Figures, returned and not written; `save` writes one, so that the same input gives the same bytes.

Colours are Okabe and Ito's, told apart by the colour-blind and, with the markers, in grey print. The baseline is black.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter

from analysis.intervals import band
from analysis.powerlaw import Fit
from analysis.runlog import write_atomically

if TYPE_CHECKING:
    import pandas as pd
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


METADATA: Any = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}


def save(figure: Figure, path: Path) -> None:
    """Write a figure as path's suffix says."""
    kind = path.suffix.lstrip(".")
    if kind not in METADATA:
        raise ValueError(f"{path}: figures are written as {', '.join(METADATA)}")
    write_atomically(path, lambda temporary: write(figure, temporary, kind))


def write(figure: Figure, target: Path | BytesIO, kind: str) -> None:
    """Write a figure as svg, pdf or png, without a date, so that equal figures are equal bytes."""
    with mpl.rc_context(STYLE):
        figure.savefig(target, format=kind, metadata=METADATA[kind])


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
        for item in multipliers:
            if item.status == "ok":
                _draw_gap(top, law, item, styles[item.arm][0])
        _label_ends(top, labels)
        delta = law.loss.delta
        loss = "least squares" if delta is None else f"Huber, delta {delta:g}"  # `dynconv fit` may use the other one
        floor = law.parameter("E", law.points.baseline)
        top.set_title(f"E = {floor:.3f}, shared, by {loss}; bands: 95%", fontsize=8, loc="left")
    return _settled(figure)


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
            labels.append((float(line[-1, 0] if len(line) else values[-1]), f"{item.arm}{_advantage(item)}", colour))
        measured = max(row["compute_baseline"] for item in multipliers for row in item.local)
        right = max([point.compute for item in multipliers for point in item.curve], default=measured)
        axes.axvspan(measured, right, color="0.93", lw=0, zorder=0)
        axes.axhline(1, color=BLACK, lw=0.6)
        axes.set(xscale="log", xlabel=f"training FLOPs ({multipliers[0].convention})", ylabel="compute multiplier m")
        axes.set_title("dots: each size; grey: extrapolated", fontsize=8, loc="left")
        _label_ends(axes, labels)
    return _settled(figure)


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
    return _settled(figure)


def loss_curves(evals: pd.DataFrame, runs: pd.DataFrame) -> Figure:
    """Held-out loss of every run against its tokens, a panel for each size; colours by arm."""
    sizes = list(dict.fromkeys(runs.sort_values("flops_exact")["size"]))
    curves = evals.merge(runs[["run_id", "arm", "size", "baseline"]], on="run_id").sort_values(["run_id", "step"])
    styles = arm_styles(list(runs["arm"]), str(runs["baseline"].iloc[0]))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.2 + 2.0 * len(sizes), 2.8), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(sizes)))
        for axes, size in zip(panels, sizes, strict=True):
            for (arm, _), rows in curves[curves["size"] == size].groupby(["arm", "run_id"], sort=True):
                axes.plot(rows["tokens"], rows["loss"], color=styles[arm][0], lw=0.9, marker=".", ms=3)
            axes.set(xlabel="training tokens", title=str(size))
            axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
        panels[0].set_ylabel("held-out loss (nats/token)")
        lines = [Line2D([], [], color=colour, label=arm) for arm, (colour, _) in styles.items()]
        figure.legend(handles=lines, loc="outside right upper", frameon=False, fontsize=8)
    return _settled(figure)


def wall_clock(runs: pd.DataFrame) -> Figure:
    """Loss against measured device hours of training, beside loss against FLOPs."""
    styles = arm_styles(list(runs["arm"]), str(runs["baseline"].iloc[0]))
    devices = runs["gpus"].astype(float).clip(lower=1)
    axes_of = {
        "training FLOPs (exact)": runs["flops_exact"],
        "measured training (device hours)": runs["train_seconds"] / 3600 * devices,
    }
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.0), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (label, cost) in zip(panels, axes_of.items(), strict=True):
            for arm, (colour, marker) in styles.items():
                mine = runs["arm"] == arm
                axes.plot(cost[mine], runs["loss"][mine], marker, color=colour, ms=4, mfc="none", label=arm)
            axes.set(xscale="log", xlabel=label)
        panels[0].set_ylabel("held-out loss (nats/token)")
        panels[1].legend(frameon=False, fontsize=8)
    return _settled(figure)


def ablation_panels(rows: pd.DataFrame, baseline_loss: float) -> Figure:
    """A panel for each `panel` of the rows: loss by `setting`, in the order given, with the baseline's as a line."""
    with mpl.rc_context(STYLE):
        groups = list(rows.groupby("panel", sort=False))
        figure = Figure(figsize=(1.0 + 1.7 * len(groups), 2.6), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(groups), sharey=True))
        for axes, (name, part) in zip(panels, groups, strict=True):
            axes.plot(range(len(part)), part["loss"], "o-", color=COLOURS[1], ms=4, lw=1)
            axes.axhline(baseline_loss, color=BLACK, lw=0.8, ls=":")
            axes.set_xticks(range(len(part)), list(part["setting"]), fontsize=7)
            axes.set_xlabel(name)
        panels[0].set_ylabel("held-out loss (nats/token)")
        panels[0].annotate("baseline", (0, baseline_loss), xytext=(0, 2), textcoords="offset points", fontsize=7)
    return _settled(figure)


def kernel_bars(rows: pd.DataFrame) -> Figure:
    """Milliseconds (`value`) of each `system`, a bar for each `setting` of it."""
    with mpl.rc_context(STYLE):
        systems, settings = list(dict.fromkeys(rows["system"])), list(dict.fromkeys(rows["setting"]))
        figure = Figure(figsize=(6.4, 0.8 + 0.42 * len(systems)), layout="constrained")
        axes = figure.subplots()
        height = 0.8 / len(settings)
        for i, setting in enumerate(settings):
            part = rows[rows["setting"] == setting].set_index("system")["value"].reindex(systems)
            at = np.arange(len(systems)) + (i - (len(settings) - 1) / 2) * height
            bars = axes.barh(at, part.to_numpy(float), height, color=COLOURS[i], label=setting)
            axes.bar_label(bars, ["" if np.isnan(v) else f"{v:.3f}" for v in part], fontsize=7, padding=2)
        axes.set_yticks(range(len(systems)), systems)
        axes.invert_yaxis()
        axes.set_xlabel("forward and backward (ms)")
        axes.legend(frameon=False, fontsize=8)
    return _settled(figure)


def arm_styles(arms: Sequence[str], baseline: str) -> dict[str, tuple[str, str]]:
    """Colour and marker of each arm, baseline first, the others by name."""
    others = sorted(set(arms) - {baseline})
    marks = {arm: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, arm in enumerate(others)}
    return {baseline: (BLACK, "o"), **marks}


def _space_ticks(axes: Axes) -> None:
    """Labels at 1 and 3 of each decade, or at 1 alone where there are many: matplotlib's own run into one another."""
    low, high = axes.get_xlim()
    steps = (1.0, 3.0) if high / low < 3e3 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(math.inf, math.inf)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _settled(figure: Figure) -> Figure:
    """Lay the figure out once and for all: each saving would lay it out anew, a little differently."""
    for axes in figure.axes:
        if axes.get_xscale() == "log":
            _space_ticks(axes)
    with mpl.rc_context(STYLE):
        figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def _advantage(item: Multiplier | None) -> str:
    if item is None:
        return ""
    m, *ends = (f"{value:.2f}" if value < 100 else f"{value:.0g}" for value in (item.m, *(item.ci or ())))
    return f"\n{m}x{f' [{ends[0]}, {ends[1]}]' if ends else ''}"


def _draw_gap(axes: Axes, law: Fit, item: Multiplier, colour: str) -> None:
    """The multiplier as what it is: how much more compute the baseline needs for the arm's loss at the largest size."""
    start = item.local[-1]["compute"]
    end = start * item.m
    level = float(law.predict({"C": np.array([start])}, item.arm)[0])
    beyond = np.geomspace(item.local[-1]["compute_baseline"], max(end, start), 20)
    axes.plot(beyond, law.predict({"C": beyond}, item.baseline), color=BLACK, lw=0.9, ls=":")
    axes.annotate("", (end, level), (start, level), arrowprops={"arrowstyle": "<->", "color": colour, "lw": 0.9})


def _label_ends(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Name the curves to the right of the axes, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    line = 0.045 * (high - low)
    half = [line * (1 + text.count("\n")) / 2 + 0.2 * line for _, text, _ in sorted(labels)]
    at = [y for y, _, _ in sorted(labels)]
    for _ in range(50):  # neighbours that overlap push each other apart by equal parts
        for i in range(len(at) - 1):
            overlap = at[i] + half[i] + half[i + 1] - at[i + 1]
            if overlap > 0:
                at[i], at[i + 1] = at[i] - overlap / 2, at[i + 1] + overlap / 2
    for y, (_, text, colour) in zip(at, sorted(labels), strict=True):
        axes.text(1.02, y, text, transform=axes.get_yaxis_transform(), color=colour, fontsize=8, va="center")
