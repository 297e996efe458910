"""Many arms against one baseline: null arms stay unresolved in 95% of sweeps, however many there are."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from planted import write_sweep

from analysis.advantage.family import wider
from analysis.advantage.multiplier import multipliers
from analysis.advantage.paired import local_multipliers
from analysis.logs.store import load


@pytest.mark.parametrize("sizes", [3, 5])
@pytest.mark.parametrize("arms", [2, 9, 19])
def test_some_null_arm_is_resolved_in_five_percent_of_sweeps(sizes: int, arms: int) -> None:
    """1,500 sweeps, the share is known to .006; by plain intervals it is .09, .29 and .50 at five sizes."""
    random = np.random.default_rng(0)
    compute = np.geomspace(1e19, 1e21, sizes)
    shape = (1500, sizes)
    law = 1.7 + 1.3 * (compute / 1e20) ** -0.15 + 0.005 * random.standard_normal(shape)
    noise = math.hypot(0.002, 0.002)
    baseline = law + noise * random.standard_normal(shape)
    plain, family = np.zeros(1500, dtype=bool), np.zeros(1500, dtype=bool)
    for _ in range(arms):
        local = local_multipliers(compute, compute, baseline, law + noise * random.standard_normal(shape))
        low, high = local.interval()
        plain |= (low > 0) | (high < 0)
        ends = [
            wider(math.exp(m), (math.exp(a), math.exp(b)), sizes - 1, arms)
            for m, a, b in zip(local.mean, low, high, strict=True)
        ]
        family |= np.array([a > 1 or b < 1 for a, b in ends])
    print(f"{arms} arms, {sizes} sizes: some resolved plain {plain.mean():.3f}, at once {family.mean():.3f}")
    assert 0.025 <= family.mean() <= 0.07
    assert plain.mean() > family.mean()


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


def test_one_arm_is_its_own_family(tmp_path: Path) -> None:
    (found,) = multipliers(load(write_sweep(tmp_path / "s", {"dyn": 1.33}, seeds=1)).runs, resamples=99)[0]
    assert found.family_ci == found.ci
    assert found.family == 1
