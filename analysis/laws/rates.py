"""Compare each arm at its own best learning rate, where runs of one arm, size and budget differ in it.

The best loss is the minimum of the parabola in ln rate through the best rate tried and its two neighbours. Where the
best is the lowest or the highest rate, or one of only two, its measured loss is used and the tuning is "at the edge".
Rates at which training is unstable (all runs fail, seeds scatter far more than elsewhere, or the loss is far above the
best) only bracket the best rate: the parabola describes stable training, and a cliff beside the best would bend it so
much that it promised a loss which no rate gives.
The minimum of several noisy losses is biased low. Where repeated seeds or replicates show the noise, this bias is
simulated about a smooth curve through the losses and added back. The remaining noise of the tuning differs from size to
size, so it is part of the spread over sizes from which the paired estimator takes its interval.

Simulated over five sizes with rates a factor of 2 apart (tests/test_rates.py), coverage is .92 to .98 with 3 or 5 rates
for both arms, or 5 for one and 3 for the other. With 9 against 3 it is .95 to .97, and .89 to .93 without the
correction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from analysis.errors import Refusal
from analysis.laws.solver import Bools, Floats
from analysis.logs.schema import AXIS_PREFIX, axis_columns, fact_columns
from analysis.logs.selection import Excluded, alike, excluded_rows, is_rate, some

if TYPE_CHECKING:
    import pandas as pd

CELL = ["arm", "_size", "_budget"]  # runs that agree in these differ only in learning rate and seed
RATE = "train.learning_rate"
FACTOR = "vary.learning_rate_factor"  # multiple of the ladder's own rate
CLIFF = 0.15  # nats above the best of a size; results/measured/h200/mini-rates: twice the best rate cost up to .06
SCATTER = 5.0  # standard deviations of the usual noise, by which the seeds of one rate may scatter
FAR_OFF = 1.5  # an untuned size whose rate is off by more than this factor gets a remark
DRAWS = 1000  # of the simulated bias, whose standard error is then about a thirtieth of the noise


def best_of(x: Floats, y: Floats) -> tuple[Floats, Floats, Bools]:
    """The best ln rate, the loss there and whether it is bracketed by worse rates, [K] each, given losses y [K, R] at
    ascending ln rates x [R]."""
    rows, at = np.arange(len(y)), y.argmin(axis=1)
    if len(x) < 3:
        return x[at], y[rows, at], np.zeros(len(y), dtype=bool)
    inside = (at > 0) & (at < len(x) - 1)
    middle = np.clip(at, 1, len(x) - 2)
    left, right = x[middle - 1] - x[middle], x[middle + 1] - x[middle]
    below, above = (y[rows, middle + step] - y[rows, middle] for step in (-1, 1))
    # The parabola through (left, below), (0, 0), (right, above) is bend d^2 + slope d.
    bend = (below / left - above / right) / (left - right)
    slope = below / left - bend * left
    usable = inside & (bend > 0)
    shift = np.where(usable, -slope / np.where(usable, 2 * bend, 1), 0.0)
    gain = np.where(usable, slope**2 / np.where(usable, 4 * bend, 1), 0.0)
    return x[at] + shift, y[rows, at] - gain, inside


def excess(x: Floats, y: Floats, sd: Floats, seed: int = 0) -> float:
    """The bias of the loss that `best_of` returns, as a positive number of nats by which it is too low on average,
    given losses y [R] at ln rates x [R] with standard errors sd [R]."""
    if not sd.any():
        return 0.0
    degree = min(2, len(x) - 1) if _bent(x, y) else min(1, len(x) - 1)
    law = np.polynomial.Polynomial.fit(x, y, degree, w=1 / sd)
    smooth = law(x)
    truth = float(law(np.linspace(x[0], x[-1], 201)).min())
    drawn = smooth + sd * np.random.default_rng(seed).standard_normal((DRAWS, len(x)))
    return truth - float(best_of(x, drawn)[1].mean())


def _bent(x: Floats, y: Floats) -> bool:
    """Whether a parabola through all losses opens upwards."""
    return len(x) > 2 and bool(np.polynomial.Polynomial.fit(x, y, 2).convert().coef[2] > 0)


@dataclass(frozen=True)
class Tuned:
    """How the learning rate of one arm was tuned at one size and budget."""

    arm: str
    size: str
    budget: str
    rates: int  # how many were tried
    best: float | None  # the rate at the minimum; the only rate where one was tried
    factor: float | None  # `best` over the ladder's own rate, where the runs record that
    at_edge: bool  # the best of several rates is the lowest or highest tried, or one of two
    given_back: float | None  # nats added to undo the bias of the minimum; None where the noise is not known
    compute: float = field(metadata={"json": False})  # FLOPs, the mean of the runs
    # The lowest and the highest rate tried at which every run learned; where there is none, the best.
    learned: tuple[float, float] = field(metadata={"json": False})
    # Runs at the best rate, and at that of the stable rates which has most.
    runs: tuple[int, int] = field(metadata={"json": False})
    # The quadratic coefficient of loss in ln rate; None where fewer than three stable rates bracket the best.
    bend: float | None = field(default=None, metadata={"json": False})
    off_rule: float | None = None  # where one rate was tried: that rate over the one of the tuned sizes (rate_rule.py)
    cost: float | None = None  # estimated loss of this deviation in nats, from the curvature at the tuned sizes


def at_best_rates(
    runs: pd.DataFrame, rate: str | None, column: str, failed: pd.DataFrame | None = None
) -> tuple[pd.DataFrame, list[Tuned]]:
    """Of each arm, size and budget, the runs at the best of the rates in column `rate`, with their losses shifted so
    that the mean is the loss at the interpolated best rate; and how each was tuned. Where no cell has two rates, the
    runs as they are and an empty list. `column` holds the compute; `failed` are runs that did not learn, whose rates
    are unstable."""
    import pandas as pd

    if rate is None or runs.groupby(CELL)[rate].nunique().max() < 2:
        return runs, []
    runs = runs.assign(_rate=_numbers(runs, rate).map(lambda value: float(f"{value:.6g}")))
    variance = _variance(runs, [*CELL, "_rate"])
    failures = _failed_rates(failed, rate)
    kept, found = [], []
    for (arm, *_), rows in runs.sort_values(["arm", column], kind="stable").groupby(CELL, sort=False):
        failed_there = failures.get((arm, str(rows["size"].iloc[0])), [])
        chosen, tuned = _tune(rows, float(rows[column].mean()), variance, failed_there)
        kept.append(chosen)
        found.append(tuned)
    return pd.concat(kept).sort_index(), found


def for_a_law(
    runs: pd.DataFrame, column: str, failed: pd.DataFrame | None = None
) -> tuple[pd.DataFrame, list[Excluded], list[str]]:
    """Select the finished runs to which a law of loss is fitted: of each arm, size (N, else its name) and compute (in
    `column`, within 10%) those at the best learning rate, as returned by `at_best_rates`. Also returns the other runs,
    and lines for the reader: how rates were chosen, and in what else the runs of one arm, size and compute differ."""
    size = runs["parameters"].astype("string").fillna(runs["size"].astype("string")).fillna("")
    within = (runs["arm"].astype("string") + "\n" + size).to_numpy(str)
    cells = runs.assign(_size=size, _budget=[str(group) for group in alike(runs[column].to_numpy(float), within)])
    names = [*axis_columns(map(str, runs)), *fact_columns(map(str, runs))]
    differing = [
        name
        for name in names
        if not (is_rate(name) or name.endswith("seed")) and cells.groupby(CELL)[name].nunique().max() > 1
    ]
    for name in differing:
        if name.startswith(AXIS_PREFIX):
            cells["_budget"] += " " + cells[name].astype("string").fillna("-")
    rows, tuned = at_best_rates(cells, rate_column(runs), column, failed)
    lines = notes(tuned)
    edges = sum(item.rates > 1 and item.at_edge for item in tuned)
    if edges:
        lines.append(f"the best rate is at the edge of those tried in {edges} of {len(tuned)} sizes and budgets")
    lines += [f"the law goes through runs of one size and compute that differ in {name}" for name in differing]
    others = excluded_rows(runs.drop(rows.index), "its learning rate is not the best of its size")
    return rows[runs.columns], others, lines


def rate_column(runs: pd.DataFrame) -> str | None:
    """The column of learning rates, else that of their factors of the ladder's rate; None without either."""
    return next((name for name in (RATE, FACTOR) if name in runs and runs[name].notna().any()), None)


def _numbers(runs: pd.DataFrame, rate: str) -> pd.Series:
    """The rates as numbers. Raises Refusal with the rows at fault unless all are positive, since a row without a
    rate would otherwise be dropped silently."""
    import pandas as pd

    values = pd.to_numeric(runs[rate], errors="coerce").astype(float)
    wrong = runs.loc[~(values > 0), "run_id"]
    if len(wrong):
        raise Refusal(
            f"some arms were run at several values of {rate}, and {some(wrong)} has none that is positive; correct it, "
            "or leave such rows out with --where"
        )
    return values


def _variance(runs: pd.DataFrame, by: list[str]) -> float | None:
    """The variance of one run's loss, from runs that agree in the columns `by`; None where no two do.

    The groups that scatter more than SCATTER times a robust standard deviation, from the median of their variances,
    count as unstable and are left out.
    """
    from scipy.stats import chi2

    groups = runs.groupby(by)["loss"].agg(["var", "size"])
    groups = groups[groups["size"] > 1]
    if groups.empty:
        return None
    dof = groups["size"] - 1
    usual = float((groups["var"] / (chi2.ppf(0.5, dof) / dof)).median())  # a variance's median is below its mean
    stable = groups["var"] <= SCATTER**2 * usual
    return float((groups["var"] * dof)[stable].sum() / dof[stable].sum())


def _failed_rates(failed: pd.DataFrame | None, rate: str) -> dict[tuple[str, str], list[float]]:
    """The rates at which runs did not learn, by arm and size."""
    if failed is None or failed.empty or rate not in failed:
        return {}
    known = failed[failed[rate].notna()]
    numbers = _numbers(known, rate).map(lambda value: float(f"{value:.6g}"))
    groups = numbers.groupby([known["arm"].astype(str), known["size"].astype(str)])
    return {key: sorted(set(values)) for key, values in groups}


def _stable(x: Floats, y: Floats, unstable: Bools) -> tuple[slice, bool]:
    """The neighbouring rates about the best at which training is stable, as a slice of the ascending ln rates x [R];
    and whether a worse or unstable rate was tried on either side of the best."""
    allowed = ~unstable if not unstable.all() else np.ones(len(x), dtype=bool)
    at = int(np.where(allowed, y, np.inf).argmin())
    allowed &= y <= y[at] + CLIFF
    first, last = at, at
    while first > 0 and allowed[first - 1]:
        first -= 1
    while last < len(x) - 1 and allowed[last + 1]:
        last += 1
    return slice(first, last + 1), 0 < at < len(x) - 1


def _tune(
    rows: pd.DataFrame, compute: float, variance: float | None, failed: Sequence[float]
) -> tuple[pd.DataFrame, Tuned]:
    """The runs of one cell, of a mean `compute`, at the best rate, their losses shifted to the interpolated minimum;
    and how it was tuned. At the rates `failed` some runs did not learn."""
    by_rate = rows.groupby("_rate")["loss"].agg(["mean", "size", "std"])
    by_rate = by_rate.reindex(sorted({*by_rate.index, *failed}))
    arm, size, budget = (str(rows[name].iloc[0]) for name in ("arm", "_size", "_budget"))
    factors = rows[FACTOR].astype(float) if FACTOR in rows else rows["_rate"] * np.nan
    own = float((rows["_rate"] / factors).median()) if factors.notna().all() else None  # the ladder's rate
    tried = len(by_rate)
    if tried < 2:  # a rate at which all runs failed is none to compare at
        only = float(by_rate.index[0])
        single = (len(rows), len(rows))
        return rows, Tuned(arm, size, budget, 1, only, _over(only, own), False, None, compute, (only, only), single)
    good = [float(value) for value in by_rate.index if value not in failed]
    x, y = np.log(by_rate.index.to_numpy(float)), by_rate["mean"].fillna(np.inf).to_numpy(float)
    unstable = by_rate["mean"].isna().to_numpy(bool) | (
        by_rate["std"] > SCATTER * np.sqrt(variance or np.inf)
    ).to_numpy(bool)
    stable, bracketed = _stable(x, y, unstable)
    x, y, by_rate = x[stable], y[stable], by_rate.iloc[stable]
    ln_rate, loss, _ = (part[0] for part in best_of(x, y[None]))
    given_back = None if variance is None else excess(x, y, np.sqrt(variance / by_rate["size"].to_numpy(float)))
    at = int(y.argmin())
    chosen = rows[rows["_rate"] == by_rate.index[at]]
    moved = chosen.assign(loss=chosen["loss"] + (loss + (given_back or 0.0) - y[at]))
    best = float(np.exp(ln_rate))
    inside = bracketed and len(x) > 2
    return moved, Tuned(
        arm=arm,
        size=size,
        budget=budget,
        rates=tried,
        best=best,
        factor=_over(best, own),
        at_edge=not bracketed,
        given_back=given_back,
        compute=compute,
        learned=(min(good, default=best), max(good, default=best)),
        runs=(len(chosen), int(by_rate["size"].max())),
        bend=float(np.polynomial.Polynomial.fit(x, y, 2).convert().coef[2]) if inside else None,
    )


def _over(rate: float | None, own: float | None) -> float | None:
    return None if rate is None or own is None else rate / own


def remarks(used: Sequence[Tuned]) -> Iterator[str]:
    """Warnings about the tuning of both arms of one comparison, at the sizes and budgets that both have: an arm may be
    left out of the largest sizes, and what the other was given there is not compared."""
    arms = list(dict.fromkeys(item.arm for item in used))
    at = {arm: {(item.size, item.budget) for item in used if item.arm == arm} for arm in arms}
    used = [item for item in used if all((item.size, item.budget) in each for each in at.values())]
    for arm in arms:
        edges = list(dict.fromkeys(item.size for item in used if item.arm == arm and item.at_edge))
        if edges:
            where = f"at the edge of those tried at {', '.join(edges)}"
            yield f"the best rate of {arm} is {where}, so a better one may lie beyond"
    for size in dict.fromkeys(item.size for item in used):
        counts = {arm: max(item.rates for item in used if (item.arm, item.size) == (arm, size)) for arm in arms}
        if min(counts.values()) == 1 < max(counts.values()):
            tried = ", ".join(f"{arm} over {count}" for arm, count in counts.items())
            yield f"not tuned alike at {size}: {tried} rate{'s' if max(counts.values()) > 1 else ''}"
    for item in used:
        if item.off_rule is not None and abs(np.log(item.off_rule)) > np.log(FAR_OFF):
            cost = "" if item.cost is None else f" (which costs about {item.cost:.2g} nats)"
            yield f"{item.arm} has one rate at {item.size}, {item.off_rule:.2g}x that of the tuned sizes' rule{cost}"
    if any(item.rates > 1 and item.given_back is None for item in used):
        rates = {item.rates for item in used}
        if len(rates) > 1:
            yield "the best of unequal numbers of rates is not corrected for noise, as there are no repeated seeds"


def untuned(runs: pd.DataFrame, rate: str | None, arm: str, baseline: str) -> list[str]:
    """A line where the arms have one learning rate at each size, and not the same: who chose them, and how well, these
    runs do not show. `runs` are those of both arms; `rate` is the column of the rates."""
    if rate is None:
        return []
    means = runs.groupby(["arm", *CELL[1:]])[rate].mean().astype(float).dropna()
    arms = means.index.get_level_values("arm")
    if not {arm, baseline} <= set(arms):
        return []
    ratios = (means[arm] / means[baseline]).dropna()
    if ratios.empty or bool(np.allclose(ratios, 1, rtol=1e-3)):
        return []
    by = " to ".join(dict.fromkeys(f"{end:.3g}" for end in (ratios.min(), ratios.max())))
    return [
        f"one learning rate for each arm, and not the same: {arm}'s is {by} times {baseline}'s; these runs do not show "
        "which is best for either"
    ]


def notes(tuned: Sequence[Tuned]) -> list[str]:
    """A line that says at which rates each arm is best: as factors of the ladder's rate, else the rates themselves; and
    one with the arms and sizes whose best rate has fewer runs than another."""
    found = []
    for arm in dict.fromkeys(item.arm for item in tuned):
        mine = [item for item in tuned if item.arm == arm and item.rates > 1 and item.best is not None]
        factors = [item.factor for item in mine if item.factor is not None]
        if factors:
            middle = np.exp(np.mean(np.log(factors)))
            found.append(f"{arm} at {middle:.2f}x the ladder's rate ({min(factors):.2g} to {max(factors):.2g})")
        elif mine:
            rates = [item.best for item in mine if item.best is not None]
            found.append(f"{arm} at {min(rates):.2g} to {max(rates):.2g}")
    few = [
        f"{item.arm} at {item.size} ({item.runs[0]} of {item.runs[1]})" for item in tuned if item.runs[0] < item.runs[1]
    ]
    lines = [f"each arm at its own best learning rate: {', '.join(found)}"] if found else []
    if few:
        lines.append(f"fewer runs at the best rate, which alone count, than at another rate: {some(few)}")
    return lines
