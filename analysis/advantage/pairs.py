"""Which runs may be compared: refuse what cannot support a claim, leave out and list what has no partner."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from analysis.laws.solver import Floats
from analysis.logs.schema import CONVENTIONS
from analysis.logs.selection import Excluded, excluded_rows, finished, some

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Pairs:
    """Paired sizes i = 1..S of a baseline and an arm, seeds averaged within a size, smallest compute first."""

    arm: str
    baseline: str
    convention: str
    sizes: tuple[str, ...]
    c0: Floats  # [S] the baseline's compute, in FLOPs under `convention`
    c1: Floats  # [S] the arm's
    y0: Floats  # [S] the baseline's loss, nats a token
    y1: Floats  # [S] the arm's
    seeds: tuple[int, ...]  # paired seeds at each size
    differences: tuple[Floats, ...]  # y0 - y1 of each seed, by size
    rate_ratio: Floats  # [S] the arm's FLOPs a train second over the baseline's; NaN where not measured or comparable
    gpu_rate_ratio: Floats  # [S] the same for FLOPs a GPU second
    excluded: tuple[Excluded, ...]


def usable(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[Excluded]]:
    """The finished rows that pairs can be made of, with what they are paired on in `_size`; and those left out."""
    nameless = runs[runs["arm"].isna()]
    if len(nameless):
        raise ValueError(f"no arm in {some(nameless['run_id'])}; add a column arm, or name it with --columns arm=...")
    done, excluded = finished(runs)
    done = done.assign(_size=size_key(done))
    repeated = done.duplicated(["arm", "_size", "seed"])
    return done[~repeated], excluded + excluded_rows(done[repeated], "repeats an arm, size and seed")


def size_key(runs: pd.DataFrame) -> pd.Series:
    """What pairs are made on: the size, else N."""
    if runs["size"].notna().all():
        return runs["size"].astype("string")
    if runs["parameters"].notna().all():
        return runs["parameters"].map("{:.12g}".format).astype("string")
    missing = runs.loc[runs["size"].isna() & runs["parameters"].isna(), "run_id"]
    raise ValueError(f"pairs are made on size, else on N, and {some(missing)} has neither; add a column size or N")


def pair(runs: pd.DataFrame, arm: str, baseline: str, convention: str, excluded: Iterable[Excluded] = ()) -> Pairs:
    """Pair `arm` with `baseline` by size and seed. `runs` and `excluded` are what `usable` returned."""
    import pandas as pd

    column = CONVENTIONS[convention]
    mine = [item for item in excluded if item.arm in (arm, baseline)]
    used = runs[["run_id", "arm", "_size", "seed", "loss", "device", "gpus", "train_seconds", column]]
    sides = [used[used["arm"] == name] for name in (baseline, arm)]
    # A table without seeds holds one an arm and size; a merge would not match missing with missing on every version.
    keyed = [side.assign(_seed=side["seed"].astype("Float64").fillna(-1)) for side in sides]
    both = pd.merge(*keyed, on=["_size", "_seed"], suffixes=("_0", "_1"), validate="one_to_one")
    paired = {*both["run_id_0"], *both["run_id_1"]}
    mine += [
        Excluded(str(row.run_id), str(row.arm), f"no partner of the same size and seed in {other}")
        for side, other in zip(sides, (arm, baseline), strict=True)
        for row in side.itertuples()
        if row.run_id not in paired
    ]
    groups = sorted((rows for _, rows in both.groupby("_size")), key=lambda rows: rows[f"{column}_0"].mean())

    def mean(name: str) -> Floats:
        return np.array([rows[name].mean() for rows in groups], dtype=float)

    return Pairs(
        arm=arm,
        baseline=baseline,
        convention=convention,
        sizes=tuple(str(rows["_size"].iloc[0]) for rows in groups),
        c0=mean(f"{column}_0"),
        c1=mean(f"{column}_1"),
        y0=mean("loss_0"),
        y1=mean("loss_1"),
        seeds=tuple(len(rows) for rows in groups),
        differences=tuple((rows["loss_0"] - rows["loss_1"]).to_numpy(float) for rows in groups),
        rate_ratio=np.array([_rate_ratio(rows, column, per_gpu=False) for rows in groups]),
        gpu_rate_ratio=np.array([_rate_ratio(rows, column, per_gpu=True) for rows in groups]),
        excluded=tuple(mine),
    )


def curve(runs: pd.DataFrame, arm: str, convention: str) -> tuple[Floats, Floats]:
    """Compute and loss of every size of one arm, [S] each, seeds averaged. `runs` is what `usable` returned."""
    column = CONVENTIONS[convention]
    means = runs[runs["arm"] == arm].groupby("_size")[[column, "loss"]].mean().sort_values(column)
    return means[column].to_numpy(float), means["loss"].to_numpy(float)


def _rate_ratio(rows: pd.DataFrame, column: str, per_gpu: bool) -> float:
    """The arm's FLOPs a second over the baseline's at one size; NaN unless measured on the same kind of device."""
    devices = {*rows["device_0"], *rows["device_1"]}
    counts = {*rows["gpus_0"], *rows["gpus_1"]}
    if rows[["device_0", "device_1"]].isna().any(axis=None) or len(devices) > 1:
        return np.nan
    rates = []
    for side in ("_0", "_1"):
        seconds = rows["train_seconds" + side].astype(float)
        if per_gpu:
            seconds = seconds * rows["gpus" + side].astype(float)
        elif len(counts) > 1:
            return np.nan
        rates.append((rows[column + side] / seconds).mean() if (seconds > 0).all() else np.nan)
    return float(rates[1] / rates[0])
