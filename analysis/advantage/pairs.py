"""Which runs may be compared: refuse what cannot support a claim, leave out and list what has no partner.

Pairs are made on size, budget and seed. Runs of one such cell that no seed tells apart are replicates and averaged;
runs of a size and budget that are configured differently are refused by name, but for declared axes and the learning
rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from analysis.advantage.budgets import ALIKE, Cell, full_grid
from analysis.advantage.clocks import Rates, rates_of_runs, rates_of_throughput
from analysis.laws.solver import Floats
from analysis.logs.schema import AXIS_PREFIX, CONVENTIONS, axis_columns, fact_columns
from analysis.logs.selection import Excluded, excluded_rows, finished, some

if TYPE_CHECKING:
    import pandas as pd

ON = ["_size", "_budget", "_seed"]  # what pairs are made on
UNSEEDED = -1  # in place of a seed; a merge would not match missing with missing on every version


@dataclass(frozen=True)
class Pairs:
    """Paired sizes i = 1..S of a baseline and an arm, seeds and budgets averaged within each; least compute first."""

    arm: str
    baseline: str
    convention: str
    sizes: tuple[str, ...]
    c0: Floats  # [S] the baseline's compute, in FLOPs under `convention`
    c1: Floats  # [S] the arm's
    y0: Floats  # [S] the baseline's loss, nats a token
    y1: Floats  # [S] the arm's
    seeds: tuple[int, ...]  # paired seeds at each size
    differences: tuple[Floats, ...]  # y0 - y1 of each seed, by size; one where seeds are not paired
    rates: Rates  # how fast the arm is beside the baseline
    excluded: tuple[Excluded, ...]
    cells: tuple[Cell, ...] = ()  # with several budgets: every paired size and budget
    budgets: tuple[str, ...] = ()  # those that were averaged, which every size has
    replicates: tuple[Floats, ...] = ()  # losses that no seed tells apart, by arm, size and budget


def usable(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[Excluded]]:
    """The finished rows that pairs can be made of, with what they are paired on in `_size` and `_seed`; and those left
    out."""
    nameless = runs[runs["arm"].isna()]
    if len(nameless):
        raise ValueError(f"no arm in {some(nameless['run_id'])}; add a column arm, or name it with --columns arm=...")
    done, excluded = finished(runs)
    return done.assign(_size=size_key(done), _seed=done["seed"].astype("Float64").fillna(UNSEEDED)), excluded


def size_key(runs: pd.DataFrame) -> pd.Series:
    """What pairs are made on: the size, else N."""
    if runs["size"].notna().all():
        return runs["size"].astype("string")
    if runs["parameters"].notna().all():
        return runs["parameters"].map("{:.12g}".format).astype("string")
    missing = runs.loc[runs["size"].isna() & runs["parameters"].isna(), "run_id"]
    raise ValueError(f"pairs are made on size, else on N, and {some(missing)} has neither; add a column size or N")


def with_axes(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with the values of a sweep's declared axes in `_budget`: runs are paired at equal values. The rate's
    factor is no such axis: each arm has its own best one."""
    budget = runs["_budget"]
    for name in axis_columns(map(str, runs)):
        if not is_rate(name) and runs[name].nunique() > 1:
            text = name.removeprefix(AXIS_PREFIX) + " " + runs[name].astype("string").fillna("-")
            budget = budget + budget.map(lambda other: ", " if other else "") + text
    return runs.assign(_budget=budget)


def is_rate(name: str) -> bool:
    """Whether a column holds a learning rate, of which a run may have several by kind of parameter, or its factor."""
    return name.endswith(("learning_rate", "learning_rate_factor"))


def require_one_configuration(runs: pd.DataFrame) -> None:
    """Raises ValueError where runs of one arm, size and budget differ in their configuration, other than the rate."""
    for name in fact_columns(map(str, runs)):
        if is_rate(name) or name.endswith("seed"):
            continue
        if runs[name].nunique() < 2 or runs.groupby(["arm", "_size", "_budget"])[name].nunique().max() < 2:
            continue
        for (arm, size, _), rows in runs.groupby(["arm", "_size", "_budget"]):
            if rows[name].nunique() > 1:
                values = "; ".join(f"{value}: {some(part['run_id'])}" for value, part in rows.groupby(name))
                raise ValueError(
                    f"runs of {arm} at {size} differ in {name} ({values}); name them as different arms, choose one "
                    "with --where, or declare the axis in the sweep's [vary]"
                )


def pair(
    runs: pd.DataFrame,
    arm: str,
    baseline: str,
    convention: str,
    excluded: Iterable[Excluded] = (),
    throughput: pd.DataFrame | None = None,
) -> Pairs:
    """Pair `arm` with `baseline` by size, budget and seed. `runs` and `excluded` are what `usable` returned, the runs
    with their budgets (`budgets.with_budgets`); measured `throughput` counts before the runs' clocks."""
    import pandas as pd

    column = CONVENTIONS[convention]
    if "clock" not in runs:
        runs = runs.assign(clock=pd.Series(pd.NA, index=runs.index, dtype="string"))
    used = runs[["run_id", "arm", *ON, "loss", "tokens", "device", "gpus", "clock", "train_seconds", column]]
    sides = {name: used[used["arm"] == name] for name in (baseline, arm)}
    both = pd.merge(*(_one_row_a_key(side, column) for side in sides.values()), on=ON, suffixes=("_0", "_1"))
    matched = set(_keys(both))
    by_cell = {(str(size), str(budget)): rows for (size, budget), rows in both.groupby(ON[:2])}
    ends = (f"{column}_0", f"{column}_1", "loss_0", "loss_1")
    cells = [Cell(*key, *(float(rows[name].mean()) for name in ends)) for key, rows in by_cell.items()]
    sizes, budgets = full_grid(cells)
    groups = [pd.concat([by_cell[size, budget] for budget in budgets]) for size in sizes]
    groups.sort(key=lambda rows: rows[f"{column}_0"].mean())
    several = len({cell.budget for cell in cells}) > 1

    def mean(name: str, log: bool = False) -> Floats:
        if len(budgets) == 1:
            return np.array([rows[name].mean() for rows in groups], dtype=float)
        of_cells = [rows.groupby("_budget")[name].mean().to_numpy(float) for rows in groups]
        return np.array([np.exp(np.log(each).mean()) if log else each.mean() for each in of_cells])

    pairs = Pairs(
        arm=arm,
        baseline=baseline,
        convention=convention,
        sizes=tuple(str(rows["_size"].iloc[0]) for rows in groups),
        c0=mean(f"{column}_0", log=True),
        c1=mean(f"{column}_1", log=True),
        y0=mean("loss_0"),
        y1=mean("loss_1"),
        seeds=tuple(_fewest_seeds(rows) for rows in groups),
        differences=tuple(_differences(rows) for rows in groups),
        rates=(
            rates_of_runs(groups, column)
            if throughput is None
            else rates_of_throughput(groups, column, throughput, baseline, arm)
        ),
        excluded=(
            *(item for item in excluded if item.arm in (arm, baseline)),
            *_without_partner(sides, matched),
            *_off_the_grid(sides, matched, sizes, budgets),
        ),
        cells=tuple(cells) if several else (),
        budgets=tuple(budgets) if several else (),
        replicates=tuple(_replicates(sides, matched)),
    )
    _require_a_ladder(pairs)
    return pairs


def _one_row_a_key(side: pd.DataFrame, column: str) -> pd.DataFrame:
    """One arm's rows with replicates averaged; they keep the first name and device."""
    if not side.duplicated(ON).any():
        return side.assign(_count=1)
    means = ["loss", "train_seconds", column]
    groups = side.groupby(ON, sort=False)
    averaged = groups.first().assign(_count=groups.size())
    averaged[means] = groups[means].mean()
    averaged.loc[groups["device"].nunique() > 1, "clock"] = "mixed"
    averaged.loc[groups["clock"].nunique() > 1, "clock"] = "mixed"
    return averaged.reset_index()


def _fewest_seeds(rows: pd.DataFrame) -> int:
    """Of the budgets of one size: paired seeds, or replicates of the arm that has fewer."""
    return int(rows[["_count_0", "_count_1"]].min(axis=1).groupby(rows["_budget"]).sum().min())


def _differences(rows: pd.DataFrame) -> Floats:
    """y0 - y1 of each seed at one size, averaged over its budgets."""
    found: Floats = (rows["loss_0"] - rows["loss_1"]).groupby(rows["_seed"], sort=False).mean().to_numpy(float)
    return found


def _keys(rows: pd.DataFrame) -> list[tuple[str, str, float]]:
    """What each row is paired on."""
    return list(zip(rows["_size"], rows["_budget"], rows["_seed"], strict=True))


def _replicates(sides: dict[str, pd.DataFrame], matched: set[tuple[str, str, float]]) -> Iterator[Floats]:
    """The losses of each arm's paired cells that have several runs which no seed tells apart."""
    for side in sides.values():
        repeated = side[side.duplicated(ON, keep=False)]
        for key, rows in repeated.groupby(ON):
            if key in matched:
                yield np.sort(rows["loss"].to_numpy(float))


def _without_partner(sides: dict[str, pd.DataFrame], matched: set[tuple[str, str, float]]) -> Iterator[Excluded]:
    several = any((side["_budget"] != "").any() for side in sides.values())
    what = "size, budget and seed" if several else "size and seed"
    for side, other in zip(sides.values(), reversed(sides), strict=True):
        if alone := [key not in matched for key in _keys(side)]:
            yield from excluded_rows(side[alone], f"no partner of the same {what} in {other}")


def _off_the_grid(
    sides: dict[str, pd.DataFrame], matched: set[tuple[str, str, float]], sizes: list[str], budgets: list[str]
) -> Iterator[Excluded]:
    outside = {key for key in matched if key[0] not in sizes or key[1] not in budgets}
    for side in sides.values() if outside else ():
        rows = side[[key in outside for key in _keys(side)]]
        yield from excluded_rows(rows, "its budget is not one of every size")


def _require_a_ladder(pairs: Pairs) -> None:
    """Raises ValueError where all sizes have the same computes for budgets: on average none has more than another."""
    if len(pairs.budgets) > 1 and len(pairs.sizes) > 1 and pairs.c0.max() <= ALIKE * pairs.c0.min():
        raise ValueError(
            f"all {len(pairs.sizes)} sizes have the same {len(pairs.budgets)} budgets of compute (an isoFLOP grid), so "
            "they form no ladder of compute; `dynconv isoflop` finds the best size at each budget, and --where leaves "
            "one size a budget"
        )


def curve(runs: pd.DataFrame, arm: str, convention: str) -> tuple[Floats, Floats]:
    """Compute and loss of every size of one arm, [S] each, seeds averaged. `runs` is what `usable` returned."""
    column = CONVENTIONS[convention]
    means = runs[runs["arm"] == arm].groupby("_size")[[column, "loss"]].mean().sort_values(column)
    return means[column].to_numpy(float), means["loss"].to_numpy(float)
