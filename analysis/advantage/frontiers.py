"""Compute multipliers between isoFLOP frontiers: both arms are compared at their own best size, budget by budget.

A comparison at equal sizes may put each arm off its optimal size; here each arm is at its own. In the paired estimator
(paired.py) budgets take the place of sizes, and the minima of the isoFLOP curves take the place of measured losses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.advantage.answers import Multiplier
from analysis.advantage.clocks import Rates
from analysis.advantage.family import at_once
from analysis.advantage.multiplier import compare
from analysis.advantage.pairs import Pairs
from analysis.errors import Refusal
from analysis.laws.isoflop import SAME_BUDGET, Optimum


def frontier_multipliers(
    optima: Sequence[Optimum], baseline: str, convention: str, seed: int = 0
) -> tuple[list[Multiplier], list[str]]:
    """(every arm's m against the baseline over the budgets at which both have a valid optimum, for each arm without an
    m one line that says why)."""
    good = [item for item in optima if item.status == "ok"]
    found, refused = [], []
    for arm in dict.fromkeys(item.arm for item in optima):
        if arm == baseline:
            continue
        try:
            found.append(compare(_pairs(good, arm, baseline, convention), seed=seed))
        except Refusal as error:
            refused.append(f"{arm}: {error}")
    return at_once(found), refused


def _pairs(good: Sequence[Optimum], arm: str, baseline: str, convention: str) -> Pairs:
    """The optima of an arm and the baseline paired by budget. Raises Refusal if they have fewer than two in common."""
    both = [
        (base, mine)
        for base in good
        for mine in good
        if base.arm == baseline and mine.arm == arm and abs(np.log(mine.compute / base.compute)) < SAME_BUDGET
    ]
    if len(both) < 2:
        raise Refusal(f"{len(both)} budgets at which it and {baseline} have a clear optimum; a multiplier needs two")
    c0, y0 = (np.array([getattr(base, name) for base, _ in both]) for name in ("compute", "loss"))
    c1, y1 = (np.array([getattr(mine, name) for _, mine in both]) for name in ("compute", "loss"))
    unknown = np.full(len(both), np.nan)
    return Pairs(
        arm=arm,
        baseline=baseline,
        convention=convention,
        sizes=tuple(f"{compute:.3g} FLOPs" for compute in c0),
        c0=c0,
        c1=c1,
        y0=y0,
        y1=y1,
        seeds=(1,) * len(both),
        differences=tuple(np.array([difference]) for difference in y0 - y1),
        rates=Rates(unknown, unknown, "isoFLOP optima", "an isoFLOP optimum has no seconds"),
        excluded=(),
    )
