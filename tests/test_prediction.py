"""Predictions: bands that hold new runs, the best size in closed form, and a back-test that sees a law fail."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from planted import ALPHA, BETA, A, B, E, best_size

from analysis.laws.intervals import bootstrap
from analysis.laws.powerlaw import Points, fit
from analysis.laws.prediction import back_test, best_sizes, predict
from analysis.laws.solver import Floats
from experiments.cli.main import main


def loss_at(compute: Floats, random: np.random.Generator) -> Floats:
    """Runs of two arms [2, n], with errors that the arms share and errors of their own."""
    shared = 0.003 * random.standard_normal(len(compute))
    own = 0.002 * random.standard_normal((2, len(compute)))
    return np.asarray(1.7 + (np.array([[1.0], [1.3]]) * compute / 1e19) ** -0.15 + shared + own)


def ladder(random: np.random.Generator, sizes: int = 7) -> Points:
    compute = np.geomspace(1e18, 1e20, sizes)
    names = tuple(map(str, range(sizes)))
    arms = ("base",) * sizes + ("dyn",) * sizes
    return Points(loss_at(compute, random).ravel(), {"C": np.tile(compute, 2)}, arms, names * 2, "base")


def test_the_band_of_a_run_holds_new_runs() -> None:
    """Inside the range and 10x beyond it; of 100 ladders, .95 is seen as .88 to 1 with probability .99."""
    hits, at = np.zeros(2), np.array([3e18, 1e21])
    for seed in range(100):
        random = np.random.default_rng(seed)
        law = bootstrap(fit(ladder(random), starts=100, polished=6), 200, seed)
        new = loss_at(at, random)
        for item in predict(law, {"C": at}, seed):
            place = int(item.x["C"] == at[1])
            assert item.ci is not None
            hits[place] += item.ci[0] <= new[int(item.arm == "dyn"), place] <= item.ci[1]
            assert item.extrapolation == ("10x above the largest C" if place else None)
    print(hits / 200)
    assert (hits / 200 >= 0.88).all()


def grid() -> Points:
    N, D = np.repeat(np.geomspace(1e7, 1e10, 6), 6), np.tile(np.geomspace(1e9, 1e12, 6), 6)
    loss = (E + A * N**-ALPHA + B * D**-BETA) * np.exp(1e-4 * np.random.default_rng(0).standard_normal(36))
    return Points(loss, {"N": N, "D": D}, ("all",) * 36, tuple(map(str, range(36))), "all")


def test_the_best_size_is_that_of_the_closed_form() -> None:
    law = bootstrap(fit(grid(), "nd", delta=None), 200)
    (best,) = best_sizes(law, [1e21])
    assert pytest.approx(best_size(1e21), rel=0.02) == best.N
    assert pytest.approx(1e21 / 6 / best.N) == best.D
    assert best.N_ci is not None
    assert best.N_ci[0] < best_size(1e21) < best.N_ci[1]
    beside = [
        float(law.predict({"N": np.array([n]), "D": np.array([1e21 / 6 / n])}, "all")[0])
        for n in (best.N * 0.9, best.N * 1.1)
    ]
    assert best.loss < min(beside)


def rays() -> Points:
    """Sizes that all get about 10 tokens for each parameter, in the second arm 8: as arms of equal compute do."""
    N = np.geomspace(1e7, 1e9, 6)
    n, d = np.tile(N, 2), np.concatenate([10 * N, 8 * N])
    loss = np.concatenate([E + scale * (A * N**-ALPHA + B * (10 * N) ** -BETA) for scale in (1.0, 0.95)])
    loss *= np.exp(1e-3 * np.random.default_rng(0).standard_normal(12))
    return Points(loss, {"N": n, "D": d}, ("base",) * 6 + ("dyn",) * 6, tuple("012345") * 2, "base")


def test_a_best_size_is_no_answer_where_every_size_gets_as_many_tokens_for_each_parameter() -> None:
    law = bootstrap(fit(rays(), "nd"), 100)
    assert law.status.startswith("N and D are collinear (D grows as N^1.00)")
    assert not any(law.determines(f"{name}[dyn]") for name in ("m", "rho_N", "rho_D"))
    for best in best_sizes(law, [1e21]):
        assert (best.N, best.D, best.loss, best.N_ci, best.loss_ci, best.extrapolation) == (None,) * 6
    at = {"N": np.array([1e9, 1e9, 1e9]), "D": np.array([1e10, 8e9, 1e11])}
    found = predict(law, at)
    assert [item.loss is None for item in found] == [False, True, True, True, False, True]
    assert found[0].loss == pytest.approx(E + A * 1e9**-ALPHA + B * 1e10**-BETA, rel=5e-3)
    assert (found[2].law_ci, found[2].ci, found[2].extrapolation) == (None, None, "10x above the largest D")


def test_arms_at_a_compute_of_their_own_determine_no_multiplier_and_no_loss() -> None:
    compute, arms = np.repeat([1e15, 1e16, 1e17], 4), ("base",) * 4 + ("dyn",) * 4 + ("static",) * 4
    loss = np.repeat([3.0, 2.6, 2.3], 4) + np.tile([0.01, -0.01, 0.004, -0.004], 3)
    law = fit(Points(loss, {"C": compute}, arms, tuple("0123") * 3, "base"), "c")
    assert "the points do not determine all parameters" in law.status
    assert not law.determines("m[dyn]")
    assert {item.loss for item in predict(law, {"C": np.array([1e18])})} == {None}


def test_a_law_that_breaks_fails_its_back_test() -> None:
    random = np.random.default_rng(0)
    good = ladder(random)
    assert all(item.inside == item.runs for item in back_test(good, "c", 200, 0, {}))
    broken = good.loss + 0.05 * (good.x["C"] > 3e19)
    tested = back_test(Points(broken, good.x, good.arm, good.cluster, "base"), "c", 200, 0, {})
    assert [item.left_out for item in tested] == [1, 1, 2, 2, 3, 3]
    last = [item for item in tested if item.left_out == 2]
    assert all(item.inside < item.runs and item.error < -0.03 for item in last)


def test_the_verb_predicts_marks_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = grid()
    rows = zip(points.x["N"], points.x["D"], points.loss, strict=True)
    path = tmp_path / "p.csv"
    path.write_text("N,D,loss\n" + "\n".join(f"{n},{d},{y}" for n, d, y in rows))
    few = ["--bootstrap", "100"]
    assert main(["predict", str(path), "--N", "1e9,1e11", "--D", "2e10", "--json", *few]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [item["extrapolation"] for item in found["predictions"]] == [None, "10x above the largest N"]
    assert found["predictions"][0]["loss"] == pytest.approx(E + A * 1e9**-ALPHA + B * 2e10**-BETA, rel=1e-3)
    assert main(["predict", str(path), "--form", "nd", "--C", "1e21", *few]) == 0
    assert "back-test" in capsys.readouterr().out
    for wrong, message in (
        (["--N", "1e9"], "give --C, or --N and --D"),
        (["--C", "-1"], "takes positive numbers"),
        (["--N", "1e9,2e9,3e9", "--D", "1e9,2e9"], "one value each, or as many"),
        (["--C", "1e21", "--hold", "E"], "--hold takes NAME=VALUE"),
        (["--C", "1e21", "--hold", "E=1,E=2"], "--hold gives E two values; got 'E=1,E=2'"),
    ):
        assert main(["predict", str(path), *wrong, *few]) == 2
        assert message in capsys.readouterr().err
    assert main(["fit", str(path), "--bootstrap", "5"]) == 2  # whose ends are the least and the most of five
    assert "--bootstrap must be 0, or at least 100 for an interval of 95%; got 5" in capsys.readouterr().err
    path.write_text("size,C,loss\n" + "\n".join(f"{k},1e{18 + k},{2 + 0.6**k}" for k in range(4)))
    assert main(["predict", str(path), "--C", "1e23", *few]) == 0
    assert "no back-test: too few sizes" in capsys.readouterr().err
