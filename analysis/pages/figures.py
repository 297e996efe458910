"""Figures of laws and multipliers.

Functions return figures; `style.save` writes one, so that the same input gives the same bytes. Figures of runs, isoFLOP
designs and kernels are in files of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from analysis.laws.intervals import band
from analysis.laws.powerlaw import Fit
from analysis.pages.style import BLACK, MANY, STYLE, Mark, arm_panels, label_ends, marks, printable, settled
from analysis.pages.tables import ratio_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from analysis.advantage.answers import Multiplier

TALLEST = 2.5  # the axis of m ends at most at this multiple of the largest m, since intervals may be infinite


def loss_against_compute(law: Fit, multipliers: Sequence[Multiplier], convention: str, loss_axis: str) -> Figure:
    """Loss of every run against training FLOPs, the law of each arm with its 68% band, and the residuals below.

    The band is 68% because four sizes leave a law one degree of freedom, at which a 95% band is seven times as wide and
    would cover the whole figure; 95% intervals are in the tables.
    """
    if law.form != "c":
        raise ValueError(f"loss against compute needs a law in C; got form {law.form}")
    with mpl.rc_context(STYLE):
        if len(set(law.points.arm)) > MANY:
            return settled(_laws_by_arm(law, multipliers, f"training FLOPs ({convention})", loss_axis))
        figure = Figure(figsize=(6.4, 5.6), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        compute = law.points.x["C"]
        grid = np.geomspace(compute.min(), compute.max(), 100)
        mark_of = marks(law.points.arm, law.points.baseline)
        answers = {item.arm: item for item in multipliers}
        labels = []
        for arm, mark in mark_of.items():
            mine = np.array([name == arm for name in law.points.arm])
            curve = law.predict({"C": grid}, arm)
            top.plot(grid, curve, **mark.line())
            if law.draws is not None:
                top.fill_between(grid, *band(law, {"C": grid}, arm, 0.68), color=mark.colour, alpha=0.15, lw=0)
            top.plot(compute[mine], law.points.loss[mine], **mark.dots())
            expected = law.predict({"C": compute[mine]}, arm)
            bottom.plot(compute[mine], 100 * np.log(law.points.loss[mine] / expected), **mark.dots())
            labels.append((float(curve[-1]), f"{printable(arm)}{_advantage(answers.get(arm))}", mark))
        bottom.axhline(0, color=BLACK, lw=0.6)
        spare = 0.08 * np.ptp(law.points.loss) + 0.01
        top.set_ylim(law.points.loss.min() - spare, law.points.loss.max() + spare)  # the bands may be far wider
        top.set(xscale="log", ylabel=loss_axis)
        bottom.set(xlabel=f"training FLOPs ({convention})", ylabel="residual (%)")
        for item in multipliers:
            if item.status == "ok":
                _draw_gap(top, law, item, mark_of[item.arm])
        label_ends(top, labels)
        delta = law.loss.delta
        loss = "least squares" if delta is None else f"Huber, delta {delta:g}"
        E = law.parameter("E", law.points.baseline)
        label = "E at its bound" if "E" in law.certificate["bounds_hit"] else f"E = {E:.3f}"
        top.set_title(f"{label}{', shared' if len(mark_of) > 1 else ''}, by {loss}; bands: 68%", loc="left")
    return settled(figure)


def _laws_by_arm(law: Fit, multipliers: Sequence[Multiplier], x_label: str, loss_axis: str) -> Figure:
    """A panel for each arm: its runs and law drawn over the baseline's, with the other arms pale in the background."""
    compute, arms = law.points.x["C"], np.array(law.points.arm, dtype=object)
    grid = np.geomspace(compute.min(), compute.max(), 50)
    curves = {arm: (grid, law.predict({"C": grid}, arm)) for arm in dict.fromkeys(law.points.arm)}
    dots = {arm: (compute[arms == arm], law.points.loss[arms == arm]) for arm in curves}
    return arm_panels(curves, dots, law.points.baseline, (x_label, loss_axis), _advantages(multipliers))[0]


def local_multipliers(multipliers: Sequence[Multiplier]) -> Figure:
    """m at each size against compute, and the line of m(C) with its 95% band, shaded where it is extrapolated."""
    if len(multipliers) > MANY:
        return _local_by_arm(multipliers)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        mark_of = marks([item.arm for item in multipliers], multipliers[0].baseline)
        labels, highest = [], 1.0
        for item in multipliers:
            mark = mark_of[item.arm]
            values = [row["m"] for row in item.local]
            axes.plot([row["compute_baseline"] for row in item.local], values, **mark.dots())
            line = np.array([[point.compute, point.m, *point.ci] for point in item.curve]).reshape(-1, 4)
            axes.plot(line[:, 0], line[:, 1], **mark.line())
            axes.fill_between(line[:, 0], line[:, 2], line[:, 3], color=mark.colour, alpha=0.15, lw=0)
            highest = max(highest, *values, *line[:, 1])
            labels.append(
                (float(line[-1, 1] if len(line) else values[-1]), f"{printable(item.arm)}{_advantage(item)}", mark)
            )
        largest = {max(row["compute_baseline"] for row in item.local) for item in multipliers if item.local}
        measured = max(largest)
        right = max([point.compute for item in multipliers for point in item.curve], default=measured)
        axes.axvspan(measured, right, color="0.93", lw=0, zorder=0)
        axes.axhline(1, color=BLACK, lw=0.6)
        axes.set(xscale="log", xlabel=f"training FLOPs ({multipliers[0].convention})", ylabel="compute multiplier m")
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, 0), min(high, TALLEST * highest))
        grey = "grey, and past an arm's last dot" if measured > 1.01 * min(largest) else "grey"
        axes.set_title(f"dots: each size; lines and bands: m(C), 95%; {grey}: extrapolated", loc="left")
        label_ends(axes, labels)
    return settled(figure)


def _local_by_arm(multipliers: Sequence[Multiplier]) -> Figure:
    """The same with a panel for each arm."""
    lines = {
        item.arm: np.array([[point.compute, point.m, *point.ci] for point in item.curve]).reshape(-1, 4)
        for item in multipliers
    }
    local = {item.arm: item.local for item in multipliers}
    dots = {arm: ([row["compute_baseline"] for row in rows], [row["m"] for row in rows]) for arm, rows in local.items()}
    curves = {arm: (line[:, 0], line[:, 1]) for arm, line in lines.items()}
    labels = (f"training FLOPs ({multipliers[0].convention}); grey: extrapolated", "compute multiplier m")
    with mpl.rc_context(STYLE):
        figure, panels = arm_panels(curves, dots, multipliers[0].baseline, labels, _advantages(multipliers))
        for arm, axes in panels.items():
            line, measured = lines[arm], max(dots[arm][0])
            axes.fill_between(line[:, 0], line[:, 2], line[:, 3], color=axes.lines[-1].get_color(), alpha=0.15, lw=0)
            axes.axvspan(measured, max(measured, *line[:, 0]), color="0.93", lw=0, zorder=0)
            axes.axhline(1, color=BLACK, lw=0.6)
        drawn = [1.0, *(row["m"] for rows in local.values() for row in rows)]
        drawn += [value for line in lines.values() for value in line[:, 1]]
        least, most = min(drawn), max(drawn)
        spare = max(most - least, 0.1)
        next(iter(panels.values())).set_ylim(least - 0.2 * spare, most + 0.4 * spare)
    return settled(figure)


def forest(multipliers: Sequence[Multiplier]) -> Figure:
    """Every arm's m with its interval, one arm in each row; hollow markers where m is not resolved."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.9 + 0.26 * len(multipliers)), layout="constrained")
        axes = figure.subplots()
        for row, item in enumerate(reversed(multipliers)):
            hollow = item.status.startswith("not resolved")
            if item.ci:
                axes.plot(item.ci, (row, row), color=BLACK, lw=1.2)
            axes.plot(item.m, row, "o", color=BLACK, mfc="white" if hollow else BLACK, ms=5)
            axes.text(
                1.02, row, _advantage(item).strip(), transform=axes.get_yaxis_transform(), fontsize=8, va="center"
            )
        axes.axvline(1, color=BLACK, lw=0.6, ls=":")
        axes.set_yticks(range(len(multipliers)), [printable(item.arm) for item in reversed(multipliers)])
        axes.set(xlabel=f"compute multiplier m over {printable(multipliers[0].baseline)} (95%; hollow: not resolved)")
        axes.set_xlim(right=min(axes.get_xlim()[1], TALLEST * max(1.0, *(item.m for item in multipliers))))
        axes.set_ylim(-0.6, len(multipliers) - 0.4)
    return settled(figure)


def _advantage(item: Multiplier | None) -> str:
    if item is None:
        return ""
    m, *ends = (ratio_text(value, 2) for value in (item.m, *(item.ci or ())))
    return f"\n{m}x{f' [{ends[0]}, {ends[1]}]' if ends else ''}"


def _advantages(multipliers: Sequence[Multiplier]) -> Mapping[str, str]:
    return {item.arm: _advantage(item).strip() for item in multipliers}


def _draw_gap(axes: Axes, law: Fit, item: Multiplier, mark: Mark) -> None:
    """The multiplier as a horizontal distance between curves: how much more compute the baseline needs to reach the
    arm's loss at the largest size."""
    start = item.local[-1]["compute"]
    end = start * item.m
    level = float(law.predict({"C": np.array([start])}, item.arm)[0])
    beyond = np.geomspace(item.local[-1]["compute_baseline"], max(end, start), 20)
    axes.plot(beyond, law.predict({"C": beyond}, item.baseline), color=BLACK, lw=0.9, ls=":")
    axes.annotate("", (end, level), (start, level), arrowprops={"arrowstyle": "<->", "color": mark.colour, "lw": 0.9})
