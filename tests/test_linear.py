"""Laws that are linear in logs: planted constants, a second implementation, outliers, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from planted import write_budgets, write_sweep
from scipy.optimize import minimize

from analysis.laws.linear import fit_bilinear, fit_optima
from analysis.laws.solver import Floats
from analysis.logs.store import load
from experiments.cli.main import main


def write_optima(path: Path, noise: float, count: int = 9, seed: int = 0) -> Path:
    """N* = .1 C^.48, D* = C / 6 N*."""
    random = np.random.default_rng(seed)
    C = np.geomspace(6e18, 3e21, count)
    N = 0.1 * C**0.48 * np.exp(noise * random.standard_normal(count))
    path.write_text("C,N,D\n" + "\n".join(f"{c},{n},{c / 6 / n}" for c, n in zip(C, N, strict=True)))
    return path


def test_exponents_of_a_table_of_optima_come_back(tmp_path: Path) -> None:
    runs = load(write_optima(tmp_path / "p.csv", 0.0)).runs
    of_n, of_d = fit_optima(runs)
    assert (of_n.values["exponent"], of_d.values["exponent"]) == pytest.approx((0.48, 0.52), rel=1e-9)
    assert np.exp(of_n.values["ln_coefficient"]) == pytest.approx(0.1, rel=1e-6)
    assert of_n.convention == "given"


def test_optima_that_did_not_learn_are_left_out_and_counted(tmp_path: Path) -> None:
    """A row far from the law, whose run diverged."""
    path = write_optima(tmp_path / "p.csv", 0.0)
    header, *rows = path.read_text().splitlines()
    lines = [f"{header},status", *(f"{row},done" for row in rows), "1e21,1,1e20,diverged"]
    path.write_text("\n".join(lines))
    for law in fit_optima(load(path).runs):
        assert law.points == 9
        assert law.status == "1 of 1 runs of all at N = 1 did not learn"
    header, *rows = lines
    marked = [f"{header},did_not_learn", *(f"{row}," for row in rows[:-1]), "1e21,1e12,1e20,done,it diverged"]
    path.write_text("\n".join(marked))
    assert [law.points for law in fit_optima(load(path).runs)] == [9, 9]


def test_runs_that_are_no_optima_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same sizes at every compute have an exponent of 0, which is no growth of the optimum."""
    path = write_budgets(tmp_path / "p.csv", np.linspace(-0.7, 0.7, 5))
    assert main(["fit", str(path), "--form", "optima"]) == 2
    err = capsys.readouterr().err
    assert "5 values of N" in err
    assert "where a table of optima has one; `dynconv isoflop` finds the optima of runs" in err


def test_a_ladder_is_no_table_of_optima(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs at 20 tokens for each parameter would give exponents of a half, with narrow intervals and any loss."""
    store = write_sweep(tmp_path / "live", {"dyn": 1.3}, sizes=4, seeds=1)
    assert main(["fit", str(store), "--form", "optima"]) == 2
    err = capsys.readouterr().err
    assert "these are the runs of a sweep, and --form optima takes a table of optima" in err
    assert err.count("\n") == 1
    N = np.geomspace(1e7, 1e9, 5)
    rows = [f"{120 * n * n},{n},{20 * n}" for n in N]
    (tmp_path / "p.csv").write_text("C,N,D\n" + "\n".join(rows))
    found = fit_optima(load(tmp_path / "p.csv").runs)
    assert all(law.status.startswith("D/N is 20 in every row") for law in found)
    assert all(law.status == "ok" for law in fit_optima(load(write_optima(tmp_path / "o.csv", 0.0)).runs))


@pytest.mark.parametrize("delta", [1e-3, None])
def test_intervals_of_the_exponents_cover(tmp_path: Path, delta: float | None) -> None:
    """40 tables: .95 is seen as at least 33 with probability .998."""
    hits = 0
    for seed in range(40):
        runs = load(write_optima(tmp_path / "p.csv", 0.1, seed=seed)).runs.assign(tokens=None)
        (law,) = fit_optima(runs, delta=delta, resamples=200)
        assert law.ci is not None
        hits += law.ci["exponent"][0] <= 0.48 <= law.ci["exponent"][1]
    print(hits)
    assert hits >= 33


def bilinear_loss(N: Floats, experts: Floats) -> Floats:
    a, b, c, d = -0.08, -0.1, 0.003, 2.9
    return np.exp(a * np.log(N) + b * np.log(experts) + c * np.log(N) * np.log(experts) + d)


def write_experts(path: Path, noise: float) -> Path:
    N, experts = np.repeat(np.geomspace(1e7, 1e9, 6), 6), np.tile(2.0 ** np.arange(1, 7), 6)
    loss = bilinear_loss(N, experts) * np.exp(noise * np.random.default_rng(0).standard_normal(36))
    loss[5] *= 1.1  # a run that went wrong
    rows = zip(N, experts, loss, strict=True)
    path.write_text("N,experts,loss\n" + "\n".join(f"{n},{e},{y}" for n, e, y in rows))
    return path


def test_the_bilinear_law_comes_back_past_a_bad_run(tmp_path: Path) -> None:
    runs = load(write_experts(tmp_path / "p.csv", 0.0)).runs
    (law,) = fit_bilinear(runs, "experts")
    truth = {"a": -0.08, "b": -0.1, "c": 0.003, "d": 2.9}
    assert law.values == pytest.approx(truth, rel=0.02)  # the bad run pulls with delta, .001
    (squares,) = fit_bilinear(runs, "experts", delta=None)
    assert abs(squares.values["b"] + 0.1) > 0.01


def test_hubers_optimum_is_that_of_a_second_implementation(tmp_path: Path) -> None:
    runs = load(write_experts(tmp_path / "p.csv", 0.003)).runs
    (law,) = fit_bilinear(runs, "experts")
    log_n, log_e, y = (np.log(runs[name].to_numpy(float)) for name in ("parameters", "experts", "loss"))
    centred = log_n - log_n.mean()

    def objective(v: Floats) -> float:
        r = np.abs(v[0] * centred + v[1] * log_e + v[2] * centred * log_e + v[3] - y)
        return float(np.where(r <= 1e-3, r**2 / 2, 1e-3 * (r - 0.5e-3)).sum())

    start = np.linalg.lstsq(np.stack([centred, log_e, centred * log_e, np.ones(36)], axis=1), y, rcond=None)[0]
    options = {"xatol": 1e-12, "fatol": 1e-16, "maxiter": 20000, "maxfev": 20000}
    best = minimize(objective, start, method="Nelder-Mead", options=options)
    best = minimize(objective, best.x, method="Nelder-Mead", options=options)
    assert law.objective <= best.fun * (1 + 1e-6)
    assert law.values["c"] == pytest.approx(best.x[2], abs=1e-4)


def test_the_verb_prints_both_forms_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optima, experts = str(write_optima(tmp_path / "o.csv", 0.05)), str(write_experts(tmp_path / "e.csv", 0.003))
    assert main(["fit", optima, "--form", "optima", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [item["target"] for item in found] == ["N", "D"]
    assert main(["fit", optima, "--form", "optima"]) == 0
    assert "FLOPs counted as given" in capsys.readouterr().out
    assert main(["fit", experts, "--form", "bilinear", "--factor", "experts"]) == 0
    assert "| c " in capsys.readouterr().out
    for wrong, message in (
        ([experts, "--form", "bilinear"], "go together"),
        ([experts, "--form", "bilinear", "--factor", "heads"], "no column 'heads'"),
        ([optima, "--form", "optima", "--hold", "E=1"], "--hold is for forms c and nd"),
        ([experts, "--form", "optima"], "no compute in every row"),
    ):
        assert main(["fit", *wrong]) == 2
        assert message in capsys.readouterr().err
