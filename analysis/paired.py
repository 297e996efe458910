"""The paired estimator of a compute multiplier m, for one comparison or for many simulated ones at once.

Both arms follow L = E + a C^-g with E and g shared; at size i the baseline's loss is y0, the arm's y1, the baseline's
reducible loss r = a0 c0^-g, and
    local ln m_i = -ln(1 - (y0 - y1) / r) / g + ln(c0 / c1),
averaged with weights (g r)^2, which undo the spread that equal noise on the differences gives the local values. What
the arms share (data order, seeds, the scale's own luck) drops out of the difference. Interval: t at S - 1 degrees of
freedom on the weighted spread over sizes. Only the sizes enter as replicates: seeds are averaged within a size.

Legend: K comparisons solved at once, S sizes, G values of g.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

from analysis.solver import Floats

EXPONENTS = (0.005, 2.0)
GRID = 48
ZOOMS = 5  # each narrows g by GRID / 4
MOST_SHARE = 0.999  # d / r at most, where an arm would be below the estimated E: its local m is a lower bound then


@dataclass(frozen=True)
class SharedLaw:
    """E and g shared, an amplitude for each arm; compute in units of `unit` FLOPs."""

    E: Floats  # [K] nats a token
    g: Floats  # [K]
    a0: Floats  # [K]
    a1: Floats  # [K]
    rss: Floats  # [K] over the 2 S points
    unit: float


def shared_law(c0: Floats, c1: Floats, y0: Floats, y1: Floats, floor: float | None = None) -> SharedLaw:
    """Least squares of losses y0, y1 [K, S] at computes c0, c1 [S]; `floor` states E instead of fitting it."""
    unit = float(np.exp(np.log(np.concatenate([c0, c1])).mean()))
    log_c0, log_c1 = np.log(c0 / unit), np.log(c1 / unit)
    count = len(y0)
    low, high = np.full(count, np.log(EXPONENTS[0])), np.full(count, np.log(EXPONENTS[1]))
    for _ in range(ZOOMS):
        grid = np.linspace(low, high, GRID, axis=1)  # [K, G]
        rss = _given_exponent(np.exp(grid), log_c0, log_c1, y0, y1, floor)[3]
        best = np.argmin(rss, axis=1)
        rows = np.arange(count)
        low, high = grid[rows, np.maximum(best - 2, 0)], grid[rows, np.minimum(best + 2, GRID - 1)]
    g = np.exp(grid[rows, best])
    E, a0, a1, rss = (part[:, 0] for part in _given_exponent(g[:, None], log_c0, log_c1, y0, y1, floor))
    return SharedLaw(E, g, a0, a1, rss, unit)


def _given_exponent(
    g: Floats, log_c0: Floats, log_c1: Floats, y0: Floats, y1: Floats, floor: float | None
) -> tuple[Floats, Floats, Floats, Floats]:
    """E, a0, a1 and the residual sum of squares, each [K, G], for exponents g [K, G]."""
    sides = [(np.exp(-g[:, :, None] * log_c), y[:, None, :]) for log_c, y in ((log_c0, y0), (log_c1, y1))]
    if floor is None:
        # With the amplitudes projected out, the sum of squares is a parabola in E.
        top, bottom = np.zeros(g.shape), np.full(g.shape, 1e-300)
        for x, y in sides:
            along = x.sum(axis=2) / (x * x).sum(axis=2)
            rest = 1 - along[:, :, None] * x
            top += (rest * y).sum(axis=2)
            bottom += rest.sum(axis=2)
        least = np.minimum(y0.min(axis=1), y1.min(axis=1))[:, None]
        E = np.clip(top / bottom, 0.0, 0.999 * least)
    else:
        E = np.full(g.shape, floor)
    amplitudes, rss = [], np.zeros(g.shape)
    for x, y in sides:
        above = y - E[:, :, None]
        amplitude = (x * above).sum(axis=2) / (x * x).sum(axis=2)
        rss += ((above - amplitude[:, :, None] * x) ** 2).sum(axis=2)
        amplitudes.append(amplitude)
    return E, amplitudes[0], amplitudes[1], rss


@dataclass(frozen=True)
class Local:
    """Local multipliers and their weighted mean."""

    law: SharedLaw
    reducible: Floats  # [K, S] r, nats a token
    ln_m: Floats  # [K, S]
    weight: Floats  # [K, S], summing to 1 over S
    mean: Floats  # [K]
    error: Floats  # [K] standard error of the mean

    def interval(self, level: float = 0.95) -> tuple[Floats, Floats]:
        """Ends of the interval of ln m, [K] each."""
        half = stdtrit(self.ln_m.shape[1] - 1, (1 + level) / 2) * self.error
        return self.mean - half, self.mean + half


def local_multipliers(c0: Floats, c1: Floats, y0: Floats, y1: Floats, floor: float | None = None) -> Local:
    """The paired estimator of losses y0, y1 [K, S] at computes c0, c1 [S], S >= 2."""
    law = shared_law(c0, c1, y0, y1, floor)
    g = law.g[:, None]
    reducible = law.a0[:, None] * (c0 / law.unit) ** -g
    share = np.minimum((y0 - y1) / reducible, MOST_SHARE)
    ln_m = -np.log1p(-share) / g + np.log(c0 / c1)
    weight = (g * reducible) ** 2
    weight /= weight.sum(axis=1, keepdims=True)
    mean = (weight * ln_m).sum(axis=1)
    spread = (weight * (ln_m - mean[:, None]) ** 2).sum(axis=1)
    return Local(law, reducible, ln_m, weight, mean, np.sqrt(spread / (len(c0) - 1)))


@dataclass(frozen=True)
class Trend:
    """The weighted line of local ln m on ln C."""

    slope: Floats  # [K] change of ln m with ln C
    t: Floats  # [K] slope over its standard error
    at: Floats  # [K] ln m on the line at the asked compute
    error: Floats  # [K] standard error there


def trend(local: Local, c0: Floats, at: Floats | float) -> Trend:
    """The line at compute `at` (FLOPs, a number or [K]); S >= 3."""
    x = np.log(c0)
    middle = (local.weight * x).sum(axis=1, keepdims=True)
    lever = (local.weight * (x - middle) ** 2).sum(axis=1)
    slope = (local.weight * (x - middle) * local.ln_m).sum(axis=1) / lever
    line = local.mean[:, None] + slope[:, None] * (x - middle)
    spread = (local.weight * (local.ln_m - line) ** 2).sum(axis=1) / (len(c0) - 2)
    away = np.log(at) - middle[:, 0]
    return Trend(
        slope,
        slope / np.sqrt(np.maximum(spread / lever, 1e-300)),
        local.mean + slope * away,
        np.sqrt(spread * (1 + away**2 / lever)),
    )


def constancy_p(c0: Floats, c1: Floats, y0: Floats, y1: Floats, resamples: int, seed: int) -> float:
    """How often a constant m gives a trend of ln m as strong as the one seen, by parametric bootstrap.

    The t distribution would reject too often: E and g are estimated from the same points. Losses y0, y1 [S]; the
    simulated ones have the fitted law with constant m, noise on the differences as the local values show it, and
    noise shared by the arms as the fit's residuals show it.
    """
    sizes = len(c0)
    seen = local_multipliers(c0, c1, y0[None], y1[None])
    strength = abs(float(trend(seen, c0, c0[-1]).t[0]))
    g, r, law = float(seen.law.g[0]), seen.reducible[0], seen.law
    mean = float(seen.mean[0])
    of_difference = (g * r * (seen.ln_m[0] - mean)).std() * np.sqrt(sizes / (sizes - 1))
    fitted1 = float(law.a1[0]) * (c1 / law.unit) ** -g
    residual = (y0 - law.E[0] - r + y1 - law.E[0] - fitted1) / 2
    shared = np.sqrt(max((residual**2).sum() / max(sizes - 3, 1) - of_difference**2 / 4, 0.0))
    random = np.random.default_rng(seed)
    common = shared * random.standard_normal((resamples, sizes))
    half = of_difference / np.sqrt(2)
    simulated0 = law.E[0] + r + common + half * random.standard_normal((resamples, sizes))
    constant = float(law.a0[0]) * (c1 * np.exp(mean) / law.unit) ** -g
    simulated1 = law.E[0] + constant + common + half * random.standard_normal((resamples, sizes))
    null = trend(local_multipliers(c0, c1, simulated0, simulated1), c0, c0[-1])
    return float((1 + (np.abs(null.t) >= strength).sum()) / (1 + resamples))


def plain_p(t: float, dof: int) -> float:
    """Two-sided p of Student's t."""
    return float(2 * stdtr(dof, -abs(t)))
