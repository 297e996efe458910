"""Planning: more sizes and seeds resolve more, what is simulated is what is reported, and the hours add up."""

from __future__ import annotations

import json
import math
import re
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted import STUDY, pairs_of, write_sweep

from analysis.advantage.changing import reported
from analysis.advantage.checks import local_of
from analysis.advantage.measured import _noise_over_sizes, measured, seed_noise_by_size
from analysis.advantage.multiplier import compare
from analysis.advantage.planning import (
    Ladder,
    Simulated,
    World,
    cheapest,
    in_order,
    ladder_of,
    plan_table,
    prospects,
    unpaired,
)
from analysis.logs.schema import RUN_COLUMNS
from analysis.logs.store import load
from analysis.pages.query import chosen
from experiments.cli.main import main
from experiments.cli.plan import planned

LADDER = Ladder(("a", "b", "c", "d", "e"), np.geomspace(1e19, 1e21, 5), np.array([1.0, 2.0, 4.0, 8.0, 16.0]))


@pytest.mark.slow
def test_sizes_and_seeds_buy_resolution() -> None:
    """With m taken for constant, 3 sizes would resolve 1.061 with one seed, 5 1.032, 5 with 3 seeds 1.026; what an
    interval for m at the largest compute asks more is its price. 200 sweeps each: coverage is known to .015."""
    found = {(item.sizes, item.seeds): item for item in prospects(LADDER, 1.06, [1, 3], World(), simulations=200)}
    smallest = {key: item.smallest_m for key, item in found.items()}
    assert smallest[3, 1] == pytest.approx(1.10, abs=0.02)
    assert smallest[5, 1] == pytest.approx(1.062, abs=0.01)
    assert smallest[5, 3] == pytest.approx(1.049, abs=0.01)
    assert found[3, 1].power < found[4, 1].power < found[5, 3].power
    assert all(0.91 <= item.coverage <= 1 for item in found.values())
    assert all(item.called_varying <= 0.1 for item in found.values())
    assert found[5, 3].gpu_hours == 2 * 3 * 31
    enough = [item for item in found.values() if item.power >= 0.8]
    assert found[5, 3] in enough
    assert cheapest(list(found.values())) == min(enough, key=lambda item: item.flops)


@pytest.mark.parametrize("seeds", [1, 2])
def test_what_is_simulated_is_what_is_reported(seeds: int) -> None:
    """Simulated sweeps through `compare`: the same number and interval; the same verdict on constancy but where its p,
    by other random numbers, is within .05 of the limit."""
    sweeps = Simulated(LADDER.compute, math.log(1.05), seeds, World(arm_noise=0.004), 30, seed=1)
    p = sweeps.constancy(np.ones(30, dtype=bool))
    ln_m, low, high = reported(sweeps.local, p, sweeps.changing)
    agreed = 0
    for k, (y0, y1) in enumerate(zip(*sweeps.losses, strict=True)):
        pairs = pairs_of(LADDER.compute, y0, y1)
        if sweeps.noise is not None:  # two seeds whose spread is what the simulation took for their noise
            apart = np.sqrt(sweeps.noise.variance[k])[:, None] * [-1.0, 1.0]
            pairs = replace(pairs, seeds=(2,) * 5, differences=tuple((y0 - y1)[:, None] + apart))
        found = compare(pairs)
        assert found.constant_m_p is not None
        assert found.ci is not None
        if (found.constant_m_p < 0.05) == (p[k] < 0.05):
            agreed += 1
            assert (found.m, *found.ci) == pytest.approx(tuple(np.exp([ln_m[k], low[k], high[k]])), rel=1e-9)
        else:
            assert abs(found.constant_m_p - 0.05) < 0.05
    assert agreed >= 27


def test_no_noise_no_doubt_and_too_much_resolves_nothing() -> None:
    (quiet,) = prospects(
        Ladder(LADDER.sizes[:3], LADDER.compute[:3], LADDER.gpu_hours[:3]),
        1.05,
        [1],
        World(seed_noise=1e-6, arm_noise=0, shared_noise=0),
        simulations=200,
    )
    assert quiet.power == 1
    (loud, *_) = prospects(LADDER, 1.05, [2], World(seed_noise=0.5), simulations=200)
    assert loud.smallest_m is None
    assert loud.power < 0.1
    assert cheapest([loud]) is None


def test_seeds_that_disagree_hide_what_their_means_show() -> None:
    """Sizes agree by luck where only the seeds differ: the reported answer is then held to the seeds' own noise."""
    sweeps = Simulated(LADDER.compute, math.log(1.05), 2, World(seed_noise=0.02), 400, seed=0)
    low, high = sweeps.local.interval()
    by_interval = (low > 0) | (high < 0)
    resolved = sweeps.resolved(np.ones(400))
    assert 0 < resolved.sum() < by_interval.sum()
    assert (np.abs(sweeps.local.mean[resolved]) >= sweeps.noise_floor[resolved]).all()


def test_power_is_that_of_one_arm_among_those_of_the_design(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What `table` calls resolved is so by the interval of all arms at once. 400 sweeps: .72 alone, .13 among five."""
    (alone,), (of_five,) = (
        prospects(Ladder(*(part[:3] for part in vars(LADDER).values())), 1.1, [1], World(), 400, arms=arms)
        for arms in (1, 5)
    )
    assert alone.power - of_five.power > 0.2
    assert (alone.coverage, alone.half_width) == (of_five.coverage, of_five.half_width)
    sweeps = Simulated(LADDER.compute, math.log(1.04), 1, World(), 400, seed=0)
    p = np.ones(400)
    _, low, high = reported(sweeps.local, p, sweeps.changing, level=0.01)
    assert (sweeps.resolved(p, 5) == ((low > 0) | (high < 0))).all()
    plan = [
        {"arm": arm, "size": str(n), "seed": 0, "flops_exact": float(n)}
        for arm in "abc"
        for n in (10**15, 10**16, 10**17)
    ]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert main(["power", str(tmp_path / "plan.json"), "--m", "1.3", "--seeds", "1", "--simulations", "100"]) == 0
    assert "simulated with the interval of all 2 arms at once" in capsys.readouterr().out


def test_errors_that_go_together_over_sizes_cost_coverage() -> None:
    """An AR(1) of .9 leaves the variance of each size, and takes the interval's coverage of a constant m below .9."""
    errors = in_order(np.random.default_rng(0).standard_normal((20_000, 6)), 0.9)
    assert errors.std(axis=0) == pytest.approx(np.ones(6), abs=0.02)
    assert np.corrcoef(errors[:, 2], errors[:, 3])[0, 1] == pytest.approx(0.9, abs=0.01)
    coverage = []
    for correlation in (0.0, 0.9):
        found = Simulated(LADDER.compute, math.log(1.33), 1, World(correlation=correlation), 400, seed=0)
        _, low, high = reported(found.local, np.ones(400), found.changing)
        coverage.append(float(((low < math.log(1.33)) & (math.log(1.33) < high)).mean()))
    assert coverage[0] > 0.94
    assert coverage[1] < 0.9


def test_seeds_that_scatter_more_at_small_sizes_leave_the_noise_of_the_arms() -> None:
    """The seeds and noise of experiments/sweeps/mini-scaling.toml, arms that scatter by .0015 around their laws, 60
    stores at once. With the seeds' noise of all sizes taken to be one, the arms' came out as 0."""
    random = np.random.default_rng(0)
    compute = np.array([2.5e14, 1.7e15, 7.5e15, 1.7e16, 3.3e16, 5.9e16])
    seeds, noise = (16, 8, 5, 3, 3, 3), (0.01, 0.004, 0.003, 0.0025, 0.002, 0.002)
    laws, squares = [], 0.0
    for _ in range(60):
        law = 1.2 + 0.39 * (compute / 7e15) ** -0.3
        y0, y1 = (law + 0.0015 * random.standard_normal(6) for _ in range(2))
        differences = tuple(
            a - b + math.sqrt(2) * sd * random.standard_normal(n)
            for a, b, sd, n in zip(y0, y1, noise, seeds, strict=True)
        )
        y1 = y0 - np.array([each.mean() for each in differences])
        each = replace(pairs_of(compute, y0, y1), seeds=seeds, differences=differences)
        laws.append((each, local_of(each, None)))
        squares += sum(float(((d - d.mean()) ** 2).sum()) / 2 for d in differences)
    pooled = math.sqrt(squares / (60 * (sum(seeds) - 6)))
    assert _noise_over_sizes(laws, pooled)["arm_noise"][0] == pytest.approx(0.0015, rel=0.25)


def test_a_baseline_that_has_not_finished_leaves_the_noise_of_seeds(tmp_path: Path) -> None:
    """It was a KeyError."""
    runs = load(write_sweep(tmp_path / "store", {"dyn": 1.3, "two": 1.1}, sizes=3, seeds=2)).runs
    runs["status"] = runs["status"].mask(runs["arm"].eq("transformer"), "unfinished")
    _, assumptions = measured(runs)
    sources = {item.name: item.source for item in assumptions}
    assert sources["seed_noise"] == "measured: seeds of one arm and size, 6 degrees of freedom"
    assert sources["arm_noise"] == "assumed, not measured"


def test_noise_is_taken_from_finished_runs_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seeds that differ by .04, as the demo's do, where .002 used to be assumed; without noise of arms. An option goes
    before what is measured."""
    store = write_sweep(tmp_path / "store", {"dyn": 1.3}, sizes=6, seeds=3, noise=0.04)
    world, assumptions = measured(load(store).runs)
    assert world.seed_noise == pytest.approx(0.04, rel=0.35)  # 12 degrees of freedom
    assert world.arm_noise < 0.03
    assert world.shared_noise == pytest.approx(0.08, rel=0.7)
    assert {item.name for item in assumptions} >= {"seed_noise", "arm_noise", "shared_noise", "exponent"}
    asked = ["power", str(store), "--m", "1.3", "--seeds", "2", "--simulations", "100", "--exponent", "0.1"]
    assert main(asked) == 0
    text = capsys.readouterr().out
    said = re.search(r"seed noise (.*) \(measured: paired seeds, a power of compute, 12 degrees of freedom\)", text)
    assert said is not None
    by_size = [float(value) for value in re.findall(r"([\d.]+) at s\d", said[1])]
    assert len(by_size) == 6
    assert math.exp(np.log(by_size).mean()) == pytest.approx(world.seed_noise, rel=0.15)
    assert "exponent 0.1 (asked)" in text
    assert "correlation 0 (assumed, not measured)" in text
    assert main([*asked, "--json"]) == 0
    assert "simulated with seed noise" in capsys.readouterr().err


def test_seeds_of_a_store_show_the_noise_of_each_size() -> None:
    """40 seeds of sizes whose noise is a power of compute, two arms; the largest size has one seed, and gets the noise
    of its neighbour. One number for all sizes would be off by a factor of 3 at either end."""
    random = np.random.default_rng(0)
    rows = [
        {"arm": arm, "size": str(i), "seed": seed, "loss": 3 - i / 10 + 0.01 * (c / 1e15) ** -0.25 * noise}
        | {"run_id": f"{arm}{i}{seed}", "flops_exact": c, "status": "complete"}
        for arm in "ab"
        for i, c in enumerate((1e15, 1e16, 1e17, 1e18))
        for seed, noise in enumerate(random.standard_normal(40 if i < 3 else 1))
    ]
    runs = pd.DataFrame(rows)
    runs = runs.assign(**{name: None for name in RUN_COLUMNS if name not in runs})
    found, source = seed_noise_by_size(runs, ladder_of(runs, "a"), "a")
    assert list(found) == ["0", "1", "2", "3"]
    assert list(found.values()) == pytest.approx([0.01, 0.0056, 0.0032, 0.0032], rel=0.2)
    assert found["3"] == found["2"]
    assert "117 degrees of freedom" in source


def test_every_kind_of_design_gives_its_ladder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = [
        {"arm": arm, "size": size, "seed": 0, "flops_exact": flops, "gpus": 8, "hours": flops / 1e19}
        for arm in ("transformer", "dyn")
        for size, flops in (("big", 4e19), ("small", 1e19), ("mid", 2e19))
    ]
    ladder = ladder_of(pd.DataFrame(plan))
    assert ladder.sizes == ("small", "mid", "big")
    assert ladder.compute.tolist() == [1e19, 2e19, 4e19]
    assert ladder.gpu_hours.tolist() == [8, 16, 32]
    assert ladder_of(pd.DataFrame(plan), None, 1e15).gpu_hours == pytest.approx(ladder.compute / 3.6e18)
    store = load(write_sweep(tmp_path / "store", {"dyn": 1.2}, sizes=3, seeds=1))
    assert ladder_of(store.runs).compute == pytest.approx(np.geomspace(1e15, 1e17, 3))
    points = pd.DataFrame({"N": [1e6, 2e6, 4e6], "D": [2e7, 4e7, 8e7], "loss": [3.5, 3.3, 3.1]})
    points.to_csv(tmp_path / "points.csv", index=False)
    by_size = ladder_of(load(tmp_path / "points.csv").runs)
    assert by_size.compute.tolist() == [1.2e14, 4.8e14, 1.92e15]
    assert by_size.sizes == ("1000000", "2000000", "4000000")
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    arguments = ["--m", "1.1", "--seeds", "1", "--simulations", "100", "--json"]
    assert main(["power", str(tmp_path / "plan.json"), *arguments]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["sizes"], row["seeds"], row["flops"], row["gpu_hours"]) == (3, 1, 1.4e20, 112)
    assert 0 < row["power"] < 1
    assert not math.isnan(row["half_width"])


def test_a_sweep_file_is_a_design(capsys: pytest.CaptureFixture[str]) -> None:
    sweep = Path(__file__).parents[1] / "experiments" / "sweeps" / "demo.toml"
    assert main(["plan", str(sweep), "--json"]) == 0
    planned = [row for row in json.loads(capsys.readouterr().out) if row["arm"] == "transformer" and row["seed"] == 0]
    arguments = ["--m", "1.3", "--seeds", "2", "--simulations", "100", "--gpu-flops", "1e9"]
    assert main(["power", str(sweep), *arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["sizes"] for row in rows] == [3, 4]
    assert rows[-1]["flops"] == pytest.approx(4 * sum(run["flops_exact"] for run in planned))
    assert rows[-1]["gpu_hours"] == pytest.approx(rows[-1]["flops"] / 1e9 / 3600)
    assert main(["power", str(sweep), *arguments]) == 0
    assert "cheapest with 80% power: 3 sizes x 2 seeds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("{}", [], "is no plan"),
        ("nonsense", [], "is unreadable"),
        ('[{"arm": "a", "size": "s"}]', [], "no compute in every row"),
        ('[{"size": "s", "flops_exact": 1e19}]', [], "needs 3 sizes; got 1"),
        ('[{"arm": "a", "size": "s", "flops_exact": 1e19}]', [], "a is the only arm; give a design of two or more"),
        (
            '[{"arm": "a", "size": "s", "flops_exact": 1e19}, {"arm": "b", "size": "t", "flops_exact": 1e19}]',
            [],
            "no size and seed is in every arm (a, b)",
        ),
        ('[{"size": "s", "flops_exact": 1e19}, {"size": "t", "run_id": "q"}]', [], "got nan in q"),
        ('[{"size": "s", "flops_exact": -1e19, "run_id": "r"}]', [], "compute must be positive; got -1e+19 in r"),
        ('[{"arm": "a", "size": "s", "flops_exact": 1e19}]', ["--seeds", "x"], "takes whole numbers"),
        ('[{"arm": "a", "size": "s", "flops_exact": 1e19}]', ["--baseline", "b"], "no arm 'b'; the arms are a"),
        ("[]", ["--gpu-flops", "-1"], "--gpu-flops must be positive; got -1"),
        ("[]", ["--exponent", "0"], "--exponent must be positive; got 0"),
        ("[]", ["--correlation", "1"], "--correlation must be between -1 and 1; got 1"),
        ("[]", ["--arm-noise", "nan"], "--arm-noise must be at least 0; got nan"),
    ],
)
def test_designs_that_are_none_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, arguments: list[str], message: str
) -> None:
    (tmp_path / "plan.json").write_text(text)
    assert main(["power", str(tmp_path / "plan.json"), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fewer", "sizes", "seeds", "told"),
    [
        ('size in ["1M", "3M", "7M"]', ["1M", "3M", "7M"], (16, 8, 5), "so without 11M, 16M, 21M"),
        ("seed == 0", ["1M", "3M", "7M", "11M", "16M", "21M"], (1,) * 6, "so without 1M (some seeds), 3M (some"),
        ("seed >= 1", ["1M", "3M", "7M", "11M", "16M", "21M"], (15, 7, 4, 2, 2, 2), "1M (some seeds), 3M (some"),
    ],
)
def test_only_what_both_arms_have_makes_the_design(
    fewer: str, sizes: list[str], seeds: tuple[int, ...], told: str
) -> None:
    runs = plan_table(planned(STUDY))
    part = chosen(runs, f'arm == "static-qkv" or (arm == "lowrank-qkv" and {fewer})')
    ladder = ladder_of(part, "static-qkv")
    assert list(ladder.sizes) == sizes
    assert ladder.seeds == seeds
    assert told in str(unpaired(part))
    assert unpaired(chosen(runs, 'arm in ["static-qkv", "lowrank-qkv"]')) is None


def test_the_cost_of_every_rate_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """What `plan --where` says of the same runs, beside the cost of one rate."""
    where = 'arm in ["static-qkv", "lowrank-qkv"]'
    assert main(["plan", str(STUDY), "--where", where]) == 0
    assert "192 runs, 1.044e+18 FLOPs" in capsys.readouterr().out
    asked = ["power", str(STUDY), "--where", where, "--baseline", "static-qkv", "--seeds", "1", "--simulations", "100"]
    line = "all 192 runs of this design take 1.044e+18 FLOPs"
    assert main(asked) == 0
    assert line in capsys.readouterr().out
    assert main([*asked, "--json"]) == 0
    assert line in capsys.readouterr().err
    alone = f"`vary.learning_rate_factor` == 4 and size in ['1M', '3M', '11M'] and {where}"
    assert main([*asked, "--where", alone]) == 0
    assert "runs of this design" not in capsys.readouterr().out


def test_a_name_that_is_no_column_is_told_as_it_was_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["power", str(STUDY), "--where", "`vary.learning_rate` == 1"]) == 2
    told = capsys.readouterr().err
    assert "name `vary.learning_rate` is not defined" in told
    assert "BACKTICK" not in told


def test_a_design_has_seeds_and_noise_of_each_size() -> None:
    """The same for all sizes is what one number says; seeds where the noise is take it off."""
    world = World(seed_noise=0.004)
    alike = Simulated(LADDER.compute, math.log(1.05), [3] * 5, replace(world, seed_noise=(0.004,) * 5), 50, seed=0)
    one = Simulated(LADDER.compute, math.log(1.05), 3, world, 50, seed=0)
    np.testing.assert_array_equal(alike.losses, one.losses)
    np.testing.assert_allclose(alike.noise_floor, one.noise_floor)
    assert alike.noise is not None
    assert one.noise is not None
    np.testing.assert_allclose(alike.noise.variance, one.noise.variance)
    falling = replace(LADDER, seeds=(25, 1, 1, 1, 1), seed_noise=(0.02, 0.004, 0.004, 0.004, 0.004))
    few, own = list(prospects(falling, 1.1, [1, None], World(), simulations=300))[-2:]
    assert (few.seeds, own.seeds) == (1, falling.seeds)
    assert own.half_width < 0.8 * few.half_width
    assert own.gpu_hours == 2 * (25 * 1 + 2 + 4 + 8 + 16)


def test_the_noise_of_each_size_and_its_own_seeds_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    sweep = "experiments/sweeps/mini-english.toml"
    options = ["--simulations", "100", "--seeds", "own,5"]
    assert main(["power", sweep, *options, "--seed-noise", "1M=.01,3M=.004,7M=.003"]) == 0
    said = capsys.readouterr().out
    assert "[3, 3, 3]" in said
    assert "seed noise 0.01 at 1M, 0.004 at 3M, 0.003 at 7M (asked)" in said
    for noise in ("1M=.01", "1M=.01,.004", "1M=x,3M=1,7M=1", "-1", "1M=1,1M=2,3M=1,7M=1"):
        assert main(["power", sweep, *options, f"--seed-noise={noise}"]) == 2
        assert "--seed-noise" in capsys.readouterr().err


def test_designs_of_fewer_sizes_are_of_the_same_law() -> None:
    """Three of five sizes are what the ladder of these three is, with the law's reducible loss at their middle."""
    of_five = next(iter(prospects(LADDER, 1.06, [2], World(), simulations=100)))
    three = World(reducible_loss=1.3 * (10**19.5 / 1e20) ** -0.15)
    (alone,) = prospects(LADDER.smallest(3), 1.06, [2], three, simulations=100)
    assert astuple(of_five) == pytest.approx(astuple(alone))
