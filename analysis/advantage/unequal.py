"""Pairs whose compute differs: far apart, the answer is read off the two fitted curves, where these share compute.

Simulated over five sizes at m = 1.33, the paired interval covers .95 at 1.5x apart, .93 at 2x, .90 at 3x, .77 at 10x,
where the error of the law's exponent outweighs that of the pairs; the curves' interval .99 at 3x and .94 at 10x, and is
wider by half.
"""

from __future__ import annotations

import math

import numpy as np

from analysis.advantage.answers import Answer, Multiplier
from analysis.advantage.joint import aicc, joint_interval
from analysis.advantage.pairs import Pairs

SAID = 1.1  # pairs further apart in compute are told
FAR = 2.0  # beyond, the two curves answer where they can
APART = 3.0  # beyond, they alone
OVERLAP = 3.0  # of compute that both curves must share, with two sizes of each arm in it


def apart(pairs: Pairs) -> float:
    """The largest ratio of compute, at least 1, within a pair."""
    return float(np.exp(np.abs(np.log(pairs.c1 / pairs.c0)).max()))


def remark(pairs: Pairs) -> str | None:
    ratio = apart(pairs)
    return f"pairs are up to {ratio:.3g}x apart in compute" if ratio > SAID else None


def far_apart(pairs: Pairs, stated: bool) -> Multiplier | None:
    """The answer of the two curves for pairs that are FAR apart; None for others, and up to APART where the curves have
    none. Raises ValueError beyond."""
    ratio = apart(pairs)
    if ratio <= FAR:
        return None
    try:
        return of_curves(pairs, stated)
    except ValueError:
        if ratio > APART:
            raise
        return None


def of_curves(pairs: Pairs, stated: bool) -> Multiplier:
    """m by the joint fit of both curves, E and exponent shared, with its likelihood profile's interval.

    Raises ValueError where the curves do not share OVERLAP of compute with two sizes of each, or three sizes are
    lacking.
    """
    low, high = max(pairs.c0.min(), pairs.c1.min()), min(pairs.c0.max(), pairs.c1.max())
    inside = [int(((low / 1.01 <= c) & (c <= high * 1.01)).sum()) for c in (pairs.c0, pairs.c1)]
    told = f"pairs of {pairs.arm} and {pairs.baseline} are up to {apart(pairs):.3g}x apart in compute"
    if high < OVERLAP * low or min(inside) < 2:
        shared = f"share {high / low:.3g}x of compute" if high > low else "share no compute"
        raise ValueError(
            f"{told}, and their curves {shared} ({OVERLAP:g}x with two sizes of each are needed); train both over the "
            f"same compute{_units(pairs)}"
        )
    m, ci = joint_interval(pairs) or (math.nan, None)
    if ci is None:
        raise ValueError(
            f"{told}, and their curves tell no m with an interval; train three sizes over the same compute"
        )
    laws = aicc(pairs)
    remarks = [f"{told}, so m is that of the two fitted curves, which share {high / low:.3g}x of compute"]
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
    """A hint where the ratio of compute is a thousand or a million at every size."""
    for power, name in ((3, "thousands"), (6, "millions"), (9, "billions")):
        if np.all(np.abs(np.abs(np.log10(pairs.c1 / pairs.c0)) - power) < 0.5):
            return f", or give N, D or C of both in one unit (one arm's seem to be in {name})"
    return ""
