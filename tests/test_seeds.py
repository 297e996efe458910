"""Seed noise that differs from size to size: what repeated seeds show of it, and the band of m(C) that it widens."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from noise_tables import THE_STUDY, Design, row, simulate
from planted import pairs_of
from scipy.optimize import minimize
from scipy.stats import chi2

from analysis.advantage.changing import band
from analysis.advantage.checks import curve, local_of
from analysis.advantage.paired import changing_multipliers, local_multipliers, seed_noise
from analysis.advantage.pairs import Pairs
from analysis.advantage.seeds import by_power, noise_by_size, scatter
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


@pytest.mark.parametrize(("noise", "before"), [(FALLING, 0.785), (EVEN, 0.968)], ids=["falling", "even"])
def test_the_band_covers_where_small_sizes_are_noisier(noise: Floats, before: float) -> None:
    """800 sweeps of that design: a share of .95 is known to .008, and the bound is three of these errors below. At the
    smallest size the band covered .78, as its noise was taken to be that of all sizes."""
    ln_m = math.log(1.33)
    y0, y1 = sweeps(800, noise, ln_m)
    squares = np.nansum((y0 - y1 - np.nanmean(y0 - y1, axis=2, keepdims=True)) ** 2, axis=2)
    covered = []
    laws = []
    for noise_of in (None, by_power(COMPUTE, squares, SEEDS, SEEDS - 1)):
        local = local_multipliers(COMPUTE, COMPUTE, np.nanmean(y0, axis=2), np.nanmean(y1, axis=2), noise=noise_of)
        laws.append((changing_multipliers(local), shifted_multipliers(local)))
    for compute in (COMPUTE[0], COMPUTE[2], COMPUTE[-1], 10 * COMPUTE[-1]):
        for changing, shifted in laws:
            _, low, high = band(changing, shifted, compute)
            covered.append(float(((low <= ln_m) & (ln_m <= high)).mean()))
    print("covered without and with the seeds' noise, at the smallest, the middle, the largest, 10x:", covered)
    assert covered[0] == pytest.approx(before, abs=0.04)
    assert min(covered[1::2]) > 0.926


def test_weights_by_the_noise_of_each_size_buy_precision() -> None:
    """With the true noise of a known law in the weights, the mean of ln m would scatter less by a factor of 1.45 than
    with weights for equal noise; with what three and five seeds show, it does by 1.28. Its interval then covers."""
    ln_m = math.log(1.33)
    y0, y1 = sweeps(2000, FALLING, ln_m)
    squares = np.nansum((y0 - y1 - np.nanmean(y0 - y1, axis=2, keepdims=True)) ** 2, axis=2)
    means = np.nanmean(y0, axis=2), np.nanmean(y1, axis=2)
    even, ours = (
        local_multipliers(COMPUTE, COMPUTE, *means, noise=noise)
        for noise in (None, by_power(COMPUTE, squares, SEEDS, SEEDS - 1))
    )
    steepness = COMPUTE**-0.15  # of the loss in ln C, up to a constant
    variance = (0.002**2 + FALLING**2 / SEEDS) / steepness**2  # of a size's ln m, up to a constant
    equal, best = steepness**2, 1 / variance
    equal, best = equal / equal.sum(), best / best.sum()
    of_known_law = math.sqrt((equal**2 * variance).sum() / (best**2 * variance).sum())
    assert of_known_law == pytest.approx(1.45, abs=0.01)
    assert float(even.mean.std() / ours.mean.std()) == pytest.approx(1.28, abs=0.06)
    covered = []
    for local in (even, ours):
        low, high = local.interval()
        covered.append(float(((low < ln_m) & (ln_m < high)).mean()))
    print("the interval of a constant m covers, with weights for equal noise and with ours:", covered)
    assert covered[0] < 0.93 < covered[1]


def test_the_study_is_told_what_its_seeds_show() -> None:
    """400 designs of mini-scaling with 3 seeds of every size: by weights for equal noise the interval of a constant m
    covers .78, and constancy is rejected in .17; tests/noise_tables.py has the whole table."""
    design = replace(THE_STUDY, seeds=(3,) * 6)
    y0, y1, noise = simulate(design, 400)
    equal, own = (row(design, (y0, y1), each, 400) for each in (None, noise))
    print(equal, own, sep="\n")
    assert own.spread < 0.9 * equal.spread
    assert own.half_width < 0.97 * equal.half_width
    assert equal.constant < 0.85 < 0.88 < own.constant
    assert own.coverage > 0.94
    assert own.rejected < 0.09 < equal.rejected
    shifted = replace(THE_STUDY, shift=-0.005)
    y0, y1, noise = simulate(shifted, 400)
    assert row(shifted, (y0, y1), noise, 400).rejected > 0.35


def test_weights_are_those_of_random_effects_by_hand() -> None:
    """A second implementation, one size at a time: the method of moments for the scatter, and inverse variances."""
    y0, y1 = (np.nanmean(y, axis=2) for y in sweeps(1, FALLING, 0.2))
    noise = by_power(COMPUTE, 2 * FALLING[None] ** 2 * (SEEDS - 1), SEEDS.astype(float), SEEDS - 1.0)
    assert noise is not None
    found = local_multipliers(COMPUTE, COMPUTE, y0, y1, noise=noise)
    slope = [float(found.law.g[0] * r) for r in found.reducible[0]]
    total = sum(s * s for s in slope)
    mean = sum(s * s * m for s, m in zip(slope, found.ln_m[0], strict=True)) / total
    q = sum(s * s * (m - mean) ** 2 for s, m in zip(slope, found.ln_m[0], strict=True))
    expected = sum((1 - s * s / total) * v for s, v in zip(slope, noise.variance[0], strict=True))
    tau2 = max((q - expected) / 5, sum(noise.variance[0]) / 6 / 2)
    weight = [s * s / (v + tau2) for s, v in zip(slope, noise.variance[0], strict=True)]
    by_hand = sum(w * m for w, m in zip(weight, found.ln_m[0], strict=True)) / sum(weight)
    assert found.mean[0] == pytest.approx(by_hand, rel=1e-12)
    spread = sum(w * (m - by_hand) ** 2 for w, m in zip(weight, found.ln_m[0], strict=True)) / sum(weight)
    assert found.error[0] == pytest.approx(math.sqrt(spread / 5), rel=1e-12)


def test_the_scatter_of_the_sizes_comes_back_without_bias() -> None:
    """20,000 draws about a known law, of unequal seed noise that is known: the moments give tau^2 on average."""
    random = np.random.default_rng(0)
    slope, of_seeds = COMPUTE**-0.15 / COMPUTE[0] ** -0.15, np.array([9.0, 4.0, 2.0, 1.0, 1.0, 0.5])
    draws = 0.3 + np.sqrt(of_seeds + 1.5) * random.standard_normal((20_000, 6)) / slope
    found = scatter(np.tile(slope, (20_000, 1)), draws, np.tile(of_seeds, (20_000, 1)))
    assert found.mean() == pytest.approx(1.5, abs=4 * found.std() / math.sqrt(20_000))


def test_seeds_that_show_equal_noise_leave_the_weights_nearly_as_they_are() -> None:
    """Sizes whose seeds differ by the same, and who agree by chance: no size gets more than for equal noise."""
    noise = by_power(COMPUTE, np.full((1, 6), 4e-6), np.full(6, 3.0), np.full(6, 2.0))
    y0, y1 = (np.nanmean(y, axis=2) for y in sweeps(1, EVEN, 0.2))
    even, ours = (local_multipliers(COMPUTE, COMPUTE, y0, y1, noise=each) for each in (None, noise))
    assert ours.weight[0] == pytest.approx(even.weight[0], rel=1e-9)


def test_the_noise_of_each_size_is_the_likeliest_power_of_compute() -> None:
    """A second implementation: the chi-squared likelihood by scipy, maximised in both parameters."""
    y0, y1 = sweeps(1, FALLING, 0.0)
    differences = [row[~np.isnan(row)] for row in (y0 - y1)[0]]
    squares = np.array([((d - d.mean()) ** 2).sum() for d in differences])

    def minus_log_likelihood(parameters: Floats) -> float:
        variance = np.exp(parameters[0] + parameters[1] * np.log(COMPUTE / 1e16))
        return -float((chi2.logpdf(squares / variance, SEEDS - 1) - np.log(variance)).sum())

    best = minimize(minus_log_likelihood, [-9.0, -0.5], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9}).x
    found = noise_by_size(COMPUTE, differences, list(SEEDS))
    assert found is not None
    expected = np.exp(best[0] + best[1] * np.log(COMPUTE / 1e16)) / SEEDS
    assert np.log(found.variance[0]) == pytest.approx(np.log(expected), abs=0.0125 * 4)  # half a step, over 4 e-folds
    assert found.dof == 15


def test_sizes_without_repeated_seeds_have_the_noise_of_the_nearest_that_has_some() -> None:
    alone, twice = np.array([0.1]), np.array([0.1, 0.2])
    assert noise_by_size(COMPUTE, [alone] * 6, [1] * 6) is None
    few = noise_by_size(COMPUTE, [alone, twice, alone, twice, alone, alone], [1, 2, 1, 2, 1, 1])
    assert few is not None
    assert few.dof == 2
    assert few.variance[0] == pytest.approx(np.array([1, 1 / 2, 1, 1 / 2, 1, 1]) * 0.005)  # one variance for all
    some = noise_by_size(
        COMPUTE, [alone, np.array([0.1, 0.2, 0.3, 0.1]), alone, twice, alone, alone], [1, 4, 1, 2, 1, 1]
    )
    assert some is not None
    of_one_seed = some.variance[0] * some.seeds
    assert some.dof == 3
    assert of_one_seed[0] == of_one_seed[1]
    assert of_one_seed[3] == of_one_seed[4] == of_one_seed[5]
    assert (of_one_seed[2] - of_one_seed[1]) * (of_one_seed[3] - of_one_seed[2]) > 0


def test_seeds_of_the_smallest_size_alone_do_not_make_it_count_for_more() -> None:
    """1,000 designs of five sizes, ten seeds of the smallest, whose noise is ten times that of the largest, and one of
    each other. What ten seeds show says nothing of the others, so weights stay those for equal noise. With the
    smallest size's noise for all, the interval of a constant m covered .88, and the band at 10x was three times as
    wide."""
    noise = (0.02, 0.01, 0.006, 0.003, 0.002)
    design = Design("", np.geomspace(1e19, 1e21, 5), (10, 1, 1, 1, 1), np.array(noise))
    y0, y1, noise_of = simulate(design, 1000)
    assert noise_of is not None
    compute = design.compute
    even, ours = (local_multipliers(compute, compute, y0, y1, noise=each) for each in (None, noise_of))
    np.testing.assert_allclose(ours.weight, even.weight, rtol=1e-9)
    low, high = ours.interval()
    assert ((low < design.ln_m) & (design.ln_m < high)).mean() > 0.915
    widths = []
    for local in (even, ours):
        ends = band(changing_multipliers(local), shifted_multipliers(local), 10 * compute[-1])[1:]
        widths.append(float(np.median(ends[1] - ends[0])))
    assert widths[1] < 1.2 * widths[0]
    least = seed_noise(ours)
    assert least is not None
    assert np.median(np.exp(least)) > 1.05  # the floor still takes the noise that is known for all


def test_leaving_out_the_only_size_with_repeated_seeds_leaves_equal_noise() -> None:
    alone = [np.array([0.1])] * 5
    noise = noise_by_size(COMPUTE, [np.array([0.1, 0.2, 0.4]), *alone], [3, *[1] * 5])
    assert noise is not None
    rest = noise.of_sizes(np.arange(6) > 0)
    np.testing.assert_allclose(rest.for_weights, rest.for_weights[:, :1] * np.ones(5), rtol=1e-9)


def test_repeated_runs_without_a_seed_show_noise_too() -> None:
    """A loss difference has the noise of two runs: groups of losses that are .2 apart as differences .2 sqrt 2 are."""
    alone = [np.array([0.1])] * 6
    runs = [(np.array([1.0, 1.2]),), *[()] * 5]
    found = noise_by_size(COMPUTE, alone, [2] + [1] * 5, runs)
    assert found is not None
    assert found.dof == 1
    assert found.variance[0] == pytest.approx(np.array([0.02, *[0.04] * 5]))


def test_what_is_redrawn_has_the_spread_of_an_estimate() -> None:
    """About the truth, less the few percent by which maximum likelihood is too low, with chi-squared spread."""
    truth = by_power(COMPUTE, np.full((1, 6), 2e-6), np.full(6, 3.0), np.full(6, 2.0))
    assert truth is not None
    drawn = truth.redrawn(4000, np.random.default_rng(0)).variance[:, 2:4].mean(axis=1)
    assert drawn.mean() == pytest.approx(truth.variance[0, 2:4].mean(), rel=0.08)
    assert drawn.std() / drawn.mean() == pytest.approx(math.sqrt(2 / 12), rel=0.15)


def test_the_curve_of_an_arm_is_as_wide_as_its_seeds_say() -> None:
    """Sizes agree by luck where the seeds of the smallest are .1 apart: the band there is the seeds'."""
    reducible = 0.8 * (COMPUTE / 1e16) ** -0.15
    made = vars(pairs_of(COMPUTE, 1.2 + reducible, 1.2 + 0.96 * reducible + 0.0002 * np.array([1, -1, 1, -1, 1, -1])))
    deviations = [scale * np.array([-1.0, 0.0, 1.0]) for scale in (0.1, 0.01, 0.001, 0.001, 0.0005, 0.0005)]
    sure = Pairs(**made)
    unsure = Pairs(
        **made
        | {"seeds": (3,) * 6, "differences": tuple(d + e for d, e in zip(sure.y0 - sure.y1, deviations, strict=True))}
    )
    first, wide = (next(curve(each, local_of(each, None))) for each in (sure, unsure))
    assert first.m == pytest.approx(wide.m, rel=2e-3)
    assert math.log(wide.ci[1] / wide.ci[0]) > 20 * math.log(first.ci[1] / first.ci[0])
