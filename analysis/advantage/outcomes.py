"""Compares arms on any metric of the log, such as accuracy on a recall task, by differences of means.

Runs are paired as for the multiplier: on size, budget and seed, each arm at its best learning rate. No law of compute
is fitted. At each size the mean difference over seeds has an interval (shares.py). Over three or more sizes, the mean
of the sizes' differences has Student's t interval, with sizes as replicates, as in the paired estimator of m.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from analysis.advantage.comparable import comparable
from analysis.advantage.mixtures import mixtures
from analysis.advantage.pairs import PAIRED_ON, nothing_in_common, usable
from analysis.advantage.shares import LEVEL, Interval, difference_interval, over_sizes, share_interval
from analysis.advantage.unresolved import UNRESOLVED
from analysis.errors import Refusal
from analysis.laws import rates
from analysis.laws.rates import Tuned, rate_column
from analysis.logs.learning import Unlearned, failed_runs, uncounted, unlearned
from analysis.logs.schema import CONVENTIONS
from analysis.logs.selection import Excluded, choose_baseline, choose_convention, excluded_rows, some

if TYPE_CHECKING:
    import pandas as pd

FEWEST_SIZES = 3  # over which the mean of the sizes' differences gets an interval
ALL_SIZES = "all sizes"


@dataclass(frozen=True)
class Rate:
    """How many of the runs succeeded, and the 95% Clopper-Pearson interval of the share."""

    successes: int
    of: int
    ci: Interval


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One arm's values of a metric at one size and budget, or over all sizes, and their difference from the baseline's.
    Means are over seeds; the difference is over the seeds that both arms have."""

    task: str
    metric: str
    size: str
    budget: str  # "" if each size has one budget
    arm: str
    baseline: str
    seeds: int  # of the arm; over all sizes, at the size with fewest
    mean: float
    median: float
    least: float
    most: float
    difference: float | None = None  # arm less baseline; None for the baseline itself
    ci: Interval | None = None  # 95% interval of the difference
    family_ci: Interval | None = None  # simultaneous 95% interval of `family` differences (Bonferroni)
    family: int = 1  # number of differences at single sizes, or of those over all sizes
    method: str | None = None  # how the interval was computed
    success: Rate | None = None  # of the arm's runs, if the task has a metric "success"
    loss: float | None = None  # mean loss on the same held-out set, nats a target
    status: str = "ok"  # "ok", or why no difference is shown


@dataclass(frozen=True)
class Outcomes:
    """The result of `compare_metric`: a row for each arm and size, the baseline's first, and the runs left out."""

    rows: tuple[Outcome, ...]
    excluded: tuple[Excluded, ...]
    did_not_learn: tuple[Unlearned, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Row:
    """A row whose simultaneous interval is computed later, when the number of differences is known."""

    outcome: Outcome
    interval: Callable[[float], tuple[Interval | None, str | None]] | None = None  # level -> (interval, method)
    no_interval: str = ""  # why `interval` returns None
    failed: Sequence[str] = ()  # remarks on runs of the two arms that did not learn


@dataclass(frozen=True)
class _Part:
    """The comparison on one task."""

    rows: list[_Row]
    excluded: list[Excluded]
    did_not_learn: list[Unlearned]
    notes: list[str]
    refusals: list[str]  # which arms have no difference here, and why


@dataclass(frozen=True)
class _Side:
    """One arm's values: for each (size, budget) a table with a row for each seed.

    Its columns are `value`, and `success` and `loss_beside`, which are NaN if not known.
    """

    arm: str
    cells: dict[tuple[str, str], pd.DataFrame]


def compare_metric(
    runs: pd.DataFrame,
    values: pd.DataFrame,
    everything: pd.DataFrame | None = None,
    *,
    baseline: str | None = None,
    convention: str | None = None,
) -> Outcomes:
    """Every arm against the baseline on one metric, task by task.

    `values` are the final values of the metric (logs.metrics.values_of). `everything` has those of all metrics
    (logs.metrics.final_metrics), of which success and loss on the same held-out set are added to each row. Raises
    Refusal if there is nothing to compare.
    """
    parts = [
        _of_task(runs, mine, _beside(mine, everything), baseline, convention)
        for _, mine in values.groupby("task", sort=False)
    ]
    rows = tuple(_at_once([row for part in parts for row in part.rows]))
    notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
    if not any(row.difference is not None for row in rows):
        refusals = dict.fromkeys(line for part in parts for line in part.refusals)
        raise Refusal("; ".join(refusals) or "the runs hold one arm; a comparison needs another")
    return Outcomes(
        rows,
        tuple(item for part in parts for item in part.excluded),
        tuple(item for part in parts for item in part.did_not_learn),
        notes,
    )


def _beside(mine: pd.DataFrame, everything: pd.DataFrame | None) -> pd.DataFrame:
    """`mine` with the columns `success` and `loss_beside` on the same held-out set.

    A metric on a further held-out set is named METRIC@SET, so these are then success@SET and loss@SET.
    """
    if everything is None:
        return mine.assign(success=np.nan, loss_beside=np.nan)
    task, metric = mine["task"].iloc[0], str(mine["metric"].iloc[0])
    _, at, where = metric.partition("@")
    for column, name in (("success", f"success{at}{where}"), ("loss_beside", f"loss{at}{where}")):
        other = everything[(everything["task"] == task) & (everything["metric"] == name)]
        own = name == metric  # Do not repeat the metric's own value.
        other = other[["run_id", "value"]].rename(columns={"value": column})
        mine = mine.assign(**{column: np.nan}) if own else mine.merge(other, on="run_id", how="left")
    return mine


def _of_task(
    runs: pd.DataFrame, mine: pd.DataFrame, measured: pd.DataFrame, baseline: str | None, convention: str | None
) -> _Part:
    """The comparison on one task.

    All runs trained on the same tasks as those with a value take part, so that a run without a value is reported.
    """
    trained_on = runs["task"].fillna("")
    runs = runs[trained_on.isin(trained_on[runs["run_id"].isin(mine["run_id"])])]
    done, excluded = usable(runs)
    task, metric = str(mine["task"].iloc[0]), str(mine["metric"].iloc[0])
    baseline = choose_baseline(runs, baseline)
    column = CONVENTIONS[choose_convention(runs, convention)]
    name = f"{task}/{metric}" if task else metric
    endless = done[done["run_id"].isin(mine.loc[~np.isfinite(mine["value"]), "run_id"])]
    excluded += excluded_rows(endless, f"its {name} is no finite number")
    absent = done[~done["run_id"].isin(mine["run_id"])]
    excluded += excluded_rows(absent, f"it has no {name}")
    done = done[~done["run_id"].isin([*endless["run_id"], *absent["run_id"]])]
    if alone := _one_sided(done, runs, baseline, name):
        return _Part([], excluded, list(unlearned(runs).values()), [alone], [alone])
    rows: list[_Row] = []
    notes: list[str] = []
    refusals: list[str] = []
    at_rates: dict[Tuned, None] = {}
    failures: dict[str, Unlearned] = {}
    for arm in [name for name in dict.fromkeys(done["arm"]) if name != baseline]:
        two = runs[runs["arm"].isin([baseline, arm])]
        try:
            pair = done[done["arm"].isin([baseline, arm])]
            both, tuned, lines = comparable(pair, arm, baseline, column, failed_runs(runs))
        except Refusal as error:
            notes.append(f"no answer for {arm}: {error}")
            refusals.append(notes[-1])
            continue
        at_rates |= dict.fromkeys(tuned)
        notes += [line for line in lines if line not in rates.notes(tuned)]  # Notes on rates are added at the end.
        notes += [f"{arm} and {baseline}: {remark}" for remark in mixtures(both, arm, baseline)]
        failed = unlearned(two, both, rate_column(both)) if tuned else unlearned(two)
        notes += uncounted(two, failed)
        failures |= failed
        sides = [_side(both, measured, name) for name in (baseline, arm)]
        names = {"task": task, "metric": metric, "baseline": baseline}
        shown = {(row.outcome.size, row.outcome.budget) for row in rows if row.outcome.arm == baseline}
        rows += [_Row(_alone(sides[0], cell, names)) for cell in sides[0].cells if cell not in shown]
        compared = list(_against(sides[1], sides[0], names, [each.remark for each in failed.values()]))
        rows += compared
        if not any(row.interval for row in compared):  # In a table each row's status says so.
            why, remedy = nothing_in_common({each: both[both["arm"] == each] for each in (baseline, arm)})
            if len(without := absent["run_id"][absent["arm"].isin([baseline, arm])]):
                remedy = f"give it to more runs, of which {some(without)} lack it"
            refusals.append(f"no answer for {arm}: of the runs with {name}, {why}; {remedy}")
    return _Part(rows, excluded, list(failures.values()), rates.notes(list(at_rates)) + notes, refusals)


def _one_sided(done: pd.DataFrame, runs: pd.DataFrame, baseline: str, name: str) -> str | None:
    """A line for the reader if the baseline, or every other arm, has no finished run with the metric `name`; else None.

    Also None if there is no other arm at all.
    """
    have, arms = set(done["arm"]), list(dict.fromkeys(runs["arm"]))
    others = [arm for arm in arms if arm != baseline]
    lacking = [baseline] if baseline not in have else [arm for arm in others if arm not in have]
    if not others or (baseline in have and len(lacking) < len(others)):
        return None
    verb = "has" if len(lacking) == 1 else "have"
    return f"no answer for {some(others)}: {some(lacking)} {verb} no {name} in any finished run"


def _side(both: pd.DataFrame, measured: pd.DataFrame, arm: str) -> _Side:
    """One arm's values, smallest size first. Replicates of a seed are averaged."""
    rows = both[both["arm"] == arm].merge(measured[["run_id", "value", "success", "loss_beside"]], on="run_id")
    rows = rows.sort_values("parameters", kind="stable")
    means = rows.groupby(PAIRED_ON, sort=False)[["value", "success", "loss_beside"]].mean().reset_index()
    return _Side(arm, {(str(s), str(b)): part for (s, b), part in means.groupby(PAIRED_ON[:2], sort=False)})


def _alone(side: _Side, cell: tuple[str, str], names: Mapping[str, str]) -> Outcome:
    """One arm's values at one size and budget, without a comparison."""
    part = side.cells[cell]
    value = part["value"].to_numpy(float)
    won = part["success"].dropna().to_numpy(float)
    known = len(won) == len(value)
    return Outcome(
        **names,  # type: ignore[arg-type]
        size=cell[0],
        budget=cell[1],
        arm=side.arm,
        seeds=len(value),
        mean=float(value.mean()),
        median=float(np.median(value)),
        least=float(value.min()),
        most=float(value.max()),
        success=Rate(int(won.sum()), len(won), share_interval(float(won.mean()), len(won))) if known else None,
        loss=float(part["loss_beside"].mean()) if part["loss_beside"].notna().all() else None,
    )


def _against(side: _Side, base: _Side, names: Mapping[str, str], failed: Sequence[str]) -> Iterator[_Row]:
    """An arm's rows at each size and budget, with the difference from the baseline, and then the row over all sizes."""
    alone, differences = [], dict[str, list[float]]()
    for cell, part in side.cells.items():
        row = _alone(side, cell, names)
        alone.append(row)
        paired = part.merge(base.cells.get(cell, part.iloc[:0]), on="_seed", suffixes=("_1", "_0"))
        y1, y0 = (paired[name].to_numpy(float) for name in ("value_1", "value_0"))
        if len(y1) == 0:
            yield _Row(replace(row, status=f"{UNRESOLVED}no run of {base.arm} at this size, budget and seeds"))
            continue
        mean = float((y1 - y0).mean())
        differences.setdefault(cell[0], []).append(mean)
        why = "one seed gives no interval" if len(y1) < 2 else "the differences do not vary"
        yield _Row(replace(row, difference=mean), partial(difference_interval, y1, y0), why, failed)
    if len(differences) >= FEWEST_SIZES:
        d = np.array([np.mean(each) for each in differences.values()])
        values = np.array([row.mean for row in alone])
        row = replace(
            alone[0],
            size=ALL_SIZES,
            budget="",
            seeds=min(row.seeds for row in alone),
            mean=float(values.mean()),
            median=float(np.median(values)),
            least=min(row.least for row in alone),
            most=max(row.most for row in alone),
            success=None,
            loss=None if any(row.loss is None for row in alone) else float(np.mean([row.loss for row in alone])),
            difference=float(d.mean()),
        )
        yield _Row(row, partial(over_sizes, d), "the differences do not vary", failed)


def _at_once(rows: Sequence[_Row]) -> Iterator[Outcome]:
    """The rows with their intervals. Rows at single sizes form one family, rows over all sizes another."""
    for row in rows:
        if row.interval is None:
            yield row.outcome
            continue
        ci, method = row.interval(LEVEL)
        same = [each for each in rows if (each.outcome.size == ALL_SIZES) == (row.outcome.size == ALL_SIZES)]
        family = sum(each.interval is not None and each.interval(LEVEL)[0] is not None for each in same)
        together = row.interval(LEVEL / max(family, 1))[0]
        reasons = list(row.failed)
        if together is None:
            reasons.append(row.no_interval)
        elif together[0] <= 0 <= together[1]:
            reasons.append("the interval holds 0" if family == 1 else f"the interval of all {family} at once holds 0")
        status = UNRESOLVED + "; ".join(reasons) if reasons else "ok"
        yield replace(row.outcome, ci=ci, family_ci=together, family=max(family, 1), method=method, status=status)
