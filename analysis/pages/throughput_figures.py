"""Measured training throughput as a figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from analysis.logs.selection import some
from analysis.pages.style import BLACK, STYLE, Mark, marks, printable, settled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# A table with these columns is one that `dynconv bench train` wrote.
COLUMNS = {"size", "arm", "optimizer", "batch", "gpus", "parallel", "tokens_per_second", "mfu", "slowdown", "against"}
SETUP = ["device", "gpus", "parallel", "optimizer", "fused"]  # each has panels of its own


def read_training(path: Path) -> pd.DataFrame | None:
    """The table that `dynconv bench train` writes, or None if the path holds something else."""
    import pandas as pd

    if not path.is_file() or path.suffix != ".parquet":
        return None
    try:
        rows = pd.read_parquet(path)
    except (OSError, ValueError):
        return None  # whoever reads stores then reports the error
    return rows if set(rows.columns) >= COLUMNS else None


def throughput_panels(rows: pd.DataFrame) -> Figure:
    """MFU (tokens a second where it is not known) and slowdown with its interval, by size and arm.

    `rows` have the columns of `dynconv bench train`. Each device, number of GPUs and optimizer has two panels. Raises
    ValueError where an arm was measured several times at a size of one of these, as at two batches: which one is meant
    is for the reader to say.
    """
    # Measured before there was this setting, nothing was fused.
    rows = rows.assign(fused=rows.get("fused", False))
    groups = [(dict(zip(SETUP, key, strict=True)), group) for key, group in rows.groupby(SETUP, sort=False)]
    for setup, group in groups:
        again = group[group.duplicated(["size", "arm"])]
        if len(again):
            where = ", ".join(str(value) for value in setup.values())
            raise ValueError(
                f"{some(again['arm'] + ' at ' + again['size'])} was measured several times on {where}, as with another "
                "batch; draw a file that has each once"
            )
    first = rows["against"].dropna().mode()
    mark_of = marks(list(rows["arm"]), str(first.iloc[0]) if len(first) else str(rows["arm"].iloc[0]))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.4 + 2.7 * len(groups)), layout="constrained")
        panels = figure.subplots(len(groups), 2, squeeze=False)
        for (setup, group), (left, right) in zip(groups, panels, strict=True):
            known = group["mfu"].notna().all()
            values = group["mfu"] * 100 if known else group["tokens_per_second"] / 1e3
            _by_size(left, group.assign(value=values), mark_of)
            left.set_ylabel("model FLOPs utilisation (%)" if known else "thousand tokens a second")
            left.set_yscale("linear" if known else "log")
            if known:
                left.set_ylim(bottom=0)
            low, high = group["slowdown_low"], group["slowdown_high"]
            others = group[group["arm"] != group["against"]]
            _by_size(right, others.assign(value=others["slowdown"], low=low, high=high), mark_of)
            right.axhline(1, color=BLACK, lw=0.8)
            right.set_ylabel(f"time of a step, over {printable(some(group['against'].unique()))}'s")
            left.set_title(_title(setup), loc="left")
            right.set_title(_provenance(group), loc="left", fontsize=7)
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=5)
    return settled(figure)


def _by_size(axes: Axes, rows: pd.DataFrame, mark_of: dict[str, Mark]) -> None:
    """`value` of every arm at every size, smallest first, with the bars `low` to `high` where they are known."""
    sizes = list(rows.groupby("size")["parameters"].min().sort_values().index)
    arms = [arm for arm in mark_of if (rows["arm"] == arm).any()]
    for place, arm in enumerate(arms):
        mine = rows[rows["arm"] == arm].sort_values("parameters")
        beside = (place - (len(arms) - 1) / 2) * 0.6 / max(len(arms), 1)
        at = np.array([sizes.index(size) for size in mine["size"]]) + beside
        axes.plot(at, mine["value"], label=printable(arm), **mark_of[arm].dots())
        if "low" in mine:
            axes.vlines(at, mine["low"].astype(float), mine["high"].astype(float), color=mark_of[arm].colour, lw=1.2)
    axes.set_xticks(range(len(sizes)), [printable(size) for size in sizes])
    axes.set_xlim(-0.6, len(sizes) - 0.4)


def _title(setup: dict[str, object]) -> str:
    gpus = f", {setup['gpus']} GPUs ({setup['parallel']})" if int(str(setup["gpus"])) > 1 else ""
    fused = "" if setup["fused"] else ", not fused"
    return printable(f"{setup['device']}{gpus}, {setup['optimizer']}{fused}", 60)


def _provenance(rows: pd.DataFrame) -> str:
    """The commit that was measured, or at which sizes which one was."""
    if rows["commit"].isna().all():
        return ""
    commits = rows["commit"].fillna("unknown").str.replace(r"^([0-9a-f]{10})[0-9a-f]+", r"\1", regex=True)
    if commits.nunique() == 1:
        return f"commit {commits.iloc[0]}"
    return printable("; ".join(f"{name}: {some(part['size'].unique())}" for name, part in rows.groupby(commits)), 80)
