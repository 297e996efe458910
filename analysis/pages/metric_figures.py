"""The figure of accuracy on recall tasks, against size and against what a task varies, such as the length of keys."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.pages.style import STYLE, marks, printable, settled

if TYPE_CHECKING:
    import pandas as pd

ACCURACY = "accuracy"
SUCCESS = "success"  # of a whole held-out set; a part of the answers has an accuracy alone
ACROSS = 3  # panels in a row
SIZE = "parameters N"


def accuracy_rows(metrics: pd.DataFrame, done: pd.DataFrame) -> pd.DataFrame:
    """The points of the figure, one for each run, panel and x: columns arm, panel, axis, x and value.

    Each task has a panel of accuracy against N. A metric such as "accuracy@key_length=2" is accuracy on a part of the
    answers or on a further held-out set. Those with the same name before the = share a panel, where they differ in
    what follows it; it shows the runs at the largest size. `metrics` are final values (logs.metrics.final_metrics).
    """
    import pandas as pd

    parts = metrics["metric"].str.extract(r"^(?P<metric>[^@]*)(?:@(?P<axis>[^=]*)=(?P<x>[-+.\de]+))?$")
    numbers = pd.to_numeric(parts["x"], errors="coerce")
    found = metrics[["run_id", "task", "value"]].assign(axis=parts["axis"], x=numbers)
    found = found[(parts["metric"] == ACCURACY) & (metrics["metric"].eq(ACCURACY) | numbers.notna())]
    found = found.merge(done[["run_id", "arm", "size", "parameters"]], on="run_id")
    further = metrics[["task"]].assign(axis=parts["axis"])[parts["metric"].eq(SUCCESS) & numbers.notna()]
    own = [_of_own_set(found, done, task, axis) for task, axis in further.drop_duplicates().itertuples(index=False)]
    found = pd.concat([found, *own])
    of_size = found.groupby(["task", "size"], dropna=False)["parameters"].transform(
        "mean"
    )  # arms of a size differ in N
    largest = of_size == of_size.groupby(found["task"]).transform("max")
    found = found[found["axis"].isna() | largest]
    several = found.groupby(["task", "axis"], dropna=False)["x"].transform("nunique") > 1
    found = found[found["axis"].isna() | several]
    whole = found["axis"].isna()
    axis = found["axis"].str.replace("_", " ")
    found = found.assign(
        x=found["x"].where(~whole, found["parameters"].astype(float)),
        panel=found["task"].where(whole, found["task"] + " by " + axis.fillna("")),
        axis=axis.fillna(SIZE),
        _part=~whole,
    )
    return found.sort_values(["task", "_part", "axis", "arm", "x"], kind="stable")[
        ["arm", "panel", "axis", "x", "value"]
    ]


def _of_own_set(found: pd.DataFrame, done: pd.DataFrame, task: str, axis: str) -> pd.DataFrame:
    """The accuracy on a task's own held-out set as one more point along `axis`, which its further sets vary: at the
    value that the run's facts have for it."""
    fact = f"task.{axis}"
    if fact not in done:
        return found.iloc[:0]
    own = found[found["axis"].isna() & (found["task"] == task)]
    own = own.merge(done[["run_id", fact]].dropna(), on="run_id")
    return own.assign(axis=axis, x=own[fact].astype(float)).drop(columns=fact)


def accuracy_panels(rows: pd.DataFrame, baseline: str) -> Figure:
    """A panel for each task and for what it varies: dots are runs, lines join the medians of each arm, since runs solve
    such a task or do not, and a mean would lie between. `rows` are those of `accuracy_rows`."""
    mark_of = marks(list(rows["arm"]), baseline)
    panels = list(dict.fromkeys(rows["panel"]))
    across = min(ACROSS, len(panels))
    down = math.ceil(len(panels) / across)
    legend = 0.2 * math.ceil(len(mark_of) / (2 * across))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(0.6 + 2.3 * across, 0.2 + 2.2 * down + legend), layout="constrained")
        drawn = np.ravel(figure.subplots(down, across, sharey=True, squeeze=False))
        for axes, panel in zip(drawn, panels, strict=False):
            mine = rows[rows["panel"] == panel]
            for arm, part in mine.groupby("arm", sort=False):
                mark, medians = mark_of[str(arm)], part.groupby("x")["value"].median()
                axes.plot(part["x"], part["value"], **mark.dots(ms=3, mfc="none"))
                axes.plot(medians.index, medians, **mark.line(lw=1))
            axis = str(mine["axis"].iloc[0])
            axes.set(title=printable(panel), xlabel=axis, ylim=(-0.03, 1.03))
            if axis == SIZE and mine["x"].nunique() > 1:
                axes.set_xscale("log")
            elif axis != SIZE:
                axes.set_xticks(sorted(mine["x"].unique()))
        for axes in drawn[len(panels) :]:
            axes.remove()
        for axes in drawn[: len(panels) : across]:
            axes.set_ylabel("accuracy")
        handles = [
            Line2D([], [], label=printable(arm), **mark.line(marker=mark.marker, ms=4, mfc="none"))
            for arm, mark in mark_of.items()
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=2 * across)
    return settled(figure)
