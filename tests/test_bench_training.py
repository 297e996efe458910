"""The training bench: what it counts, compares, keeps and refuses, on a CPU with the smallest models."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text
from scipy import stats

from analysis.logs.throughput import read_throughput
from analysis.pages.throughput_figures import throughput_panels
from experiments.bench import stepping
from experiments.bench.stepping import Kernel, Outcome, Settings, measure, most_expensive
from experiments.bench.throughput import COLUMNS, PEAKS, difference, machine, merge, ratio, rows_of, table
from experiments.bench.training import render
from experiments.bench.trials import DEFAULT_ARMS, Request, Trial, trials
from experiments.bench.weights import Lendable, RepeatedDraws
from experiments.cli.main import main
from experiments.design.forecast import evaluated_tokens
from experiments.design.sweep import load_sweep, read_sweep
from experiments.models.decoder import Decoder
from experiments.training.assembly import make_trainer
from experiments.training.parallel import World
from experiments.training.trainer import MICRO_BATCH_TOKENS, Trainer

ALONE = World(0, 1, torch.device("cpu"))
SWEEPS = Path(__file__).parents[1] / "experiments" / "sweeps"
WHERE = {"device": "A card", "versions": "torch 2", "commit": "abc"}
TWO = ("transformer", "lowrank-qkv")


def chosen(size: str = "25k", arms: tuple[str, ...] = TWO, **settings: Any) -> list[Trial]:
    return trials(Request((size,), arms, **settings), size, MICRO_BATCH_TOKENS)


@pytest.mark.parametrize("size", ["1M", "300M"])
def test_flops_by_part_are_those_of_the_counter(size: str) -> None:
    for trial in chosen(size, DEFAULT_ARMS):
        parts, model, length = trial.flops(), trial.run.model, trial.run.train.sequence_length
        assert sum(parts.values()) == trial.batch * model.training_flops_per_sequence(length)
        assert parts["head"] == 6 * trial.tokens * model.width * model.vocabulary
        assert (parts["convolutions"] > 0) == (trial.run.arm != "transformer")


def test_a_step_takes_the_micro_batch_of_a_run() -> None:
    assert [(trial.batch, trial.run.train.sequence_length) for trial in chosen("300M", TWO)] == [(8, 4096)] * 2
    assert [trial.batch for trial in chosen("1M")] == [32, 32]  # the recipe's whole batch
    assert [trial.batch for trial in chosen("1M", sequence=4096)] == [8, 8]
    assert [(trial.batch, trial.tokens) for trial in chosen("1M", batch=3)] == [(3, 3 * 512)] * 2
    several = chosen("1M", optimizers=("adamw", "muon"), gpus=2)
    assert [(t.gpus, t.optimizer, t.run.arm, t.parallel) for t in several[3:6]] == [
        (1, "muon", "lowrank-qkv", "none"),
        (2, "adamw", "transformer", "ddp"),
        (2, "adamw", "lowrank-qkv", "ddp"),
    ]
    assert several[4].tokens == 2 * several[0].tokens
    (accumulated,) = chosen("1M", ("transformer",), micro_batches=4, recompute="block", fused=(True,))
    assert accumulated.execution("cuda").recompute == "block"
    assert accumulated.execution("cuda").fused
    assert (accumulated.batch, accumulated.tokens) == (32, 4 * 32 * 512)
    assert accumulated.execution("cpu").micro_batch == 32


def test_arms_are_compared_with_the_first_that_is_fused_like_them() -> None:
    found = chosen("1M", fused=(False, True))
    assert [(trial.run.arm, trial.fused) for trial in found] == [(arm, fused) for fused in (False, True) for arm in TWO]
    assert found[3].name == "1M lowrank-qkv adamw"
    rows = rows_of(found, [Outcome([time] * 3, 2**30, True) for time in (1.0, 1.5, 0.8, 1.0)], None, WHERE)
    assert [row["slowdown"] for row in rows] == pytest.approx([1, 1.5, 1, 1.25])
    text = render(rows)
    assert [line.split()[:2] for line in text.splitlines() if line.startswith(TWO)] == [
        [arm, fused] for fused in ("off", "on") for arm in TWO
    ]
    throughput_panels(table(rows))


def test_a_sweep_file_gives_its_arms_and_recipe(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    text = (SWEEPS / "demo.toml").read_text()
    more = '[arm.mine]\nconv = { kind = "lowrank", sites = ["k"], rank = 3 }\n[train]\noptimizer = { kind = "muon" }\n'
    path.write_text(text.replace('arms = ["transformer"', 'arms = ["mine", "transformer"') + more)
    found = trials(Request(("70k",), sweep=path), "70k", MICRO_BATCH_TOKENS)
    assert [trial.run.arm for trial in found] == ["transformer", "mine", "static-qkv", "lowrank-qkv"]  # baseline first
    assert {trial.optimizer for trial in found} == {"muon"}
    assert found[1].run.model.conv.sites == ("k",)


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_sweep_of_ours_can_be_measured(path: Path) -> None:
    sweep = read_sweep(path)
    if sweep.data is None:
        with pytest.raises(ValueError, match=r"has no \[data\]; give a sweep on text"):
            trials(Request(sweep.sizes, sweep=path), sweep.sizes[0], MICRO_BATCH_TOKENS)
        return
    for size in sweep.sizes:
        found = trials(Request((size,), sweep=path), size, MICRO_BATCH_TOKENS)
        assert {trial.run.arm for trial in found} == set(sweep.arms)
        assert all(trial.run.train.learning_rate_at(1000) < 1e-5 for trial in found)


def test_intervals_are_student_s_and_missing_for_few_rounds() -> None:
    random = np.random.default_rng(1)
    theirs = random.uniform(1, 2, 6)
    mine = theirs * 1.3 * random.lognormal(0, 0.02, 6)
    for got, values, back in (
        (ratio(mine, theirs), np.log(mine) - np.log(theirs), np.exp),
        (difference(mine, theirs), mine - theirs, float),
    ):
        interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        want = (values.mean(), interval.low, interval.high)
        assert got == pytest.approx([back(value) for value in want], rel=1e-12)
    assert ratio([2.0, 2.0], [1.0, 1.0]) == (pytest.approx(2.0), None, None)


def test_rows_by_hand() -> None:
    """Rounds of 1 and 1.5 s; on two GPUs 1.25 s; Muon adds 0.5 s. Drift common to all cancels."""
    found = chosen("1M", optimizers=("adamw", "muon"), gpus=2)
    drift = np.array([1.0, 1.1, 1.2])
    base = {("transformer", "adamw"): 1.0, ("lowrank-qkv", "adamw"): 1.5}
    base |= {("transformer", "muon"): 1.5, ("lowrank-qkv", "muon"): 2.0}
    times = [base[trial.run.arm, trial.optimizer] * (1.25 if trial.gpus == 2 else 1) * drift for trial in found]
    outcomes = [Outcome(list(each), 2**31, True) for each in times]
    rows = rows_of(found, outcomes, 1e12, WHERE)
    assert list(rows[0]) == list(COLUMNS)
    first, slower = rows[:2]
    assert first["tokens_per_second"] == pytest.approx(32 * 512 / 1.1)
    flops = 32 * found[0].run.model.training_flops_per_sequence(512)
    assert first["mfu"] == pytest.approx(flops / 1.1 / 1e12)
    assert (first["memory_gib"], first["captured"], first["rounds"]) == (2.0, True, 3)
    assert first["slowdown"] == 1
    assert {first[name] for name in ("slowdown_low", "optimizer_ms", "efficiency")} == {None}
    assert (slower["against"], slower["slowdown"]) == ("transformer", pytest.approx(1.5))
    assert (slower["slowdown_low"], slower["slowdown_high"]) == pytest.approx((1.5, 1.5))
    assert slower["added_ms"] == pytest.approx(1e3 * 0.5 * 1.1)
    assert slower["added_ms_low"] < slower["added_ms"] < slower["added_ms_high"]
    assert rows[2]["optimizer_ms"] == pytest.approx(1e3 * 0.5 * 1.1)
    assert rows[2]["slowdown"] == 1
    on_two = rows[4]
    assert (on_two["gpus"], on_two["efficiency"]) == (2, pytest.approx(0.8))
    assert on_two["tokens_per_second"] == pytest.approx(2 * 0.8 * first["tokens_per_second"])
    assert on_two["mfu"] == pytest.approx(0.8 * first["mfu"])
    unknown = rows_of(found[:2], [Outcome([1.0])] * 2, None, WHERE)
    assert (unknown[0]["mfu"], unknown[0]["memory_gib"], unknown[1]["slowdown_low"]) == (None, None, None)


def test_plan_forecasts_by_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, sweep = tmp_path / "t.parquet", str(SWEEPS / "demo.toml")
    found = [trial for batch in (4, 8) for trial in chosen("25k", batch=batch)]
    rows = rows_of(found, [Outcome([0.1]), Outcome([0.2]), Outcome([0.1]), Outcome([0.2])], None, WHERE)
    table([*rows, *(row | {"gpus": 2, "device": "Another"} for row in rows)]).to_parquet(path)
    assert main(["plan", sweep, "--throughput", str(path), "--json"]) == 0
    out = capsys.readouterr()
    planned = {run.run_id: run for run in load_sweep(Path(sweep))}
    assert f"{path} has no throughput of static-qkv at 25k, " in out.err
    for row in json.loads(out.out):
        speed = {"transformer": 8 * 128 / 0.1, "lowrank-qkv": 8 * 128 / 0.2}.get(row["arm"])  # the faster batch
        if row["size"] == "25k" and speed is not None:
            evaluated = evaluated_tokens(planned[row["run_id"]]) / 3  # a forward pass: a third of a step's work
            assert row["hours"] == pytest.approx((row["tokens"] + evaluated) / speed / 3600)
            assert (row["tokens_per_second"], row["forecast_from"]) == (speed, str(path))
            assert row["teraflops_per_second"] == pytest.approx(row["flops_exact"] / row["tokens"] * speed / 1e12)
        else:
            assert row["hours"] is None
    slower = [row | {"fused": False, "tokens_per_second": 0.5 * row["tokens_per_second"]} for row in rows]
    table(slower).to_parquet(path)
    assert main(["plan", sweep, "--throughput", str(path)]) == 0
    assert "lowrank-qkv at 25k (only not fused)" in capsys.readouterr().err
    table([*rows, *slower]).to_parquet(path)
    (tmp_path / "apart.toml").write_text('executor = "local"\n[default]\nfused = false\n')
    for options, times in (([], 1), (["--profile", str(tmp_path / "apart.toml")], 0.5)):
        assert main(["plan", sweep, "--throughput", str(path), *options, "--json"]) == 0
        found = [row for row in json.loads(capsys.readouterr().out) if (row["arm"], row["size"]) == (TWO[1], "25k")]
        assert {row["tokens_per_second"] for row in found} == {times * 8 * 128 / 0.2}
    table([*rows, *(row | {"commit": "def"} for row in rows)]).to_parquet(path)
    assert main(["plan", sweep, "--throughput", str(path)]) == 2
    assert "the throughput of transformer at 25k is of several commits (abc, def); leave" in capsys.readouterr().err


def test_a_peak_is_known_for_named_cards_only() -> None:
    assert PEAKS["NVIDIA H100 80GB HBM3"] == PEAKS["NVIDIA H200"] == 989e12
    assert "NVIDIA H100 PCIe" not in PEAKS
    names = ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "cpu"]
    assert [machine(name) for name in names] == ["h200", "h100", "h100-pcie", "a100-sxm4", "cpu"]


def test_a_file_keeps_other_settings_and_replaces_equal_ones(tmp_path: Path) -> None:
    path = tmp_path / "new" / "training.parquet"

    def rows(seconds: float, **where: str) -> list[dict[str, Any]]:
        return rows_of(chosen(), [Outcome([seconds])] * 2, None, WHERE | where)

    merge(rows(1.0), path)
    merge(rows(2.0, device="Another"), path)
    merge(rows(4.0, commit="def")[:1], path)
    found = pd.read_parquet(path)
    keyed = found.set_index(["device", "arm"])[["step_ms", "commit"]]
    assert {key: tuple(row) for key, row in zip(keyed.index, keyed.to_numpy(), strict=True)} == {
        ("A card", "lowrank-qkv"): (1000, "abc"),
        ("A card", "transformer"): (4000, "def"),
        ("Another", "lowrank-qkv"): (2000, "abc"),
        ("Another", "transformer"): (2000, "abc"),
    }
    assert found["mfu"].isna().all()
    pd.DataFrame({"size": ["1M"]}).to_parquet(path)
    with pytest.raises(ValueError, match=r"has no column arm, optimizer, .*; give -o another file"):
        merge(rows(1.0), path)


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code, standard output and error of the verb on a CPU, with short turns."""

    def run(*arguments: str) -> tuple[int, str, str]:
        words = [
            "bench",
            "train",
            *arguments,
            "--device",
            "cpu",
            "--seconds",
            "1e-9",
            "-o",
            str(tmp_path / "t.parquet"),
        ]
        code = main(words)
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def test_the_verb_measures_real_steps(bench: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    figure = tmp_path / "f.svg"
    code, out, err = bench(
        "25k", "45k", "--arms", *TWO, "--rounds", "3", "--json", "--profile", "--figure", str(figure)
    )
    assert code == 0, err
    rows = json.loads(out)
    assert [(row["size"], row["arm"], row["batch"]) for row in rows] == [
        (size, arm, 8) for size in ("25k", "45k") for arm in TWO
    ]
    for row in rows:
        assert row["step_ms"] > 0
        assert row["tokens_per_second"] == pytest.approx(8 * 128 / row["step_ms"] * 1e3)
        assert (row["device"], row["mfu"], row["memory_gib"], row["captured"]) == ("cpu", None, None, False)
        assert 0 < len(row["kernels"]) <= stepping.MOST_KERNELS
        assert sum(kernel["share"] for kernel in row["kernels"]) <= 1
    written = pd.read_parquet(tmp_path / "t.parquet")
    assert list(written.columns) == list(COLUMNS)
    assert written["step_ms"].tolist() == [row["step_ms"] for row in rows]
    assert figure.stat().st_size > 0


def test_what_it_writes_makes_a_multiplier_in_seconds(
    bench: Callable[..., tuple[int, str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file as it was written, but for speeds, whose ratio is planted: 0.8 at every size."""
    assert bench("25k", "45k", "70k", "--arms", *TWO, "--rounds", "1")[0] == 0
    rows = pd.read_parquet(tmp_path / "t.parquet")
    rows["tokens_per_second"] = np.where(rows["arm"] == "transformer", 1000.0, 800.0)
    points = ["arm,size,N,D,loss,train.optimizer"]
    for i, size in enumerate(("25k", "45k", "70k")):
        for arm, m in (("transformer", 1.0), ("lowrank-qkv", 1.4)):
            compute = 1e15 * 4.0**i
            count, loss = 1000 * 2**i, 1.7 + (m * compute / 1e16) ** -0.2
            points.append(f"{arm},{size},{count},{compute / 6 / count},{loss},adamw")
    (tmp_path / "p.csv").write_text("\n".join(points))

    def table_of(rows: pd.DataFrame) -> Any:
        rows.to_parquet(tmp_path / "speeds.parquet")
        command = ["table", str(tmp_path / "p.csv"), "--baseline", "transformer", "--json"]
        assert main([*command, "--throughput", str(tmp_path / "speeds.parquet")]) == 0
        return json.loads(capsys.readouterr().out)[0]

    found = table_of(rows)
    assert found["wall_clock"]["source"] == "throughput measured on cpu"
    assert found["wall_clock"]["m"] == pytest.approx(0.8 * found["m"], rel=1e-9)
    # The same settings once more with Muon, at which the arm is faster: rows of the runs' own optimizer count.
    faster = rows["tokens_per_second"] * np.where(rows["arm"] == "transformer", 1, 9)
    both = pd.concat([rows, rows.assign(optimizer="muon", tokens_per_second=faster)])
    assert table_of(both)["wall_clock"] == found["wall_clock"]


def test_another_arm_s_slowness_is_found_as_it_was_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(run: Any, *others: Any) -> Trainer:
        trainer = make_trainer(run, *others)
        if run.arm == "static-qkv":
            trainer.model.register_forward_pre_hook(lambda *_: time.sleep(0.2))
        return trainer

    monkeypatch.setattr(stepping, "make_trainer", slow)
    found = chosen(arms=("transformer", "static-qkv"))
    outcomes = measure(Settings(tuple(found), "cpu", 3, 0.0, False, False))
    _, slower = rows_of(found, outcomes, None, WHERE)
    assert 190 < slower["added_ms"] < 400  # the machine's other work may add to it


def test_what_needs_more_memory_and_more_processes_is_prepared_first() -> None:
    measurement = stepping._Measurement(Settings(tuple(chosen(gpus=2)), "cpu", 1, 0.1, False, False), ALONE)
    order = [(trial.run.arm, trial.gpus) for trial in map(measurement._trials.__getitem__, measurement._by_memory())]
    assert order == [("lowrank-qkv", 2), ("lowrank-qkv", 1), ("transformer", 2), ("transformer", 1)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_arm_lends_its_memory_between_its_turns(optimizer: str) -> None:
    (trial,) = chosen(arms=("lowrank-qkv",), optimizers=(optimizer,))
    runner = stepping._Runner(trial, ALONE, 0.0, alone=False)
    parameters = [parameter.detach() for parameter in runner._trainer.model.parameters()]
    fresh = Decoder(trial.run.model, trial.run.seed)
    for _ in range(2):
        assert {parameter.untyped_storage().nbytes() for parameter in parameters} == {0}
        runner._lendable.take_back()
        for mine, theirs in zip(parameters, fresh.parameters(), strict=True):
            assert float(mine.std()) == pytest.approx(float(theirs.detach().std()), rel=0.3)
            assert theirs.min() <= mine.min()
            assert mine.max() <= theirs.max()
        runner._lendable.lend()
        runner.turn()
    assert len(runner.outcome.seconds) == 2


def test_memory_that_was_lent_comes_back_with_the_same_spread() -> None:
    state = {"weights": 0.02 * torch.randn(300, 400) + 0.1, "squares": torch.rand(5000) ** 8, "gains": torch.ones(9)}
    state |= {"zeros": torch.zeros(2, 3), "step": torch.tensor(7.0), "tokens": torch.arange(4)}
    kept = {name: tensor.clone() for name, tensor in state.items()}
    lendable = Lendable()
    lendable.add(state.values())
    lendable.lend()
    assert state["weights"].untyped_storage().nbytes() == 0
    lendable.take_back()
    for name in ("gains", "zeros", "step", "tokens"):
        assert torch.equal(state[name], kept[name])
    assert not torch.equal(state["weights"], kept["weights"])
    assert float(state["weights"].mean()) == pytest.approx(0.1, abs=1e-3)
    assert float(state["weights"].std()) == pytest.approx(0.02, rel=0.02)
    assert state["squares"].min() >= 0


def test_large_matrices_repeat_their_first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.bench.weights._DRAWN", 64)
    run = chosen(arms=("lowrank-all",))[0].run
    plain = Decoder(run.model, 0)
    with RepeatedDraws():
        quick = Decoder(run.model, 0)
    large = [p for p in quick.parameters() if p.dim() == 2 and p.numel() > 64]
    assert large
    for (name, mine), theirs in zip(quick.named_parameters(), plain.parameters(), strict=True):
        assert mine.shape == theirs.shape
        assert float(mine.detach().std()) == pytest.approx(float(theirs.detach().std()), rel=0.5), name
    rows = 64 // run.model.width
    assert torch.equal(quick.embedding.weight[:rows], quick.embedding.weight[rows : 2 * rows])
    with RepeatedDraws(), torch.device("meta"):
        assert {parameter.device.type for parameter in Decoder(run.model, 0).parameters()} == {"meta"}


def test_complete_rounds_are_kept_when_it_is_interrupted(
    bench: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    turns: list[int] = []
    turn = stepping._Runner.turn

    def interrupted(runner: stepping._Runner) -> None:
        turns.append(0)
        if len(turns) == 6:  # in the second turn of the third round
            raise KeyboardInterrupt
        turn(runner)

    monkeypatch.setattr(stepping._Runner, "turn", interrupted)
    code, out, err = bench("25k", "45k", "--arms", *TWO, "--rounds", "5")
    assert code == 130
    assert "25k: 2 rounds" in out
    assert "interrupted" in err
    assert pd.read_parquet(tmp_path / "t.parquet")["rounds"].tolist() == [2, 2]


def fitting(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers of batches beyond `most` sequences run out of memory."""

    def made(run: Any, *others: Any) -> Trainer:
        if run.train.batch_sequences > most:
            raise torch.OutOfMemoryError
        return make_trainer(run, *others)

    monkeypatch.setattr(stepping, "make_trainer", made)


def test_a_batch_that_does_not_fit_is_halved_and_told(
    bench: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fitting(3, monkeypatch)
    code, out, err = bench("25k", "--arms", *TWO, "--rounds", "1", "--json")
    assert code == 0
    assert {row["batch"] for row in json.loads(out)} == {2}
    assert "25k lowrank-qkv adamw: a batch of 8 sequences of 128 tokens does not fit" in err
    assert "; 2 fit and are measured" in err
    code, out, err = bench("25k", "--arms", *TWO, "--batch", "6", "--rounds", "1")
    assert (code, out) == (2, "")
    assert "a batch of 6 sequences of 128 tokens does not fit in 0 GiB; 3 fit: --batch 3" in err
    fitting(0, monkeypatch)
    code, _, err = bench("25k", "--arms", *TWO)
    assert code == 1
    assert "nor does any smaller one; give a shorter --sequence" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["1Q"], "size: got '1Q'; "),
        (["25k", "--arms", "lowrank"], "--arms: got 'lowrank'; did you mean"),
        (["25k", "--optimizer", "sgd"], "--optimizer: got 'sgd'; legal: adamw, muon"),
        (["25k", "--batch", "0"], "--batch must be at least 1; got 0"),
        (["25k", "--rounds", "0"], "--rounds must be at least 1; got 0"),
        (["25k", "--peak", "nan"], "--peak must be above zero and finite; got nan"),
        (["25k", "--micro-batches", "0"], "--micro-batches must be at least 1; got 0"),
        (["25k", "--gpus", "0"], "--gpus must be at least 1; got 0"),
        (["25k", "--sweep", "nowhere.toml"], "nowhere.toml"),
        (["25k", "--figure", "f.jpg"], "--figure wants a file .svg, .pdf, .png"),
    ],
)
def test_a_wrong_request_is_one_line(
    bench: Callable[..., tuple[int, str, str]], arguments: list[str], message: str
) -> None:
    code, out, err = bench(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_gpus_that_are_not_there_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert main(["bench", "train", "25k", "--gpus", "2"]) == 2
    assert "--gpus 2: torch sees no GPU here" in capsys.readouterr().err
    assert main(["bench", "train", "25k", "--device", "cuda"]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_kernels_are_named_by_their_share_of_the_device_s_time() -> None:
    class Event:
        def __init__(self, key: str, kind: str, us: float, annotation: bool = False) -> None:
            self.key, self.self_device_time_total, self.is_user_annotation = key, us, annotation
            self.device_type = type("Kind", (), {"name": kind})

    events = [Event("gemm", "CUDA", 600.0), Event("gemm", "CUDA", 200.0), Event("norm", "CUDA", 200.0)]
    events += [Event("step", "CUDA", 900.0, annotation=True), Event("aten::mm", "CPU", 5.0)]
    assert most_expensive(events, True, 4) == [Kernel("gemm", 0.2, 0.8), Kernel("norm", 0.05, 0.2)]


def test_the_text_says_what_was_measured() -> None:
    found = chosen("1M", optimizers=("adamw", "muon"))
    outcomes = [Outcome([0.002 * f, 0.0022 * f, 0.0021 * f], 2**30, True) for f in (1.0, 1.25, 2.0, 2.5)]
    rows = rows_of(found, outcomes, 989e12, WHERE)
    text = render([row | {"kernels": [{"name": "gemm", "milliseconds": 0.5, "share": 0.25}]} for row in rows])
    assert "1M: 3 rounds, batch 32 on each GPU, sequences of 512, vocabulary 4096" in text
    (line,) = (line for line in text.splitlines() if line.split()[:2] == ["lowrank-qkv", "adamw"] and "%" in line)
    assert "1.250  [1.250, 1.250]" in line
    assert line.split()[:4] == ["lowrank-qkv", "adamw", "2.625", "+0.525"]
    assert "muon against adamw, transformer: +2.1 ms [" in text
    assert "lowrank-qkv muon\nkernel  ms a step  share\ngemm          0.5  25.0%" in text


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_and_one_in_turn(bench: Callable[..., tuple[int, str, str]], parallel: str) -> None:
    options = ["--gpus", "2", "--parallel", parallel, "--rounds", "3", "--json"]
    code, out, err = bench("25k", "--arms", "lowrank-qkv", *options)
    assert code == 0, err
    alone, together = json.loads(out)
    assert (alone["gpus"], alone["parallel"], together["gpus"], together["parallel"]) == (1, "none", 2, parallel)
    assert alone["efficiency"] is None
    assert 0 < together["efficiency_low"] < together["efficiency"] < together["efficiency_high"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("captured", [True, False])
def test_on_a_gpu_a_step_takes_what_events_around_it_say(captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not captured:
        monkeypatch.setattr("experiments.training.trainer.CAPTURED_PARAMETERS", 0)
    check = Trainer.check_captured

    def with_much_memory(trainer: Trainer) -> None:
        check(trainer)
        torch.empty(4 * 2**30, dtype=torch.uint8, device="cuda")

    monkeypatch.setattr(Trainer, "check_captured", with_much_memory)
    torch.compiler.reset()
    trial = chosen("1M")[1]
    runner = stepping._Runner(trial, World(0, 1, torch.device("cuda", 0)), 0.2, alone=False)
    for _ in range(3):
        runner.turn()
    runner._lendable.take_back()
    assert runner.outcome.captured == captured
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    steps = sum(len(runner._window()) for _ in range(3))
    end.record()
    torch.cuda.synchronize()
    assert np.median(runner.outcome.seconds) == pytest.approx(begin.elapsed_time(end) / 1e3 / steps, rel=0.2)
    assert runner.outcome.memory is not None
    assert 0.2 < runner.outcome.memory / 2**30 < 2  # without that of the check


def test_throughput_of_several_commits_is_not_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [trial for size in ("25k", "45k", "70k") for trial in chosen(size)]
    rows = [
        row | {"commit": commit}
        for commit in ("abc", "def")
        for pair in (found[0:2], found[2:4], found[4:6])
        for row in rows_of(pair, [Outcome([1.0]), Outcome([1.5])], None, WHERE)
    ]
    counts = {"25k": 1e3, "45k": 2e3, "70k": 4e3}
    points = [f"{arm},{size},{count},1e6,{3 - count / 1e4}" for size, count in counts.items() for arm in TWO]

    def answer(rows: list[dict[str, Any]], columns: str = "", cells: str = "") -> Any:
        (tmp_path / "p.csv").write_text("\n".join([f"arm,size,N,D,loss{columns}", *(row + cells for row in points)]))
        table(rows).to_parquet(tmp_path / "t.parquet")
        command = ["table", str(tmp_path / "p.csv"), "--baseline", "transformer", "--json"]
        assert main([*command, "--throughput", str(tmp_path / "t.parquet")]) == 0
        return json.loads(capsys.readouterr().out)[0]

    assert answer(rows)["no_clock"] == "at 25k the throughput is of several commits (abc, def)"
    split = [row for row in rows if (row["commit"] == "abc") == (row["arm"] == "transformer")]
    words = (
        "is at no equal batch, sequence, gpus, parallel, micro_batches, recompute, fused, vocabulary, "
        "device, versions, commit"
    )
    assert words in answer(split)["no_clock"]
    by_size = [row for row in rows if (row["commit"] == "abc") == (row["size"] == "25k")]
    found = answer(by_size)
    assert found["wall_clock"]["source"] == "throughput measured on A card, of several commits (abc, def)"
    muon = [row | {"optimizer": "muon"} for row in rows[:6]]
    reason = "at 25k the throughput is of several optimizers, and the runs do not say which they used"
    assert answer(rows[:6] + muon)["no_clock"] == reason
    known = answer(rows[:6] + muon, ",train.optimizer", ",muon")
    assert known["wall_clock"]["m"] == pytest.approx(known["m"] / 1.5)
    unfused = [row | {"fused": False} for row in rows[:6]]
    found = answer(rows[:6] + unfused)["no_clock"]
    assert found == "at 25k the throughput is of several settings of fused (False, True)"
    assert answer(unfused)["wall_clock"]["source"] == "throughput measured on A card, not fused"
    slower = [row | {"gpus": 2, "tokens_per_second": 1.0} for row in rows[:6]]
    on_one = answer(rows[:6] + slower, ",gpus", ",1")["wall_clock"]
    assert (on_one["m"], on_one["source"]) == (pytest.approx(known["m"] / 1.5), "throughput measured on A card")
    source = "throughput measured on A card, gpus 1, 2, mean over several settings (gpus) at 25k, 45k, 70k"
    assert answer(rows[:6] + slower)["wall_clock"]["source"] == source


def _drawn() -> pd.DataFrame:
    """Rows of three sizes, the first without an MFU, at two commits."""
    made = []
    for size, peak in (("1M", 989e12), ("16M", 989e12), ("300M", 989e12)):
        found = chosen(size, ("transformer", "lowrank-qkv", "lowrank-all"))
        outcomes = [Outcome([f * 0.1, f * 0.102, f * 0.099]) for f in (1.0, 1.1, 1.4)]
        made += rows_of(found, outcomes, peak, WHERE | {"commit": "a" * 40 if size == "1M" else "b" * 40})
    return table(made)


def test_the_figure_shows_utilisation_and_slowdowns_with_intervals() -> None:
    rows = _drawn()
    left, right = throughput_panels(rows).axes
    assert [text.get_text() for text in left.get_xticklabels()] == ["1M", "16M", "300M"]
    heights = {line.get_label(): line.get_ydata() for line in left.lines}
    want = rows[rows["arm"] == "lowrank-qkv"]["mfu"] * 100
    assert heights["lowrank-qkv"] == pytest.approx(want.tolist())
    assert "transformer" not in {line.get_label() for line in right.lines}
    (_, bars) = right.collections
    ends = [tuple(segment[:, 1]) for segment in bars.get_segments()]
    others = rows[rows["arm"] == "lowrank-all"]
    assert ends == [pytest.approx(pair) for pair in zip(others["slowdown_low"], others["slowdown_high"], strict=True)]
    assert left.get_title(loc="left") == "A card, adamw\ncommits aaaaaaaaaa: 1M; bbbbbbbbbb: 16M, 300M"
    unknown = throughput_panels(rows.assign(mfu=np.nan)).axes[0]
    assert (unknown.get_ylabel(), unknown.get_yscale()) == ("thousand tokens a second", "log")
    several = throughput_panels(pd.concat([rows, rows.assign(gpus=2, parallel="ddp")])).axes
    assert [axes.get_title(loc="left").split("\n")[0] for axes in several] == [
        "A card, adamw",
        "",
        "A card, 2 GPUs (ddp), adamw",
        "",
        "transformer, A card",
    ]
    with pytest.raises(ValueError, match=r"transformer at 1M, .* was measured several times on A card, 1, none, adamw"):
        throughput_panels(pd.concat([rows, rows.assign(batch=3)]))


def test_the_figure_names_every_arm_in_the_order_of_the_table() -> None:
    rows = _drawn()
    two = rows[(rows["size"] != "1M") & (rows["arm"] != "lowrank-all")]  # the first panel lacks an arm of the second
    figure = throughput_panels(pd.concat([two.assign(fused=False), rows.assign(fused=True)]))
    (legend,) = (legend for part in figure.subfigs for legend in part.legends)
    assert [text.get_text() for text in legend.get_texts()] == ["transformer", "lowrank-qkv", "lowrank-all"]


def test_what_is_compared_with_no_arm_has_a_line_beside_its_other_settings() -> None:
    rows = _drawn()
    alone = rows[(rows["arm"] == "transformer") & (rows["size"] == "300M")].assign(optimizer="muon", mfu=0.25)
    (_, right, lines) = throughput_panels(pd.concat([rows, alone])).axes
    assert right.collections
    assert [text.get_text() for text in lines.get_yticklabels()] == ["300M: adamw", "300M: muon"]
    drawn = [line.get_xdata()[0] for line in lines.lines if line.get_marker() == "o"]
    assert drawn == pytest.approx([rows["mfu"][rows["size"] == "300M"].iloc[0] * 100, 25])

    (single,) = throughput_panels(alone).axes
    assert single.get_title(loc="left") == "transformer, A card\ncommit bbbbbbbbbb"
    assert [text.get_text() for text in single.get_yticklabels()] == ["300M: muon"]

    other = alone.assign(device="Another", commit=None)  # two devices and one commit of two known: both are named
    (both,) = throughput_panels(pd.concat([alone, other])).axes
    assert [text.get_text() for text in both.get_yticklabels()] == ["300M: A card, muon", "300M: Another, muon"]
    texts = [text.get_text() for text in both.texts]
    assert texts == ["25.0", "commit bbbbbbbbbb", "25.0", "commit unknown"]


def test_no_text_of_the_figure_overlaps_another() -> None:
    rows = _drawn()
    settings = [
        rows.assign(device=device, gpus=gpus, parallel="fsdp" if gpus > 1 else "none", fused=fused, commit=name * 40)
        for device, gpus, fused, name in (("A card", 1, False, "c"), ("B card", 2, True, "d"))
    ]
    alone = rows[rows["arm"] == "transformer"].assign(optimizer="muon")
    figure = throughput_panels(pd.concat([rows, *settings, alone]))
    found = [text for part in (*figure.axes, *figure.subfigs[0].legends) for text in part.findobj(Text)]
    # Numbers are left out: among them are labels of ticks beyond the axes, which are not drawn.
    shown = [text for text in found if isinstance(text, Text) and text.get_visible()]
    texts = [text for text in shown if text.get_text().strip("0123456789.")]
    boxes = [text.get_window_extent() for text in texts]
    pairs = itertools.combinations(zip(texts, boxes, strict=True), 2)
    assert [(a.get_text(), b.get_text()) for (a, one), (b, two) in pairs if one.overlaps(two)] == []


def test_plot_draws_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _drawn().to_parquet(tmp_path / "t.parquet")
    assert main(["plot", str(tmp_path / "t.parquet"), "-o", str(tmp_path / "figures")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'figures' / 'training.svg'}\n"


def test_the_measured_file_is_one_that_bench_train_merges_with_and_plot_draws() -> None:
    path = SWEEPS.parents[1] / "results" / "measured" / "h200" / "training.parquet"
    rows = pd.read_parquet(path)
    assert list(rows.columns) == list(COLUMNS)
    assert rows["commit"].notna().all()
    throughput_panels(rows)
    assert len(read_throughput(path)) == len(rows)
