"""The variance of each size's loss difference: the part that is due to seeds, which repeated seeds show, and the
scatter of the sizes about the law, which more seeds do not lower.

Small models scatter more: in results/measured/h200/mini-rates two seeds differ three times as much at 1M parameters as
at 3M, and a design may have more seeds of small sizes. The paired estimator therefore weights a size by the inverse of
its own variance, as in a meta-analysis with random effects. The variance of seeds is smoothed over sizes, since three
seeds alone give a poor one; a size without repeated seeds weighs as if it had the mean of the others. The scatter is
estimated by the method of moments (DerSimonian and Kacker, Contemporary Clinical Trials 28, 2007, 105, eq. 6, with the
weights for equal noise). Simulations: analysis/README.md.

Legend: K comparisons at once, S sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from analysis.laws.solver import Bools, Floats, Indices

STEEPNESS = np.linspace(-3.0, 3.0, 241)  # of the noise: its variance is taken to change as C to this power
FEWEST_FOR_STEEPNESS = 3  # degrees of freedom; with fewer, one variance of a seed is taken for all sizes
LEAST_SCATTER = 0.5  # variance of the sizes' scatter, at least, over the mean variance of the seeds


@dataclass(frozen=True)
class NoiseBySize:
    """The variance of each size's loss difference, averaged over its seeds, that is due to seeds."""

    variance: Floats  # [K, S] nats squared
    compute: Floats  # [S] FLOPs
    seeds: Floats  # [S] over which the difference is averaged
    dof_by_size: Floats  # [S] degrees of freedom that each size's repeated seeds gave

    @property
    def dof(self) -> int:
        """Degrees of freedom of the variances, less one where their steepness was fitted. With it, t's bound
        of the seeds' noise is exceeded by that alone in .05 to .16 of simulated designs (analysis/README.md)."""
        return int(self.dof_by_size.sum()) - int(self.differs_by_size)

    @property
    def differs_by_size(self) -> bool:
        """Whether there was enough to fit how the noise of a seed changes with compute."""
        return _has_steepness(self.dof_by_size)

    @property
    def repeated(self) -> Bools:
        """Which sizes [S] had seeds repeated; the noise of the others is taken from their neighbours."""
        return self.dof_by_size > 0

    @property
    def for_weights(self) -> Floats:
        """The variance [K, S], in which a size without repeated seeds has the mean of those with. By the noise of its
        neighbour's seeds it would count for less the more seeds the neighbour has. But designs give more seeds to the
        small models that scatter more, and these would then decide m (analysis/README.md)."""
        repeated = self.repeated
        if not repeated.any():
            return self.variance
        return np.where(repeated, self.variance, self.variance[:, repeated].mean(axis=1, keepdims=True))

    def at_least(self, variance: Floats, dof: Floats, part: Floats) -> tuple[Floats, Floats]:
        """The larger of `variance` [K], which has `dof` [K] degrees of freedom, and that of the sum over sizes of
        `part` [K, S] times the size's loss difference, as far as its own seeds were repeated; and the degrees of
        freedom of the larger one."""
        by_seeds = (part**2 * np.where(self.repeated, self.variance, 0.0)).sum(axis=1)
        return np.maximum(variance, by_seeds), np.where(by_seeds > variance, self.dof, dof)

    def of_rows(self, rows: Bools | Indices) -> NoiseBySize:
        """Of these comparisons alone."""
        return replace(self, variance=self.variance[rows])

    def of_sizes(self, keep: Bools) -> NoiseBySize:
        """At these sizes alone, as estimated from all."""
        parts = self.compute[keep], self.seeds[keep], self.dof_by_size[keep]
        return NoiseBySize(self.variance[:, keep], *parts)

    def redrawn(self, count: int, random: np.random.Generator) -> NoiseBySize:
        """What `count` simulated repetitions of each comparison estimate, [K * count, S], where this is the truth."""
        of_one = np.repeat(self.variance * self.seeds, count, axis=0)
        chi_squared = 2 * random.standard_gamma(self.dof_by_size / 2, of_one.shape)  # 0 without repeated seeds
        found = by_power(self.compute, of_one * chi_squared, self.seeds, self.dof_by_size)
        assert found is not None
        return found


def noise_by_size(
    compute: Floats, differences: Sequence[Floats], seeds: Sequence[int], replicates: Sequence[Sequence[Floats]] = ()
) -> NoiseBySize | None:
    """From the loss differences of each size's paired seeds, and from the losses of runs whose seeds are not known
    (`replicates`, groups of them at each size); None where nothing was repeated. `compute` [S] and `seeds` [S]."""
    groups = [[each] for each in differences]
    squares, dof = _squares(groups)
    if replicates:
        # A difference has the noise of two runs.
        squares, dof = (one + other for one, other in zip((squares, dof), _squares(replicates, 2.0), strict=True))
    return by_power(compute, squares[None], np.array(seeds, dtype=float), dof)


def _squares(groups: Sequence[Sequence[Floats]], factor: float = 1.0) -> tuple[Floats, Floats]:
    """Sums of squared deviations from each group's mean, times a factor, and their degrees of freedom, [S] each."""
    squares = [sum(float(((each - each.mean()) ** 2).sum()) for each in of_size) for of_size in groups]
    dof = [sum(len(each) - 1 for each in of_size) for of_size in groups]
    return factor * np.array(squares, dtype=float), np.array(dof, dtype=float)


def by_power(compute: Floats, squares: Floats, seeds: Floats, dof: Floats) -> NoiseBySize | None:
    """By maximum likelihood of a variance that is a power of compute, given the sums of squared deviations [K, S] of
    the differences of single seeds, with `dof` [S] degrees of freedom; None where these are 0. `seeds` [S] are those
    that each size's difference is averaged over. Beyond the sizes with repeated seeds, the noise of a seed is taken to
    be that of the nearest of them."""
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
    return bool(dof.sum() >= FEWEST_FOR_STEEPNESS and (dof > 0).sum() > 1)


def scatter(steepness: Floats, ln_m: Floats, of_seeds: Floats) -> Floats:
    """The variance [K] of the sizes' scatter, by the method of moments; below 0 where the sizes agree better than their
    seeds. `steepness` [K, S] is the derivative of the loss differences in ln m, `of_seeds` [K, S] their variance that
    is due to seeds."""
    share = steepness**2 / (steepness**2).sum(axis=1, keepdims=True)
    mean = (share * ln_m).sum(axis=1, keepdims=True)
    squares = ((steepness * (ln_m - mean)) ** 2).sum(axis=1)
    found: Floats = (squares - ((1 - share) * of_seeds).sum(axis=1)) / (ln_m.shape[1] - 1)
    return found


def difference_variance(steepness: Floats, ln_m: Floats, noise: NoiseBySize | None) -> Floats:
    """The variance [K, S] of the sizes' loss differences: scatter, and where seeds were repeated theirs. The scatter is
    taken to be at least LEAST_SCATTER of the seeds' mean variance: few sizes often agree by chance, and weights by
    seeds alone would then leave all to one size. Arguments as of `scatter`."""
    by_seeds = np.zeros_like(ln_m) if noise is None else noise.for_weights
    least = np.maximum(LEAST_SCATTER * by_seeds.mean(axis=1), 1e-300)  # arms with equal losses have no variance at all
    found: Floats = by_seeds + np.maximum(scatter(steepness, ln_m, by_seeds), least)[:, None]
    return found
