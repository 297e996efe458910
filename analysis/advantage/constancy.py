"""Is m the same at every compute? A test of it, bounds on the change, and a test of correlated errors between sizes.

A test that does not reject is no evidence of constancy: with few sizes it detects only large changes. So m is called
constant only if the interval of its change is small (`change_bounds`), as in equivalence testing.

Legend: K comparisons at once, S sizes.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import stdtrit

from analysis.advantage.paired import Local, local_multipliers, trend
from analysis.advantage.seeds import NoiseBySize
from analysis.laws.solver import Bools, Floats, Indices

SIGNIFICANCE = 0.05  # level of the test that m is constant
NEGLIGIBLE = 0.05  # m is called constant if m at the largest compute is within this share of the mean m
ROUNDING = 1e-6  # relative noise of losses below which no trend is tested: it would be floating-point rounding
BLOCK = 20  # resamples drawn between two checks of whether the p-value is already decided
TOGETHER = 4000  # laws fitted in one batch, small enough for a processor's cache
NULL_DRAWS = 20_000  # simulated draws of the test that errors are independent over sizes
FEWEST_FOR_CORRELATION = 5  # sizes; with four, two residual degrees of freedom say nothing about correlation


def constancy_p(
    c0: Floats,
    c1: Floats,
    y0: Floats,
    y1: Floats,
    resamples: int,
    seed: int,
    until: float = 2.0,
    irreducible_loss: float | None = None,
    noise: NoiseBySize | None = None,
) -> Floats:
    """p-value [K] of the test that m is constant: how often, under a constant m, the trend of ln m is as strong as the
    observed one, by parametric bootstrap.

    The t distribution would reject too often, since E and g are estimated from the same points. Losses y0, y1 [K, S]
    are in nats a token, computes c0, c1 [S] in FLOPs; for a test in seconds give the arm's compute divided by its
    relative throughput. Simulated losses follow the fitted law with constant m, with noise on the differences estimated
    from the local values, and noise shared by the arms estimated from the fit's residuals. `irreducible_loss` is a
    stated E, which is then not fitted. Resampling stops early once p can no longer come out below `until`; the p
    returned is then only known to be at least `until`.

    With few sizes the residuals about the trend often have a small variance by chance, so the critical t is large.
    Repeated seeds bound this variance from below, in the data as in the resamples, in which the `noise` of each size is
    estimated anew. Where small models scatter more, the test rejects a constant m in .00 to .08 of designs, and in up
    to .17 without the seeds' noise (analysis/README.md).
    """
    random = np.random.default_rng(seed)
    seen = local_multipliers(c0, c1, y0, y1, irreducible_loss, noise)
    strength = np.abs(trend(seen, c0[-1], at_least_seeds=True).t)
    null_law = _NullLaw(seen)
    largest = np.sqrt(seen.variance.max(axis=1))
    as_strong = np.where(largest < ROUNDING * y0.min(axis=1), resamples, 0)  # resamples, [K]
    for drawn in range(0, resamples, BLOCK):
        count = min(BLOCK, resamples - drawn)
        undecided = np.flatnonzero((as_strong < resamples) & ((1 + as_strong) / (1 + resamples) < until))
        for part in np.array_split(undecided, max(1, len(undecided) * BLOCK // TOGETHER)):
            losses = null_law.draw(part, count, random)
            redrawn = noise and noise.of_rows(part).redrawn(count, random)
            null = trend(local_multipliers(c0, c1, *losses, irreducible_loss, redrawn), c0[-1], at_least_seeds=True)
            as_strong[part] += (np.abs(null.t).reshape(-1, count) >= strength[part, None]).sum(axis=1)
    return (1 + as_strong) / (1 + resamples)


class _NullLaw:
    """Simulates losses with a constant m and the noise that was estimated from the observed losses (`seen`)."""

    def __init__(self, seen: Local) -> None:
        c1, (y0, y1) = seen.c1, seen.losses
        sizes, law, mean = len(c1), seen.law, seen.mean[:, None]
        g, E, a1 = law.g[:, None], law.E[:, None], law.a1[:, None]
        self.of_difference = np.sqrt(seen.variance)  # [K, S] standard deviation of the differences, nats a token
        residual = (y0 + y1 - 2 * E - seen.reducible - a1 * (c1 / law.unit) ** -g) / 2
        fitted = 3 if seen.irreducible_loss is None else 2
        shared = (residual**2).sum(axis=1) / max(sizes - fitted, 1) - seen.variance.mean(axis=1) / 4
        self.shared = np.sqrt(np.maximum(shared, 0.0))
        constant = law.a0[:, None] * np.exp(-g * (np.log(c1 / law.unit) + mean))
        self.laws = E + seen.reducible, E + constant  # [K, S] each

    def draw(self, rows: Indices, count: int, random: np.random.Generator) -> tuple[Floats, Floats]:
        """Simulated losses of both arms, [len(rows) * count, S] each."""
        shape = (len(rows), count, self.laws[0].shape[1])
        common = self.shared[rows, None, None] * random.standard_normal(shape)
        half = self.of_difference[rows, None] / np.sqrt(2)
        y0, y1 = (law[rows, None] + common + half * random.standard_normal(shape) for law in self.laws)
        return y0.reshape(-1, shape[2]), y1.reshape(-1, shape[2])


def change_bounds(changing: Local) -> tuple[Floats, Floats]:
    """Ends of the 90% interval, [K] each, of ln m at the largest compute minus its weighted mean over the sizes, by the
    law of a changing m (`changing_multipliers`); S >= 3."""
    top = trend(changing, changing.c0[-1])
    middle = (changing.weight * np.log(changing.c0)).sum(axis=1)
    distance = np.log(changing.c0[-1]) - middle
    half = stdtrit(len(changing.c0) - 2, 0.95) * top.slope_error * distance
    return top.slope * distance - half, top.slope * distance + half


def shown_constant(changing: Local) -> Bools:
    """Whether m at the largest compute is shown to be within NEGLIGIBLE of the mean m [K], by two one-sided tests at 5%
    (Schuirmann, J. Pharmacokinetics and Biopharmaceutics 15, 1987, 657). In simulation, an m that is 5% off at the
    largest compute is called constant in at most 5% of the designs (analysis/README.md)."""
    low, high = change_bounds(changing)
    margin = math.log1p(NEGLIGIBLE)
    return (low > -margin) & (high < margin)


def correlation_p(local: Local, seed: int = 0) -> Floats:
    """p-value [K] of the test that the errors of the sizes are independent, against neighbours that are correlated.

    The errors are the residuals of the loss differences about the line of local ln m (`changing_multipliers`). The
    statistic is von Neumann's ratio (Annals of Math. Stat. 12, 1941, 367), which has more power than a runs test; its
    null distribution is simulated with independent normal errors about the same line. NaN below FEWEST_FOR_CORRELATION
    sizes.
    """
    count, sizes = local.ln_m.shape
    p = np.full(count, np.nan)
    if sizes < FEWEST_FOR_CORRELATION:
        return p
    draws = np.random.default_rng(seed).standard_normal((NULL_DRAWS, sizes))
    for k in range(count):
        scale = local.law.g[k] * local.reducible[k]  # converts ln m to a loss difference
        axes = np.linalg.qr(np.stack([scale, scale * np.log(local.c0 / local.c0[0])], axis=1))[0]
        errors = np.concatenate([(scale * local.ln_m[k])[None], draws])
        found = _neighbours(errors - (errors @ axes) @ axes.T)
        p[k] = (found >= found[0]).mean()  # the observed statistic counts as one of the draws
    return p


def _neighbours(residual: Floats) -> Floats:
    """1 minus half of von Neumann's ratio of residuals [N, S], approximately the lag-one autocorrelation [N]."""
    steps = (np.diff(residual, axis=1) ** 2).sum(axis=1)
    ratio: Floats = 1 - steps / np.maximum(2 * (residual**2).sum(axis=1), 1e-300)
    return ratio
