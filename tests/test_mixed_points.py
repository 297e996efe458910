"""Tables of other people in which one name stands for several things, or a unit for another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.cli.main import main


def ladder(**changes: Callable[[int, int], Any]) -> str:
    """Two arms of four sizes and two seeds as CSV, with columns that are functions of size and seed."""
    columns: dict[str, Callable[[int, int], Any]] = {
        "N": lambda size, _: 10**6 * 4**size,
        "C": lambda size, _: 1e15 * 10**size,
    }
    columns |= changes
    rows = [
        [arm, f"s{size}", seed, 2 + m * 0.8**size + 0.001 * seed, *(value(size, seed) for value in columns.values())]
        for size in range(4)
        for arm, m in (("base", 1.0), ("arm", 0.95))
        for seed in (0, 1)
    ]
    return "\n".join(",".join(map(str, row)) for row in [["arm", "size", "seed", "loss", *columns], *rows])


def test_seeds_of_unlike_models_are_not_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """N differs under one name of a size, at equal C; what is rounded is no other model."""
    (tmp_path / "points.csv").write_text(ladder(N=lambda size, seed: 10**6 * 4**size * (1 + (size == 2) * seed)))
    assert main(["table", str(tmp_path / "points.csv"), "--baseline", "base"]) == 2
    assert "runs of arm at s2 differ in N (1.6e+07 in row 11 and 3.2e+07 in row 12)" in capsys.readouterr().err
    (tmp_path / "points.csv").write_text(ladder(N=lambda size, seed: 10**6 * 4**size + 999 * seed))
    assert main(["table", str(tmp_path / "points.csv"), "--baseline", "base"]) == 0


def test_settings_that_nothing_knows_are_named_where_they_are_averaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "points.csv").write_text(
        ladder(
            optimizer=lambda _, seed: ("adamw", "muon")[seed],
            batch=lambda size, _: 32 * 2**size,
            Created=lambda size, seed: f"2026-01-{10 * size + seed}",
        )
    )
    assert main(["table", str(tmp_path / "points.csv"), "--baseline", "base"]) == 0
    out = capsys.readouterr().out
    assert "Averaged over runs that differ in optimizer (adamw, muon): base at s0, arm at s0, base at s1" in out
    assert "batch" not in out
    assert "Created" not in out


def test_every_verb_says_that_losses_are_in_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--hold E is then in bits, too."""
    (tmp_path / "points.csv").write_text(ladder())
    arguments = ["table", str(tmp_path / "points.csv"), "--baseline", "base", "--hold", "E=1"]
    assert main(arguments) == 0
    assert "losses are in" not in capsys.readouterr().err
    (tmp_path / "points.csv").write_text(ladder().replace("loss", "loss_bits", 1))
    assert main([*arguments, "--columns", "loss=loss_bits"]) == 0
    assert "losses are in bits/token, and so is all that is told of them and any E" in capsys.readouterr().err
