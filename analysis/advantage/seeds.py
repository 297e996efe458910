"""Seed noise that differs from size to size, as repeated seeds show it.

The spread of the local multipliers about their line gives one variance for all sizes. But small models scatter more:
in results/measured/h200/mini-rates two seeds differ three times as much at 1M parameters as at 3M. The smallest size
also decides the line at its own compute, so its error there is not in the spread: with noise that falls from .02 nats
at the smallest of six sizes to .003 at the largest, the 95% band of m(C) at the smallest covers .76. So the variance of
the line is held to be at least that which the seeds of each size show.

Legend: K comparisons at once, S sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.laws.solver import Floats

STEEPNESS = np.linspace(-3.0, 3.0, 241)  # of the noise: its variance is taken to change as C to this power


@dataclass(frozen=True)
class NoiseBySize:
    """The variance of each size's loss difference, averaged over its seeds, that is due to seeds."""

    variance: Floats  # [K, S] nats squared
    dof: int

    def at_least(self, variance: Floats, dof: Floats, part: Floats) -> tuple[Floats, Floats]:
        """The larger of `variance` [K], which has `dof` [K] degrees of freedom, and that of the sum over sizes of
        `part` [K, S] times the size's loss difference; and the degrees of freedom of the larger one."""
        by_seeds = (part**2 * self.variance).sum(axis=1)
        return np.maximum(variance, by_seeds), np.where(by_seeds > variance, self.dof, dof)


def noise_by_size(compute: Floats, differences: Sequence[Floats]) -> NoiseBySize | None:
    """From the loss differences of each size's paired seeds; None where fewer than three could vary. `compute` [S]."""
    squares = np.array([((each - each.mean()) ** 2).sum() for each in differences])
    return by_power(compute, squares[None], np.array([len(each) for each in differences]))


def by_power(compute: Floats, squares: Floats, seeds: Floats) -> NoiseBySize | None:
    """By maximum likelihood of a variance that is a power of compute, given the sums of squared deviations [K, S] of
    the differences of `seeds` [S] seeds from their mean. Sizes with one seed show no noise, and get none."""
    dof = seeds - 1
    repeated = dof > 0
    if dof.sum() < 3:
        return None
    x = np.log(compute) - np.log(compute[repeated]).mean()
    steepness = STEEPNESS if repeated.sum() > 1 else np.zeros(1)
    # Given the steepness b, the variance at x = 0 is the mean of the squares over C^b, weighted by degrees of freedom.
    scaled = np.exp(-steepness[:, None] * x) @ squares.T  # [B, K]
    level = np.log(np.maximum(scaled / dof.sum(), 1e-300))
    minus_log_likelihood = dof.sum() * level + (steepness * (dof * x).sum())[:, None]
    best = minus_log_likelihood.argmin(axis=0)
    of_one = np.exp(level[best, np.arange(len(best))][:, None] + steepness[best][:, None] * x)
    return NoiseBySize(np.where(repeated, of_one / seeds, 0.0), int(dof.sum()) - (2 if len(steepness) > 1 else 0))
