"""Intervals of differences of means, for few seeds and for outcomes that may be 0 or 1.

Outcomes of recall tasks are often bimodal: a run solves the task or does not. Student's t interval over seeds is wrong
for them: if 80% of one arm's runs solve a task and 20% of the other's, it covers the difference of mean accuracies in
.70 with 3 seeds and in .88 with 5 (4,000 simulations). Another interval is used for outcomes that are 0 or 1, and for
shares (values between 0 and 1) of which some are near 1 and others are not, or whose differences do not vary. It
combines the Clopper-Pearson intervals of both means as in Newcombe (1998, Statistics in Medicine 17, method 10), and
ignores that seeds are paired. For shares it is conservative: among outcomes between 0 and 1 with a given mean, those
that are 0 or 1 vary most.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import betaincinv, stdtrit

from analysis.laws.solver import Floats

Interval = tuple[float, float]
LEVEL = 0.05
SOLVED, UNSOLVED = 0.9, 0.5  # Shares are bimodal if some are at least SOLVED and others at most UNSOLVED.
NO_SPREAD = 1e-12  # Differences whose standard error is below this share of the values are rounding errors.


def share_interval(mean: float, count: int, level: float = LEVEL) -> Interval:
    """Clopper and Pearson's interval (Biometrika 26, 1934, 404) of a probability, from the mean of `count` outcomes
    that are 0 or 1. `level` is the probability that it misses."""
    k = mean * count
    low = 0.0 if k <= 0 else float(betaincinv(k, count - k + 1, level / 2))
    high = 1.0 if k >= count else float(betaincinv(k + 1, count - k, 1 - level / 2))
    return low, high


def difference_interval(y1: Floats, y0: Floats, level: float = LEVEL) -> tuple[Interval | None, str | None]:
    """(interval of the mean of y1 - y0, how it was computed) for paired y1, y0 [n]. `level` is the probability that it
    misses. (None, None) for a single pair, and for differences that do not vary and are not of shares."""
    if len(y1) < 2:
        return None, None
    both = np.concatenate([y1, y0])
    d = y1 - y0
    error = float(d.std(ddof=1)) / math.sqrt(len(d))
    constant = error <= NO_SPREAD * max(1.0, float(np.abs(both).max()))
    shares = bool(((both >= 0) & (both <= 1)).all())
    bimodal = shares and (both.max() >= SOLVED and both.min() <= UNSOLVED)
    if not (bimodal or constant):
        half = float(stdtrit(len(d) - 1, 1 - level / 2)) * error
        return (float(d.mean()) - half, float(d.mean()) + half), "t over seeds"
    if not shares:
        return None, None
    return _of_shares(float(y1.mean()), float(y0.mean()), len(d), level), "Clopper-Pearson of both means"


def over_sizes(d: Floats, level: float = LEVEL) -> tuple[Interval | None, str | None]:
    """(Student's t interval of the mean of the sizes' differences d [S], how it was computed); (None, None) if they do
    not vary. `level` is the probability that it misses."""
    error = float(d.std(ddof=1)) / math.sqrt(len(d))
    if error <= NO_SPREAD * max(1.0, float(np.abs(d).max())):
        return None, None
    half = float(stdtrit(len(d) - 1, 1 - level / 2)) * error
    return (float(d.mean()) - half, float(d.mean()) + half), f"t over {len(d)} sizes"


def _of_shares(p1: float, p0: float, count: int, level: float) -> Interval:
    """Newcombe's combination of the intervals of two shares into one of p1 - p0."""
    (low1, high1), (low0, high0) = (share_interval(p, count, level) for p in (p1, p0))
    return (
        p1 - p0 - math.hypot(p1 - low1, high0 - p0),
        p1 - p0 + math.hypot(high1 - p1, p0 - low0),
    )
