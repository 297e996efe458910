"""Cross-checks of the paired estimator: the joint fit's profile interval, AICc, and the wild cluster bootstrap."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
from scipy.special import fdtri

from analysis.advantage.paired import EXPONENTS, Local
from analysis.advantage.pairs import Pairs
from analysis.laws.powerlaw import Points, fit
from analysis.laws.solver import ROUNDING, Floats

Interval = tuple[float, float]

LN_M = (-3.0, 3.0)  # range of ln m that is searched: m from 1/20 to 20
MODELS = {"shared": ("A",), "free exponent": ("A", "alpha"), "free E": ("A", "E")}
DRAWS = 3999
SIGNIFICANCE = 0.05
# Webb's six points (Canadian J. Economics 56, 2023): mean 0, variance 1, and enough of them for few clusters.
WEBB = np.array([-np.sqrt(1.5), -1.0, -np.sqrt(0.5), np.sqrt(0.5), 1.0, np.sqrt(1.5)])


def joint_interval(pairs: Pairs, level: float = SIGNIFICANCE) -> tuple[float, Interval | None] | None:
    """(m of the least-squares fit with E and exponent shared, its profile interval by the F distribution).

    The interval misses m with probability `level`, and is None below three sizes. Values beyond LN_M are returned as 0
    or infinity. The result is None if every m fits equally well, as happens when losses do not fall with compute.

    All points have equal weight, even if the noise differs between sizes, by which the paired estimator weights them.
    The law of both arms is E + a (k C)^-g, with k = m for the arm and 1 for the baseline. The interval contains every m
    at which the smallest residual sum of squares is at most RSS (1 + F / (n - 4)), n = 2 S.
    """
    points = 2 * len(pairs.sizes)
    low, high = LN_M
    for _ in range(4):
        grid = np.linspace(low, high, 101)
        rss = _profile(pairs, grid)
        if (low, high) == LN_M and np.ptp(rss) <= ROUNDING**2 * (pairs.y0**2 + pairs.y1**2).sum():
            return None
        at = int(rss.argmin())
        low, high = grid[max(at - 1, 0)], grid[min(at + 1, 100)]
    best = float(grid[at])
    m = {LN_M[0]: 0.0, LN_M[1]: math.inf}.get(best, math.exp(best))
    if points <= 4:
        return m, None
    limit = rss[at] * (1 + fdtri(1, points - 4, 1 - level) / (points - 4))

    def rejected(ln_m: float) -> bool:
        return bool(_profile(pairs, np.array([ln_m]))[0] > limit)

    return m, (math.exp(_edge(rejected, best, -1e-3)), math.exp(_edge(rejected, best, 1e-3)))


def _edge(rejected: Callable[[float], bool], inside: float, step: float) -> float:
    """The ln m at which a test starts to reject, searched from `inside`, which it accepts, in the direction of `step`.

    Infinite if it is farther away than the width of LN_M; `inside` itself if `step` is 0, as for data without noise.
    """
    if step == 0:
        return inside
    outside = inside + step
    while not rejected(outside):
        if abs(step) > LN_M[1] - LN_M[0]:
            return math.copysign(math.inf, step)
        step *= 2
        inside, outside = outside, inside + step
    for _ in range(40):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
    return inside


def _profile(pairs: Pairs, ln_m: Floats) -> Floats:
    """The smallest residual sum of squares [M] over E, a and g, at each ln m [M]."""
    log_c = np.log(np.concatenate([pairs.c0, pairs.c1]))
    log_c -= log_c.mean()
    y = np.concatenate([pairs.y0, pairs.y1])
    arm = np.repeat([0.0, 1.0], len(pairs.sizes))
    low = np.full(len(ln_m), math.log(EXPONENTS[0]))
    high = np.full(len(ln_m), math.log(EXPONENTS[1]))
    for _ in range(3):
        grid = np.linspace(low, high, 40, axis=1)
        x = np.exp(-np.exp(grid)[:, :, None] * (log_c + arm * ln_m[:, None, None]))
        x_mean, y_mean = x.mean(axis=2, keepdims=True), y.mean()
        a = ((x - x_mean) * (y - y_mean)).sum(axis=2) / ((x - x_mean) ** 2).sum(axis=2)
        E = y_mean - a * x_mean[:, :, 0]
        a, E = np.maximum(a, 0), np.where(a < 0, y_mean, E)
        from_zero = (x * y).sum(axis=2) / (x * x).sum(axis=2)  # the fit with E at its lower bound, 0
        a, E = np.where(E < 0, from_zero, a), np.maximum(E, 0)
        rss = ((y - E[:, :, None] - a[:, :, None] * x) ** 2).sum(axis=2)
        best = rss.argmin(axis=1)
        rows = np.arange(len(ln_m))
        low, high = grid[rows, np.maximum(best - 1, 0)], grid[rows, np.minimum(best + 1, 39)]
    return rss.min(axis=1)


def aicc(pairs: Pairs) -> dict[str, float] | None:
    """AICc of the least-squares fit of each of MODELS (lower is better); None if there are too few points."""
    count = 2 * len(pairs.sizes)
    points = Points(
        loss=np.concatenate([pairs.y0, pairs.y1]),
        x={"C": np.concatenate([pairs.c0, pairs.c1])},
        arm=(pairs.baseline,) * len(pairs.sizes) + (pairs.arm,) * len(pairs.sizes),
        cluster=pairs.sizes * 2,
        baseline=pairs.baseline,
    )
    found = {}
    for name, per_arm in MODELS.items():
        k = 4 + len(per_arm)  # E, two amplitudes, exponent, noise; one more for a second free parameter
        if count - k - 1 < 1:
            return None
        rss = fit(points, "c", delta=None, per_arm=per_arm, starts=200, polished=6).objective
        found[name] = count * math.log(max(rss, 1e-300) / count) + 2 * k + 2 * k * (k + 1) / (count - k - 1)
    return found


def wild_cluster_interval(local: Local, seed: int = 0) -> Interval:
    """95% interval of m by the restricted wild cluster bootstrap-t: all m that its test does not reject at 5%.
    "Restricted" means that the null hypothesis is imposed on the resamples.

    To test a value of ln m, the deviations of the local values from it are multiplied by random weights, one of Webb's
    six for each size; the value is rejected if the observed t is among the 5% most extreme. Coverage simulated at
    m = 1.05 to 2 (tests/test_multiplier.py): .99 at three sizes, .97 at four, .93 at five, .93 to .95 at six. The
    unrestricted bootstrap, with deviations from the estimate, covers .87 at three, .90 at four and .91 at five. With
    Rademacher's two weights, the restricted one cannot reject any value below six sizes, so its interval is infinite.
    """
    values, weight, sizes = local.ln_m[0], local.weight[0], len(local.ln_m[0])
    if len(WEBB) ** sizes // 2 <= DRAWS:  # Enumerate all patterns up to their sign, since opposites have the same |t|.
        signs = np.array(list(itertools.product(WEBB[:3], *[WEBB] * (sizes - 1))))
    else:
        signs = np.random.default_rng(seed).choice(WEBB, (DRAWS, sizes))
    middle, error = float(local.mean[0]), float(local.error[0])

    def rejected(ln_m: float) -> bool:
        draws = signs * (values - ln_m)
        mean = draws @ weight
        spread = ((draws - mean[:, None]) ** 2) @ weight / (sizes - 1)
        # Compare products, not ratios: a pattern of equal weights has zero spread, so its t is infinite.
        farther = np.abs(mean) * error >= abs(middle - ln_m) * np.sqrt(spread) * (1 - ROUNDING)
        return float(farther.mean()) <= SIGNIFICANCE

    return math.exp(_edge(rejected, middle, -error)), math.exp(_edge(rejected, middle, error))
