"""Cross-checks of the paired estimator: the joint fit's profile interval, AICc, and the wild cluster bootstrap."""

from __future__ import annotations

import itertools
import math

import numpy as np
from scipy.special import fdtri

from analysis.paired import EXPONENTS, Local, ratio
from analysis.pairs import Pairs
from analysis.powerlaw import Points, fit
from analysis.solver import Floats

Interval = tuple[float, float]

LN_M = (-3.0, 3.0)  # m from 1/20 to 20
MODELS = {"shared": ("A",), "free exponent": ("A", "alpha"), "free E": ("A", "E")}
DRAWS = 1999
# Webb's six points (Canadian J. Economics 56, 2023): mean 0, variance 1, and enough of them for few clusters.
WEBB = np.array([-np.sqrt(1.5), -1.0, -np.sqrt(0.5), np.sqrt(0.5), 1.0, np.sqrt(1.5)])


def joint_interval(pairs: Pairs) -> tuple[float, Interval | None]:
    """m of the least-squares fit with E and exponent shared, and its F-profile interval; None below three sizes.

    The law of both arms is E + a (k C)^-g, with k = m for the arm and 1 for the baseline. The interval holds the m
    whose best residual sum of squares is at most RSS (1 + F / (n - 4)), n = 2 S.
    """
    points = 2 * len(pairs.sizes)
    low, high = LN_M
    for _ in range(4):
        grid = np.linspace(low, high, 101)
        rss = _profile(pairs, grid)
        at = int(rss.argmin())
        low, high = grid[max(at - 1, 0)], grid[min(at + 1, 100)]
    best = float(grid[at])
    if points <= 4:
        return math.exp(best), None
    limit = rss[at] * (1 + fdtri(1, points - 4, 0.95) / (points - 4))
    return math.exp(best), (math.exp(_edge(pairs, limit, best, -1)), math.exp(_edge(pairs, limit, best, 1)))


def _edge(pairs: Pairs, limit: float, inside: float, side: int) -> float:
    """Where the profile passes `limit` on one side of ln m = `inside`; infinite if not within LN_M."""
    outside = inside + side * 1e-3
    while _profile(pairs, np.array([outside]))[0] <= limit:
        inside, outside = outside, outside + 2 * (outside - inside)
        if not LN_M[0] <= outside <= LN_M[1]:
            return side * math.inf
    for _ in range(30):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if _profile(pairs, np.array([middle]))[0] <= limit else (inside, middle)
    return inside


def _profile(pairs: Pairs, ln_m: Floats) -> Floats:
    """Least residual sum of squares [M] over E, a and g at each ln m [M]."""
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
        from_zero = (x * y).sum(axis=2) / (x * x).sum(axis=2)  # E has its lower bound at 0
        a, E = np.where(E < 0, from_zero, a), np.maximum(E, 0)
        rss = ((y - E[:, :, None] - a[:, :, None] * x) ** 2).sum(axis=2)
        best = rss.argmin(axis=1)
        rows = np.arange(len(ln_m))
        low, high = grid[rows, np.maximum(best - 1, 0)], grid[rows, np.minimum(best + 1, 39)]
    return rss.min(axis=1)


def aicc(pairs: Pairs) -> dict[str, float] | None:
    """AICc of least-squares fits by MODELS, lower is better; None where points are too few."""
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
        k = 4 + len(per_arm)  # E, two amplitudes, exponent, the noise; one more where something is free
        if count - k - 1 < 1:
            return None
        rss = fit(points, "c", delta=None, per_arm=per_arm, starts=200).objective
        found[name] = count * math.log(max(rss, 1e-300) / count) + 2 * k + 2 * k * (k + 1) / (count - k - 1)
    return found


def wild_cluster_interval(local: Local, seed: int = 0) -> Interval:
    """Interval of m from bootstrapped t: the local values' deviations times one of Webb's weights a size."""
    deviation = local.ln_m[0] - local.mean[0]
    weight, sizes = local.weight[0], len(deviation)
    if 6**sizes <= DRAWS:
        signs = np.array(list(itertools.product(WEBB, repeat=sizes)))
    else:
        signs = np.random.default_rng(seed).choice(WEBB, (DRAWS, sizes))
    draws = signs * deviation
    mean = draws @ weight
    error = np.sqrt(((draws - mean[:, None]) ** 2) @ weight / (sizes - 1))
    t = np.quantile(np.abs(mean) / np.maximum(error, 1e-300), 0.95)
    middle, half = float(local.mean[0]), float(t * local.error[0])
    return ratio(middle - half), ratio(middle + half)
