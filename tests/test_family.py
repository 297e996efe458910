"""Many arms against one baseline: null arms stay unresolved in 95% of sweeps, however many there are."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from planted import write_sweep
from scipy.optimize import brentq
from scipy.stats import t as student

from analysis.advantage.changing import reported
from analysis.advantage.multiplier import multipliers
from analysis.advantage.paired import changing_multipliers, local_multipliers, trend
from analysis.logs.store import load


@pytest.mark.parametrize("sizes", [3, 4, 6])
@pytest.mark.parametrize("arms", [2, 5, 12])
def test_some_null_arm_is_resolved_in_five_percent_of_sweeps(sizes: int, arms: int) -> None:
    """By the intervals that are reported, which average the laws of a constant and of a changing m. 1,500 sweeps, so
    that a share of .05 is known to .006; the bound is three of these errors. Stretching the 95% interval by the ratio
    of t quantiles, as before, gives .08 to .25 for 5 and 12 arms."""
    random = np.random.default_rng(0)
    compute = np.geomspace(1e19, 1e21, sizes)
    shape = (1500, sizes)
    law = 1.7 + 1.3 * (compute / 1e20) ** -0.15 + 0.005 * random.standard_normal(shape)
    noise = math.hypot(0.002, 0.002)
    baseline = law + noise * random.standard_normal(shape)
    plain, family = np.zeros(1500, dtype=bool), np.zeros(1500, dtype=bool)
    for _ in range(arms):
        local = local_multipliers(compute, compute, baseline, law + noise * random.standard_normal(shape))
        changing = changing_multipliers(local)
        for resolved, level in ((plain, 0.05), (family, 0.05 / arms)):
            _, low, high = reported(local, np.ones(1500), changing, level=level)
            resolved |= (low > 0) | (high < 0)
    print(f"{arms} arms, {sizes} sizes: some resolved plain {plain.mean():.3f}, at once {family.mean():.3f}")
    assert family.mean() <= 0.067
    assert plain.mean() > family.mean()


def test_the_interval_of_all_at_once_is_a_quantile_of_the_averaged_laws(tmp_path: Path) -> None:
    """A second implementation of the mixture's quantile, by scipy's distributions and root finder."""
    arms = {"a": 1.1, "b": 1.33, "c": 0.9, "d": 1.0, "e": 2.0}
    for item in multipliers(load(write_sweep(tmp_path / "s", arms, sizes=4, seeds=1)).runs, resamples=99)[0]:
        compute, y0, y1 = (np.array([row[name] for row in item.local]) for name in ("compute", "loss_baseline", "loss"))
        local = local_multipliers(compute, compute, y0[None], y1[None])
        changing = changing_multipliers(local)
        top, t = trend(changing, compute[-1]), float(trend(local, compute[-1]).t[0])
        odds = 0.2 * (1 + t**2 / 2) ** 2  # .1 for each size beyond two, times the likelihood ratio
        laws = [
            (1 / (1 + odds), student(3, local.mean[0], local.error[0])),
            (odds / (1 + odds), student(top.dof[0], top.at[0], top.error[0])),
        ]
        assert item.family_ci is not None
        for end, tail in zip(item.family_ci, (0.005, 0.995), strict=True):
            exact = brentq(lambda x, laws=laws, tail=tail: sum(w * law.cdf(x) for w, law in laws) - tail, -50, 50)
            assert math.log(end) == pytest.approx(exact, rel=1e-9)


def test_an_arm_that_one_interval_resolves_and_that_of_all_does_not_is_not_resolved(tmp_path: Path) -> None:
    arms = {f"null-{k}": 1.0 for k in range(9)} | {"real": 1.33}
    runs = load(write_sweep(tmp_path / "s", arms, sizes=4, seeds=1, random_seed=4)).runs
    found = {item.arm: item for item in multipliers(runs, resamples=99)[0]}
    for item in found.values():
        assert item.ci is not None
        assert item.family_ci is not None
        assert item.family == 10
        assert item.family_ci[0] < item.ci[0] < item.m < item.ci[1] < item.family_ci[1]
    nulls = [item for arm, item in found.items() if arm != "real"]
    lucky = [item for item in nulls if item.ci and not item.ci[0] <= 1 <= item.ci[1]]
    assert lucky  # by the plain interval
    assert all(item.status.startswith("not resolved") for item in nulls)
    assert any("not resolved: the interval of all 10 arms at once holds 1" in item.status for item in lucky)
    assert found["real"].family_ci is not None
    assert found["real"].family_ci[0] > 1


def test_clocks_are_resolved_by_the_interval_of_all_at_once_too(tmp_path: Path) -> None:
    """Ten arms of equal speed: m in seconds is m, and so is what is said of it."""
    arms = {f"null-{k}": 1.0 for k in range(9)} | {"real": 1.33}
    rows = load(write_sweep(tmp_path / "s", arms, sizes=4, seeds=1, random_seed=4)).runs
    rows = rows.assign(train_seconds=rows["flops_exact"] / 1e12)
    lucky = 0
    for item in multipliers(rows, resamples=99)[0]:
        clock = item.wall_clock
        assert clock is not None
        assert (clock.ci, clock.family_ci) == (pytest.approx(item.ci), pytest.approx(item.family_ci))
        assert clock.status.startswith("not resolved") == (item.arm != "real")
        lucky += "of all 10 arms at once" in clock.status
    assert lucky


def test_one_arm_is_its_own_family(tmp_path: Path) -> None:
    (found,) = multipliers(load(write_sweep(tmp_path / "s", {"dyn": 1.33}, seeds=1)).runs, resamples=99)[0]
    assert found.family_ci == found.ci
    assert found.family == 1
