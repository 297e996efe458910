"""Which runs may be compared: refuse what cannot support a claim, leave out and list what has no partner."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from analysis.runlog import CONVENTIONS
from analysis.solver import Floats

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Excluded:
    """A row that was left out."""

    run_id: str
    arm: str
    reason: str


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


def finished(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[Excluded]]:
    """The finished rows, and those left out because they are not.

    Raises ValueError, with the rows at fault, on anything that would make a comparison meaningless.
    """
    status = runs["status"].astype("string").fillna("no status")
    unfinished, done = runs[status != "complete"], runs[status == "complete"]
    excluded = _excluded(unfinished, status[unfinished.index])
    if done.empty:
        stands = ", ".join(status.unique())
        raise ValueError(f"none of {len(runs)} runs has finished, which is status complete; got {stands}")
    if done["loss"].isna().all():
        raise ValueError("the table has no column loss with values; add one, or name it with --columns loss=...")
    require_positive(done, "loss", "loss")
    for name, noun in (
        ("tokenizer_sha256", "tokenizers"),
        ("data_sha256", "data"),
        ("convention", "FLOP conventions"),
    ):
        if name in done and done[name].nunique(dropna=False) > 1:
            groups = done.assign(_of=done[name].astype("string").fillna("unknown")).groupby("_of")
            counts = "; ".join(f"{str(value)[:12]}: {_some(rows['run_id'])}" for value, rows in groups)
            raise ValueError(f"the runs mix {noun} ({counts}) and cannot be compared; split the table")
    return done, excluded


def require_positive(rows: pd.DataFrame, column: str, name: str) -> None:
    """Raises ValueError with the rows at fault unless a column holds positive numbers only."""
    values = rows[column].to_numpy(float, na_value=np.nan)
    wrong = rows[~(np.isfinite(values) & (values > 0))]
    if len(wrong):
        raise ValueError(
            f"{name} must be positive; got {_some(wrong[column])} in {_some(wrong['run_id'])}; "
            "correct these rows, remove them, or mark them unfinished in a column status"
        )


def usable(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[Excluded]]:
    """The finished rows that pairs can be made of, with what they are paired on in `_size`; and those left out."""
    nameless = runs[runs["arm"].isna()]
    if len(nameless):
        raise ValueError(f"no arm in {_some(nameless['run_id'])}; add a column arm, or name it with --columns arm=...")
    done, excluded = finished(runs)
    done = done.assign(_size=size_key(done))
    repeated = done.duplicated(["arm", "_size", "seed"])
    return done[~repeated], excluded + _excluded(done[repeated], "repeats an arm, size and seed")


def without_repeats(done: pd.DataFrame) -> tuple[pd.DataFrame, list[Excluded]]:
    """Finished rows of which no two are the same run: equal in arm, size, N, D, compute and seed and, where arm or seed
    is not known, in the loss. A law needs no pairs, so a size may have several runs that no seed tells apart."""
    same = ["arm", "size", "parameters", "tokens", "seed", *(name for name in CONVENTIONS.values() if name in done)]
    known = done["arm"].notna() & done["seed"].notna()
    repeated = done.duplicated([*same, "loss"]) | (known & done.duplicated(same))
    return done[~repeated], _excluded(done[repeated], "repeats a run")


def _excluded(rows: pd.DataFrame, reason: str | pd.Series) -> list[Excluded]:
    named = rows.assign(_reason=reason, arm=rows["arm"].fillna(""))
    return [Excluded(*map(str, row)) for row in named[["run_id", "arm", "_reason"]].itertuples(index=False)]


def size_key(runs: pd.DataFrame) -> pd.Series:
    """What pairs are made on: the size, else N."""
    if runs["size"].notna().all():
        return runs["size"].astype("string")
    if runs["parameters"].notna().all():
        return runs["parameters"].map("{:.12g}".format).astype("string")
    missing = runs.loc[runs["size"].isna() & runs["parameters"].isna(), "run_id"]
    raise ValueError(f"pairs are made on size, else on N, and {_some(missing)} has neither; add a column size or N")


def choose_convention(runs: pd.DataFrame, wanted: str | None = None) -> str:
    """The convention asked for, else the first of exact, given, 6ND, 6N_nonemb D that the finished rows have.

    Raises ValueError, with the rows at fault, where some of them lack it: another would be chosen in silence.
    """
    done = runs[runs["status"] == "complete"]
    have = [name for name, column in CONVENTIONS.items() if column in done and done[column].notna().any()]
    if wanted is not None and wanted not in CONVENTIONS:
        raise ValueError(f"no FLOP convention {wanted!r}; there are {', '.join(CONVENTIONS)}")
    if wanted is not None and wanted not in have:
        raise ValueError(f"the table lacks {CONVENTIONS[wanted]}; it has compute by {', '.join(have) or 'none'}")
    chosen = wanted or next((name for name in ("exact", "given", "6ND", "6N_nonemb D") if name in have), None)
    if chosen is None:
        raise ValueError("the table has no compute in every row; add a column C in FLOPs, or columns N and D")
    require_positive(done, CONVENTIONS[chosen], "compute")
    return chosen


def choose_baseline(runs: pd.DataFrame, wanted: str | None = None) -> str:
    """The baseline asked for, else the sweep's."""
    arms = sorted(runs["arm"].dropna().unique())
    if wanted is None:
        named = runs["baseline"].dropna().unique()
        if len(named) != 1:
            raise ValueError(f"the table names {len(named)} baselines; choose one of {', '.join(arms)} with --baseline")
        wanted = str(named[0])
    if wanted not in arms:
        raise ValueError(f"no arm {wanted!r} to be the baseline; the arms are {', '.join(arms)}")
    return wanted


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


def _some(values: Iterable[object], most: int = 4) -> str:
    shown = [str(value) for value in values]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")
