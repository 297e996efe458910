"""Each arm at its own best learning rate: a planted one comes back, the luck of the least of many losses does not."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from noise_tables import STUDY, THE_STUDY, TUNINGS, tune

from analysis.advantage.changing import reported
from analysis.advantage.paired import changing_multipliers, local_multipliers
from analysis.laws import rates
from analysis.laws.rates import best_of, excess
from analysis.laws.solver import Floats
from experiments.cli.main import main

COMPUTE = np.geomspace(1e19, 1e21, 5)
M = 1.33
DOUBLE = math.log(2)


def law(m: float, compute: Floats | float = COMPUTE) -> Any:
    return 1.7 + 1.3 * (m * np.asarray(compute) / 1e20) ** -0.15


def grid(count: int, step: float = DOUBLE) -> Floats:
    found: Floats = step * (np.arange(count) - (count - 1) / 2)
    return found


def lost(off: Floats | float) -> Any:
    """Nats lost by a rate exp(off) times the best: .014 for half of it, .018 for twice; 0.22 for eight times."""
    return 0.03 * np.square(off) + 0.01 * np.clip(off, 0, None) ** 3


def test_the_minimum_of_a_parabola_comes_back_and_an_edge_is_told() -> None:
    x = np.log([1e-3, 2e-3, 3e-3, 8e-3])
    y = 3 + 0.05 * (x - math.log(2.4e-3)) ** 2
    at, loss, bracketed = best_of(x, np.stack([y, -y, 3 + 0 * y]))
    assert (math.exp(at[0]), loss[0], bracketed[0]) == (pytest.approx(2.4e-3), pytest.approx(3), True)
    assert not bracketed[1:].any()
    assert loss[1] == -y.max()
    assert [value[0] for value in best_of(x[:2], y[None, :2])] == [x[1], y[1], False]


def test_the_least_of_equal_losses_is_given_back() -> None:
    """Of two rates that differ by noise alone the least is sd / sqrt(pi) too low."""
    assert excess(np.array([0.0, 5.0]), np.array([3.0, 3.0]), np.full(2, 0.01)) == pytest.approx(0.0056, abs=0.0006)
    assert abs(excess(np.array([0.0, 5.0]), np.array([3.0, 4.0]), np.full(2, 0.01))) < 0.0006


@pytest.fixture
def answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def of(rows: Iterator[str], header: str, code: int = 0) -> Any:
        (tmp_path / "p.csv").write_text("\n".join([header, *rows]) + "\n")
        assert main(["table", str(tmp_path / "p.csv"), "--baseline", "base", "--json"]) == code
        out = capsys.readouterr()
        return out.err if code else json.loads(out.out)[0]

    return of


HEADER = "arm,size,seed,C,loss,train.learning_rate,vary.learning_rate_factor"


def sweep(
    factors: Callable[[str, int], Floats],
    best: dict[str, float],
    noise: float = 0.0,
    seeds: int = 2,
    random_seed: int = 0,
) -> Iterator[str]:
    """Both arms at the asked ln factors of the ladder's rate; an arm is best at ln factor best[arm]."""
    random = np.random.default_rng(random_seed)
    for arm, m in (("base", 1.0), ("new", M)):
        for i, compute in enumerate(COMPUTE):
            ladder = 0.004 * (compute / COMPUTE[0]) ** -0.1
            for x in factors(arm, i):
                for seed in range(seeds):
                    loss = law(m, compute) + lost(x - best[arm]) + noise * random.standard_normal()
                    yield f"{arm},s{i},{seed},{compute},{loss},{ladder * math.exp(x)},{math.exp(x)}"


def test_each_arm_is_compared_at_its_own_best_rate(answer: Any) -> None:
    """At the ladder's rate, where the baseline is best, the arm would lose .03 nats and seem to have m = 1.1."""
    found = answer(sweep(lambda *_: grid(5), {"base": 0.0, "new": -1.0}, noise=0.0005, random_seed=1), HEADER)
    assert found["m"] == pytest.approx(M, rel=0.01)
    assert found["ci"][0] < 1.005 * M < 1.01 * found["ci"][1]  # what is lost is no parabola of ln rate
    assert found["status"] == "ok"
    assert "base at 0.9" in found["notes"][0]
    assert "new at 0.3" in found["notes"][0]
    assert {(item["rates"], item["at_edge"]) for item in found["rates"]} == {(5, False)}
    for item in found["rates"]:
        assert item["factor"] == pytest.approx({"base": 1.0, "new": math.exp(-1)}[item["arm"]], rel=0.12)
    alone = answer(sweep(lambda *_: np.zeros(1), {"base": 0.0, "new": -1.0}, noise=0.0005), HEADER)
    assert alone["m"] < 1.2
    assert alone["rates"] == []


def test_rates_that_were_chosen_elsewhere_are_told(answer: Any) -> None:
    """Each arm at one rate, and not the same: that of a pilot, of which these runs know nothing."""
    chosen = {"base": math.log(2), "new": 0.0}
    found = answer(sweep(lambda arm, _: np.array([chosen[arm]]), {"base": 0.5, "new": 0.0}, noise=0.0005), HEADER)
    assert found["notes"] == [
        "one learning rate for each arm, and not the same: new's is 0.5 times base's; these runs do not show which is "
        "best for either"
    ]
    assert answer(sweep(lambda *_: np.zeros(1), {"base": 0.5, "new": 0.0}), HEADER)["notes"] == []


def unlike(rest: Callable[[str, int], str] = lambda *_: "") -> Iterator[str]:
    """Two arms, two seeds of each size; 4096 in one arm and 8192 in the other; `rest` of arm and seed."""
    for arm, m, value in (("base", 1.0, 4096), ("new", M, 8192)):
        for i, compute in enumerate(COMPUTE):
            for seed in range(2):
                yield f"{arm},s{i},{seed},{compute},{law(m, compute)},{value}{rest(arm, seed)}"


def test_settings_of_an_arm_that_change_with_size_are_told(answer: Any) -> None:
    """As where two stores call two convolutions by one name. What changes alike in both arms is the ladder's."""
    rows = []
    for arm, m in (("base", 1.0), ("new", M)):
        for i, compute in enumerate(COMPUTE):
            facts = f"{4096 << i},{'none' if arm == 'base' else 'static' if i < 2 else 'lowrank'}"
            rows.append(f"{arm},s{i},{compute},{law(m, compute)},{facts}")
    found = answer(rows, "arm,size,C,loss,train.batch_tokens,conv.kind")
    sizes = [f"s{i}" for i in range(2, len(COMPUTE))]
    shown = ", ".join(sizes[:4]) + (f" and {len(sizes) - 4} more" if len(sizes) > 4 else "")
    assert found["notes"] == [f"not the same at all sizes of new: conv.kind is static (s0, s1), lowrank ({shown})"]


def test_recipes_that_differ_and_facts_that_some_seeds_lack_are_told(answer: Any) -> None:
    """Another batch in one arm is a note, since an arm may have a recipe of its own; a fact that seeds of one arm and
    size lack is a warning, since they may be of another configuration."""
    rows = unlike(lambda arm, seed: "," if arm == "new" and seed else ",8")
    found = answer(rows, "arm,size,seed,C,loss,train.batch_tokens,conv.rank")
    assert found["notes"] == ["the arms differ in train.batch_tokens: 4096 in base, 8192 in new"]
    assert "conv.rank is recorded of some runs of one arm and size, and not of row 12, row 14" in found["status"]


def test_losses_over_unlike_vocabularies_are_told(answer: Any) -> None:
    """A loss a token of 8192 tokens is another quantity than one of 4096. Where a table has no hash of the tokenizer,
    the sizes of the vocabularies tell."""
    found = answer(unlike(), "arm,size,seed,C,loss,vocabulary")
    assert "vocabulary is not the same within 10 of 10 pairs (4096, 8192)" in found["status"]


def test_the_order_of_rows_does_not_matter(answer: Any) -> None:
    rows = list(sweep(lambda *_: grid(3), {"base": 0.0, "new": -0.4}, noise=0.002))
    first, last = answer(iter(rows), HEADER), answer(iter(rows[::-1]), HEADER)
    assert first["m"] == pytest.approx(last["m"], rel=1e-9)
    assert first["ci"] == pytest.approx(last["ci"], rel=1e-9)


def test_a_best_rate_at_the_edge_and_arms_not_tuned_alike_are_told(answer: Any) -> None:
    found = answer(sweep(lambda *_: grid(3), {"base": 0.0, "new": -2.0}), HEADER)
    assert "the best rate of new is at the edge of those tried at s0, s1, s2, s3, s4" in found["status"]
    uneven = answer(
        sweep(lambda arm, _: grid(3) if arm == "new" else np.zeros(1), {"base": 0.3, "new": 0.0}, noise=0.0005), HEADER
    )
    assert "not tuned alike at s0: base over 1, new over 3 rates" in uneven["status"]


def test_an_untuned_size_is_measured_by_the_rule_of_the_tuned_ones(answer: Any) -> None:
    """The two largest sizes have one rate, 2.7 times below the best."""

    def factors(_: str, size: int) -> Floats:
        return grid(5) if size < 3 else np.array([-1.0])

    found = answer(sweep(factors, {"base": 0.0, "new": 0.0}, noise=0.0002), HEADER)
    only = [item for item in found["rates"] if item["rates"] == 1]
    assert [(item["arm"], item["size"]) for item in only] == [(a, s) for a in ("base", "new") for s in ("s3", "s4")]
    for item in only:
        assert item["off_rule"] == pytest.approx(math.exp(-1), rel=0.1)
        assert item["cost"] == pytest.approx(0.03, rel=0.7)
    assert "new has one rate at s4, 0.3" in found["status"]


def test_a_run_without_its_rate_is_named(answer: Any) -> None:
    rows = list(sweep(lambda *_: grid(3), {"base": 0.0, "new": 0.0}))
    error = answer(iter([*rows, f"base,s0,0,{COMPUTE[0]},3,,"]), HEADER, code=2)
    assert "some arms were run at several values of train.learning_rate, and row 61 has none" in error


def test_points_with_a_column_lr_are_tuned_too(answer: Any) -> None:
    rows = [",".join(row.split(",")[:6]) for row in sweep(lambda *_: grid(5), {"base": 0.0, "new": -0.5})]
    found = answer(iter(rows), "arm,size,seed,C,loss,lr")
    assert found["m"] == pytest.approx(M, rel=0.01)
    assert "each arm at its own best learning rate: base at 0.0" in found["notes"][0]


PILOT = {  # held-out losses of two seeds at 1, 2, 4 and 8 times the ladder's rate: 1M parameters on Python, one H200
    "base": [(2.345, 2.405), (2.342, 2.364), (2.350, 2.990), (4.623, 4.719)],
    "new": [(2.259, 2.306), (2.221, 2.223), (2.206, 2.298), (2.762, 3.920)],
}


def pilot(sizes: int = 5, without: tuple[str, ...] = ()) -> Iterator[str]:
    """The pilot's losses at every size of a law, the arm's with their own advantage."""
    for arm, losses in PILOT.items():
        for i, compute in enumerate(COMPUTE[:sizes]):
            for factor, of_seeds in zip((1, 2, 4, 8), losses, strict=True):
                for seed, loss in enumerate(of_seeds):
                    if f"{arm}{factor}" not in without:
                        yield f"{arm},s{i},{seed},{compute},{loss + law(1.0, compute) - 2.9},{0.004 * factor},{factor}"


def test_a_cliff_beside_the_best_rate_promises_no_loss_that_no_rate_gave(answer: Any) -> None:
    """The seeds at 4 and 8 differ by .6 nats. Their mean and their noise, in the parabola and in what is given back,
    made the baseline better than the arm, which has lower losses at every rate."""
    found = answer(pilot(), HEADER)
    assert found["m"] > 1.2
    for item in found["rates"]:
        assert item["rates"] == 4
        assert not item["at_edge"]
        assert 1.9 < item["factor"] < 2.5
        assert item["given_back"] < 0.02  # seeds of stable rates differ by .001 to .06
    without_the_cliff = answer(pilot(without=("base8", "new8")), HEADER)
    assert without_the_cliff["m"] == pytest.approx(found["m"], rel=0.02)


def test_a_rate_at_which_runs_diverged_brackets_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without it the best rate is the highest that is left."""
    rows = [f"{row},complete" for row in pilot(without=("base8", "new8", "base4"))]
    diverged = [
        f"base,s{i},{seed},{compute},,{0.004 * 4},4,diverged" for i, compute in enumerate(COMPUTE) for seed in (0, 1)
    ]
    edges = []
    for more in ([], diverged):
        (tmp_path / "p.csv").write_text("\n".join([f"{HEADER},status", *rows, *more]) + "\n")
        assert main(["table", str(tmp_path / "p.csv"), "--baseline", "base", "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)
        edges.append({item["at_edge"] for item in found["rates"] if item["arm"] == "base"})
    assert edges == [{True}, {False}]


def simulate(m: float, x: Floats, best: float, noise: float, sweeps: int, random: np.random.Generator) -> Floats:
    """Best losses of one arm [sweeps, 2, S]: as they are, and with the excess given back. Its best ln rate is spread by
    .3 about `best` from size to size."""
    found = np.empty((sweeps, 2, len(COMPUTE)))
    arm = 0.002 * random.standard_normal((sweeps, len(COMPUTE)))
    off = best + 0.3 * random.uniform(-1, 1, (sweeps, len(COMPUTE)))
    for k in range(sweeps):
        for s, level in enumerate(law(m)):
            y = level + arm[k, s] + lost(x - off[k, s]) + noise * random.standard_normal(len(x))
            loss = best_of(x, y[None])[1][0]
            found[k, :, s] = loss, loss + excess(x, y, np.full(len(x), noise), seed=k)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of_baseline", "of_arm", "plain_bias"),
    [
        (grid(3), grid(3), 0.0),
        (grid(5), grid(5), 0.0),
        (grid(3), grid(5), 0.006),
        (grid(3), grid(9, DOUBLE / 2), 0.017),
    ],
)
def test_the_interval_of_tuned_arms_covers(
    of_baseline: Floats, of_arm: Floats, plain_bias: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 sweeps of five sizes, noise .007 a rate. The arm with more rates seems better than it is by `plain_bias` of
    ln m."""
    monkeypatch.setattr(rates, "DRAWS", 200)
    random = np.random.default_rng(0)
    losses = [simulate(m, x, shift, 0.007, 300, random) for m, x, shift in ((1.0, of_baseline, 0.0), (M, of_arm, 0.1))]
    bias, covered = [], []
    for way in (0, 1):
        local = local_multipliers(COMPUTE, COMPUTE, losses[0][:, way], losses[1][:, way])
        low, high = local.interval()
        bias.append(float(local.mean.mean() - math.log(M)))
        covered.append(float(((low < math.log(M)) & (math.log(M) < high)).mean()))
    print(f"{len(of_baseline)} and {len(of_arm)} rates: bias {bias[0]:.4f} -> {bias[1]:.4f}, {covered}")
    assert bias[0] == pytest.approx(plain_bias, abs=0.007)
    assert abs(bias[1]) < 0.006
    assert 0.9 <= covered[1] <= 0.99


def test_choosing_among_rates_costs_little_and_a_rate_off_the_best_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 designs of mini-scaling; tests/noise_tables.py has the whole table."""
    monkeypatch.setattr(rates, "DRAWS", 200)
    found = []
    for tuning in (TUNINGS[0], TUNINGS[1], TUNINGS[2], TUNINGS[7]):
        y0, y1, noise = tune(THE_STUDY, tuning, 300, corrected=True)
        local = local_multipliers(STUDY, STUDY, y0, y1, noise=noise)
        assert abs(float(local.mean.mean()) - THE_STUDY.ln_m) < 4 * float(local.mean.std()) / math.sqrt(300)
        _, low, high = reported(local, np.ones(300), changing_multipliers(local))
        found.append(float(np.median(high - low)))
    best, tuned, uneven, off = found
    assert tuned == pytest.approx(best, rel=0.1)
    assert uneven == pytest.approx(best, rel=0.1)
    assert off > 1.8 * best


def test_a_rate_that_only_the_first_seed_tried_is_compared_with_the_others(answer: Any) -> None:
    """Later seeds train each arm's best rate alone: all are paired, and m is what all rates of all seeds say."""

    def rows(everywhere: bool) -> Iterator[str]:
        for arm, m in (("base", 1.0), ("new", M)):
            for i, compute in enumerate(COMPUTE):
                for seed in range(3):
                    for x in (-DOUBLE, 0.0, DOUBLE) if everywhere or seed == 0 else (0.0,):
                        loss = law(m, compute) + 0.05 * (x - 0.1) ** 2 + 0.0005 * ((seed * 7 + i * 3) % 5 - 2)
                        yield f"{arm},s{i},{seed},{compute},{loss},{1e-3 * math.exp(x)}"

    header = "arm,size,seed,C,loss,train.learning_rate"
    whole, few = (answer(rows(everywhere), header) for everywhere in (True, False))
    assert few["n_seeds"] == whole["n_seeds"] == 3
    assert few["m"] == pytest.approx(whole["m"], rel=2e-3)
    assert [item["rates"] for item in few["rates"]] == [3] * 2 * len(COMPUTE)


def rate_table(path: Path, sizes: int = 1) -> Path:
    """Two arms of m = 1.33 with 5 rates each at 5 computes, the least loss of every cell on a law; the arm's best rate
    is twice the baseline's. Each compute is spent on `sizes` N about the best."""
    lines = ["arm,N,D,train.learning_rate,loss"]
    for arm, m, best in (("base", 1.0, 1e-3), ("new", M, 2e-3)):
        for compute in COMPUTE:
            best_size = 1e8 * (compute / 1e19) ** 0.5
            for N in best_size * 2.0 ** (np.arange(sizes) - sizes // 2):
                for rate in 1e-3 * 2.0 ** np.arange(-2, 4):
                    loss = law(m, compute) + 0.05 * math.log(rate / best) ** 2 + 0.02 * math.log(N / best_size) ** 2
                    lines.append(f"{arm},{N},{compute / 6 / N},{rate},{loss}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_fits_go_through_the_best_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mean over rates is .03 to .1 above the best, and differs between the arms."""
    path = rate_table(tmp_path / "p.csv")
    assert main(["fit", str(path), "--bootstrap", "0", "--baseline", "base", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["points"] == 10
    assert (found["E"], found["alpha"]) == (pytest.approx(1.7, abs=1e-3), pytest.approx(0.15, abs=1e-3))
    assert found["arms"]["new"]["m"] == pytest.approx(M, rel=1e-3)
    assert {item["reason"] for item in found["excluded"]} == {"its learning rate is not the best of its size"}
    assert len(found["excluded"]) == 50
    (note,) = found["notes"]
    assert note == "each arm at its own best learning rate: base at 0.001 to 0.001, new at 0.002 to 0.002"
    assert note in err
    assert len(err.splitlines()) == 2
    assert main(["predict", str(path), "--C", "1e22", "--bootstrap", "100", "--baseline", "base", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"][0]["loss"] == pytest.approx(law(1.0, 1e22), abs=1e-3)


def test_isoflop_optima_are_of_the_best_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = rate_table(tmp_path / "p.csv", sizes=5)
    assert main(["isoflop", str(path), "--json"]) == 0
    for item in json.loads(capsys.readouterr().out)["optima"]:
        m = M if item["arm"] == "new" else 1.0
        assert item["loss"] == pytest.approx(law(m, item["compute"]), abs=2e-3)
        assert item["points"] == 5


def test_rates_are_no_seed_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = rate_table(tmp_path / "p.csv")
    options = ["--baseline", "base", "--seeds", "1", "--simulations", "100"]
    assert main(["power", str(path), *options]) == 0
    assert "seed noise 0.002 (assumed, not measured)" in capsys.readouterr().out


def test_a_law_through_runs_of_several_configurations_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"a,{i},{c},{d},{law(1.0, c) + d}" for i, c in enumerate(COMPUTE) for d in (0.1, 0.2)]
    (tmp_path / "p.csv").write_text("\n".join(["arm,size,C,train.weight_decay,loss", *rows]))
    assert main(["fit", str(tmp_path / "p.csv"), "--bootstrap", "0"]) == 0
    said = "the law goes through runs of one size and compute that differ in train.weight_decay"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["table"], ["fit", "--bootstrap", "200"]])
def test_rows_in_another_order_say_the_same(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To every digit, resamples included."""
    header, *rows = rate_table(tmp_path / "a.csv").read_text().splitlines()
    noise = 0.003 * np.random.default_rng(0).standard_normal(len(rows))
    rows = [f"{row.rpartition(',')[0]},{float(row.split(',')[-1]) + e}" for row, e in zip(rows, noise, strict=True)]
    answers = []
    for order in (np.arange(len(rows)), np.random.default_rng(1).permutation(len(rows))):
        (tmp_path / "a.csv").write_text("\n".join([header, *(rows[i] for i in order)]))
        assert main([verb[0], str(tmp_path / "a.csv"), *verb[1:], "--baseline", "base", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        for item in [found] if verb[0] == "fit" else found:
            item.pop("excluded")
        answers.append(found)
    assert answers[0] == answers[1]


def test_the_bilinear_law_goes_through_the_best_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More experts suffer more from a wrong rate: b came out as -.101, with an interval from -.137 to -.067."""
    rows = []
    for log_n, log_e in itertools.product(np.log([1e7, 3e7, 1e8, 3e8]), np.log([1, 4, 16, 64])):
        for off in (-DOUBLE, 0, DOUBLE):
            loss = math.exp(-0.08 * log_n - 0.1 * log_e + 0.003 * log_n * log_e + 2.9) + 0.05 * off**2 * (1 + log_e)
            rows.append(f"{math.exp(log_n)},{math.exp(log_e)},{1e-3 * math.exp(off)},{loss}")
    (tmp_path / "p.csv").write_text("\n".join(["N,experts,lr,loss", *rows]))
    assert main(["fit", str(tmp_path / "p.csv"), "--form", "bilinear", "--factor", "experts", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["points"] == 16
    assert found["values"] == pytest.approx({"a": -0.08, "b": -0.1, "c": 0.003, "d": 2.9}, rel=1e-3)
    assert found["notes"] == ["each arm at its own best learning rate: all at 0.001 to 0.001"]
