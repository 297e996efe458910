"""Sizes that were trained at several budgets: matching the budgets of two arms, and testing whether m depends on them.

A size with several budgets counts as one replicate: its runs share the deviation of that size from the law, and
branches of one trunk share weights. So losses are averaged over the budgets that every size has, as they are over
seeds. If each budget b follows E + a_b C^-g and the budgets are the same multiples of compute at every size, then the
mean over budgets follows a power law with the same E and g. The paired estimator therefore applies to the means, and
its degrees of freedom count sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import stdtr, stdtrit

from analysis.advantage.paired import MOST_SHARE, ratio
from analysis.errors import Refusal
from analysis.laws.solver import Floats, Indices
from analysis.logs.selection import alike

if TYPE_CHECKING:
    import pandas as pd

SLOPE_ERROR = 0.03  # relative error of the shared law's slope at one budget that the test of budgets tolerates
UNITS = {"C": "FLOPs", "D": "tokens", "D/N": "tokens per parameter"}


@dataclass(frozen=True)
class Cell:
    """One size at one budget: compute and loss of both arms, averaged over seeds."""

    size: str
    budget: str
    c0: float  # the baseline's compute, FLOPs
    c1: float  # the arm's
    y0: float  # the baseline's loss, nats a token
    y1: float  # the arm's


def with_budgets(runs: pd.DataFrame, baseline: str, column: str) -> tuple[pd.DataFrame, str | None]:
    """(the runs of two arms with a new column `_budget` on which they are paired, how budgets were matched in words).
    With a single budget at every size, `_budget` is "" and the second value is None.

    A column `budget` that holds text is used as it is. Numbers in it are not used, since arms matched by compute may
    have different ones. Without text, two runs of a size have the same budget if they agree in one of C, D and D/N: the
    one in which most rows of the other arm match the `baseline`. `column` holds the compute. Raises Refusal if no row
    of the other arm matches in any of them.
    """
    stored = runs["budget"].astype("string") if "budget" in runs else None
    if stored is not None and stored.notna().any() and not stored.map(_is_number).all():
        budget = stored.fillna("no budget given")
        several = budget.groupby(runs["_size"]).nunique().max() > 1
        return runs.assign(_budget=budget if several else ""), "as stored" if several else None
    measures = _measures(runs, column)
    size = runs["_size"].to_numpy(str)
    if _most_in_a_cell(runs, alike(measures["C"], runs["arm"].to_numpy(str) + "\n" + size)) == 1:
        return runs.assign(_budget=""), None
    best, groups, matched = "", None, 0
    for name, values in measures.items():
        group = alike(values, size)
        of_baseline = set(zip(size[runs["arm"] == baseline], group[runs["arm"] == baseline], strict=True))
        others = zip(size[runs["arm"] != baseline], group[runs["arm"] != baseline], strict=True)
        shared = sum(cell in of_baseline for cell in others)
        if shared > matched:
            best, groups, matched = name, group, shared
    if groups is None:
        raise Refusal(
            f"sizes have several budgets, and those of the other arm equal {baseline}'s in none of "
            f"{', '.join(measures)}; add a column budget with the same text in runs to be paired"
        )
    return runs.assign(_budget=_names(runs, groups, measures, baseline)), f"taken from equal {best} across arms"


def _is_number(text: str) -> bool:
    try:
        return float(text) > 0
    except (TypeError, ValueError):
        return False


def _most_in_a_cell(runs: pd.DataFrame, group: Indices) -> int:
    """The largest number of different groups within one arm and size."""
    return int(runs.assign(_group=group).groupby(["arm", "_size"])["_group"].nunique().max())


def _measures(runs: pd.DataFrame, column: str) -> dict[str, Floats]:
    """The quantities by which budgets may be matched, [rows] each, leaving out those that some row lacks."""
    measures = {"C": runs[column].to_numpy(float)}
    if (runs["tokens"] > 0).all():
        measures["D"] = runs["tokens"].to_numpy(float)
        if (runs["parameters"] > 0).all():
            measures["D/N"] = measures["D"] / runs["parameters"].to_numpy(float)
    return measures


def _names(runs: pd.DataFrame, groups: Indices, measures: dict[str, Floats], baseline: str) -> list[str]:
    """A name for the budget of every row that sizes can share.

    It is the budget's D/N, D or C, whichever gives the fewest different names over the baseline's sizes. If none of
    these is shared by sizes, it is the budget's rank at its size, counted from the largest.
    """
    table = runs[["arm", "_size"]].assign(_group=groups, **measures)
    cells = table[table["arm"] == baseline].groupby(["_size", "_group"])[list(measures)].mean().reset_index()
    place = cells.groupby("_size")["_group"].rank(ascending=False).astype(int)
    names = ["the largest of each size" if at == 1 else f"number {at} of each size, from the largest" for at in place]
    fewest = len(cells)
    for measure in (name for name in ("D/N", "D", "C") if name in measures):
        values = cells[measure].to_numpy(float)
        across = alike(values, np.full(len(values), ""))
        spread = cells.groupby(across)["_size"].agg(["nunique", "size"])
        if (spread["nunique"] == spread["size"]).all() and len(spread) < fewest:
            fewest = len(spread)
            typical = [float(np.exp(np.log(values[across == at]).mean())) for at in across]
            names = [f"{value:.3g} {UNITS[measure]}" for value in typical]
    known = dict(zip(zip(cells["_size"], cells["_group"], strict=True), names, strict=True))
    return [known.get(cell, "one that the baseline lacks") for cell in zip(runs["_size"], groups, strict=True)]


def full_grid(cells: Sequence[Cell]) -> tuple[list[str], list[str]]:
    """(sizes, budgets) that form a complete grid, in which every size has every budget.

    It consists of the sizes of the budget that most sizes have (on a tie, the one with the larger compute), and of all
    budgets that each of these sizes has.
    """
    sizes_of = {name: {cell.size for cell in cells if cell.budget == name} for name in _budgets(cells)}
    if not sizes_of:
        return [], []
    most = max(sizes_of, key=lambda name: (len(sizes_of[name]), max(c.c0 for c in cells if c.budget == name)))
    budgets = [name for name, sizes in sizes_of.items() if sizes >= sizes_of[most]]
    return sorted(sizes_of[most]), budgets


def _budgets(cells: Sequence[Cell]) -> list[str]:
    """The names of the budgets, in ascending order of their largest compute."""
    largest = {cell.budget: 0.0 for cell in cells}
    for cell in cells:
        largest[cell.budget] = max(largest[cell.budget], cell.c0)
    return sorted(largest, key=lambda name: (largest[name], name))


@dataclass(frozen=True)
class OfBudget:
    """m at one budget, by a law whose E and exponent are shared by all budgets."""

    budget: str
    m: float
    ci: tuple[float, float]  # t over the sizes; 95% unless another level was asked for
    sizes: int


def by_budget(
    cells: Sequence[Cell], E: float, g: float, variance: Mapping[str, float] | None = None, level: float = 0.05
) -> tuple[tuple[OfBudget, ...], float | None]:
    """(m of every budget that has at least two sizes, p-value of the test that all budgets have the same m).

    Each interval misses m with probability `level`. The p-value is None if fewer than two budgets have two sizes in
    common.

    The baseline's amplitude at each budget is fitted by least squares, given the E and exponent g of the law over all
    budgets. For each budget the test takes, size by size, the deviation of ln m from its mean over budgets, and asks by
    a t test over sizes whether these deviations average to zero; p-values are Bonferroni-corrected over the budgets.
    Sizes are weighted as in the paired estimator, by (g r)^2 / v; `variance` holds v by size, in any unit, and a size
    without one gets their mean. Where budgets are 4- to 16-fold apart, the shared law's
    slope at one budget is wrong by some hundredths, which scales all ln m of that budget; so deviations up to
    SLOPE_ERROR times ln m are tolerated. In simulation the test then rejects 0% to 4% of sweeps whose m does not depend
    on the budget (tests/test_budgets.py); without the tolerance, up to three quarters of those with m = 2.
    """
    variance = variance or {}
    typical = float(np.mean(list(variance.values()))) if variance else 1.0
    found = []
    values: dict[str, dict[str, tuple[float, float]]] = {}  # budget -> size -> ln m, weight
    for name in _budgets(cells):
        mine = [cell for cell in cells if cell.budget == name]
        if len(mine) < 2:
            continue
        c0, c1, y0, y1 = (np.array([getattr(cell, key) for cell in mine]) for key in ("c0", "c1", "y0", "y1"))
        x = (c0 / c0[0]) ** -g
        r = max(((y0 - E) * x).sum() / (x * x).sum(), 1e-300) * x
        ln_m = -np.log1p(-np.minimum((y0 - y1) / r, MOST_SHARE)) / g + np.log(c0 / c1)
        weight = (g * r) ** 2 / np.array([variance.get(cell.size, typical) for cell in mine])
        values[name] = {cell.size: (at, w) for cell, at, w in zip(mine, ln_m, weight, strict=True)}
        mean, error = _mean(ln_m, weight)
        half = stdtrit(len(mine) - 1, 1 - level / 2) * error
        found.append(OfBudget(name, ratio(mean), (ratio(mean - half), ratio(mean + half)), len(mine)))
    return tuple(found), _same_p(values)


def _mean(values: Floats, weight: Floats) -> tuple[float, float]:
    """Weighted mean, and its standard error estimated from the spread of the values."""
    share = weight / weight.sum()
    mean = float(share @ values)
    return mean, float(np.sqrt(share @ (values - mean) ** 2 / (len(values) - 1)))


def _same_p(values: dict[str, dict[str, tuple[float, float]]]) -> float | None:
    """The p-value of the test in `by_budget`; `values` are (ln m, weight) by budget and size."""
    if len(values) < 2:
        return None
    sizes = [size for size in next(iter(values.values())) if all(size in by_size for by_size in values.values())]
    if len(sizes) < 2:
        return None
    ln_m = np.array([[by_size[size][0] for size in sizes] for by_size in values.values()])
    weight = np.array([[by_size[size][1] for size in sizes] for by_size in values.values()]).mean(axis=0)
    deviations = ln_m - ln_m.mean(axis=0)
    tolerated = SLOPE_ERROR * abs(_mean(ln_m.mean(axis=0), weight)[0])
    least = 1.0
    tested = deviations if len(deviations) > 2 else deviations[:1]  # of two budgets, deviations are equal and opposite
    for deviation in tested:
        mean, error = _mean(deviation, weight)
        least = min(least, 2 * stdtr(len(sizes) - 1, -max(abs(mean) - tolerated, 0.0) / max(error, 1e-300)))
    return float(min(1.0, least * len(tested)))  # Bonferroni
