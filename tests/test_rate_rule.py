"""The rates of sizes where one is tried: each arm's own level, one slope of all arms; a planted rule comes back."""

from __future__ import annotations

import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from planted import FIRST_SEEDS, STUDY, STUDY_BEST, STUDY_M, study, write_points
from stage_tables import Rates as StageRates
from stage_tables import X
from stage_tables import rule as rule_of_the_stages

from analysis.laws.rate_rule import rule_of
from analysis.laws.rates import Tuned
from experiments.cli.main import main

MIDDLE = 6.8e15  # FLOPs at which planted factors are STUDY_BEST
COMPUTE = {"1M": 2.490e14, "3M": 1.678e15, "7M": 7.455e15, "11M": 1.680e16, "16M": 3.296e16, "21M": 5.864e16}


def tuned(arm: str, size: str, factor: float, **changes: Any) -> Tuned:
    values = {"rates": 3, "at_edge": False, "learned": (0.004 * factor / 2, 0.004 * factor * 2), "bend": 0.02}
    return Tuned(
        arm=arm,
        size=size,
        budget="",
        best=0.004 * factor,
        factor=factor,
        given_back=None,
        compute=COMPUTE[size],
        runs=(1, 1),
        **(values | changes),
    )


def test_the_rule_is_that_of_the_study_s_simulations() -> None:
    """The same slope and the same rates as tests/stage_tables.py computes for many sweeps at once."""
    random = np.random.default_rng(3)
    best = {arm: np.exp(random.normal(0.7, 0.3, 3)) for arm in STUDY_M}
    found = rule_of(
        tuned(arm, size, float(factor), learned=(1e-9, 1e9))
        for arm, factors in best.items()
        for size, factor in zip(("1M", "3M", "11M"), factors, strict=True)
    )
    assert found is not None
    for arm in STUDY_M:
        others = [arm, *(each for each in STUDY_M if each != arm)]
        points = [(np.log(best[each])[None], np.log(best[each])[None]) for each in others]
        height, slope = rule_of_the_stages(points, StageRates("runs", "shared"))
        assert found.slope == pytest.approx(float(slope[0]), abs=2e-3)  # FLOPs above have four digits
        for place, size in ((2, "7M"), (4, "16M"), (5, "21M")):
            assert found.at(arm, COMPUTE[size]) == pytest.approx(
                math.exp(float(height[0] + slope[0] * X[place])), rel=5e-3
            )


def test_edges_do_not_count_and_bound_the_rule() -> None:
    rates = [
        tuned("base", "1M", 2.0),
        tuned("base", "3M", 2.0),
        tuned("base", "11M", 1.0, at_edge=True, learned=(0.004, 0.0064)),
        tuned("new", "1M", 1.0),
        tuned("new", "11M", 1.0),
        tuned("edge", "1M", 4.0, at_edge=True),
        tuned("single", "1M", 4.0, rates=1),
    ]
    found = rule_of(rates)
    assert found is not None
    assert found.slope == pytest.approx(0, abs=1e-12)
    assert found.at("new", 1e17) == pytest.approx(1.0)
    assert found.at("base", 1e17) == pytest.approx(1.6)  # the highest at which it learned at 11M
    assert found.at("edge", 1e17) is None
    assert found.at("single", 1e17) is None
    assert rule_of(rates[2:4]) is None


def best_factor(arm: str, size: str, slope: float) -> float:
    return STUDY_BEST[arm] * (COMPUTE[size] / MIDDLE) ** slope


def test_the_planted_rates_of_untuned_sizes_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As lines that the sweep file can hold, of every size at which it trains one rate; with the first session's runs,
    which hold none of these sizes."""
    path = write_points(study(1, slope=0.04, noise=0.0, scatter=0.0), tmp_path / "study.csv")
    assert main(["table", str(path), "--rates", str(STUDY)]) == 0
    out = capsys.readouterr()
    assert "+0.04 for each e-fold of compute" in out.out
    found = tomllib.loads(out.out)["vary_by_arm"]
    assert set(found) == set(STUDY_M)
    for arm, axes in found.items():
        assert set(axes["learning_rate_factor"]) == {"7M", "16M", "21M"}
        for size, (factor,) in axes["learning_rate_factor"].items():
            assert factor == pytest.approx(best_factor(arm, size, 0.04), rel=0.03)  # two digits
    assert main(["table", str(path), "--rates", str(STUDY), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["arm"], row["size"]): row["learning_rate_factor"] for row in rows} == {
        (arm, size): factor for arm, axes in found.items() for size, (factor,) in axes["learning_rate_factor"].items()
    }


def answers(rows: pd.DataFrame, folder: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert main(["table", str(write_points(rows, folder / "p.csv")), "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def off_rule(found: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    rates = [each for item in found for each in item["rates"] if each["rates"] == 1]
    return {(each["arm"], each["size"]): each["off_rule"] for each in rates}


def test_table_warns_by_the_same_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who trains the printed rates is told of none. Static filters are planted a curve of their own at the tuned sizes,
    by which their own line, extrapolated, is off by a factor of 2 at 21M."""
    slope, tilt = 0.0, 0.15
    rates = {(arm, size): best_factor(arm, size, slope) for arm in STUDY_M for size in ("7M", "16M", "21M")}
    rows = study(2, slope=slope, noise=0.0, scatter=0.0, singles=rates)
    mine = (rows["arm"] == "static-qkv") & rows["size"].isin(["1M", "3M", "11M"])
    off = np.log(rows["vary.learning_rate_factor"] / STUDY_BEST["static-qkv"])
    bent = 0.02 * ((off - tilt * np.log(rows["flops_exact"] / 1.7e15)) ** 2 - off**2)
    rows["loss"] += bent.where(mine, 0.0)
    found = answers(rows, tmp_path, capsys)
    told = off_rule(found)
    assert len(told) == 5 * 3 + 2  # head-wise filters are not at 21M
    shared = np.log([told["lowrank-all", size] for size in ("7M", "16M", "21M")])
    assert abs(shared).max() < 0.15  # the slope of static filters is a sixth of the slope in common
    statuses = {item["arm"]: item["status"] for item in found}
    assert not any("has one rate" in status for status in statuses.values())
    assert math.exp(tilt * math.log(COMPUTE["21M"] / 1.7e15)) > 1.5  # its own line would have warned


def test_a_rate_off_the_rule_is_told_with_what_it_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = {(arm, size): STUDY_BEST[arm] for arm in STUDY_M for size in ("7M", "16M", "21M")}
    rows = study(2, noise=0.0, scatter=0.0, singles=rates | {("lowrank-all", "21M"): 6.0})
    (item,) = [each for each in answers(rows, tmp_path, capsys) if each["arm"] == "lowrank-all"]
    assert (
        "lowrank-all has one rate at 21M, 2x that of the tuned sizes' rule (which costs about 0.0096" in item["status"]
    )
    assert "has one rate at 16M" not in item["status"]


def test_a_store_without_a_rule_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = study(1, noise=0.0)
    path = str(write_points(rows[rows["size"] == "1M"], tmp_path / "p.csv"))
    assert main(["table", path, "--rates", str(STUDY)]) == 2
    assert "no arm has its best learning rate between worse ones at two sizes" in capsys.readouterr().err
    assert main(["table", path, "--rates", str(STUDY), "--by", "arm"]) == 2
    assert "do not go together" in capsys.readouterr().err


def test_what_has_no_rate_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An arm of the sweep that the store lacks, rates that are no factors of a ladder, and a sweep on no text."""
    rows = study(1, noise=0.0)
    path = str(write_points(rows[rows["arm"] != "static-qkv"], tmp_path / "p.csv"))
    assert main(["table", path, "--rates", str(STUDY)]) == 0
    out = capsys.readouterr()
    assert "no rates for static-qkv: no best rate between worse ones was found at any size" in out.err
    assert "static-qkv" not in out.out
    bare = str(write_points(rows.drop(columns="vary.learning_rate_factor"), tmp_path / "bare.csv"))
    assert main(["table", bare, "--rates", str(STUDY)]) == 2
    assert "the runs do not record their factor of the ladder's rate" in capsys.readouterr().err
    assert main(["table", path, "--rates", str(STUDY.with_name("demo-mqar.toml"))]) == 2
    assert "a sweep on text is wanted" in capsys.readouterr().err


PILOT = STUDY.parents[2] / "results" / "measured" / "h200" / "mini-rates"


@pytest.mark.parametrize(
    ("key", "other", "message"),
    [
        ("tokens_per_parameter = 20", "tokens_per_parameter = 30", "tokens per parameter 18.5 against 27.8"),
        ("[data]", '[train]\noptimizer = { kind = "muon" }\n[data]', "optimizer adamw against muon"),
        ("[data]", '[train]\nschedule = { kind = "wsd", decay_fraction = 0.2 }\n[data]', "schedule cosine against wsd"),
        ("[data]", "[train]\nbatch_sequences = 16\n[data]", "tokens of a batch 1.64e+04 against 8.19e+03"),
        ("[data]", "[train]\nlearning_rate = 0.001\n[data]", "learning rate at factor 1 0.004 against 0.001"),
    ],
)
def test_a_sweep_of_another_recipe_gets_no_rates(
    key: str, other: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pilot's runs, and the study's file with one setting changed."""
    sweep = tmp_path / "other.toml"
    sweep.write_text(STUDY.read_text().replace(key, other))
    assert main(["table", str(PILOT), "--rates", str(sweep)]) == 2
    said = capsys.readouterr()
    assert f"otherwise: {message}" in said.err
    assert not said.out


def test_a_sweep_of_another_ladder_gets_no_rates(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(PILOT), "--rates", str(STUDY.with_name("paper-scaling.toml"))]) == 2
    said = capsys.readouterr()
    assert "is of ladder 'paper', whose sizes are 150M, 300M, 400M, 600M, 1B, 2B; got 1M, 3M" in said.err
    assert not said.out


def test_the_pilot_gives_rates_to_larger_sizes_of_its_ladder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the sweep trains none of the pilot's own sizes."""
    assert main(["table", str(PILOT), "--rates", str(STUDY)]) == 0
    whole = capsys.readouterr().out
    sweep = tmp_path / "larger.toml"
    sweep.write_text(
        STUDY.read_text().split("[seeds_by_size]")[0].replace('"1M", "3M", ', "")
        + "[data]"
        + STUDY.read_text().split("[data]")[1]
    )
    assert main(["table", str(PILOT), "--rates", str(sweep)]) == 0
    larger = tomllib.loads(capsys.readouterr().out)["vary_by_arm"]
    for arm, axes in tomllib.loads(whole)["vary_by_arm"].items():
        assert axes["learning_rate_factor"].items() <= larger[arm]["learning_rate_factor"].items()


def test_a_factor_that_is_held_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """The pilot's best factors of low-rank filters rise from 1M to 3M, and 8 was not stable at 3M."""
    assert main(["table", str(PILOT), "--rates", str(STUDY)]) == 0
    text = capsys.readouterr().out
    arms = {arm: axes["learning_rate_factor"] for arm, axes in tomllib.loads(text)["vary_by_arm"].items()}
    assert arms["lowrank-qkv"]["7M"] == [4]
    of_arm = text.split("[vary_by_arm.lowrank-qkv.learning_rate_factor]")[1].split("[vary")[0]
    said = re.findall(
        r"^(\w+) = \[4\]  # held at 4, the highest at which it learned; the rule goes on to (.*)$", of_arm, re.M
    )
    assert [size for size, _ in said] == ["7M", "16M", "21M"]
    assert 4 < float(said[0][1]) < float(said[1][1]) < float(said[2][1])
    of_arm = text.split("[vary_by_arm.transformer.learning_rate_factor]")[1].split("[vary")[0]
    assert "held" not in of_arm
    assert main(["table", str(PILOT), "--rates", str(STUDY), "--format", "csv"]) == 0
    assert "lowrank-qkv at 7M is held at 4, the highest" in capsys.readouterr().err


def test_a_table_without_learning_rates_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = study(1, noise=0.0).drop(columns=["vary.learning_rate_factor", "train.learning_rate"], errors="ignore")
    bare = bare.drop_duplicates(["arm", "size", "seed"])
    assert main(["table", str(write_points(bare, tmp_path / "bare.csv")), "--rates", str(STUDY)]) == 2
    assert "the table has no learning rates" in capsys.readouterr().err


def test_later_seeds_train_the_best_rate_alone() -> None:
    """Of the maker of the study's runs, on which these tests stand."""
    rows = study(3)
    for size, seeds in FIRST_SEEDS.items():
        later = rows[(rows["size"] == size) & (rows["seed"] >= seeds)]
        assert later.groupby("arm")["vary.learning_rate_factor"].nunique().eq(1).all()
        assert set(later["arm"]) == set(STUDY_M)
