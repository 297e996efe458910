"""Measured training throughput as a figure."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from analysis.logs.selection import some
from analysis.pages.style import BLACK, PALE, STYLE, Mark, marks, printable, settled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# A table with these columns is one that `dynconv bench train` wrote.
COLUMNS = {"size", "arm", "optimizer", "batch", "gpus", "parallel", "tokens_per_second", "mfu", "slowdown", "against"}
SETUP = ["device", "gpus", "parallel", "optimizer", "fused"]  # what is equal where arms are compared


def read_training(path: Path) -> pd.DataFrame | None:
    """The table that `dynconv bench train` writes, or None if the path holds something else. Raises ValueError for
    speeds that are not positive."""
    import pandas as pd

    if not path.is_file() or path.suffix != ".parquet":
        return None
    try:
        rows = pd.read_parquet(path)
    except (OSError, ValueError):
        return None  # whoever reads stores then reports the error
    if not set(rows.columns) >= COLUMNS:
        return None
    if len(wrong := rows[~(rows["tokens_per_second"] > 0)]):
        got = f"{wrong['tokens_per_second'].iloc[0]} in {len(wrong)} rows"
        raise ValueError(f"{path}: tokens_per_second must be positive; got {got}; remove these")
    return rows


def throughput_panels(rows: pd.DataFrame) -> Figure:
    """MFU (tokens a second where it is not known) and slowdown with its interval, by size and arm.

    `rows` have the columns of `dynconv bench train`. Each setting of SETUP at which arms were compared has two panels.
    A last panel has what was measured of one arm under several settings, and what was compared with nothing. Raises
    ValueError where an arm was measured several times at a size and setting, as at two batches: which one is meant is
    for the reader to say.
    """
    # Measured before there was this setting, nothing was fused.
    rows = rows.assign(fused=rows.get("fused", False)).reset_index(drop=True)
    groups = [group for _, group in rows.groupby(SETUP, sort=False)]
    _check_once(groups)
    compared = [group for group in groups if _others(group).any()]
    settings = _by_setting(rows, compared)
    first = rows["against"].dropna().mode()
    mark_of = marks(list(rows["arm"]), str(first.iloc[0]) if len(first) else str(rows["arm"].iloc[0]))
    mark_of = {arm: mark_of[arm] for arm in _order(rows)}
    named = [arm for arm in mark_of if any((group["arm"] == arm).any() for group in compared)]
    columns = min(5, 100 // (6 + max((len(printable(arm)) for arm in named), default=0)))  # as many as have room
    heights = [0.1 + 0.2 * math.ceil(len(named) / columns) + 2.6 * len(compared)] if compared else []
    heights += [0.9 + 0.2 * len(settings)] if len(settings) else []
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.2, sum(heights)), layout="constrained")
        parts = list(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights).flat)
        if compared:
            _draw_compared(parts[0], compared, mark_of)
            handles = [Line2D([], [], label=printable(arm), **mark_of[arm].dots()) for arm in named]
            parts[0].legend(handles=handles, loc="outside upper left", ncols=columns)
        if len(settings):
            _draw_settings(parts[-1].subplots(), settings, mark_of)
        return settled(figure)


def _check_once(groups: list[pd.DataFrame]) -> None:
    for group in groups:
        again = group[group.duplicated(["size", "arm"])]
        if len(again):
            where = ", ".join(str(value) for value in group[SETUP].iloc[0])
            raise ValueError(
                f"{some(again['arm'] + ' at ' + again['size'])} was measured several times on {where}, as with another "
                "batch; draw a file that has each once"
            )


def _others(rows: pd.DataFrame) -> pd.Series[bool]:
    """Which rows were compared with another arm."""
    return (rows["arm"] != rows["against"]) & rows["slowdown"].notna()


def _order(rows: pd.DataFrame) -> list[str]:
    """The arms as the table has them where most of them were measured together, then the others."""
    together = [list(group["arm"]) for _, group in rows.groupby([*SETUP, "size"], sort=False)]
    return list(dict.fromkeys(arm for arms in sorted(together, key=len, reverse=True) for arm in arms))


def _by_setting(rows: pd.DataFrame, compared: list[pd.DataFrame]) -> pd.DataFrame:
    """Rows of baselines measured at a size under several settings, and of arms that no other panel shows, with their
    arm's and size's rows under other settings; by size, arm and setting."""
    shown = [label for group in compared for label in group.index]
    same = rows.groupby(["size", "arm"])["arm"].transform("size") > 1
    alone = ~rows.index.isin(shown)
    beside = rows.assign(alone=alone).groupby(["size", "arm"])["alone"].transform("any")
    chosen = rows[beside | (same & (rows["arm"] == rows["against"]))]
    smallest = chosen.groupby("size")["parameters"].transform("min")
    place = chosen["arm"].map(_order(rows).index)
    return chosen.assign(smallest=smallest, place=place).sort_values(["smallest", "place", *SETUP], kind="stable")


def _draw_compared(part: SubFigure, groups: list[pd.DataFrame], mark_of: dict[str, Mark]) -> None:
    panels = part.subplots(len(groups), 2, squeeze=False)
    for group, (left, right) in zip(groups, panels, strict=True):
        values, label, known = _speed(group)
        _by_size(left, group.assign(value=values), mark_of)
        left.set_ylabel(label)
        left.set_yscale("linear" if known else "log")
        if known:
            left.set_ylim(0, 1.08 * values.max())
        others = group[_others(group)]
        low, high = others["slowdown_low"], others["slowdown_high"]
        _by_size(right, others.assign(value=others["slowdown"], low=low, high=high), mark_of)
        right.axhline(1, color=BLACK, lw=0.8)
        right.set_ylabel(f"time of a step, over {printable(some(others['against'].unique()))}'s", fontsize=8)
        # Over both panels: the right one has no title that it could run into.
        left.set_title("\n".join([_setting(group.iloc[0]), *_provenance(group)]), loc="left", fontsize=8)


def _draw_settings(axes: Axes, rows: pd.DataFrame, mark_of: dict[str, Mark]) -> None:
    """A line for each row, labelled with its size and setting; with arm, device and commit too where these differ."""
    values, label, known = _speed(rows)
    arms, devices = rows["arm"].unique(), rows["device"].unique()
    commits = _commits(rows)
    names = []
    for place, ((_, row), value, commit) in enumerate(zip(rows.iterrows(), values, commits, strict=True)):
        axes.axhline(place, color=PALE, lw=0.5, zorder=0)
        axes.plot([value], [place], **mark_of[row["arm"]].dots())
        axes.annotate(_three_digits(value), (value, place), (6, 0), textcoords="offset points", va="center", fontsize=7)
        if commits.nunique() > 1:
            at = axes.get_yaxis_transform()
            axes.text(1.01, place, f"commit {commit}", transform=at, va="center", fontsize=7)
        arm = f" {printable(row['arm'])}" if len(arms) > 1 else ""
        names.append(f"{printable(row['size'])}{arm}: {_setting(row, with_device=len(devices) > 1)}")
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(label)
    if known:
        axes.set_xlim(0, 1.15 * values.max())
    else:
        axes.set_xscale("log")
        axes.margins(x=0.15)
    what = [printable(arms[0])] if len(arms) == 1 else ["Settings"]
    what += [printable(devices[0])] if len(devices) == 1 else []
    lines = [", ".join(what), *(_provenance(rows) if commits.nunique() == 1 else [])]
    axes.set_title("\n".join(lines), loc="left", fontsize=8)


def _three_digits(value: float) -> str:
    return f"{value:#.3g}" if value < 99.95 else f"{value:,.0f}"


def _speed(rows: pd.DataFrame) -> tuple[pd.Series[float], str, bool]:
    """What is drawn of the rows' speed, the axis' label, and whether it is their MFU."""
    if rows["mfu"].notna().all():
        return rows["mfu"] * 100, "model FLOPs utilisation (%)", True
    return rows["tokens_per_second"] / 1e3, "thousand tokens a second", False


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


def _setting(row: pd.Series[Any], with_device: bool = True) -> str:
    device = [str(row["device"])] if with_device else []
    devices = "processes" if row["device"] == "cpu" else "GPUs"
    gpus = [f"{row['gpus']} {devices} ({row['parallel']})"] if int(row["gpus"]) > 1 else []
    fused = [] if row["fused"] else ["not fused"]
    return printable(", ".join([*device, *gpus, str(row["optimizer"]), *fused]), 60)


def _commits(rows: pd.DataFrame) -> pd.Series[str]:
    return rows["commit"].fillna("unknown").str.replace(r"^([0-9a-f]{10})[0-9a-f]+", r"\1", regex=True)


def _provenance(rows: pd.DataFrame) -> list[str]:
    """Lines with the commit that was measured, or at which sizes which one was."""
    if rows["commit"].isna().all():
        return []
    commits = _commits(rows)
    if commits.nunique() == 1:
        return [f"commit {printable(commits.iloc[0])}"]
    each = [f"{name}: {', '.join(part['size'].unique())}" for name, part in rows.groupby(commits, sort=False)]
    return [printable(line, 100) for line in textwrap.wrap("commits " + "; ".join(each), 100)]
