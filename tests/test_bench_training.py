"""The training bench: what it counts, compares, keeps and refuses, on a CPU with the smallest models."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from analysis.pages.throughput_figures import throughput_panels
from experiments.bench import stepping
from experiments.bench.stepping import Kernel, Outcome, Settings, measure, most_expensive
from experiments.bench.throughput import COLUMNS, PEAKS, difference, machine, merge, ratio, rows_of, table
from experiments.bench.training import render
from experiments.bench.trials import DEFAULT_ARMS, Request, Trial, trials
from experiments.cli.main import main
from experiments.design.forecast import evaluated_tokens
from experiments.design.sweep import load_sweep
from experiments.design.sweep_file import read_sweep
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
    """By a clock that only the models' forward passes move, so that the machine's other work does not count."""
    now = 0.0

    def slow(run: Any, *others: Any) -> Trainer:
        trainer = make_trainer(run, *others)

        def pass_time(*_: object) -> None:
            nonlocal now
            now += 0.3 if run.arm == "static-qkv" else 0.1

        trainer.model.register_forward_pre_hook(pass_time)
        return trainer

    monkeypatch.setattr("experiments.training.trainer.time", types.SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(stepping, "make_trainer", slow)
    found = chosen(arms=("transformer", "static-qkv"))
    outcomes = measure(Settings(tuple(found), "cpu", 3, 0.0, False, False))
    faster, slower = rows_of(found, outcomes, None, WHERE)
    assert faster["step_ms"] == pytest.approx(100)
    assert (slower["added_ms"], slower["slowdown"]) == pytest.approx((200, 3))


def test_what_needs_more_memory_and_more_processes_is_prepared_first() -> None:
    measurement = stepping._Measurement(Settings(tuple(chosen(gpus=2)), "cpu", 1, 0.1, False, False), ALONE)
    order = [(trial.run.arm, trial.gpus) for trial in map(measurement._trials.__getitem__, measurement._by_memory())]
    assert order == [("lowrank-qkv", 2), ("lowrank-qkv", 1), ("transformer", 2), ("transformer", 1)]


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


def test_a_damaged_file_is_refused_before_anything_is_measured(
    bench: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "t.parquet").write_bytes(b"torn")
    monkeypatch.setattr(stepping, "measure", lambda _: pytest.fail("it was measured"))
    code, _, err = bench("25k", "--arms", "transformer")
    assert code == 2
    assert "t.parquet is unreadable (" in err
    assert err.endswith("); move it away, or give -o another file\n")


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
        (["25k", "--fused", "off", "on"], "--fused off on compares kernels of a GPU; got a CPU"),
        (["25k", "--parallel", "fsdp"], "--parallel fsdp is for several GPUs; got --gpus 1"),
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
