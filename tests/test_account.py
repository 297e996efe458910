"""Forecasts and account: hours by planted speeds, calibrations that are real and some that are stale, caps, limits."""

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from texts import CHEAP_SWEEP

from analysis.logs.files import read_json, write_json
from analysis.logs.reader import read_rows
from analysis.logs.schema import SCHEMA
from experiments import source
from experiments.cli.main import main
from experiments.data.dataset import Dataset
from experiments.design import calibrations
from experiments.design.calibrations import Calibration, Work
from experiments.design.config import Execution, RunConfig
from experiments.design.forecast import Rate, evaluated_tokens, stated_rate
from experiments.design.sweep import load_sweep
from experiments.design.timeline import Piece, hours_until_done
from experiments.launching import account, sbatch, slurm
from experiments.launching import submit as launch
from experiments.launching.profile import Job, Profile, Slurm, load_profile
from experiments.training import presence
from experiments.training.presence import Share
from experiments.training.run import Run

HERE = Profile("local", max_parallel=2, default=Job(device="cpu"))
CLUSTER = Profile("slurm", slurm=Slurm("p", signal_seconds=30), default=Job(device="cpu"))


def plant(run: RunConfig, speed: float, cache: Path, profile: Profile = HERE, **changes: object) -> None:
    """A calibration with this speed, in tokens a second."""
    job = profile.job(run.size)
    kept = Calibration(
        arm=run.arm,
        size=run.size,
        tokens_per_second=speed,
        spread=0.01,
        place=account.place(profile, job),
        device="a planted device",
        dtype="float32",
        versions=calibrations.versions(),
        code=source.code_sha256(),
        measured_at=time.time(),
    )
    calibrations.write(replace(kept, **changes), Work.of(run, job.execution, kept.place), cache)  # type: ignore[arg-type]


@pytest.fixture
def cheap(tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep file of two seeds, with a cache and a working folder of its own."""
    path = tmp_path / "cheap.toml"
    path.write_text(CHEAP_SWEEP.format(source=text_folder).replace("seeds = [0]", "seeds = [0, 1]"))
    monkeypatch.setenv("DYNCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return path


# Hours


def test_the_evaluations_of_a_forecast_are_those_that_a_run_makes(
    tiny_run: RunConfig, submitted: Callable[..., Path], tmp_path: Path
) -> None:
    run_dir = submitted(tiny_run, tmp_path)
    Run(run_dir)()
    evaluations = {row["step"] for row in read_rows(run_dir, "evals").table.to_pylist()}
    assert len(evaluations) == 4  # 25 steps: after 8, 16, 24, and at the end
    assert evaluated_tokens(tiny_run) == len(evaluations) * 50 * 16
    often = replace(tiny_run, train=replace(tiny_run.train, evaluate_every=16))  # a batch passes several multiples
    assert evaluated_tokens(often) == 25 * 50 * 16


def test_hours_by_hand(tiny_run: RunConfig) -> None:
    """A forward pass over a held-out token is a third of the work of a training token."""
    tokens, evaluated = 16 * (8 * 24 + 5), 4 * 50 * 16
    assert Rate(100.0, "").hours(tiny_run) == pytest.approx((tokens + evaluated / 3) / 100 / 3600)
    assert Rate(100.0, "", whole=True, start_seconds=9).hours(tiny_run) == pytest.approx((tokens / 100 + 9) / 3600)
    stated = stated_rate(tiny_run, 2, 0.5)
    assert stated.tokens_per_second == pytest.approx(1e12 * tokens / tiny_run.counts.flops_exact)
    branch = replace(tiny_run, branch_step=10)  # of which its trunk trained 10 of 25 steps and evaluated once
    assert Rate(1.0, "").hours(branch) == pytest.approx((tokens - 10 * 8 * 16 + 3 * 50 * 16 / 3) / 3600)


@pytest.mark.parametrize(
    ("pieces", "slots", "hours"),
    [
        ([("a", 3), ("b", 2), ("c", 2)], 2, 4.0),
        ([("a", 3), ("b", 2), ("c", 2)], 1, 7.0),
        ([("a", 3), ("b", 2), ("c", 2)], None, 3.0),
        ([], 2, 0.0),
        ([("b1", 1, "", "t"), ("b2", 2, "", "t"), ("t", 4), ("x", 5)], 2, 7.0),  # branches wait for their trunk
        ([("b1", 1, "", "done before"), ("x", 5)], 2, 5.0),
        ([("a", 3, "s"), ("b", 3, "s"), ("c", 4, "l")], 1, 6.0),  # a lane takes no slot of another's
    ],
)
def test_the_end_of_a_sweep_by_hand(pieces: list[tuple[object, ...]], slots: int | None, hours: float) -> None:
    assert hours_until_done([Piece(*piece) for piece in pieces], slots) == hours  # type: ignore[arg-type]


def test_a_plan_by_planted_speeds(
    cheap: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = load_sweep(cheap)
    plant(runs[0], 50.0, tmp_path / "cache")  # of both, as the seed makes no difference
    profile = tmp_path / "p.toml"
    profile.write_text('executor = "local"\nmax_parallel = 1\nmax_gpu_hours = 0.5\n[default]\ndevice = "cpu"\n')
    assert main(["plan", str(cheap), "--profile", str(profile), "--json"]) == 0
    hours = (runs[0].own_tokens + evaluated_tokens(runs[0]) / 3) / 50 / 3600
    for row in json.loads(capsys.readouterr().out):
        assert row["hours"] == pytest.approx(hours)
        assert row["tokens_per_second"] == 50.0
        assert row["forecast_from"].startswith("the calibration of 20")
        assert row["forecast_from"].endswith(" on a planted device")
    assert main(["plan", str(cheap), "--profile", str(profile)]) == 0
    text = capsys.readouterr().out
    ends = r"with 1 run at once: until \w+ 20\d\d-\d\d-\d\d \d\d:\d\d if it starts now"
    assert re.search(rf"^{2 * hours * 60:.3g} min {ends}", text, re.MULTILINE)
    assert f"max_gpu_hours = 0.5: 0 used in results/runs/cheap, {2 * hours:.4g} forecast; within the cap" in text
    assert "share a device" not in text
    assert not (tmp_path / "results").exists()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    profile.write_text('executor = "local"\nmax_parallel = 2\n[default]\ndevice = "cpu"\n')
    assert main(["plan", str(cheap), "--profile", str(profile)]) == 0
    assert "; later, as runs share a device, and their speeds are of one run alone" in capsys.readouterr().out


# Calibrations


def test_a_real_calibration_is_used_until_it_is_stale(
    cheap: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = tmp_path / "p.toml"
    profile.write_text('executor = "local"\n[default]\ndevice = "cpu"\n')
    plan = ["plan", str(cheap), "--profile", str(profile), "--json"]
    before = time.time()
    assert main([*plan, "--calibrate"]) == 0
    rows = json.loads(capsys.readouterr().out)
    (kept,) = (tmp_path / "cache" / calibrations.FOLDER).glob("*.json")  # one for both seeds
    stored = read_json(kept)
    assert (stored["arm"], stored["size"], stored["dtype"]) == ("transformer", "25k", "float32")
    assert stored["device"] == stored["place"] == calibrations.cpu_name()
    assert before < stored["measured_at"] < time.time()
    assert {row["tokens_per_second"] for row in rows} == {stored["tokens_per_second"]}
    assert main(plan) == 0
    assert json.loads(capsys.readouterr().out) == rows
    # Executed otherwise it is other work, and nothing is known of that.
    profile.write_text('executor = "local"\n[default]\ndevice = "cpu"\nthreads = 2\n')
    assert main(plan) == 0
    assert {row["hours"] for row in json.loads(capsys.readouterr().out)} == {None}
    profile.write_text('executor = "local"\n[default]\ndevice = "cpu"\nteraflops_per_second = 1\n')
    monkeypatch.setattr(source, "code_sha256", lambda: "0123")
    assert main(plan) == 0
    out, err = capsys.readouterr()
    assert "the calibration of transformer at 25k is of other code, and is not used; `dynconv plan --calibrate`" in err
    assert {row["forecast_from"] for row in json.loads(out)} == {"the profile's 1 TFLOP/s a device"}
    assert main([*plan, "--calibrate", "--throughput", "x.csv"]) == 2


def test_a_calibration_that_finished_runs_go_before_says_so(
    cheap: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.bench.calibration.calibrate", lambda _: None)
    profile = tmp_path / "p.toml"
    profile.write_text('executor = "local"\n[default]\ndevice = "cpu"\n')
    plan = ["plan", str(cheap), "--profile", str(profile)]
    run, *_ = load_sweep(cheap)
    run_dir = tmp_path / "results" / "runs" / "cheap" / run.run_id
    run_dir.mkdir(parents=True)
    write_json(run_dir / "config.json", {"schema": SCHEMA, "execution": asdict(Execution("cpu"))})
    clocks = {"train": 30.0, "eval": 6.0}
    write_json(run_dir / "run.json", {"device": "cpu", "dtype": "float32", "torch": "2", "seconds": clocks})
    assert main([*plan, "--calibrate"]) == 0
    told = "the forecast of transformer at 25k is by the clocks of finished runs in results/runs/cheap, which go before"
    assert told in capsys.readouterr().err
    assert main(plan) == 0
    assert told not in capsys.readouterr().err  # nothing was measured that could have been meant
    assert main([*plan, "--calibrate", "--store", str(tmp_path / "none")]) == 0
    assert told not in capsys.readouterr().err


def test_packed_runs_are_not_forecast_by_speeds_of_whole_sequences(
    tiny_run: RunConfig, cheap: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their speed depends on their documents, which the random tokens of a calibration do not have."""
    packed = replace(tiny_run, packed=True)
    plant(tiny_run, 50.0, tmp_path)
    assert account.speeds([tiny_run], HERE, tmp_path / "store", tmp_path).rates.keys() == {tiny_run.run_id}
    assert account.speeds([packed], HERE, tmp_path / "store", tmp_path).rates == {}
    cheap.write_text("packed = true\n" + cheap.read_text())
    assert main(["plan", str(cheap), "--calibrate"]) == 2
    assert "got a sweep with packed = true, whose speed depends on its documents" in capsys.readouterr().err


def test_speeds_are_not_measured_beside_other_runs(
    cheap: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be too low, and kept for all forecasts to come."""
    monkeypatch.setenv(presence.FOLDER_VARIABLE, str(tmp_path / "present"))
    with presence.starting():
        presence.add(os.getpid(), "/store/a-run", Share((), 1, tuple(os.sched_getaffinity(0))))
    assert main(["plan", str(cheap), "--calibrate"]) == 2
    assert f"got 1 that train on this machine, as a-run (process {os.getpid()}): wait" in capsys.readouterr().err
    assert not (tmp_path / "cache" / calibrations.FOLDER).exists()
    monkeypatch.setenv("DYNCONV_CACHE", "/proc/cache")  # where even root makes no files: said before it measures, too
    assert main(["plan", str(cheap), "--calibrate"]) == 2
    assert "name a place that you can write to, by the variable DYNCONV_CACHE" in capsys.readouterr().err


def test_containers_have_calibrations_of_their_own() -> None:
    image = replace(CLUSTER, slurm=Slurm("p", signal_seconds=30, srun_options=("--container-image=a.sqsh",)))
    assert account.place(image, Job()) != account.place(CLUSTER, Job()) == "slurm gpu partition=p"


def test_a_job_that_measures_is_told_from_one_that_does_not_by_what_it_wrote(
    cheap: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of its node may be hours behind."""
    (run,) = {run.model: run for run in load_sweep(cheap)}.values()
    cache, seconds = tmp_path / "cache", iter((100.0, 200.0))
    cluster = replace(CLUSTER, default=Job(device="cpu", hours=1.0))
    path = tmp_path / "p.toml"
    path.write_text(
        'executor = "slurm"\n[slurm]\npartition = "p"\nsignal_seconds = 30\n[default]\ndevice = "cpu"\nhours = 1\n'
    )
    works = True

    def sbatched(*_: object) -> str:
        if works:
            plant(run, 50.0, cache, cluster, measured_at=next(seconds))
        return "7"

    monkeypatch.setattr(slurm, "check", lambda _: None)
    monkeypatch.setattr(slurm, "queue", lambda *_: {})
    monkeypatch.setattr(slurm, "accounting", lambda _: {"7": [slurm.Ended("FAILED", "1:0")]})
    monkeypatch.setattr(sbatch, "script", lambda *_, **__: "")
    monkeypatch.setattr(sbatch, "submit", sbatched)
    monkeypatch.setattr("experiments.cli.plan._POLL_SECONDS", 0.0)
    arguments = ["plan", str(cheap), "--profile", str(path), "--calibrate"]
    assert [main(arguments), main(arguments)] == [0, 0]
    capsys.readouterr()
    works = False
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert "25k: job 7 measured nothing (Slurm says FAILED: it exited with code 1); its output: " in err


def test_versions_and_damage(tiny_run: RunConfig, tmp_path: Path) -> None:
    plant(tiny_run, 50.0, tmp_path, versions="torch 1.0")
    found = account.speeds([tiny_run], HERE, tmp_path / "store", tmp_path)
    assert found.rates == {}
    assert f"is of torch 1.0; here is {calibrations.versions()}, and is not used" in found.notes[0]
    (path,) = (tmp_path / calibrations.FOLDER).glob("*.json")
    write_json(path, read_json(path) | {"tokens_per_second": -1.0})
    with pytest.raises(ValueError, match=f"{path}: tokens_per_second must be positive and finite; got -1.0"):
        account.speeds([tiny_run], HERE, tmp_path / "store", tmp_path)


def test_rounds_that_differ_are_noted(tiny_run: RunConfig, tmp_path: Path) -> None:
    plant(tiny_run, 50.0, tmp_path, spread=0.6)
    (note,) = account.speeds([tiny_run], HERE, tmp_path / "store", tmp_path).notes
    assert note.startswith("the calibration of lowrank-qkv at tiny varied by 60%")


# Finished runs


def test_finished_runs_say_how_long_the_others_take(
    tiny_run: RunConfig, submitted: Callable[..., Path], tmp_path: Path
) -> None:
    runs = [replace(tiny_run, seed=seed) for seed in range(4)]
    plant(tiny_run, 50.0, tmp_path)
    clocks = {
        "train": 30.0,
        "eval": 6.0,
        "checkpoint": 3.0,
        "lost": 1.0,
        "startup": 7.0,
        "compile": 1.0,
        "queue": 900.0,
    }
    done = {"device": "cpu", "dtype": "float32", "torch": "2", "seconds": clocks}
    for run, factor in zip(runs, (1.0, 2.0), strict=False):
        seconds = {name: factor * value for name, value in clocks.items()}
        write_json(submitted(run, tmp_path) / "run.json", done | {"seconds": seconds})
    rates = account.speeds(runs, HERE, tmp_path, tmp_path).rates
    assert {rate.source for rate in rates.values()} == {f"finished runs of {tmp_path} on cpu"}
    assert rates[runs[3].run_id].hours(runs[3]) == pytest.approx((1.5 * 40 + 1.5 * 8) / 3600)
    plain = Profile("local", default=Job(device="cpu", compile=False))  # which has no effect on a CPU
    assert account.speeds(runs, plain, tmp_path, tmp_path).rates == rates
    shared = {"attempts_made": [{"sharing": 3}, {"sharing": None}]}
    write_json(tmp_path / runs[0].run_id / "run.json", done | shared)
    (told,) = {rate.source for rate in account.speeds(runs, HERE, tmp_path, tmp_path).rates.values()}
    assert told == f"finished runs of {tmp_path} on cpu, up to 3 at once on it"
    # Of two kinds of devices they are no forecast, and those of another number of processes are none.
    write_json(tmp_path / runs[1].run_id / "run.json", done | {"torch": "1"})
    found = account.speeds(runs, HERE, tmp_path, tmp_path)
    assert {rate.tokens_per_second for rate in found.rates.values()} == {50.0}
    assert "finished runs of lowrank-qkv at tiny are of several devices or versions" in found.notes[0]
    two = Profile("local", default=Job(device="cpu", gpus=2))
    assert account.speeds(runs, two, tmp_path, tmp_path / "empty").rates == {}
    gpu = Profile("slurm", slurm=Slurm("p"), default=Job(device="cuda"))
    assert account.speeds(runs, gpu, tmp_path, tmp_path / "empty").rates == {}


# The cap


def test_submit_refuses_what_passes_the_cap_and_counts_what_was_used(
    tiny_run: RunConfig, dataset: Dataset, tmp_path: Path
) -> None:
    store, cache = tmp_path / "store", dataset.path.parent
    runs = [replace(tiny_run, seed=seed) for seed in range(3)]
    unknown = Profile("local", max_parallel=2, default=HERE.default, max_gpu_hours=5.0)
    with pytest.raises(ValueError, match=r"max_gpu_hours = 5 needs a forecast, and the speed of lowrank-qkv at tiny"):
        launch.submit(runs, unknown, store, cache=cache)
    stated = replace(HERE.default, teraflops_per_second=tiny_run.counts.flops_exact / 1e12 / 3600)  # an hour a run
    hours = stated_rate(tiny_run, 1, stated.teraflops_per_second or 0).hours(tiny_run)
    capped = Profile("local", max_parallel=2, default=stated, max_gpu_hours=2.9 * hours)
    words = rf"max_gpu_hours = {2.9 * hours:g} in the profile: \S+ has used 0 GPU-hours, and the 3 runs to be submitted"
    with pytest.raises(ValueError, match=rf"{words} are forecast to take {3 * hours:.4g} more, by the profile's"):
        launch.submit(runs, capped, store, cache=cache)
    assert not list(store.glob("*/config.json"))
    assert launch.submit(runs[:1], capped, store, cache=cache).unsuccessful == []
    # What the finished run has really used is a second; planted, it is 2.5 hours on two devices.
    attempt = store / runs[0].run_id / "attempt-0001.json"
    kept = read_json(attempt)
    assert account.used_hours(store) < 0.1
    write_json(attempt, kept | {"gpus": 2, "updated_at": kept["started_at"] + 2.5 * 3600})
    used = 5.0 + 2 * kept["seconds"]["startup"] / 3600
    assert account.used_hours(store) == pytest.approx(used)
    planted = Profile("local", max_parallel=2, default=HERE.default, max_gpu_hours=used + 1e-9)
    with pytest.raises(ValueError, match=rf"has used {used:.4g} GPU-hours, and the 2 runs .* finished runs of"):
        launch.submit(runs, planted, store, cache=cache)
    account.require_within_cap(runs[1:], runs, replace(planted, max_gpu_hours=used + 1), store, cache)


# Time limits


def test_a_time_limit_follows_from_what_was_measured_and_from_nothing_else(
    tiny_run: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    def limits(profile: Profile, runs: list[RunConfig]) -> Profile:
        return account.with_time_limits(profile, runs, account.speeds(runs, profile, tmp_path, tmp_path))

    short, long = (replace(tiny_run, size=size) for size in ("45k", "25k"))
    long = replace(long, train=replace(tiny_run.train, tokens=16 * 8 * 5000))
    profile = replace(CLUSTER, size={"110k": Job(device="cpu", hours=3.0)})
    given = replace(tiny_run, size="110k")
    runs = [short, long, given]
    assert limits(profile, runs) == profile
    stated = replace(profile, default=replace(profile.default, teraflops_per_second=1.0))
    assert limits(stated, runs) == stated
    words = "the time limit of 25k is 24 h: the speed of 1 of its 1 runs was not measured"
    assert capsys.readouterr().err.count(words) == 2
    plant(short, 20.0, tmp_path, profile)  # of all three: only their length differs
    limited = limits(profile, runs)
    hours = {run.size: Rate(20.0, "").hours(run) for run in (short, long)}
    assert hours["25k"] > 5
    for size, forecast in hours.items():
        assert limited.job(size).time_limit == pytest.approx(1.5 * forecast + 0.5)
    assert limited.job("110k").time_limit == 3.0
    words = f"the time limit of 25k is {1.5 * hours['25k'] + 0.5:.3g} h: 1.5 times the longest run's forecast of"
    err = capsys.readouterr().err
    assert words in err
    assert re.search(r"forecast of \S+ h, by the calibration of .* on a planted device, and 0.5 h for the start", err)
    endless = [replace(long, train=replace(long.train, tokens=10**9))]
    assert limits(profile, endless).job("25k").time_limit == 24.0


def test_a_profile_says_auto_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text('executor = "local"\n[default]\nhours = 3\n[size.1B]\nhours = "auto"\n[size.2B]\nhours = 4\n')
    profile = load_profile(path)
    assert [profile.job(size).hours for size in ("300M", "1B", "2B")] == [3.0, None, 4.0]
    assert profile.job("1B").time_limit == 24.0
    path.write_text('executor = "local"\n[default]\nhours = "long"\n')
    with pytest.raises(ValueError, match=r"default.hours: got 'long'; wanted a number"):
        load_profile(path)
    path.write_text('executor = "local"\nmax_gpu_hours = 0\n')
    with pytest.raises(ValueError, match="max_gpu_hours must be finite and above zero; got 0"):
        load_profile(path)
