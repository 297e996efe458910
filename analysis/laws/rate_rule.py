"""The learning rate of a size where only one is tried, from the sizes where an arm's best rate was found.

Each arm has its own level of ln rate, and all arms share one slope in ln C. Few sizes are tuned, and each best rate is
noisy: a slope of each arm's own, extrapolated, is farther off than what the arms' slopes differ by (the table "rates
chosen by runs that count" of analysis/README.md). A size at which the best rate is at the edge of those tried does not
count, and no rate goes beyond those at which the arm learned at its largest tuned size. Rates are factors of the
ladder's own where all runs record these, so that the slope is what the ladder lacks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.errors import Refusal
from analysis.laws.rates import FACTOR, RATE, Tuned
from analysis.logs.schema import TRUNK

if TYPE_CHECKING:
    import pandas as pd

CLOSE = 0.02  # by which numbers of a recipe may differ, relative to either: counts of tokens may be rounded
NUMBERS = ("train.batch_tokens", "tokens", "parameters", RATE, FACTOR)  # columns that decide which factor is best
DIGITS = 2  # of the factors that a sweep file gets


@dataclass(frozen=True)
class Level:
    """What the rule takes from one arm."""

    x: float  # mean ln C of the sizes that count
    y: float  # mean ln rate (or ln factor) there
    sizes: tuple[str, ...]  # those that count
    lowest: float  # ln rates between which the rule stays
    highest: float
    bend: float | None  # nats that a rate off the best costs, for each squared e-fold; None where it is not known


@dataclass(frozen=True)
class RateRule:
    """ln rate = y + slope (ln C - x) of each arm, within its bounds."""

    slope: float
    factors: bool  # whether rates are factors of the ladder's own
    levels: Mapping[str, Level]

    def at(self, arm: str, compute: float) -> float | None:
        """The rate (or factor) of an arm at a compute in FLOPs, within the arm's bounds; None for an arm whose best
        rate was found nowhere."""
        if arm not in self.levels:
            return None
        level = self.levels[arm]
        return min(max(self.unbounded(arm, compute), float(np.exp(level.lowest))), float(np.exp(level.highest)))

    def unbounded(self, arm: str, compute: float) -> float:
        """The same where the line goes on beyond the arm's bounds; the arm must have a level."""
        level = self.levels[arm]
        return float(np.exp(level.y + self.slope * (np.log(compute) - level.x)))


def rule_of(tuned: Iterable[Tuned]) -> RateRule | None:
    """The rule by how the arms were tuned; None unless some arm's best rate was found at two sizes."""
    each = list({(item.arm, item.size, item.budget): item for item in tuned if item.rates > 1}.values())
    factors = bool(each) and all(item.factor is not None for item in each)
    arms: dict[str, list[Tuned]] = {}
    for item in each:
        if not item.at_edge:
            arms.setdefault(item.arm, []).append(item)
    levels, top, bottom = {}, 0.0, 0.0
    for arm, found in arms.items():
        x = np.log([item.compute for item in found])
        y = np.log([_value(item, factors) for item in found])
        top += float(((x - x.mean()) * (y - y.mean())).sum())
        bottom += float(((x - x.mean()) ** 2).sum()) if len({item.size for item in found}) > 1 else 0.0
        largest = max((item for item in each if item.arm == arm), key=lambda item: item.compute)
        assert largest.best is not None
        lowest, highest = np.log(np.array(largest.learned) * _value(largest, factors) / largest.best)
        bends = [item.bend for item in found if item.bend is not None]
        sizes = tuple(dict.fromkeys(item.size for item in found))
        bend = max(float(np.mean(bends)), 0.0) if bends else None
        levels[arm] = Level(float(x.mean()), float(y.mean()), sizes, float(lowest), float(highest), bend)
    return RateRule(top / bottom, factors, levels) if bottom else None


def _value(item: Tuned, factors: bool) -> float:
    value = item.factor if factors else item.best
    assert value is not None
    return value


def beside_the_rule(tuned: Sequence[Tuned], rule: RateRule | None) -> list[Tuned]:
    """The same, with `off_rule` and `cost` filled in where a single rate was tried."""
    return [_beside(item, rule) for item in tuned]


def _beside(item: Tuned, rule: RateRule | None) -> Tuned:
    wanted = rule.at(item.arm, item.compute) if rule else None
    own = item.factor if rule and rule.factors else item.best
    if item.rates > 1 or rule is None or wanted is None or own is None:
        return item
    off = float(np.log(own / wanted))
    bend = rule.levels[item.arm].bend
    return replace(item, off_rule=float(np.exp(off)), cost=None if bend is None else bend * off**2)


def factor_rule(tuned: Iterable[Tuned]) -> RateRule:
    """As `rule_of`. Raises Refusal where there is no rule, or none of factors of the ladder's own rate."""
    rule = rule_of(tuned)
    if rule is None:
        raise Refusal("no arm has its best learning rate between worse ones at two sizes; try more rates there")
    if not rule.factors:
        raise Refusal("the runs do not record their factor of the ladder's rate, vary.learning_rate_factor")
    return rule


@dataclass(frozen=True)
class SingleFactor:
    """The factor of the ladder's rate for a size at which one is tried."""

    arm: str
    size: str
    factor: float
    unbounded: float  # what the line says; `factor` is held at the lowest or the highest rate at which the arm learned


def single_factors(rule: RateRule, plan: pd.DataFrame, column: str) -> list[SingleFactor]:
    """The factors of the ladder's rate of every arm of the rule, at every size at which it is planned at one factor
    alone. `plan` has planned runs with arm, size, `factor` and compute in `column`."""
    found = []
    for (arm, size), runs in plan.groupby(["arm", "size"], sort=False):
        compute = float(runs[column].mean())
        factor = rule.at(str(arm), compute)
        if factor is not None and runs["factor"].nunique(dropna=False) == 1:
            both = (float(f"{each:.{DIGITS}g}") for each in (factor, rule.unbounded(str(arm), compute)))
            found.append(SingleFactor(str(arm), str(size), *both))
    return found


def require_same_recipe(runs: pd.DataFrame, plan: pd.DataFrame) -> None:
    """Raises Refusal where runs were trained otherwise than planned ones of the same arm and size: the best factor of
    the ladder's rate goes with that rate, the optimizer, the schedule, the batch and the tokens per parameter. What
    either table does not record is not compared."""
    there = dict(list(_recipes(plan[plan["budget"] != TRUNK]).groupby(["arm", "size"])))
    found: dict[str, str] = {}
    for cell, mine in _recipes(runs).groupby(["arm", "size"], sort=False):
        for name in mine.columns.intersection(there[cell].columns).drop(["arm", "size"]) if cell in there else ():
            ours, theirs = (sorted(each[name].dropna().unique()) for each in (mine, there[cell]))
            if ours and theirs and not _alike(ours, theirs):
                found.setdefault(name, f"{name} {_said(ours)} against {_said(theirs)} ({cell[0]} at {cell[1]})")
    if found:
        raise Refusal(
            f"these runs' best factors are not the sweep's, which trains otherwise: {', '.join(found.values())}; give "
            "runs and a sweep of one recipe, or leave runs out with --where"
        )


def _said(values: list[Any]) -> str:
    return " and ".join(f"{value:.3g}" if isinstance(value, float) else value for value in values)


def _recipes(table: pd.DataFrame) -> pd.DataFrame:
    """Of each run the arm, the size and, by its name in messages, what its best factor goes with."""
    found = table[["arm", "size"]].astype(str)
    for name, column in (("optimizer", "train.optimizer"), ("schedule", "train.schedule")):
        if column in table:
            found[name] = table[column].astype(object).where(table[column].notna(), None)
    numbers = {name: table[name].astype(float) for name in NUMBERS if name in table}
    if "train.batch_tokens" in numbers:
        found["tokens of a batch"] = numbers["train.batch_tokens"]
    if {"tokens", "parameters"} <= set(numbers):
        found["tokens per parameter"] = numbers["tokens"] / numbers["parameters"]
    if RATE in numbers:
        found["learning rate at factor 1"] = numbers[RATE] / numbers.get(FACTOR, 1.0)
    return found


def _alike(ours: list[Any], theirs: list[Any]) -> bool:
    """Whether two sorted lists of values are the same; of numbers, whether their ends are nearly so."""
    if isinstance(ours[0], str):
        return ours == theirs
    return bool(np.allclose([ours[0], ours[-1]], [theirs[0], theirs[-1]], rtol=CLOSE, atol=0))
