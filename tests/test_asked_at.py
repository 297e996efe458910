"""m at a compute far beyond the runs: planted laws come back with an interval, and nobody can take it for measured."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from noise_tables import STUDY, STUDY_NOISE
from planted import pairs_of, write_points

from analysis.advantage.checks import EXTRAPOLATED, asked_at
from analysis.advantage.multiplier import compare
from analysis.advantage.paired import local_multipliers
from analysis.advantage.seeds import by_power
from experiments.cli.main import main

MIDDLE = float(np.exp(np.log(STUDY).mean()))
FAR = 570 * STUDY[-1]  # the paper's 300M
Law = Callable[[Any], Any]


def law(compute: Any) -> Any:
    return 0.39 * (compute / MIDDLE) ** -0.3


def own_exponent(compute: Any) -> Any:
    """m = 1.33 at the middle, and doubles in four decades."""
    return law(1.33 * compute * (compute / MIDDLE) ** (math.log(2) / math.log(1e4)))


def own_irreducible_loss(compute: Any) -> Any:
    return law(1.2 * compute) - 0.01


LAWS: list[Law] = [lambda compute: law(1.33 * compute), own_exponent, own_irreducible_loss]


def true_m(arm: Law, compute: float) -> float:
    """The baseline's compute that reaches the arm's loss, over the arm's."""
    return float((arm(compute) / 0.39) ** (-1 / 0.3) * MIDDLE / compute)


@pytest.mark.parametrize("arm", LAWS)
def test_a_planted_law_comes_back_at_any_compute(arm: Law) -> None:
    asked = [STUDY[2], STUDY[-1], FAR]
    pairs = pairs_of(STUDY, 1.7 + law(STUDY), 1.7 + arm(STUDY))
    found = compare(pairs, at=asked, resamples=99)
    assert [at.compute for at in found.asked] == asked
    assert [at.times_largest for at in found.asked] == pytest.approx([STUDY[2] / STUDY[-1], 1, 570])
    assert [at.times_smallest for at in found.asked] == pytest.approx([c / STUDY[0] for c in asked])
    for at in found.asked:
        assert at.m == pytest.approx(true_m(arm, at.compute), rel=0.002)
    assert max(at.compute for at in found.curve) == pytest.approx(EXTRAPOLATED * STUDY[-1])  # as without


@pytest.mark.parametrize("arm", LAWS)
def test_its_interval_covers_if_the_law_goes_on(arm: Law) -> None:
    """150 noisy studies, at 570 times the largest compute; analysis/README.md has the shares of 400."""
    random = np.random.default_rng(5)
    seeds, covered = np.array([16.0, 8, 5, 3, 3, 3]), 0
    for _ in range(150):
        shared = 0.005 * random.standard_normal(6)
        of_arms = (0.001 * random.standard_normal((2, 1, 6)), STUDY_NOISE * random.standard_normal((2, 1, 6)))
        y0, y1 = (
            1.7 + of_arm(STUDY) + shared + scatter + of_seeds / np.sqrt(seeds)
            for of_arm, scatter, of_seeds in zip((law, arm), *of_arms, strict=True)
        )
        squares = 2 * STUDY_NOISE**2 * random.chisquare(seeds - 1, (1, 6))
        noise = by_power(STUDY, squares, seeds, seeds - 1)
        (at,) = asked_at(local_multipliers(STUDY, STUDY, y0, y1, noise=noise), [FAR])
        covered += at.ci[0] < true_m(arm, FAR) < at.ci[1]
    assert covered / 150 > 0.9


@pytest.fixture
def points(tmp_path: Path) -> Path:
    rows = [
        {"arm": arm, "size": f"s{i}", "seed": 0, "C": compute, "loss": 1.7 + loss(compute)}
        for arm, loss in (("base", law), ("new", LAWS[0]))
        for i, compute in enumerate(STUDY)
    ]
    rows += [row | {"arm": "short"} for row in rows[6:8]]
    return write_points(pd.DataFrame(rows), tmp_path / "p.csv")


def test_it_is_told_as_extrapolated_in_every_form(points: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = ["table", str(points), "--baseline", "base", "--at", f"{FAR:.4g},{STUDY[1]:.4g},1e13"]
    for form in ("md", "latex"):
        assert main([*table, "--format", form]) == 0
        out = capsys.readouterr()
        lines = [line for line in out.out.splitlines() if f"{FAR:.4g}" in line]
        assert len(lines) == 1
        assert "no: extrapolated 570 times beyond the largest compute" in lines[0]
        assert "1.330" in lines[0]
        assert f"extrapolated {STUDY[0] / 1e13:.3g} times below the smallest compute" in out.out
        assert out.out.count("interpolated") == 1
        assert "beyond the largest compute no run tells whether they go on" in out.out
        assert "no m at another compute for short: three paired sizes" in out.err
    assert main([*table, "--format", "csv"]) == 0
    new, short = csv.DictReader(io.StringIO(capsys.readouterr().out))
    names = [name for name in new if "m_at_" in name and name[-1].isdigit()]
    assert names == [f"extrapolated_m_at_{FAR:.4g}", f"m_at_{STUDY[1]:.4g}", "extrapolated_m_at_1e+13"]
    assert float(new[names[0]]) == pytest.approx(1.33, rel=1e-3)
    assert [short[name] for name in names] == ["", "", ""]
    assert main([*table, "--json"]) == 0
    asked = json.loads(capsys.readouterr().out)[0]["asked"]
    assert [at["times_largest"] > 1 for at in asked] == [True, False, False]


def test_without_being_asked_for_nothing_changes(points: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(points), "--baseline", "base"]) == 0
    assert "extrapolated" not in capsys.readouterr().out


@pytest.mark.parametrize("at", ["", "0", "1e19,", "300M", "-1e19", "inf"])
def test_what_is_no_compute_is_refused(at: str, points: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(points), f"--at={at}"]) == 2
    assert f"--at takes positive numbers, 1e9,2e9; got {at!r}" in capsys.readouterr().err
    assert main(["table", str(points), "--at", "1e19", "--by", "arm"]) == 2
    assert "do not go together" in capsys.readouterr().err
    assert main(["table", str(points), f"--at={at}", "--by", "arm"]) == 2
    assert "do not go together" in capsys.readouterr().err


@pytest.mark.parametrize("at", [1e300, 1.01e6 * STUDY[-1], STUDY[0] / 1.01e6, 3])
def test_what_is_far_from_all_runs_is_refused(at: float, points: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(points), "--baseline", "base", f"--at={STUDY[1]:.4g},{at:.4g}"]) == 2
    said = capsys.readouterr()
    assert f"--at {at:.4g} is too far from the" in said.err
    assert not said.out


def test_a_compute_is_answered_once_and_how_far_is_short(points: Path, capsys: pytest.CaptureFixture[str]) -> None:
    far = f"{5e5 * STUDY[-1]:.4g}"
    assert main(["table", str(points), "--baseline", "base", f"--at={far},{far}"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if far in line]
    assert "extrapolated 5e+05 times beyond the largest compute" in line
