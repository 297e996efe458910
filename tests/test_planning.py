"""Planning: more sizes and seeds resolve less, the simulated power is the estimator's, and the hours add up."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from planted import write_sweep

from analysis.planning import Ladder, World, prospects, read_ladder
from experiments.cli import main

LADDER = Ladder(("a", "b", "c", "d", "e"), np.geomspace(1e19, 1e21, 5), np.array([1.0, 2.0, 4.0, 8.0, 16.0]))


def test_sizes_and_seeds_buy_resolution() -> None:
    """For orientation, ../shared/statistics.md: 3 sizes resolve 1.061 with one seed, 5 1.032, 5 with 3 seeds 1.026."""
    found = {(item.sizes, item.seeds): item for item in prospects(LADDER, 1.05, [1, 3], World())}
    smallest = {key: item.smallest_m for key, item in found.items()}
    assert smallest[3, 1] == pytest.approx(1.061, abs=0.012)
    assert smallest[5, 1] == pytest.approx(1.032, abs=0.005)
    assert smallest[5, 3] == pytest.approx(1.026, abs=0.005)
    assert found[3, 1].power < found[4, 1].power < found[5, 3].power
    assert all(0.93 <= item.coverage <= 0.97 for item in found.values())
    assert found[5, 3].gpu_hours == 2 * 3 * 31


def test_no_noise_no_doubt_and_too_much_resolves_nothing() -> None:
    (quiet,) = prospects(
        Ladder(LADDER.sizes[:3], LADDER.compute[:3], LADDER.gpu_hours[:3]),
        1.05,
        [1],
        World(seed_noise=1e-6, arm_noise=0, shared_noise=0),
        simulations=200,
    )
    assert quiet.power == 1
    (loud, *_) = prospects(LADDER, 1.05, [1], World(seed_noise=0.5), simulations=200)
    assert loud.smallest_m is None
    assert loud.power < 0.2


def test_a_plan_and_a_store_give_the_ladder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = [
        {"arm": arm, "size": size, "seed": 0, "flops_exact": flops, "gpus": 8, "hours": flops / 1e19}
        for arm in ("transformer", "dyn")
        for size, flops in (("big", 4e19), ("small", 1e19), ("mid", 2e19))
    ]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    ladder = read_ladder(path, None, None)
    assert ladder.sizes == ("small", "mid", "big")
    assert ladder.compute.tolist() == [1e19, 2e19, 4e19]
    assert ladder.gpu_hours.tolist() == [8, 16, 32]
    assert read_ladder(path, None, 1e15).gpu_hours == pytest.approx(ladder.compute / 3.6e18)
    store = write_sweep(tmp_path / "store", {"dyn": 1.2}, sizes=3, seeds=1)
    assert read_ladder(store, None, None).compute == pytest.approx(np.geomspace(1e15, 1e17, 3))
    assert main(["power", str(path), "--m", "1.1", "--seeds", "1", "--simulations", "200", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["sizes"], row["seeds"], row["gpu_hours"]) == (3, 1, 112)
    assert 0 < row["power"] < 1
    assert not math.isnan(row["half_width"])


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("{}", [], "is no plan"),
        ("nonsense", [], "is unreadable"),
        ('[{"arm": "a", "size": "s"}]', [], "lacks compute"),
        ('[{"arm": "a", "size": "s", "flops_exact": 1e19}]', [], "needs 3 sizes; got 1"),
        ('[{"arm": "a", "size": "s", "flops_exact": 1e19}]', ["--seeds", "x"], "takes whole numbers"),
        ('[{"arm": "a", "size": "s", "flops_exact": 1e19}]', ["--baseline", "b"], "no arm 'b'; the arms are a"),
    ],
)
def test_designs_that_are_none_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, arguments: list[str], message: str
) -> None:
    (tmp_path / "plan.json").write_text(text)
    assert main(["power", str(tmp_path / "plan.json"), *arguments]) == 2
    assert message in capsys.readouterr().err
