"""Is m the same at every compute? A test, what a change could amount to, and whether errors go together over sizes.

A test that does not reject shows nothing: with few sizes it sees only large changes. So m counts as shown constant only
where the change that the data allow is small (`change_bounds`), as in tests of equivalence.

Legend: K comparisons at once, S sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from analysis.advantage.paired import Local, local_multipliers, trend
from analysis.laws.solver import Bools, Floats, Indices

SIGNIFICANCE = 0.05  # of the test that m is constant
NEGLIGIBLE = 0.05  # m is shown constant where m at the largest compute is within this share of it
ROUNDING = 1e-6  # relative noise of losses below which a trend is not looked for: it would be the arithmetic's own
BLOCK = 20  # resamples of a comparison before it is asked whether more are needed
TOGETHER = 4000  # laws fitted at once: few enough for a processor's cache
NULL_DRAWS = 20_000  # of the test that errors are independent over sizes
FEWEST_FOR_CORRELATION = 5  # sizes: below, two residuals are free and tell nothing of their order


@dataclass(frozen=True)
class SeedNoise:
    """What repeated seeds show of the noise of a size's loss difference, seeds averaged: a part of it."""

    variance: Floats  # [K] nats squared
    dof: int


def seed_noise_of(differences: Sequence[Floats]) -> SeedNoise | None:
    """Of the loss differences of each size's paired seeds; None where no size has two."""
    dof = sum(len(each) - 1 for each in differences)
    if dof < 1:
        return None
    variance = sum(((each - each.mean()) ** 2).sum() for each in differences) / dof
    return SeedNoise(np.array([variance * np.mean([1 / len(each) for each in differences])]), dof)


def constancy_p(
    c0: Floats,
    c1: Floats,
    y0: Floats,
    y1: Floats,
    resamples: int,
    seed: int,
    until: float = 2.0,
    floor: float | None = None,
    seeds: SeedNoise | None = None,
) -> Floats:
    """How often a constant m gives a trend of ln m as strong as the one seen, by parametric bootstrap: p [K].

    The t distribution would reject too often: E and g are estimated from the same points. Losses y0, y1 [K, S] at
    computes c0, c1 [S]; for a test in seconds give the arm's compute divided by its relative throughput. The simulated
    losses have the fitted law with constant m, noise on the differences as the local values show it, and noise shared
    by the arms as the fit's residuals show it. `floor` holds E. A p that cannot come out below `until` any more is
    returned at once, too small.

    With few sizes the trend's residuals often have a small variance by luck, and the test must ask for a large t.
    Repeated seeds bound the variance from below, also in the resamples, and less is asked. At the same size that gains
    a little power where sizes are four and seeds are much of the noise (.27 to .31), hardly any with more
    (analysis/README.md).
    """
    random = np.random.default_rng(seed)
    seen = local_multipliers(c0, c1, y0, y1, floor)
    strength = np.abs(trend(seen, c0[-1], seeds.variance if seeds else None).t)
    noise = _Noise(seen, seeds)
    farther = np.where(noise.of_difference < ROUNDING * y0.min(axis=1), resamples, 0)
    for drawn in range(0, resamples, BLOCK):
        count = min(BLOCK, resamples - drawn)
        going = np.flatnonzero((farther < resamples) & ((1 + farther) / (1 + resamples) < until))
        for part in np.array_split(going, max(1, len(going) * BLOCK // TOGETHER)):
            losses, least = noise.draw(part, count, random)
            null = trend(local_multipliers(c0, c1, *losses, floor), c0[-1], least)
            farther[part] += (np.abs(null.t).reshape(-1, count) >= strength[part, None]).sum(axis=1)
    return (1 + farther) / (1 + resamples)


class _Noise:
    """Losses with constant m, and noise as seen."""

    def __init__(self, seen: Local, seeds: SeedNoise | None) -> None:
        c1, (y0, y1) = seen.c1, seen.losses
        sizes, law, mean = len(c1), seen.law, seen.mean[:, None]
        g, E, a1 = law.g[:, None], law.E[:, None], law.a1[:, None]
        deviation = g * seen.reducible * (seen.ln_m - mean)
        self.seeds = seeds
        self.of_difference = deviation.std(axis=1) * np.sqrt(sizes / (sizes - 1))  # [K] nats a token
        if seeds:
            self.of_difference = np.maximum(self.of_difference, np.sqrt(seeds.variance))
        residual = (y0 + y1 - 2 * E - seen.reducible - a1 * (c1 / law.unit) ** -g) / 2
        fitted = 3 if seen.floor is None else 2
        shared = (residual**2).sum(axis=1) / max(sizes - fitted, 1) - self.of_difference**2 / 4
        self.shared = np.sqrt(np.maximum(shared, 0.0))
        constant = law.a0[:, None] * np.exp(-g * (np.log(c1 / law.unit) + mean))
        self.laws = E + seen.reducible, E + constant  # [K, S] each

    def draw(
        self, rows: Indices, count: int, random: np.random.Generator
    ) -> tuple[tuple[Floats, Floats], Floats | None]:
        """Losses of both arms, [len(rows) * count, S] each, and the variance that their seeds show."""
        shape = (len(rows), count, self.laws[0].shape[1])
        common = self.shared[rows, None, None] * random.standard_normal(shape)
        half = self.of_difference[rows, None, None] / np.sqrt(2)
        y0, y1 = (law[rows, None] + common + half * random.standard_normal(shape) for law in self.laws)
        least = None
        if self.seeds:
            luck = random.chisquare(self.seeds.dof, shape[:2]) / self.seeds.dof
            least = (self.seeds.variance[rows, None] * luck).ravel()
        return (y0.reshape(-1, shape[2]), y1.reshape(-1, shape[2])), least


def change_bounds(changing: Local) -> tuple[Floats, Floats]:
    """How far ln m at the largest compute may be from its weighted mean over the sizes: the ends of a 90% interval, [K]
    each, by the law of a changing m (`changing_multipliers`); S >= 3."""
    top = trend(changing, changing.c0[-1])
    middle = (changing.weight * np.log(changing.c0)).sum(axis=1)
    distance = np.log(changing.c0[-1]) - middle
    half = stdtrit(len(changing.c0) - 2, 0.95) * top.slope_error * distance
    return top.slope * distance - half, top.slope * distance + half


def shown_constant(changing: Local) -> Bools:
    """[K] whether m at the largest compute is shown to be within NEGLIGIBLE of the m that is reported: two one-sided
    tests at 5% (Schuirmann, J. Pharmacokinetics and Biopharmaceutics 15, 1987, 657). Simulated, an m that ends 5% away
    is called constant in at most 5% of designs (analysis/README.md)."""
    low, high = change_bounds(changing)
    margin = math.log1p(NEGLIGIBLE)
    return (low > -margin) & (high < margin)


def correlation_p(local: Local, seed: int = 0) -> Floats:
    """How often independent errors of the sizes go together as much as those seen: p [K].

    The errors are those of the loss differences about the line of local ln m (`changing_multipliers`). The statistic is
    von Neumann's ratio (Annals of Math. Stat. 12, 1941, 367), which sees more than the number of runs of equal sign
    does; its distribution is that of independent normal errors about the same line, simulated. NaN below
    FEWEST_FOR_CORRELATION sizes.
    """
    count, sizes = local.ln_m.shape
    p = np.full(count, np.nan)
    if sizes < FEWEST_FOR_CORRELATION:
        return p
    draws = np.random.default_rng(seed).standard_normal((NULL_DRAWS, sizes))
    for k in range(count):
        scale = local.law.g[k] * local.reducible[k]  # of ln m, to a loss difference
        axes = np.linalg.qr(np.stack([scale, scale * np.log(local.c0 / local.c0[0])], axis=1))[0]
        errors = np.concatenate([(scale * local.ln_m[k])[None], draws])
        found = _neighbours(errors - (errors @ axes) @ axes.T)
        p[k] = (found >= found[0]).mean()  # the seen one counts as a draw
    return p


def _neighbours(residual: Floats) -> Floats:
    """1 - half of von Neumann's ratio of residuals [N, S]: close to the correlation of neighbours."""
    steps = (np.diff(residual, axis=1) ** 2).sum(axis=1)
    ratio: Floats = 1 - steps / np.maximum(2 * (residual**2).sum(axis=1), 1e-300)
    return ratio
