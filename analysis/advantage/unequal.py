"""Pairs whose arms differ in compute: if they are far apart, m is that of the joint fit of both arms' curves.

The curves must overlap in compute for that.

Simulated over five sizes at m = 1.33, the paired interval covers .95 where the arms' compute differs by 1.5x, .93 at
2x, .90 at 3x and .77 at 10x, where the error of the law's exponent, which it leaves out, dominates. The interval of the
joint fit covers .99 at 3x and .94 at 10x, and is half as wide again.
"""

from __future__ import annotations

import math

import numpy as np

from analysis.advantage.answers import Answer, Multiplier
from analysis.advantage.joint import Interval, aicc, joint_interval
from analysis.advantage.pairs import Pairs
from analysis.errors import Refusal

MENTIONED_RATIO = 1.1  # ratio of compute within a pair above which the status mentions it
JOINT_FIT_RATIO = 2.0  # ratio above which the joint fit of the curves is used if it is possible
LARGEST_PAIRED_RATIO = 3.0  # ratio above which the paired estimator is not used, even if the joint fit is impossible
REQUIRED_OVERLAP = 3.0  # ratio of largest to smallest compute over which both curves must have at least two sizes


def apart(pairs: Pairs) -> float:
    """The largest ratio of compute, at least 1, within a pair."""
    return float(np.exp(np.abs(np.log(pairs.c1 / pairs.c0)).max()))


def remark(pairs: Pairs) -> str | None:
    """A remark if pairs differ in compute by more than MENTIONED_RATIO, else None."""
    ratio = apart(pairs)
    return f"pairs are up to {ratio:.3g}x apart in compute" if ratio > MENTIONED_RATIO else None


def far_apart(pairs: Pairs, stated: bool) -> Multiplier | None:
    """The multiplier by the joint fit, for pairs whose compute differs by more than JOINT_FIT_RATIO; None for others.

    If the joint fit is impossible, also None up to LARGEST_PAIRED_RATIO, and raises Refusal above it.
    """
    ratio = apart(pairs)
    if ratio <= JOINT_FIT_RATIO:
        return None
    try:
        return of_curves(pairs, stated)
    except Refusal:
        if ratio > LARGEST_PAIRED_RATIO:
            raise
        return None


def of_curves(pairs: Pairs, stated: bool) -> Multiplier:
    """m by the joint fit of both curves, E and exponent shared, with its likelihood-profile interval.

    Raises Refusal if the curves do not overlap by REQUIRED_OVERLAP with two sizes of each arm, or if the fit gives no
    interval, as with fewer than three sizes.
    """
    low, high = max(pairs.c0.min(), pairs.c1.min()), min(pairs.c0.max(), pairs.c1.max())
    inside = [int(((low / 1.01 <= c) & (c <= high * 1.01)).sum()) for c in (pairs.c0, pairs.c1)]
    gap = f"pairs of {pairs.arm} and {pairs.baseline} are up to {apart(pairs):.3g}x apart in compute"
    if high < REQUIRED_OVERLAP * low or min(inside) < 2:
        shared = f"share {high / low:.3g}x of compute" if high > low else "share no compute"
        raise Refusal(
            f"{gap}, and their curves {shared} ({REQUIRED_OVERLAP:g}x with two sizes of each are needed); train both "
            f"over the same compute{_units(pairs)}"
        )
    m, ci = joint_interval(pairs) or (math.nan, None)
    if ci is None:
        raise Refusal(
            f"{gap}, and the joint fit of their curves gives m no interval; train three sizes over the same compute"
        )

    def interval_at(level: float) -> Interval:
        at_level = (joint_interval(pairs, level) or (m, None))[1]
        assert at_level is not None
        return at_level

    laws = aicc(pairs)
    remarks = [f"{gap}, so m is that of the two fitted curves, which share {high / low:.3g}x of compute"]
    if ci[0] <= 1 <= ci[1]:
        remarks.insert(0, "not resolved: the interval holds 1")
    if laws and min(laws, key=laws.__getitem__) != "shared":
        remarks.append("not constant: the curves differ in more than compute by AICc")
    if stated:
        remarks.append("E is fitted, not the stated one")
    return Multiplier(
        arm=pairs.arm,
        baseline=pairs.baseline,
        m=m,
        ci=ci,
        interval_at=interval_at,
        method="two curves where they share compute",
        m_at_cmax=m,
        m_at_cmax_ci=ci,
        convention=pairs.convention,
        n_sizes=len(pairs.sizes),
        n_seeds=min(pairs.seeds),
        status="; ".join(remarks),
        excluded=pairs.excluded,
        joint=Answer(m, ci),
        aicc=laws,
        no_clock="pairs of unequal compute have no relative throughput",
        irreducible_loss=math.nan,
        exponent=math.nan,
    )


def _units(pairs: Pairs) -> str:
    """A hint for the message if the ratio is close to a thousand, a million or a billion at every size, so that the
    arms' compute is probably in different units; else ""."""
    for power, name in ((3, "thousands"), (6, "millions"), (9, "billions")):
        if np.all(np.abs(np.abs(np.log10(pairs.c1 / pairs.c0)) - power) < 0.5):
            return f", or give N, D or C of both in one unit (one arm's seem to be in {name})"
    return ""
