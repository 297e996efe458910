"""Figures, returned and not written: `style.save` writes one, so that the same input gives the same bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from analysis.laws.intervals import band
from analysis.laws.powerlaw import Fit
from analysis.pages.style import (
    BLACK,
    COLOURS,
    HATCHES,
    MARKERS,
    STYLE,
    Mark,
    label_ends,
    marks,
    printable,
    settled,
)
from analysis.pages.style import save as save

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from analysis.advantage.answers import Multiplier
    from analysis.laws.isoflop import Allocation, Optimum

LOSS = "held-out loss (nats/token)"
UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))
ACROSS = 4  # names in a line of a legend
TALLEST = 2.5  # times the largest m is as far as the axis of m goes: an interval may go to infinity


def loss_against_compute(law: Fit, multipliers: Sequence[Multiplier], convention: str) -> Figure:
    """Loss of every run against training FLOPs, the law of each arm with its 68% band, and the residuals below.

    68%, because four sizes leave a law one degree of freedom, at which a 95% band is seven times as wide and hides
    everything; the 95% intervals are the tables'.
    """
    if law.form != "c":
        raise ValueError(f"loss against compute needs a law in C; got form {law.form}")
    with mpl.rc_context(STYLE):
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
        top.set(xscale="log", ylabel=LOSS)
        bottom.set(xlabel=f"training FLOPs ({convention})", ylabel="residual (%)")
        for item in multipliers:
            if item.status == "ok":
                _draw_gap(top, law, item, mark_of[item.arm])
        label_ends(top, labels)
        delta = law.loss.delta
        loss = "least squares" if delta is None else f"Huber, delta {delta:g}"
        floor = law.parameter("E", law.points.baseline)
        floor_text = "E at its bound" if "E" in law.certificate["bounds_hit"] else f"E = {floor:.3f}"
        top.set_title(f"{floor_text}{', shared' if len(mark_of) > 1 else ''}, by {loss}; bands: 68%", loc="left")
    return settled(figure)


def local_multipliers(multipliers: Sequence[Multiplier]) -> Figure:
    """m at each size against compute, and the line of m(C) with its 95% band, shaded where it is extrapolated."""
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
        measured = max(row["compute_baseline"] for item in multipliers for row in item.local)
        right = max([point.compute for item in multipliers for point in item.curve], default=measured)
        axes.axvspan(measured, right, color="0.93", lw=0, zorder=0)
        axes.axhline(1, color=BLACK, lw=0.6)
        axes.set(xscale="log", xlabel=f"training FLOPs ({multipliers[0].convention})", ylabel="compute multiplier m")
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, 0), min(high, TALLEST * highest))
        axes.set_title("dots: each size; lines and bands: m(C), 95%; grey: extrapolated", loc="left")
        label_ends(axes, labels)
    return settled(figure)


def forest(multipliers: Sequence[Multiplier]) -> Figure:
    """Every arm's m with its interval, one a row; hollow where not resolved."""
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


def loss_curves(evals: pd.DataFrame, runs: pd.DataFrame, baseline: str) -> Figure:
    """Held-out loss of every run against its tokens, a panel for each size."""
    sizes = list(dict.fromkeys(runs.sort_values("parameters")["size"]))
    curves = evals.merge(runs[["run_id", "arm", "size"]], on="run_id").sort_values(["run_id", "step"])
    mark_of = marks(list(runs["arm"]), baseline)
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
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        for axes in panels[len(sizes) :]:
            axes.remove()
        figure.supxlabel("training tokens", fontsize=9)
        figure.supylabel(LOSS, fontsize=9)
        _legend(figure, mark_of)
    return settled(figure)


def wall_clock(runs: pd.DataFrame, baseline: str) -> Figure:
    """What compute costs in measured training time, and what that time buys; lines join the means of sizes."""
    seconds = (runs["train_seconds"] * runs["gpus"].astype(float).clip(lower=1)).astype(float)
    unit, length = next(item for item in UNITS if seconds.max() >= item[1] or item[1] == 1)
    time = f"measured training (device {unit})"
    table = runs.assign(**{"training FLOPs (exact)": runs["flops_exact"], time: seconds / length, LOSS: runs["loss"]})
    mark_of = marks(list(runs["arm"]), baseline)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.0 + _legend_height(mark_of)), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, (x, y) in zip(panels, [("training FLOPs (exact)", time), (time, LOSS)], strict=True):
            for arm, mark in mark_of.items():
                mine = table[table["arm"] == arm]
                means = mine.groupby(["size", "parameters"], dropna=False)[[x, y]].mean().sort_values(x)
                axes.plot(mine[x], mine[y], **mark.dots(ms=4, mfc="none"))
                axes.plot(means[x], means[y], **mark.line(lw=0.9))
            axes.set(xscale="log", xlabel=x, ylabel=y)
        panels[0].set_yscale("log")
        panels[0].set_title(f"on {', '.join(sorted(runs['device'].dropna().unique()))}", loc="left")
        _legend(figure, mark_of)
    return settled(figure)


def ablation_panels(rows: pd.DataFrame, baseline_loss: float | None) -> Figure:
    """A panel for each `factor`, a line for each `line` of it: loss by `setting`, in the order given.

    Dots are runs, lines join their means; the baseline's loss is dotted.
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
            axes.set_xlabel(str(factor))
            axes.margins(y=0.1)
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderpad=0, fontsize=7)
        panels[0].set_ylabel(f"{LOSS}, {printable(rows['size'].iloc[0])}")
        if baseline_loss is not None:
            place: Any = {"xytext": (0, 2), "textcoords": "offset points", "fontsize": 7}
            panels[0].annotate("baseline", (0, baseline_loss), **place)
    return settled(figure)


def isoflop_panels(
    rows: pd.DataFrame, optima: Sequence[Optimum], laws: Sequence[Allocation], convention: str
) -> Figure:
    """A row for each arm: loss against N at each budget with its parabola, then N* and D* against compute.

    Optima are large, hollow where they do not count. `rows` are the finished runs, their compute in column "C".
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 0.4 + 2.6 * len(laws)), layout="constrained")
        for (curves, *growths), law in zip(figure.subplots(len(laws), 3, squeeze=False), laws, strict=True):
            mine = [item for item in optima if item.arm == law.arm]
            _parabolas(curves, rows[rows["arm"] == law.arm], mine)
            curves.set(xscale="log", xlabel="parameters N", ylabel=LOSS)
            curves.set_title(printable(law.arm) if len(laws) > 1 else "", loc="left")
            for axes, name, exponent in zip(growths, "ND", (law.N_exponent, law.D_exponent), strict=True):
                _growth(axes, name, exponent, mine)
                axes.set(xscale="log", yscale="log", xlabel=f"training FLOPs ({convention})")
                axes.set_ylabel({"N": "best N* (parameters)", "D": "best D* (tokens)"}[name])
            if law.ci and law.N_exponent:
                growths[0].set_title(f"N* ~ C^{law.N_exponent:.2f} [{law.ci[0]:.2f}, {law.ci[1]:.2f}]", loc="left")
    return settled(figure)


def _parabolas(axes: Axes, rows: pd.DataFrame, optima: Sequence[Optimum]) -> None:
    """Runs of one arm by budget, dark to light, each of the budget whose compute is nearest."""
    budgets = np.log([item.compute for item in optima])
    nearest = np.abs(np.log(rows["C"].to_numpy(float))[:, None] - budgets).argmin(axis=1)
    shades = mpl.colormaps["cividis"](np.linspace(0, 0.85, len(optima)))
    for place, (item, shade) in enumerate(zip(optima, shades, strict=True)):
        part = rows[nearest == place]
        marker = MARKERS[place % len(MARKERS)]
        axes.plot(
            part["parameters"], part["loss"], ls="", marker=marker, ms=3.5, color=shade, label=f"{item.compute:.1e}"
        )
        if item.N is None or item.loss is None:
            continue
        low, high = item.window or (item.N, item.N)
        grid = np.geomspace(min(low, item.N), max(high, item.N), 60)
        axes.plot(grid, item.curve(grid), color=shade, lw=1)
        axes.plot(item.N, item.loss, "*", ms=10, color=shade, mec=BLACK, mew=0.6, mfc=_face(item, shade))
    axes.legend(title="FLOPs", title_fontsize=7, fontsize=7, handletextpad=0.1, loc="upper right")


def _growth(axes: Axes, name: str, exponent: float | None, optima: Sequence[Optimum]) -> None:
    """N* or D* of every budget with its interval, and the law through those that count."""
    for item in optima:
        value: float | None = getattr(item, name)
        if value is None or item.N is None or item.ci is None:
            continue
        ends = [item.N * value / end if name == "D" else end for end in item.ci]  # N D is the budget's
        axes.plot([item.compute] * 2, ends, color=BLACK, lw=1)
        axes.plot(item.compute, value, "*", ms=10, color=BLACK, mfc=_face(item, BLACK))
    good = [item for item in optima if item.status == "ok"]
    if exponent is not None:
        compute = np.array([item.compute for item in good])
        height = np.mean(np.log([getattr(item, name) for item in good]) - exponent * np.log(compute))
        axes.plot(compute, np.exp(height) * compute**exponent, color=COLOURS[1], lw=1.2, ls="--")


def _face(item: Optimum, shade: Any) -> Any:
    return shade if item.status == "ok" else "white"


def kernel_bars(rows: pd.DataFrame) -> Figure:
    """Microseconds of forward and backward of every op and provider, at the shape that most rows have.

    `rows` have the columns of `dynconv bench kernels`; where `fraction` (of the copy bandwidth) is known, a line marks
    the floor: the time that the bytes which must move would take. Raises ValueError where nothing was timed.
    """
    both = rows[(rows["pass"] == "fwd+bwd") & rows["us"].notna()]
    if both.empty:
        raise ValueError("kernel bars need rows with pass fwd+bwd and a time in us; the table has none")
    shape = ["B", "T", "D", "W", "dtype"]
    common = both[shape].value_counts(sort=False).idxmax()
    shown = both[(both[shape] == list(common)).all(axis=1)]
    shown = shown.assign(label=[_kernel(row) for row in shown.to_dict("records")])
    labels, providers = list(dict.fromkeys(shown["label"])), list(dict.fromkeys(shown["provider"]))
    of_label = {label: list(dict.fromkeys(rows["provider"])) for label, rows in shown.groupby("label")}
    fractions = shown.get("fraction", math.nan)
    floor = (shown["us"] * fractions).groupby(shown["label"]).median().reindex(labels)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.9 + (0.12 + 0.2 * len(providers)) * len(labels)), layout="constrained")
        axes = figure.subplots()
        height = 0.8 / len(providers)
        for place, provider in enumerate(providers):
            times = shown[shown["provider"] == provider].groupby("label", sort=False)["us"].median()
            beside = [of_label[label] for label in times.index]
            middles = np.array([labels.index(label) for label in times.index])
            at = middles + [(names.index(provider) - (len(names) - 1) / 2) * height for names in beside]
            look: Any = {"color": COLOURS[place % len(COLOURS)], "hatch": HATCHES[place % len(HATCHES)], "ec": "white"}
            axes.barh(at, times, height, label=provider, **look)
            for us, end, y in zip(
                times, np.fmax(times, floor[times.index]), at, strict=True
            ):  # clear of the floor's line
                offset: Any = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}
                axes.annotate(f"{us:.0f}", (end, y), **offset)
        if floor.notna().any():
            reach = np.array([height * len(of_label[label]) / 2 + 0.05 for label in labels])
            ends = np.arange(len(labels)) - reach, np.arange(len(labels)) + reach
            axes.vlines(floor, *ends, color=BLACK, lw=1.5, label="floor: bytes at the copy bandwidth")
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set_xlabel("forward and backward (µs)")
        where = ", ".join(sorted(shown["device"].dropna().unique())) if "device" in shown else ""
        values = ", ".join(
            f"{name} {value}" if name != "dtype" else str(value) for name, value in zip(shape, common, strict=True)
        )
        axes.set_title(f"{where + ': ' if where else ''}{values}", loc="left")
        axes.legend()
    return settled(figure)


def _kernel(row: dict[str, Any]) -> str:
    """As "lowrank R=16 + static", "headwise h=4": h channels share a filter."""
    size = {"headwise": lambda: f" h={row['D'] // int(row['H'])}", "lowrank": lambda: f" R={int(row['R'])}"}
    return f"{row['op']}{size.get(row['op'], str)()}{' + static' if row.get('static') is True else ''}"


def _legend(figure: Figure, mark_of: dict[str, Mark]) -> None:
    lines = [
        Line2D([], [], label=printable(arm), **mark.line(marker=mark.marker, ms=4, mfc="none"))
        for arm, mark in mark_of.items()
    ]
    figure.legend(handles=lines, loc="outside upper left", ncols=ACROSS)


def _legend_height(mark_of: dict[str, Mark]) -> float:
    """Inches."""
    return 0.17 * math.ceil(len(mark_of) / ACROSS)


def _advantage(item: Multiplier | None) -> str:
    if item is None:
        return ""
    m, *ends = (f"{value:.2f}" if value < 100 else f"{value:.0g}" for value in (item.m, *(item.ci or ())))
    return f"\n{m}x{f' [{ends[0]}, {ends[1]}]' if ends else ''}"


def _draw_gap(axes: Axes, law: Fit, item: Multiplier, mark: Mark) -> None:
    """The multiplier as what it is: how much more compute the baseline needs for the arm's loss at the largest size."""
    start = item.local[-1]["compute"]
    end = start * item.m
    level = float(law.predict({"C": np.array([start])}, item.arm)[0])
    beyond = np.geomspace(item.local[-1]["compute_baseline"], max(end, start), 20)
    axes.plot(beyond, law.predict({"C": beyond}, item.baseline), color=BLACK, lw=0.9, ls=":")
    axes.annotate("", (end, level), (start, level), arrowprops={"arrowstyle": "<->", "color": mark.colour, "lw": 0.9})
