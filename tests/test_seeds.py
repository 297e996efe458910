"""Seed noise that differs from size to size: what repeated seeds show of it, and the band of m(C) that it widens."""

from __future__ import annotations

import math

import numpy as np
import pytest
from planted import pairs_of
from scipy.optimize import minimize
from scipy.stats import chi2

from analysis.advantage.changing import band
from analysis.advantage.checks import curve, local_of
from analysis.advantage.paired import changing_multipliers, local_multipliers
from analysis.advantage.pairs import Pairs
from analysis.advantage.seeds import by_power, noise_by_size
from analysis.advantage.shifted import shifted_multipliers
from analysis.laws.solver import Floats

# Six sizes over 240x of compute, about as in experiments/sweeps/mini-scaling.toml, with fewer seeds of the small ones.
COMPUTE = np.array([2.5e14, 1.7e15, 7e15, 2.2e16, 4e16, 6e16])
SEEDS = np.array([5, 5, 3, 3, 3, 3])
FALLING = np.array([0.02, 0.012, 0.006, 0.005, 0.004, 0.003])
EVEN = np.full(6, 0.005)


def sweeps(count: int, noise: Floats, ln_m: float) -> tuple[Floats, Floats]:
    """Losses of both arms over seeds [count, S, n]; NaN where a size has fewer."""
    random = np.random.default_rng(0)
    shape = (count, len(COMPUTE), SEEDS.max())
    reducible = 0.8 * (COMPUTE / np.exp(np.log(COMPUTE).mean())) ** -0.15
    shared = 0.005 * random.standard_normal((*shape[:2], 1))
    missing = np.where(np.arange(shape[2]) < SEEDS[:, None], 0.0, np.nan)
    y0, y1 = (
        1.2
        + (reducible * factor)[:, None]
        + shared
        + 0.002 * random.standard_normal((*shape[:2], 1))
        + noise[:, None] * random.standard_normal(shape)
        + missing
        for factor in (1.0, math.exp(-0.15 * ln_m))
    )
    return y0, y1


@pytest.mark.parametrize(("noise", "before"), [(FALLING, 0.76), (EVEN, 0.98)], ids=["falling", "even"])
def test_the_band_covers_where_small_sizes_are_noisier(noise: Floats, before: float) -> None:
    """800 sweeps of that design: a share of .95 is known to .008, and the bound is three of these errors below. At the
    smallest size the band covered .76, as its noise was taken to be that of all sizes."""
    ln_m = math.log(1.33)
    y0, y1 = sweeps(800, noise, ln_m)
    squares = np.nansum((y0 - y1 - np.nanmean(y0 - y1, axis=2, keepdims=True)) ** 2, axis=2)
    seeds = by_power(COMPUTE, squares, SEEDS)
    local = local_multipliers(COMPUTE, COMPUTE, np.nanmean(y0, axis=2), np.nanmean(y1, axis=2))
    changing, shifted = changing_multipliers(local), shifted_multipliers(local)
    covered = []
    for compute in (COMPUTE[0], COMPUTE[2], COMPUTE[-1], 10 * COMPUTE[-1]):
        for noise_of in (None, seeds):
            _, low, high = band(changing, shifted, compute, noise_of)
            covered.append(float(((low <= ln_m) & (ln_m <= high)).mean()))
    print("covered without and with the seeds' noise, at the smallest, the middle, the largest, 10x:", covered)
    assert covered[0] == pytest.approx(before, abs=0.04)
    assert min(covered[1::2]) > 0.926


def test_weights_that_ignore_noise_by_size_cost_precision() -> None:
    """The mean of ln m weights a size by how steeply its loss falls. With the true noise in the weights, too, it would
    scatter less by a factor that is known for a known law, and is 1.4 for a fitted one."""
    y0, y1 = sweeps(800, FALLING, math.log(1.33))
    local = local_multipliers(COMPUTE, COMPUTE, np.nanmean(y0, axis=2), np.nanmean(y1, axis=2))
    steepness = COMPUTE**-0.15  # of the loss in ln C, up to a constant
    variance = (0.002**2 + FALLING**2 / SEEDS) / steepness**2  # of a size's ln m, up to a constant
    ours, best = steepness**2, 1 / variance
    ours, best = ours / ours.sum(), best / best.sum()
    of_known_law = math.sqrt((ours**2 * variance).sum() / (best**2 * variance).sum())
    assert float(local.mean.std() / (local.ln_m @ best).std()) == pytest.approx(1.4, abs=0.1)
    assert of_known_law == pytest.approx(1.45, abs=0.01)


def test_the_noise_of_each_size_is_the_likeliest_power_of_compute() -> None:
    """A second implementation: the chi-squared likelihood by scipy, maximised in both parameters."""
    y0, y1 = sweeps(1, FALLING, 0.0)
    differences = [row[~np.isnan(row)] for row in (y0 - y1)[0]]
    squares = np.array([((d - d.mean()) ** 2).sum() for d in differences])

    def minus_log_likelihood(parameters: Floats) -> float:
        variance = np.exp(parameters[0] + parameters[1] * np.log(COMPUTE / 1e16))
        return -float((chi2.logpdf(squares / variance, SEEDS - 1) - np.log(variance)).sum())

    best = minimize(minus_log_likelihood, [-9.0, -0.5], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9}).x
    found = noise_by_size(COMPUTE, differences)
    assert found is not None
    expected = np.exp(best[0] + best[1] * np.log(COMPUTE / 1e16)) / SEEDS
    assert np.log(found.variance[0]) == pytest.approx(np.log(expected), abs=0.0125 * 4)  # half a step, over 4 e-folds
    assert found.dof == 14


def test_one_seed_shows_no_noise_and_few_show_none_that_counts() -> None:
    alone, twice = np.array([0.1]), np.array([0.1, 0.2])
    assert noise_by_size(COMPUTE, [twice, alone, alone, twice, alone, alone]) is None
    some = noise_by_size(COMPUTE, [np.array([0.1, 0.2, 0.3, 0.1]), alone, alone, twice, alone, alone])
    assert some is not None
    assert ((some.variance[0] > 0) == [True, False, False, True, False, False]).all()


def test_the_curve_of_an_arm_is_as_wide_as_its_seeds_say() -> None:
    """Sizes agree by luck where the seeds of the smallest are .1 apart: the band there is the seeds'."""
    reducible = 0.8 * (COMPUTE / 1e16) ** -0.15
    made = vars(pairs_of(COMPUTE, 1.2 + reducible, 1.2 + 0.96 * reducible + 0.0002 * np.array([1, -1, 1, -1, 1, -1])))
    deviations = [scale * np.array([-1.0, 0.0, 1.0]) for scale in (0.1, 0.01, 0.001, 0.001, 0.0005, 0.0005)]
    sure = Pairs(**made)
    unsure = Pairs(
        **made | {"differences": tuple(d + each for d, each in zip(sure.y0 - sure.y1, deviations, strict=True))}
    )
    first, wide = (next(curve(each, local_of(each, None))) for each in (sure, unsure))
    assert first.m == wide.m
    slope = 0.15 * reducible[0]
    assert math.log(wide.ci[1] / wide.ci[0]) / 2 > 0.1 / math.sqrt(3) / slope > 5 * math.log(first.ci[1] / first.ci[0])
