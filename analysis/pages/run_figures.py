"""Figures of runs: final loss against cost, loss curves, and arms that differ in one fact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from analysis.pages.ablations import at_best_setting
from analysis.pages.style import (
    BLACK,
    BUDGETS,
    LOSS,
    MANY,
    STYLE,
    Mark,
    arm_panels,
    grid_of_panels,
    loss_label,
    marks,
    printable,
    settled,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))
ACROSS = 4  # names in a line of a legend


def loss_curves(evals: pd.DataFrame, runs: pd.DataFrame, baseline: str) -> Figure:
    """Held-out loss of every run against its tokens: a panel for each size, or for each arm where these are many."""
    sizes = list(dict.fromkeys(runs.sort_values("parameters")["size"]))
    curves = evals.merge(runs[["run_id", "arm", "size"]], on="run_id").sort_values(["run_id", "step"])
    mark_of = marks(list(runs["arm"]), baseline)
    if len(mark_of) > MANY:
        return _curves_by_arm(curves, sizes, list(mark_of))
    across = min(len(sizes), 3 if len(sizes) != 4 else 2)
    down = math.ceil(len(sizes) / across)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.4 + 2.3 * across, 0.2 + 2.2 * down + _legend_height(mark_of)), layout="constrained")
        panels = np.ravel(figure.subplots(down, across, squeeze=False))
        for axes, size in zip(panels, sizes, strict=False):
            for (arm, _), rows in curves[curves["size"] == size].groupby(["arm", "run_id"], sort=True):
                mark = mark_of[arm]
                axes.plot(rows["tokens"], rows["loss"], **mark.line(lw=0.9, marker=mark.marker, ms=3, mfc="none"))
            axes.set(title=printable(size))
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        for axes in panels[len(sizes) :]:
            axes.remove()
        figure.supxlabel("training tokens", fontsize=9)
        figure.supylabel(loss_label(runs), fontsize=9)
        _legend(figure, mark_of)
    return settled(figure)


def _curves_by_arm(curves: pd.DataFrame, sizes: Sequence[str], arms: Sequence[str]) -> Figure:
    """A panel for each arm. Sizes are shaded from dark to light, and the legend names them."""
    with mpl.rc_context(STYLE):
        figure, panels = grid_of_panels(arms, "training tokens", LOSS)
        shades = mpl.colors.LinearSegmentedColormap.from_list("sizes", BUDGETS)(np.linspace(0, 1, len(sizes)))
        for arm, axes in zip(arms, panels, strict=True):
            for size, shade in zip(sizes, shades, strict=True):
                mine = curves[(curves["arm"] == arm) & (curves["size"] == size) & (curves["tokens"] > 0)]
                for _, rows in mine.groupby("run_id", sort=True):
                    axes.plot(rows["tokens"], rows["loss"], color=shade, lw=0.8)
        panels[0].set_xscale("log")
        handles = [
            Line2D([], [], color=shade, label=printable(size)) for size, shade in zip(sizes, shades, strict=True)
        ]
        figure.legend(handles=handles, loc="upper left", ncols=8, fontsize=7)
    return settled(figure)


def loss_against(runs: pd.DataFrame, column: str, label: str, baseline: str) -> Figure:
    """Final loss of every run against its cost in `column` (compute, tokens or time); lines join the means of sizes, at
    the best setting of each where runs differ in learning rate or other axes.

    More than MANY arms have a panel each, with the baseline in black and the others pale in the background.
    """
    mark_of = marks(list(runs["arm"]), baseline)
    with mpl.rc_context(STYLE):
        if len(mark_of) > MANY:
            return settled(_spent_by_arm(runs, column, label, baseline))
        figure = Figure(figsize=(6.4, 3.6 + _legend_height(mark_of)), layout="constrained")
        axes, loss = figure.subplots(), loss_label(runs)
        _spent(axes, runs.assign(**{loss: runs["loss"], label: runs[column]}), label, loss, mark_of)
        axes.set_title(_what_lines_join(runs), loc="left")
        _legend(figure, mark_of)
    return settled(figure)


def time_of(runs: pd.DataFrame) -> tuple[pd.Series, str]:
    """Measured training time of each run over all its devices, in the largest unit that fits, and its label."""
    seconds = (runs["train_seconds"] * runs["gpus"].astype(float).fillna(1).clip(lower=1)).astype(float)
    unit, length = next(item for item in UNITS if seconds.max() >= item[1] or item[1] == 1)
    return seconds / length, f"measured training (device {unit})"


def wall_clock(runs: pd.DataFrame, column: str, convention: str, baseline: str) -> Figure:
    """What compute in `column` costs in measured training time, and what that time buys.

    Runs whose clocks cannot be compared are drawn, and the figure says how many they are.
    """
    (time, label), loss = time_of(runs), loss_label(runs)
    compute = f"training FLOPs ({convention})"
    table = runs.assign(**{compute: runs[column], label: time, loss: runs["loss"]})
    mark_of = marks(list(runs["arm"]), baseline)
    with mpl.rc_context(STYLE):
        if len(mark_of) > MANY:
            figure = _spent_by_arm(table, label, label, baseline)
            if shared := _shared_clocks(runs):
                figure.suptitle(shared)
            return settled(figure)
        figure = Figure(figsize=(6.4, 3.0 + _legend_height(mark_of)), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, (x, y) in zip(panels, [(compute, label), (label, loss)], strict=True):
            _spent(axes, table, x, y, mark_of)
        panels[0].set_yscale("log")
        devices = ", ".join(sorted(runs["device"].dropna().unique()))
        panels[0].set_title(f"on {printable(devices, 60)}" if devices else "", loc="left")
        panels[1].set_title("\n".join(filter(None, [_shared_clocks(runs), _what_lines_join(runs)])), loc="left")
        _legend(figure, mark_of)
    return settled(figure)


def _shared_clocks(runs: pd.DataFrame) -> str:
    """How many clocks were shared, or are of several kinds, as a title; empty if every run was alone on its device."""
    shared = int(runs["clock"].dropna().ne("alone").sum()) if "clock" in runs else 0
    return f"{shared} of {len(runs)} clocks shared or mixed" if shared else ""


def _spent(axes: Axes, table: pd.DataFrame, x: str, y: str, mark_of: dict[str, Mark]) -> None:
    best = at_best_setting(table)
    for arm, mark in mark_of.items():
        mine = table[table["arm"] == arm]
        means = best[best["arm"] == arm].groupby(["size", "parameters"], dropna=False)[[x, y]].mean().sort_values(x)
        axes.plot(mine[x], mine[y], **mark.dots(ms=4, mfc="none"))
        axes.plot(means[x], means[y], **mark.line(lw=0.9))
    axes.set(xscale="log", xlabel=x, ylabel=y)


def _spent_by_arm(runs: pd.DataFrame, column: str, label: str, baseline: str) -> Figure:
    best = at_best_setting(runs).groupby(["arm", "size", "parameters"], dropna=False)
    cells = best[[column, "loss"]].mean().sort_values(column)
    curves = {str(arm): (part[column], part["loss"]) for arm, part in cells.groupby(level="arm")}
    dots = {str(arm): (part[column], part["loss"]) for arm, part in runs.groupby("arm")}
    lines = _what_lines_join(runs)
    return arm_panels(curves, dots, baseline, (f"{label}; {lines}" if lines else label, loss_label(runs)), {})[0]


def _what_lines_join(runs: pd.DataFrame) -> str:
    """A word on the lines where runs of one size differ in learning rate or other axes; else nothing."""
    return "lines: each size's best setting" if len(at_best_setting(runs)) < runs["loss"].count() else ""


def ablation_panels(rows: pd.DataFrame, baseline_loss: float | None) -> Figure:
    """A panel for each `factor`, a line for each `line` of it: loss by `setting`, in the order given.

    Dots are runs, lines join their means; the baseline's loss, at its best learning rate, is dotted.
    """
    mark_of = marks(list(rows["line"]), "")
    with mpl.rc_context(STYLE):
        groups = list(rows.groupby("factor", sort=False))
        figure = Figure(figsize=(1.0 + 2.0 * len(groups), 3.2), layout="constrained")
        panels = np.ravel(figure.subplots(1, len(groups), sharey=True, squeeze=False))
        for axes, (factor, part) in zip(panels, groups, strict=True):
            settings = list(dict.fromkeys(part["setting"]))
            for name, mine in part.groupby("line", sort=False):
                at, mark = mine["setting"].map(settings.index), mark_of[name]
                means = mine["loss"].groupby(at).mean()
                axes.plot(
                    means.index, means, **mark.line(lw=1, marker=mark.marker, ms=4, label=fill(printable(name, 80), 26))
                )
                axes.plot(at, mine["loss"], **mark.dots(ms=3, marker="."))
            if baseline_loss is not None:
                axes.axhline(baseline_loss, color=BLACK, lw=0.8, ls=":")
            axes.set_xticks(
                range(len(settings)), [printable(text).replace("-", "-\n") for text in settings], fontsize=7
            )
            axes.set_xlabel(printable(factor))
            axes.margins(y=0.1)
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderpad=0, fontsize=7)
        panels[0].set_ylabel(f"{loss_label(rows)}, {printable(rows['size'].iloc[0])}")
        if baseline_loss is not None:
            place: Any = {"xytext": (0, 2), "textcoords": "offset points", "fontsize": 7}
            panels[0].annotate("baseline at its best", (0, baseline_loss), **place)
    return settled(figure)


def _legend(figure: Figure, mark_of: dict[str, Mark]) -> None:
    lines = [
        Line2D([], [], label=printable(arm), **mark.line(marker=mark.marker, ms=4, mfc="none"))
        for arm, mark in mark_of.items()
    ]
    figure.legend(handles=lines, loc="outside upper left", ncols=ACROSS)


def _legend_height(mark_of: dict[str, Mark]) -> float:
    """The height of the legend in inches."""
    return 0.17 * math.ceil(len(mark_of) / ACROSS)
