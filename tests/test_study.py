"""The counted study's own design with a planted truth: every session leaves an answer for every arm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from planted import STUDY, STUDY_M, study, write_points

from analysis.advantage import multiplier
from analysis.advantage.multiplier import multipliers
from analysis.logs.store import load
from analysis.pages.figures import local_multipliers
from experiments.cli.main import main
from experiments.cli.plan import planned


@pytest.mark.parametrize("session", [1, 2, 5])
def test_every_session_leaves_an_answer_for_every_arm(session: int, tmp_path: Path) -> None:
    """Head-wise filters are not trained at the largest size, where the baseline has one rate as at other sizes. That
    arm was refused as soon as there was such a size, and the intervals of all arms at once were of one arm less."""
    runs = load(write_points(study(session, noise=0.1, scatter=0.0), tmp_path / "study.csv")).runs
    found, refused = multipliers(runs, resamples=99)
    assert refused == []
    assert {item.arm for item in found} == set(STUDY_M) - {"transformer"}
    for item in found:
        assert item.family == 5
        assert item.family_ci is not None
        assert item.family_ci[0] < STUDY_M[item.arm] < item.family_ci[1]
        assert item.m == pytest.approx(STUDY_M[item.arm], rel=0.02)
        assert item.n_sizes == (3 if session == 1 else 5 if item.arm == "headwise-qkv" else 6)


def test_figures_say_where_an_arm_that_ends_early_is_extrapolated(tmp_path: Path) -> None:
    """Grey begins at the largest compute of all, and head-wise filters end at 16M."""
    runs = load(write_points(study(2, noise=0.1), tmp_path / "study.csv")).runs
    found, _ = multipliers(runs, resamples=99)
    titles = []
    for shown in (found, [item for item in found if item.arm != "headwise-qkv"]):
        (axes,) = local_multipliers(shown).axes
        titles.append(axes.get_title(loc="left"))
    assert titles[0].endswith("grey, and past an arm's last dot: extrapolated")
    assert titles[1].endswith("95%; grey: extrapolated")


def test_what_is_said_of_rates_is_of_the_sizes_that_both_arms_have(tmp_path: Path) -> None:
    """The Transformer's rate of 21M, four times the best, is no remark on head-wise filters."""
    rows = study(2, noise=0.1, singles={("transformer", "21M"): 8.0})
    found, _ = multipliers(load(write_points(rows, tmp_path / "study.csv")).runs, resamples=99)
    told = {item.arm: "transformer has one rate at 21M" in item.status for item in found}
    assert told == {arm: arm != "headwise-qkv" for arm in STUDY_M if arm != "transformer"}


def test_a_fault_of_ours_is_no_reason_why_an_arm_has_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error of NumPy is a ValueError as a refusal of ours is: it ends the table instead of dropping the arm."""
    remarks = multiplier.remarks

    def faulty(used: Any) -> Any:
        return max([]) if any(item.arm == "static-qkv" for item in used) else remarks(used)

    path = write_points(study(1, noise=0.1), tmp_path / "study.csv")
    monkeypatch.setattr(multiplier, "remarks", faulty)
    assert main(["table", str(path)]) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert "no answer for" not in out.err


def test_an_arm_that_cannot_be_compared_is_still_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = study(1, noise=0.1)
    rows = rows[(rows["arm"] != "static-qkv") | (rows["size"] == "1M")]
    assert main(["table", str(write_points(rows, tmp_path / "study.csv")), "--json"]) == 0
    out = capsys.readouterr()
    assert "no answer for static-qkv: 1 paired size with transformer; an interval needs at least two" in out.err
    assert {item["family"] for item in json.loads(out.out)} == {4}


FIRST_QUESTION = 'arm in ["static-qkv", "lowrank-qkv"]'


def test_power_asks_the_first_question_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a session's store, by --where: the same as on a table of the two arms alone, and more than as one of five."""
    rows = study(1)
    whole = write_points(rows, tmp_path / "study.csv")
    two = write_points(rows[rows["arm"].isin(["static-qkv", "lowrank-qkv"])], tmp_path / "two.csv")
    asked = ["--baseline", "static-qkv", "--seeds", "own", "--simulations", "100", "--m", "1.1", "--json"]
    found = []
    for path, where in ((whole, FIRST_QUESTION), (two, None), (whole, None)):
        assert main(["power", str(path), *asked, *(["--where", where] if where else [])]) == 0
        out = capsys.readouterr()
        (prospect,) = json.loads(out.out)
        found.append(prospect["power"])
        assert ("the interval of all 5 arms at once" in out.err) == (path == whole and where is None)
    assert found[0] == found[1] > found[2] + 0.1


def test_power_takes_a_part_of_a_sweep_and_of_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(planned(STUDY)))
    answers = []
    for design in (STUDY, tmp_path / "plan.json"):
        where = f'size in ["1M", "3M", "7M"] and {FIRST_QUESTION}'
        asked = ["--baseline", "static-qkv", "--seeds", "own", "--simulations", "100"]
        assert main(["power", str(design), *asked, "--where", where]) == 0
        answers.append(capsys.readouterr().out)
        assert main(["power", str(design), *asked, "--where", "arm == 'none'"]) == 2
        assert "leaves no row of 616" in capsys.readouterr().err
    assert answers[0] == answers[1]
    assert "[16, 8, 5]" in answers[0]
    assert "arms at once" not in answers[0]
