"""The paired estimator of a compute multiplier m, for one comparison or for many simulated ones at once.

Both arms follow L = E + a C^-g with E and g shared; at size i the baseline's loss is y0, the arm's y1, the baseline's
reducible loss r = a0 c0^-g, and
    local ln m_i = -ln(1 - (y0 - y1) / r) / g + ln(c0 / c1),
averaged with weights (g r)^2 / v, where v is the variance of y0 - y1 at that size (seeds.py): these are the inverse
variances of the local values. Errors that the arms share (data order, seeds, the deviation of a size from the law)
cancel in the difference. The interval is t's at S - 1 degrees of freedom, from the weighted spread over sizes, as for
random effects in Hartung and Knapp (Statistics in Medicine 20, 2001, 3875) and Sidik and Jonkman (ibid. 21, 2002,
3153); only the ratios of the variances enter. Only sizes count as replicates; seeds are averaged within a size.

Legend: K comparisons solved at once, S sizes, G values of log g.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from analysis.advantage.seeds import NoiseBySize, difference_variance
from analysis.laws.solver import Floats

EXPONENTS = (0.005, 2.0)  # bounds of g
GRID = 48  # number of values of log g in the first, coarse search
FINE = 9  # number of values of log g around the best one in every refinement
ZOOMS = 5  # refinements, each of which narrows the range of log g by a factor of about FINE / 2
REFITS = 3  # refits of the law with a changing m; each brings ln m ten times closer to its limit, at last to .0001
TILTS = (-0.9, 3.0)  # bounds of d ln m / d ln C
LARGEST = 300.0  # bound of |ln m|, so that exp stays finite
MOST_SHARE = 0.999  # bound of (y0 - y1) / r; an arm whose loss is below the estimated E gets a lower bound as local m


def ratio(ln_m: float) -> float:
    """exp(ln_m), clipped to be finite, since ln m is unbounded for arms whose losses no compute would make equal."""
    return math.exp(min(max(float(ln_m), -LARGEST), LARGEST))


@dataclass(frozen=True)
class SharedLaw:
    """A law with E and g shared and an amplitude for each arm; C is compute in units of `unit` FLOPs. The baseline's
    loss is E + a0 C^-g, the arm's E + a1 C^(-g (1 + tilt)), so that m grows as C^tilt."""

    E: Floats  # [K] nats a token
    g: Floats  # [K]
    a0: Floats  # [K]
    a1: Floats  # [K]
    rss: Floats  # [K] over the 2 S points
    unit: float
    tilt: Floats  # [K]


def shared_law(
    c0: Floats, c1: Floats, y0: Floats, y1: Floats, irreducible_loss: float | None = None, tilt: Floats | None = None
) -> SharedLaw:
    """Least-squares fit to losses y0, y1 [K, S] (nats a token) at computes c0, c1 [S] (FLOPs), given `tilt` [K], by
    default 0. `irreducible_loss` is a stated E, which is then not fitted."""
    tilt = np.zeros(len(y0)) if tilt is None else tilt
    unit = float(np.exp(np.log(np.concatenate([c0, c1])).mean()))
    logs = np.log(c0 / unit), (1 + tilt[:, None, None]) * np.log(c1 / unit)
    least = np.minimum(y0.min(axis=1), y1.min(axis=1))[:, None]
    limits = (0 * least, 0.999 * least) if irreducible_loss is None else (np.full_like(least, irreducible_loss),) * 2
    rows = np.arange(len(y0))
    grid = np.tile(np.log(np.geomspace(*EXPONENTS, GRID)), (len(y0), 1))
    for _ in range(ZOOMS):
        rss = _given_exponent(grid, logs, (y0, y1), limits)[3]
        best = np.argmin(rss, axis=1)
        grid = np.linspace(
            grid[rows, np.maximum(best - 1, 0)], grid[rows, np.minimum(best + 1, grid.shape[1] - 1)], FINE, axis=1
        )
    rss = _given_exponent(grid, logs, (y0, y1), limits)[3]
    log_g = _parabola_minimum(grid, rss)
    E, a0, a1, rss = (part[:, 0] for part in _given_exponent(log_g[:, None], logs, (y0, y1), limits))
    return SharedLaw(E, np.exp(log_g), a0, a1, rss, unit, tilt)


def _parabola_minimum(x: Floats, y: Floats) -> Floats:
    """The x [K] of the minimum of each row of y [K, G], given at evenly spaced x [K, G], by the parabola through the
    smallest value and its two neighbours."""
    rows, best = np.arange(len(x)), np.clip(np.argmin(y, axis=1), 1, x.shape[1] - 2)
    below, least, above = (y[rows, best + shift] for shift in (-1, 0, 1))
    bend = below - 2 * least + above
    shift = np.clip(np.where(bend > 0, (below - above) / np.where(bend > 0, 2 * bend, 1), 0), -1, 1)
    return x[rows, best] + shift * (x[:, 1] - x[:, 0])


def _given_exponent(
    log_g: Floats, logs: tuple[Floats, Floats], losses: tuple[Floats, Floats], limits: tuple[Floats, Floats]
) -> tuple[Floats, Floats, Floats, Floats]:
    """(E, a0, a1, residual sum of squares) of the best fit at the exponents exp(log_g), each [K, G], with E within
    `limits`. `logs` are the arms' log computes, which broadcast to [K, G, S]; `losses` are [K, S]."""
    g = np.exp(log_g)[:, :, None]
    middle = losses[0].mean(axis=1, keepdims=True)  # subtracted, to avoid cancellation in the sums of squares
    top, bottom = np.zeros(log_g.shape), np.zeros(log_g.shape)
    sums = []
    for log_c, y in zip(logs, losses, strict=True):
        x, y = np.exp(-g * log_c), y - middle
        x_sum, square, product = x.sum(axis=2), np.einsum("kgs,kgs->kg", x, x), np.einsum("kgs,ks->kg", x, y)
        # With the amplitudes projected out, the sum of squares is a parabola in E.
        top += y.sum(axis=1, keepdims=True) - x_sum / square * product
        bottom += y.shape[1] - x_sum / square * x_sum
        sums.append((x_sum, square, product, y))
    E: Floats = np.clip(middle + top / np.maximum(bottom, 1e-300), *limits)
    amplitudes, rss = [], np.zeros(log_g.shape)
    for x_sum, square, product, y in sums:
        amplitudes.append((product - (E - middle) * x_sum) / square)
        rss += ((y[:, None, :] - (E - middle)[:, :, None]) ** 2).sum(axis=2) - amplitudes[-1] ** 2 * square
    return E, amplitudes[0], amplitudes[1], np.maximum(rss, 0.0)


@dataclass(frozen=True)
class Local:
    """Local multipliers and their weighted mean."""

    c0: Floats  # [S] the baseline's compute, FLOPs
    c1: Floats  # [S] the arm's
    losses: tuple[Floats, Floats]  # [K, S] each
    irreducible_loss: float | None  # the stated irreducible loss; None where E is fitted
    law: SharedLaw
    law_error: Floats  # [K, 2, 2] covariance of ln g and ln a0
    law_dof: int
    reducible: Floats  # [K, S] r, nats a token
    ln_m: Floats  # [K, S]
    sensitivity: Floats  # [K, S, 2] derivatives of ln_m in ln g and ln a0
    noise: NoiseBySize | None  # what repeated seeds show; None where there are none
    variance: Floats  # [K, S] of the loss differences, nats squared, about a constant m
    weight: Floats  # [K, S], summing to 1 over S
    mean: Floats  # [K]
    error: Floats  # [K] standard error of the mean

    def interval(self, level: float = 0.05) -> tuple[Floats, Floats]:
        """Ends of the interval of ln m that misses it with probability `level`, [K] each.

        The error of the fitted law is not included. Simulated on 4 to 6 sizes with 1 and 3 seeds, coverage without it
        is .944 to .954 at m = 1.05 and 1.33, and .93 to .95 at m = 2 (.915 with 6 sizes and an exponent of .3).
        Including it (delta method, Welch's degrees of freedom) changes the width by at most 4% for m up to 1.33
        (coverage .946 to .961), but at m = 2 widens the interval by 8% to 21%, for a coverage of .964 to .978: part of
        this error is already in the spread of the local values. Including only the other part changes nothing over
        100x of compute, and over 1,000x raises the coverage at m = 2 from .942 to .955, for 4% to 6% more width.
        """
        half = stdtrit(self.ln_m.shape[1] - 1, 1 - level / 2) * self.error
        return self.mean - half, self.mean + half


def local_multipliers(
    c0: Floats,
    c1: Floats,
    y0: Floats,
    y1: Floats,
    irreducible_loss: float | None = None,
    noise: NoiseBySize | None = None,
) -> Local:
    """The paired estimator for losses y0, y1 [K, S] (nats a token) at computes c0, c1 [S] (FLOPs), S >= 2, by a law
    with a constant m. Without `noise`, the loss differences of all sizes are taken to be equally noisy."""
    return by_law(shared_law(c0, c1, y0, y1, irreducible_loss), c0, c1, (y0, y1), irreducible_loss, noise)


def changing_multipliers(local: Local) -> Local:
    """The paired estimator by a law in which m changes with compute; S >= 3. The rate of change is the slope of the
    line of local ln m; law and line are refitted in turn until they agree (REFITS times).

    Under the law of a constant m, E and g absorb part of a change. Simulated (5 sizes, 100x of compute), that law's
    ln m at the largest compute is .01 too low where m doubles over six decades of compute, and .06 where it doubles
    over one and a half; its interval covers 95% and 60%. By the law of a changing m the bias is .001, the spread 8% to
    10% larger and the coverage 95% to 97%.
    """
    for _ in range(REFITS):
        tilt = np.clip(trend(local, local.c0[-1]).slope, *TILTS)
        law = shared_law(local.c0, local.c1, *local.losses, local.irreducible_loss, tilt)
        local = of_law(law, local)
    return local


def of_law(law: SharedLaw, like: Local, losses: tuple[Floats, Floats] | None = None) -> Local:
    """The paired estimator for the points of `like`, or for other `losses` [K, S] there, by another law.

    The variances stay those about a constant m. So a change of m counts as scatter, which only brings the weights
    closer to those for equal noise.
    """
    points = like.c0, like.c1, losses or like.losses, like.irreducible_loss
    return by_law(law, *points, like.noise, like.variance)


def by_law(
    law: SharedLaw,
    c0: Floats,
    c1: Floats,
    losses: tuple[Floats, Floats],
    irreducible_loss: float | None,
    noise: NoiseBySize | None,
    variance: Floats | None = None,
) -> Local:
    """The paired estimator given a fitted law; `irreducible_loss` is its E if that was stated, else None. `variance` is
    estimated from the local values if it is not given."""
    y0, y1 = losses
    g, log_c0 = law.g[:, None], np.log(c0 / law.unit)
    log_c1 = (1 + law.tilt[:, None]) * np.log(c1 / law.unit)
    r0 = law.a0[:, None] * np.exp(-g * log_c0)
    r1 = law.a1[:, None] * np.exp(-g * log_c1)
    share = np.minimum((y0 - y1) / r0, MOST_SHARE)
    at_equal_compute = -np.log1p(-share) / g
    ln_m = at_equal_compute + np.log(c0 / c1)
    if variance is None:
        variance = difference_variance(g * r0, ln_m, noise)
    weight = (g * r0) ** 2 / (variance / variance.max(axis=1, keepdims=True))
    weight /= weight.sum(axis=1, keepdims=True)
    mean = (weight * ln_m).sum(axis=1)
    spread = (weight * (ln_m - mean[:, None]) ** 2).sum(axis=1)
    by_r = -share / (1 - share) / g
    sensitivity = np.stack([-at_equal_compute - by_r * g * log_c0, by_r], axis=2)
    residual = (y0 - law.E[:, None] - r0 + y1 - law.E[:, None] - r1) / 2
    slopes = [np.ones_like(r0), -g * (r0 * log_c0 + r1 * log_c1) / 2, (r0 + r1) / 2]
    law_error, law_dof = _law_error(slopes[irreducible_loss is not None :], residual)
    error = np.sqrt(spread / (len(c0) - 1))
    return Local(
        c0=c0,
        c1=c1,
        losses=losses,
        irreducible_loss=irreducible_loss,
        law=law,
        law_error=law_error,
        law_dof=law_dof,
        reducible=r0,
        ln_m=ln_m,
        sensitivity=sensitivity,
        noise=noise,
        variance=variance,
        weight=weight,
        mean=mean,
        error=error,
    )


def _law_error(slopes: list[Floats], residual: Floats) -> tuple[Floats, int]:
    """(covariance [K, 2, 2] of the last two parameters, its degrees of freedom).

    `slopes` are the derivatives of the arms' mean loss in the parameters, and `residual` its residuals, [K, S] each.
    The mean contains the errors that the arms share, which cancel in the differences but do affect the law.
    """
    jacobian = np.stack(slopes, axis=2)
    dof = max(residual.shape[1] - len(slopes), 1)
    gram = jacobian.transpose(0, 2, 1) @ jacobian
    unit = 1 / np.sqrt(np.einsum("kpp->kp", gram))
    scale = unit[:, :, None] * unit[:, None, :]
    inverse = np.linalg.inv(gram * scale + 1e-12 * np.eye(len(slopes))) * scale
    variance = (residual**2).sum(axis=1) / dof
    return inverse[:, -2:, -2:] * variance[:, None, None], dof


def seed_noise(local: Local) -> Floats | None:
    """The smallest |ln m| [K] that is significant at 95% against seed noise alone; None without repeated seeds."""
    if local.noise is None:
        return None
    slope = local.law.g[:, None] * local.reducible  # derivative of the loss difference in ln m
    error = np.sqrt((local.weight**2 * local.noise.variance / slope**2).sum(axis=1))
    return stdtrit(local.noise.dof, 0.975) * error


@dataclass(frozen=True)
class Trend:
    """The weighted regression line of local ln m on ln C; its standard errors include the error of the law."""

    slope: Floats  # [K] change of ln m with ln C
    slope_error: Floats  # [K] its standard error
    t: Floats  # [K] slope over its standard error
    at: Floats  # [K] ln m on the line at the requested compute
    error: Floats  # [K] standard error of `at`
    dof: Floats  # [K] degrees of freedom of `error`, by Welch and Satterthwaite

    def estimate(self) -> tuple[Floats, Floats, Floats]:
        """ln m at the requested compute and the ends of its 95% interval, [K] each."""
        half = stdtrit(self.dof, 0.975) * self.error
        return self.at, self.at - half, self.at + half


def trend(local: Local, at: float, at_least_seeds: bool = False) -> Trend:
    """The weighted regression line, evaluated at compute `at` (FLOPs); S >= 3. With `at_least_seeds`, the variances of
    slope and height are at least those due to seed noise."""
    x, sizes = np.log(local.c0), len(local.c0)
    middle = (local.weight * x).sum(axis=1, keepdims=True)
    lever = (local.weight * (x - middle) ** 2).sum(axis=1, keepdims=True)
    for_slope = local.weight * (x - middle) / lever  # the slope and the height are linear in the local values
    for_height = local.weight + for_slope * (np.log(at) - middle)
    slope, height = ((part * local.ln_m).sum(axis=1) for part in (for_slope, for_height))
    line = local.mean[:, None] + slope[:, None] * (x - middle)
    spread = (local.weight * (local.ln_m - line) ** 2).sum(axis=1) / (sizes - 2)

    def variances(part: Floats) -> tuple[Floats, Floats, Floats]:
        by_law = np.einsum("ks,ksi->ki", part, local.sensitivity)
        law = np.einsum("ki,kij,kj->k", by_law, local.law_error, by_law)
        own, dof = spread * (part**2 / local.weight).sum(axis=1), np.full_like(spread, sizes - 2)
        if at_least_seeds and local.noise is not None:
            own, dof = local.noise.at_least(own, dof, part / (local.law.g[:, None] * local.reducible))
        return own, law, dof

    own, law, own_dof = variances(for_height)
    total = np.maximum(own + law, 1e-300)
    # Use shares of the total, since squares of small variances underflow. Arms with equal losses have no variance.
    by_share = (own / total) ** 2 / own_dof + (law / total) ** 2 / local.law_dof
    dof = 1 / np.maximum(by_share, 1 / sizes)
    slope_error = np.sqrt(np.maximum(sum(variances(for_slope)[:2]), 1e-300))
    return Trend(slope, slope_error, slope / slope_error, height, np.sqrt(total), dof)
