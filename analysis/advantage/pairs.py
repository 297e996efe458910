"""Pairs the runs of an arm and a baseline: refuses what cannot be compared, and lists runs that are left out.

Runs are paired on size, budget and seed. Several runs of an arm that agree in all three are replicates, and averaged.
Runs of one arm, size and budget that differ in their configuration are refused by name, except in declared [vary] axes
and in the learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from analysis.advantage.budgets import Cell, full_grid
from analysis.advantage.clocks import Rates, rates_of_runs, rates_of_throughput
from analysis.advantage.seeds import NoiseBySize, noise_by_size
from analysis.errors import Refusal
from analysis.laws.solver import Floats
from analysis.logs.schema import AXIS_PREFIX, CONVENTIONS, axis_columns, fact_columns
from analysis.logs.selection import ALIKE, Excluded, excluded_rows, finished, is_rate, some
from analysis.logs.throughput import RUNS_OPTIMIZER

if TYPE_CHECKING:
    import pandas as pd

PAIRED_ON = ["_size", "_budget", "_seed"]  # the columns that runs are paired on
SAME_N = 1.02  # by which N of runs of one size may differ, as 1.3B and 1,312,000,000 do
UNSEEDED = -1  # stands for a missing seed, since not all versions of pandas merge missing keys with each other


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
    differences: tuple[Floats, ...]  # for each size, y0 - y1 of each seed; a single value if seeds are not paired
    rates: Rates  # the arm's speed relative to the baseline
    excluded: tuple[Excluded, ...]
    cells: tuple[Cell, ...] = ()  # every paired size and budget; empty if each size has one budget
    budgets: tuple[str, ...] = ()  # the budgets averaged over, which every size has; empty if each size has one
    # For each size: losses of replicates without a seed (equal arm, size and budget), one array for each group of them.
    replicates: tuple[tuple[Floats, ...], ...] = ()

    @property
    def noise(self) -> NoiseBySize | None:
        """The seed noise of each size, from repeated seeds and replicates; None if nothing was repeated."""
        return noise_by_size(self.c0, self.differences, self.seeds, self.replicates)


def usable(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[Excluded]]:
    """(the finished rows with new columns `_size` and `_seed` on which they are paired, the rows left out).

    Raises Refusal if a row names no arm.
    """
    nameless = runs[runs["arm"].isna()]
    if len(nameless):
        raise Refusal(f"no arm in {some(nameless['run_id'])}; add a column arm, or name it with --columns arm=...")
    done, excluded = finished(runs)
    return done.assign(_size=size_key(done), _seed=done["seed"].astype("Float64").fillna(UNSEEDED)), excluded


def size_key(runs: pd.DataFrame) -> pd.Series:
    """The key by which sizes are paired: the column size, or N if some row lacks a size. Raises Refusal if some row
    then lacks N as well."""
    if runs["size"].notna().all():
        return runs["size"].astype("string")
    if runs["parameters"].notna().all():
        return runs["parameters"].map("{:.12g}".format).astype("string")
    missing = runs.loc[runs["size"].isna() & runs["parameters"].isna(), "run_id"]
    raise Refusal(f"pairs are made on size, else on N, and {some(missing)} has neither; add a column size or N")


def with_axes(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with the values of the sweep's declared [vary] axes appended to `_budget`, so that runs are paired at
    equal values. Learning rates are excepted, since each arm is compared at its own best rate."""
    budget = runs["_budget"]
    for name in axis_columns(map(str, runs)):
        if not is_rate(name) and runs[name].nunique() > 1:
            text = name.removeprefix(AXIS_PREFIX) + " " + runs[name].astype("string").fillna("-")
            budget = budget + budget.map(lambda other: ", " if other else "") + text
    return runs.assign(_budget=budget)


def require_one_configuration(runs: pd.DataFrame) -> None:
    """Raises Refusal where runs of one arm, size and budget differ in N or in their configuration, other than the
    rate."""
    for (arm, size, _), rows in runs.groupby(["arm", "_size", "_budget"]):
        counts = rows.dropna(subset=["parameters"]).sort_values("parameters", kind="stable")
        if len(counts) and counts["parameters"].iloc[-1] > SAME_N * counts["parameters"].iloc[0]:
            ends = " and ".join(f"{row.parameters:.6g} in {row.run_id}" for row in counts.iloc[[0, -1]].itertuples())
            raise Refusal(
                f"runs of {arm} at {size} differ in N ({ends}); name them as different sizes, or choose with --where"
            )
    for name in fact_columns(map(str, runs)):
        if is_rate(name) or name.endswith("seed"):
            continue
        if runs[name].nunique() < 2 or runs.groupby(["arm", "_size", "_budget"])[name].nunique().max() < 2:
            continue
        for (arm, size, _), rows in runs.groupby(["arm", "_size", "_budget"]):
            if rows[name].nunique() > 1:
                values = "; ".join(f"{value}: {some(part['run_id'])}" for value, part in rows.groupby(name))
                raise Refusal(
                    f"runs of {arm} at {size} differ in {name} ({values}); name them as different arms, choose one "
                    "with --where, or declare the axis in the sweep's [vary]"
                )


def averaged(runs: pd.DataFrame) -> list[str]:
    """Lines for the reader on replicates: runs of an arm with the same size, budget and seed, which `pair` averages.

    Rows without a seed are not among them: each counts as a seed of its own, and their number is reported.
    """
    seeded = runs[runs["_seed"] != UNSEEDED]
    repeated = seeded[seeded.duplicated(["arm", *PAIRED_ON], keep=False)]
    return [
        f"runs of {arm} with the same size and seed but another loss are averaged ({some(rows['run_id'])})"
        for arm, rows in repeated.groupby("arm")
    ]


def pair(
    runs: pd.DataFrame,
    arm: str,
    baseline: str,
    convention: str,
    excluded: Iterable[Excluded] = (),
    throughput: pd.DataFrame | None = None,
) -> Pairs:
    """Pair `arm` with `baseline` by size, budget and seed.

    `runs` and `excluded` are the results of `usable`, the runs with their budgets (`budgets.with_budgets`). Measured
    `throughput`, if given, is used instead of the runs' clocks. Raises Refusal if the arms have no pair, or if all
    sizes have the same compute.
    """
    import pandas as pd

    column = CONVENTIONS[convention]
    absent = [name for name in ("clock", "execution", "fused", RUNS_OPTIMIZER, "vocabulary") if name not in runs]
    runs = runs.assign(**dict.fromkeys(absent, pd.Series(pd.NA, index=runs.index, dtype="string")))
    clock = ["device", "gpus", "execution", "fused", "clock", "train_seconds"]
    used = runs[["run_id", "arm", *PAIRED_ON, "loss", "tokens", *clock, RUNS_OPTIMIZER, "vocabulary", column]]
    sides = {name: used[used["arm"] == name] for name in (baseline, arm)}
    both = pd.merge(*(_one_row_a_key(side, column) for side in sides.values()), on=PAIRED_ON, suffixes=("_0", "_1"))
    if both.empty:
        raise Refusal("; ".join(nothing_in_common(sides)))
    matched = set(_keys(both))
    by_cell = {(str(size), str(budget)): rows for (size, budget), rows in both.groupby(PAIRED_ON[:2])}
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
        replicates=_replicates(sides, matched, [str(rows["_size"].iloc[0]) for rows in groups]),
    )
    _require_a_ladder(pairs)
    return pairs


def nothing_in_common(sides: dict[str, pd.DataFrame]) -> tuple[str, str]:
    """(reason, remedy) for two arms without a pair: the first of size, budget and seed in which they share no value."""
    for column, name in (("_size", "size"), ("_budget", "budget"), ("_seed", "seed")):
        of_arm = {arm: set(rows[column]) for arm, rows in sides.items()}
        if not set.intersection(*of_arm.values()):
            shown = {
                arm: ["none" if v == UNSEEDED else f"{v:g}" if name == "seed" else v for v in sorted(values)]
                for arm, values in of_arm.items()
            }
            has = "; ".join(f"{arm} has {some(values)}" for arm, values in shown.items())
            remedy = f"give both the same, in a column {name}"
            if name == "seed":
                remedy += ", or remove that column to compare means over unpaired seeds"
            return f"pairs are made on {name}, and none is in both arms ({has})", remedy
    return "no size, budget and seed together is in both arms", "train both arms at the same ones"


def _one_row_a_key(side: pd.DataFrame, column: str) -> pd.DataFrame:
    """One arm's rows with replicates averaged, and the number of replicates in a new column `_count`.

    An averaged row keeps the run_id and device of its first replicate. If replicates differ in a column that decides
    their clock, or some lack it, the row's clock is "mixed".
    """
    if not side.duplicated(PAIRED_ON).any():
        return side.assign(_count=1)
    means = ["loss", "train_seconds", column]
    groups = side.groupby(PAIRED_ON, sort=False)
    averaged = groups.first().assign(_count=groups.size())
    averaged[means] = groups[means].mean()
    for name in ("device", "execution", "fused", "clock", "gpus"):
        averaged.loc[groups[name].nunique(dropna=False) > 1, "clock"] = "mixed"
    averaged.loc[groups["train_seconds"].count() < groups.size(), "train_seconds"] = np.nan
    return averaged.reset_index()


def _fewest_seeds(rows: pd.DataFrame) -> int:
    """The number of paired seeds at one size, at the budget that has fewest.

    Replicates without a seed count as seeds, as many as the arm with fewer has. Replicates of a numbered seed count
    once.
    """
    counts = rows[["_count_0", "_count_1"]].min(axis=1).where(rows["_seed"].eq(UNSEEDED), 1)
    return int(counts.groupby(rows["_budget"]).sum().min())


def _differences(rows: pd.DataFrame) -> Floats:
    """y0 - y1 of each seed at one size, averaged over its budgets."""
    found: Floats = (rows["loss_0"] - rows["loss_1"]).groupby(rows["_seed"], sort=False).mean().to_numpy(float)
    return found


def _keys(rows: pd.DataFrame) -> list[tuple[str, str, float]]:
    """The size, budget and seed that each row is paired on."""
    return list(zip(rows["_size"], rows["_budget"], rows["_seed"], strict=True))


def _replicates(
    sides: dict[str, pd.DataFrame], matched: set[tuple[str, str, float]], sizes: list[str]
) -> tuple[tuple[Floats, ...], ...]:
    """For each of `sizes`: the sorted losses of each group of runs without a seed that have equal arm, size and budget.

    Runs that repeat a numbered seed share its noise, so they do not show it and are left out.
    """
    found: dict[str, list[Floats]] = {size: [] for size in sizes}
    for side in sides.values():
        repeated = side[side.duplicated(PAIRED_ON, keep=False) & side["_seed"].eq(UNSEEDED)]
        for key, rows in repeated.groupby(PAIRED_ON):
            if key in matched and str(key[0]) in found:
                found[str(key[0])].append(np.sort(rows["loss"].to_numpy(float)))
    return tuple(map(tuple, found.values()))


def _without_partner(sides: dict[str, pd.DataFrame], matched: set[tuple[str, str, float]]) -> Iterator[Excluded]:
    """The runs of each arm that the other arm has no partner for."""
    several = any((side["_budget"] != "").any() for side in sides.values())
    what = "size, budget and seed" if several else "size and seed"
    for side, other in zip(sides.values(), reversed(sides), strict=True):
        if alone := [key not in matched for key in _keys(side)]:
            yield from excluded_rows(side[alone], f"no partner of the same {what} in {other}")


def _off_the_grid(
    sides: dict[str, pd.DataFrame], matched: set[tuple[str, str, float]], sizes: list[str], budgets: list[str]
) -> Iterator[Excluded]:
    """The paired runs outside of the complete grid of sizes and budgets."""
    outside = {key for key in matched if key[0] not in sizes or key[1] not in budgets}
    for side in sides.values() if outside else ():
        rows = side[[key in outside for key in _keys(side)]]
        yield from excluded_rows(rows, "its budget is not one of every size")


def _require_a_ladder(pairs: Pairs) -> None:
    """Raises Refusal if all sizes have the same compute or the same budgets of compute, to which no law of compute can
    be fitted."""
    if len(pairs.sizes) > 1 and pairs.c0.max() <= ALIKE * pairs.c0.min():
        several = len(pairs.budgets) > 1
        same = f"the same {len(pairs.budgets)} budgets of compute" if several else "the same compute"
        raise Refusal(
            f"all {len(pairs.sizes)} sizes have {same} (an isoFLOP grid), so they form no ladder of compute; "
            "`dynconv isoflop` finds the best size at each budget, and --where leaves one size a budget"
        )


def curve(runs: pd.DataFrame, arm: str, convention: str) -> tuple[Floats, Floats]:
    """(compute in FLOPs, loss) of every size of one arm, [S] each, averaged over seeds; `runs` are from `usable`."""
    column = CONVENTIONS[convention]
    means = runs[runs["arm"] == arm].groupby("_size")[[column, "loss"]].mean().sort_values(column)
    return means[column].to_numpy(float), means["loss"].to_numpy(float)
