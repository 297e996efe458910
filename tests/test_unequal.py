"""Pairs of unequal compute are told, and far apart answered from both curves or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import pairs_of

from analysis.advantage.multiplier import compare
from analysis.laws.solver import Floats
from experiments.cli.main import main


def loss(compute: Floats, m: float = 1.0) -> Floats:
    law: Floats = 1.7 + (m * compute / 1e19) ** -0.15
    return law


@pytest.fixture
def answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def of(c0: Floats, c1: Floats, y1: Floats, code: int = 0, noise: float = 0.0) -> Any:
        random = np.random.default_rng(0)
        rows = [
            f"{arm},s{i},{c},{y + noise * random.standard_normal()}"
            for arm, cs, ys in (("base", c0, loss(c0)), ("new", c1, y1))
            for i, (c, y) in enumerate(zip(cs, ys, strict=True))
        ]
        (tmp_path / "p.csv").write_text("\n".join(["arm,size,C,loss", *rows]))
        assert main(["table", str(tmp_path / "p.csv"), "--baseline", "base", "--json"]) == code
        out = capsys.readouterr()
        return out.err if code else json.loads(out.out)[0]

    return of


def test_pairs_more_than_a_tenth_apart_are_told(answer: Any) -> None:
    c = np.geomspace(1e18, 1e20, 4)
    assert "apart in compute" not in answer(c, 1.05 * c, loss(1.05 * c, 1.3))["status"]
    found = answer(c, c * [1, 1, 1.8, 1], loss(c * [1, 1, 1.8, 1], 1.3))
    assert found["m"] == pytest.approx(1.3, rel=1e-3)
    assert "pairs are up to 1.8x apart in compute" in found["status"]


def test_curves_that_share_no_compute_are_refused(answer: Any) -> None:
    """Issue 12: answered 1.237, resolved."""
    c = np.geomspace(1e18, 1e20, 3)
    error = answer(c, 100 * c, loss(100 * c), code=2)
    assert "up to 100x apart in compute, and their curves share no compute" in error
    assert "train both over the same compute" in error


def test_parameters_in_millions_are_asked_about(answer: Any) -> None:
    c = np.geomspace(1e18, 1e20, 4)
    assert "one arm's seem to be in millions" in answer(c, c / 1e6, loss(c), code=2)


def test_pairs_far_apart_are_answered_from_the_curves_where_they_share_compute(answer: Any) -> None:
    c = np.geomspace(1e18, 1e21, 6)
    found = answer(c, 8 * c, loss(8 * c, 1.3), noise=0.001)
    assert found["method"] == "two curves where they share compute"
    assert found["ci"][0] < 1.3 < found["ci"][1]
    assert found["m"] == pytest.approx(1.3, rel=0.05)
    assert "m is that of the two fitted curves, which share 125x of compute" in found["status"]


def test_the_curves_interval_covers() -> None:
    """60 designs, 6 sizes over three decades, pairs 8x apart: nominally .95, and the F profile is wide."""
    c = np.geomspace(1e18, 1e21, 6)
    random = np.random.default_rng(0)
    covered = []
    for _ in range(60):
        pairs = pairs_of(c, *(loss(k, m) + 0.003 * random.standard_normal(6) for k, m in ((c, 1.0), (8 * c, 1.3))))
        found = compare(replace(pairs, c1=8 * c))
        assert found.ci is not None
        covered.append(found.ci[0] < 1.3 < found.ci[1])
    print(f"coverage {np.mean(covered):.3f}")
    assert np.mean(covered) >= 0.88
