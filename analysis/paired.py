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

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from analysis.solver import Floats

EXPONENTS = (0.005, 2.0)
GRID = 48
ZOOMS = 6  # each narrows g by GRID / 4
ROUNDING = 1e-6  # relative noise of losses below which a trend is not looked for: it would be the arithmetic's own
LARGEST = 300.0  # of |ln m|
MOST_SHARE = 0.999  # d / r at most, where an arm would be below the estimated E: its local m is a lower bound then


def ratio(ln_m: float) -> float:
    """exp, kept a finite number: for arms that no compute makes equal ln m can have any size."""
    return math.exp(min(max(float(ln_m), -LARGEST), LARGEST))


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

    c0: Floats  # [S] the baseline's compute, FLOPs
    law: SharedLaw
    law_error: Floats  # [K, 2, 2] covariance of ln g and ln a0
    law_dof: int
    reducible: Floats  # [K, S] r, nats a token
    ln_m: Floats  # [K, S]
    sensitivity: Floats  # [K, S, 2] change of ln_m with ln g and ln a0
    weight: Floats  # [K, S], summing to 1 over S
    mean: Floats  # [K]
    error: Floats  # [K] standard error of the mean

    def interval(self, level: float = 0.95) -> tuple[Floats, Floats]:
        """Ends of the interval of ln m, [K] each.

        The law's error is left out here: to one number it adds little, and coverage is nominal without it; with it,
        it is near .97 (simulated at m = 1.1 to 2 over 100x and 1,000x of compute).
        """
        half = stdtrit(self.ln_m.shape[1] - 1, (1 + level) / 2) * self.error
        return self.mean - half, self.mean + half


def local_multipliers(c0: Floats, c1: Floats, y0: Floats, y1: Floats, floor: float | None = None) -> Local:
    """The paired estimator of losses y0, y1 [K, S] at computes c0, c1 [S], S >= 2."""
    law = shared_law(c0, c1, y0, y1, floor)
    g, log_c0 = law.g[:, None], np.log(c0 / law.unit)
    r0 = law.a0[:, None] * np.exp(-g * log_c0)
    r1 = law.a1[:, None] * np.exp(-g * np.log(c1 / law.unit))
    share = np.minimum((y0 - y1) / r0, MOST_SHARE)
    at_equal_compute = -np.log1p(-share) / g
    ln_m = at_equal_compute + np.log(c0 / c1)
    weight = (g * r0) ** 2
    weight /= weight.sum(axis=1, keepdims=True)
    mean = (weight * ln_m).sum(axis=1)
    spread = (weight * (ln_m - mean[:, None]) ** 2).sum(axis=1)
    by_r = -share / (1 - share) / g
    sensitivity = np.stack([-at_equal_compute - by_r * g * log_c0, by_r], axis=2)
    residual = (y0 - law.E[:, None] - r0 + y1 - law.E[:, None] - r1) / 2
    slopes = [np.ones_like(r0), -g * (r0 * log_c0 + r1 * np.log(c1 / law.unit)) / 2, (r0 + r1) / 2]
    law_error, law_dof = _law_error(slopes[floor is not None :], residual)
    error = np.sqrt(spread / (len(c0) - 1))
    return Local(c0, law, law_error, law_dof, r0, ln_m, sensitivity, weight, mean, error)


def _law_error(slopes: list[Floats], residual: Floats) -> tuple[Floats, int]:
    """Covariance [K, 2, 2] of the last two parameters, and its degrees of freedom, from a fit's slopes and residuals
    [K, S]: of the arms' mean, whose error they share and the differences do not show."""
    jacobian = np.stack(slopes, axis=2)
    dof = max(residual.shape[1] - len(slopes), 1)
    gram = jacobian.transpose(0, 2, 1) @ jacobian
    unit = 1 / np.sqrt(np.einsum("kpp->kp", gram))
    scale = unit[:, :, None] * unit[:, None, :]
    inverse = np.linalg.inv(gram * scale + 1e-12 * np.eye(len(slopes))) * scale
    variance = (residual**2).sum(axis=1) / dof
    return inverse[:, -2:, -2:] * variance[:, None, None], dof


@dataclass(frozen=True)
class Trend:
    """The weighted line of local ln m on ln C, with the law's error in its standard errors."""

    slope: Floats  # [K] change of ln m with ln C
    t: Floats  # [K] slope over its standard error
    at: Floats  # [K] ln m on the line at the asked compute
    error: Floats  # [K] standard error there
    dof: Floats  # [K] degrees of freedom of it, by Welch and Satterthwaite


def trend(local: Local, at: float) -> Trend:
    """The line at compute `at` (FLOPs); S >= 3."""
    x, sizes = np.log(local.c0), len(local.c0)
    middle = (local.weight * x).sum(axis=1, keepdims=True)
    lever = (local.weight * (x - middle) ** 2).sum(axis=1, keepdims=True)
    for_slope = local.weight * (x - middle) / lever  # the slope and the height are linear in the local values
    for_height = local.weight + for_slope * (np.log(at) - middle)
    slope, height = ((part * local.ln_m).sum(axis=1) for part in (for_slope, for_height))
    line = local.mean[:, None] + slope[:, None] * (x - middle)
    spread = (local.weight * (local.ln_m - line) ** 2).sum(axis=1) / (sizes - 2)

    def variances(part: Floats) -> tuple[Floats, Floats]:
        by_law = np.einsum("ks,ksi->ki", part, local.sensitivity)
        law = np.einsum("ki,kij,kj->k", by_law, local.law_error, by_law)
        return spread * (part**2 / local.weight).sum(axis=1), law

    own, law = variances(for_height)
    total = np.maximum(own + law, 1e-300)
    dof = total**2 / np.maximum(own**2 / (sizes - 2) + law**2 / local.law_dof, 1e-300)
    slope_error = np.sqrt(np.maximum(sum(variances(for_slope)), 1e-300))
    return Trend(slope, slope / slope_error, height, np.sqrt(total), np.minimum(dof, sizes))


def constancy_p(c0: Floats, c1: Floats, y0: Floats, y1: Floats, resamples: int, seed: int) -> float:
    """How often a constant m gives a trend of ln m as strong as the one seen, by parametric bootstrap.

    The t distribution would reject too often: E and g are estimated from the same points. Losses y0, y1 [S]; the
    simulated ones have the fitted law with constant m, noise on the differences as the local values show it, and
    noise shared by the arms as the fit's residuals show it.
    """
    sizes = len(c0)
    seen = local_multipliers(c0, c1, y0[None], y1[None])
    strength = abs(float(trend(seen, c0[-1]).t[0]))
    g, r, law = float(seen.law.g[0]), seen.reducible[0], seen.law
    mean = float(seen.mean[0])
    of_difference = (g * r * (seen.ln_m[0] - mean)).std() * np.sqrt(sizes / (sizes - 1))
    if of_difference < ROUNDING * y0.min():
        return 1.0
    fitted1 = float(law.a1[0]) * (c1 / law.unit) ** -g
    residual = (y0 - law.E[0] - r + y1 - law.E[0] - fitted1) / 2
    shared = np.sqrt(max((residual**2).sum() / max(sizes - 3, 1) - of_difference**2 / 4, 0.0))
    random = np.random.default_rng(seed)
    common = shared * random.standard_normal((resamples, sizes))
    half = of_difference / np.sqrt(2)
    simulated0 = law.E[0] + r + common + half * random.standard_normal((resamples, sizes))
    constant = float(law.a0[0]) * (c1 * np.exp(mean) / law.unit) ** -g
    simulated1 = law.E[0] + constant + common + half * random.standard_normal((resamples, sizes))
    null = trend(local_multipliers(c0, c1, simulated0, simulated1), c0[-1])
    return float((1 + (np.abs(null.t) >= strength).sum()) / (1 + resamples))
