"""The variance of each size's loss difference: seed noise, and the scatter of the sizes about the law.

Repeated seeds show the seed noise; more seeds do not lower the scatter. Small models have more seed noise: in
results/measured/h200/mini-rates two seeds differ three times as much at 1M parameters as at 3M, and a design may have
more seeds of small sizes. The paired estimator therefore weights a size by the inverse of its own variance, as in a
meta-analysis with random effects. The variance of the seed noise is smoothed over sizes, since three seeds alone give a
poor estimate; a size without repeated seeds gets the mean of the others for its weight. The scatter is estimated by the
method of moments (DerSimonian and Kacker, Contemporary Clinical Trials 28, 2007, 105, eq. 6, with the weights for equal
noise). Simulations: analysis/README.md.

Legend: K comparisons at once, S sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from analysis.laws.solver import Bools, Floats, Indices

STEEPNESS = np.linspace(-3.0, 3.0, 241)  # candidates for b: the variance of the seed noise is taken to change as C^b
FEWEST_FOR_STEEPNESS = 3  # degrees of freedom; with fewer, all sizes are taken to have the same seed noise
LEAST_SCATTER = 0.5  # lower bound of the variance of the scatter, over the mean variance of the seed noise


@dataclass(frozen=True)
class NoiseBySize:
    """The seed noise of each size: the variance of its loss difference that is due to seeds."""

    variance: Floats  # [K, S] nats squared, of the difference averaged over the size's seeds
    compute: Floats  # [S] FLOPs
    seeds: Floats  # [S] number of seeds over which the difference is averaged
    dof_by_size: Floats  # [S] degrees of freedom from each size's repeated seeds

    @property
    def dof(self) -> int:
        """Degrees of freedom of the variances, less one if their steepness was fitted. With it, seed noise alone
        exceeds the bound by Student's t in .05 to .16 of simulated designs (analysis/README.md)."""
        return int(self.dof_by_size.sum()) - int(self.differs_by_size)

    @property
    def differs_by_size(self) -> bool:
        """Whether there were enough repeated seeds to fit how the seed noise changes with compute."""
        return _has_steepness(self.dof_by_size)

    @property
    def repeated(self) -> Bools:
        """Which sizes [S] have repeated seeds; the seed noise of the others is taken from their neighbours."""
        return self.dof_by_size > 0

    @property
    def for_weights(self) -> Floats:
        """The variance [K, S] for weights, in which a size without repeated seeds has the mean of the sizes with them.

        With the noise of a single seed at its neighbour, it would weigh less the more seeds the neighbour has. Designs
        give more seeds to small models, which have more noise, and these would then decide m (analysis/README.md).
        """
        repeated = self.repeated
        if not repeated.any():
            return self.variance
        return np.where(repeated, self.variance, self.variance[:, repeated].mean(axis=1, keepdims=True))

    def at_least(self, variance: Floats, dof: Floats, part: Floats) -> tuple[Floats, Floats]:
        """(the larger of two variances [K], its degrees of freedom [K]).

        The first is `variance` [K] with `dof` [K]. The second is the seed noise of the sum over sizes of `part` [K, S]
        times the size's loss difference, in which only sizes with repeated seeds count.
        """
        by_seeds = (part**2 * np.where(self.repeated, self.variance, 0.0)).sum(axis=1)
        return np.maximum(variance, by_seeds), np.where(by_seeds > variance, self.dof, dof)

    def of_rows(self, rows: Bools | Indices) -> NoiseBySize:
        """The noise of these of the K comparisons."""
        return replace(self, variance=self.variance[rows])

    def of_sizes(self, keep: Bools) -> NoiseBySize:
        """The noise of these of the S sizes, as estimated from all sizes."""
        parts = self.compute[keep], self.seeds[keep], self.dof_by_size[keep]
        return NoiseBySize(self.variance[:, keep], *parts)

    def redrawn(self, count: int, random: np.random.Generator) -> NoiseBySize:
        """The noise as estimated from `count` simulated repetitions of each comparison, [K * count, S], if this is the
        true noise."""
        of_one = np.repeat(self.variance * self.seeds, count, axis=0)
        chi_squared = 2 * random.standard_gamma(self.dof_by_size / 2, of_one.shape)  # 0 without repeated seeds
        found = by_power(self.compute, of_one * chi_squared, self.seeds, self.dof_by_size)
        assert found is not None
        return found


def noise_by_size(
    compute: Floats, differences: Sequence[Floats], seeds: Sequence[int], replicates: Sequence[Sequence[Floats]] = ()
) -> NoiseBySize | None:
    """The seed noise of each size; None if nothing was repeated.

    It is estimated from the loss differences of each size's paired seeds, and from the losses of `replicates`, which
    are groups of runs without a seed at each size. `compute` [S] is in FLOPs; `seeds` [S] are their numbers.
    """
    groups = [[each] for each in differences]
    squares, dof = _squares(groups)
    if replicates:
        # A difference has the noise of two runs, so the variance of single runs counts twice.
        squares, dof = (one + other for one, other in zip((squares, dof), _squares(replicates, 2.0), strict=True))
    return by_power(compute, squares[None], np.array(seeds, dtype=float), dof)


def _squares(groups: Sequence[Sequence[Floats]], factor: float = 1.0) -> tuple[Floats, Floats]:
    """(sums of squared deviations from each group's mean, times a factor; their degrees of freedom), [S] each."""
    squares = [sum(float(((each - each.mean()) ** 2).sum()) for each in of_size) for of_size in groups]
    dof = [sum(len(each) - 1 for each in of_size) for of_size in groups]
    return factor * np.array(squares, dtype=float), np.array(dof, dtype=float)


def by_power(compute: Floats, squares: Floats, seeds: Floats, dof: Floats) -> NoiseBySize | None:
    """The seed noise as a power of compute, by maximum likelihood; None if all `dof` are 0.

    `squares` [K, S] are the sums of squared deviations of single seeds' differences, with `dof` [S] degrees of freedom.
    `seeds` [S] are the numbers of seeds that each size's difference is averaged over. Outside the range of the sizes
    with repeated seeds, the noise of a seed is that of the nearest of them.
    """
    repeated = dof > 0
    if not repeated.any():
        return None
    x = np.log(compute)
    x = np.clip(x, x[repeated].min(), x[repeated].max())
    x -= x[repeated].mean()
    steepness = STEEPNESS if _has_steepness(dof) else np.zeros(1)
    # Given the steepness b, the variance at x = 0 is the mean of the squares over C^b, weighted by degrees of freedom.
    scaled = np.exp(-steepness[:, None] * x) @ squares.T  # [B, K]
    level = np.log(np.maximum(scaled / dof.sum(), 1e-300))
    minus_log_likelihood = dof.sum() * level + (steepness * (dof * x).sum())[:, None]
    best = minus_log_likelihood.argmin(axis=0)
    of_one = np.exp(level[best, np.arange(len(best))][:, None] + steepness[best][:, None] * x)
    return NoiseBySize(of_one / seeds, compute, seeds, dof)


def _has_steepness(dof: Floats) -> bool:
    """Whether these degrees of freedom [S] suffice to fit how the seed noise changes with compute."""
    return bool(dof.sum() >= FEWEST_FOR_STEEPNESS and (dof > 0).sum() > 1)


def scatter(steepness: Floats, ln_m: Floats, of_seeds: Floats) -> Floats:
    """The variance [K] of the sizes' scatter, by the method of moments; below 0 if sizes agree better than seeds do.

    `steepness` [K, S] is the derivative of the loss differences in ln m, and `of_seeds` [K, S] their variance that is
    due to seeds.
    """
    share = steepness**2 / (steepness**2).sum(axis=1, keepdims=True)
    mean = (share * ln_m).sum(axis=1, keepdims=True)
    squares = ((steepness * (ln_m - mean)) ** 2).sum(axis=1)
    found: Floats = (squares - ((1 - share) * of_seeds).sum(axis=1)) / (ln_m.shape[1] - 1)
    return found


def difference_variance(steepness: Floats, ln_m: Floats, noise: NoiseBySize | None) -> Floats:
    """The variance [K, S] of the sizes' loss differences: scatter plus seed noise, if that is known.

    The scatter is at least LEAST_SCATTER of the mean seed noise: few sizes often agree by chance, and weights by seed
    noise alone could then give nearly all weight to one size. Arguments as in `scatter`.
    """
    by_seeds = np.zeros_like(ln_m) if noise is None else noise.for_weights
    least = np.maximum(LEAST_SCATTER * by_seeds.mean(axis=1), 1e-300)  # Arms with equal losses have no variance at all.
    found: Floats = by_seeds + np.maximum(scatter(steepness, ln_m, by_seeds), least)[:, None]
    return found
