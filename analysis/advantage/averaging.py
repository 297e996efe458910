"""Model averaging: combine the estimates of several laws into one interval, weighted by how well each law fits.

The 95% interval cuts 2.5% off each end of the mixture of the laws' t distributions (Turek and Fletcher, Computational
Statistics and Data Analysis 56, 2012, 2809).

Legend: K comparisons at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

from analysis.laws.solver import Floats

HALVINGS = 50


@dataclass(frozen=True)
class Student:
    """The t distribution of one law's estimate, and the weight of that law."""

    at: Floats  # [K] the estimate
    error: Floats  # [K] its standard error
    dof: Floats  # [K] degrees of freedom
    support: Floats  # [K] log of the law's weight, up to a constant that all laws share


def fit_gain(t: Floats, sizes: int) -> Floats:
    """Log likelihood ratio [K], under normal errors, of a law with one more parameter whose t statistic is `t` [K]."""
    gain: Floats = sizes / 2 * np.log1p(t**2 / (sizes - 2))
    return gain


def weights(laws: Sequence[Student]) -> Floats:
    """The weights of the laws, [laws, K], summing to 1 over the laws."""
    support = np.stack([law.support for law in laws])
    weight: Floats = np.exp(support - support.max(axis=0))
    return weight / weight.sum(axis=0)


def averaged(laws: Sequence[Student], level: float = 0.95) -> tuple[Floats, Floats, Floats]:
    """(mean, low, high), [K] each: the weighted mean of the estimates, and the ends of the interval beyond each of
    which (1 - level) / 2 of the mixture lies."""
    weight = weights(laws)
    errors = [np.maximum(law.error, 1e-300) for law in laws]
    mean = sum(part * law.at for part, law in zip(weight, laws, strict=True))

    def end(tail: float) -> Floats:
        # A quantile of a mixture lies between the least and the largest of its parts' quantiles.
        parts = [law.at + stdtrit(law.dof, tail) * error for law, error in zip(laws, errors, strict=True)]
        low, high = np.min(parts, axis=0), np.max(parts, axis=0)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            below = sum(
                part * stdtr(law.dof, (middle - law.at) / error)
                for part, law, error in zip(weight, laws, errors, strict=True)
            )
            low, high = np.where(below < tail, middle, low), np.where(below < tail, high, middle)
        found: Floats = (low + high) / 2
        return found

    low, high = end((1 - level) / 2), end((1 + level) / 2)
    return mean, np.minimum(low, mean), np.maximum(high, mean)
