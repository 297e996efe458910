"""The load of each expert in mixtures of experts, from the log's metrics to the figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from analysis.pages.style import STYLE, printable, settled

if TYPE_CHECKING:
    import pandas as pd

METRIC = r"expert_load\.(?P<layer>\d+)\.(?P<expert>\d+)"  # 1: the mean load of the layer
DARKEST = 2.0  # loads from this on have one colour


def expert_loads(metrics: pd.DataFrame) -> pd.DataFrame:
    """run_id, layer, expert, load, from a table of `logs.metrics.final_metrics`. Empty for a store without experts."""
    rows = metrics.join(metrics["metric"].str.extract(METRIC).astype("Int64")).dropna(subset=["layer"])
    return rows.rename(columns={"value": "load"})[["run_id", "layer", "expert", "load"]].reset_index(drop=True)


def expert_load(loads: pd.DataFrame, runs: pd.DataFrame) -> Figure:
    """A map of layers and experts for each arm, of its first seed at its largest size; darkest from twice the mean on.

    The title of each has the largest load: experts that are spread over devices wait for the one with most tokens.
    """
    with_experts = runs[runs["run_id"].isin(loads["run_id"])]
    chosen = with_experts.sort_values(["parameters", "seed"], ascending=[False, True]).drop_duplicates("arm")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.6 + 1.3 * len(chosen)), layout="constrained")
        panels = np.ravel(figure.subplots(len(chosen), 1, squeeze=False))
        for axes, (_, run) in zip(panels, chosen.sort_values("arm").iterrows(), strict=True):
            mine = loads[loads["run_id"] == run["run_id"]]
            grid = mine.pivot_table(index="layer", columns="expert", values="load").to_numpy(float)
            image = axes.imshow(grid, cmap="viridis_r", vmin=0, vmax=DARKEST, aspect="auto", interpolation="nearest")
            axes.set(
                title=f"{printable(run['arm'])}, {printable(run['size'])}: at most {grid.max():.2f}", ylabel="layer"
            )
        panels[-1].set_xlabel("expert")
        figure.colorbar(image, ax=list(panels), extend="max", label="load over the mean")
    return settled(figure)
