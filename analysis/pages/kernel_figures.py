"""Times of kernels as a figure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from analysis.pages.style import BLACK, COLOURS, HATCHES, STYLE, settled

if TYPE_CHECKING:
    import pandas as pd


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
            ends = np.fmax(times, floor[times.index])  # so that a label does not cover the line of the floor
            for us, end, y in zip(times, ends, at, strict=True):
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
    """The label of a kernel, such as "lowrank R=16 + static", or "headwise h=4" where h channels share a filter."""
    size = {"headwise": lambda: f" h={row['D'] // int(row['H'])}", "lowrank": lambda: f" R={int(row['R'])}"}
    return f"{row['op']}{size.get(row['op'], str)()}{' + static' if row.get('static') is True else ''}"
