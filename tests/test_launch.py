"""Launching on this machine: local slots, Ctrl-C, cancel, retry."""

import errno
import fcntl
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from launches import HERE, PATIENCE, Submit, slow_down, state_of, wait_until

from analysis.logs.files import read_json
from analysis.logs.reader import read_rows
from experiments.data.dataset import Dataset
from experiments.design.config import RunConfig
from experiments.launching import jobs, local, local_loop, progress, snapshot, states
from experiments.launching import submit as launch
from experiments.launching.cancel import cancel
from experiments.launching.locks import signals_deferred, termination_as_interrupt
from experiments.launching.profile import Job, Profile


@pytest.fixture
def diverging_run(tiny_run: RunConfig) -> RunConfig:
    return replace(tiny_run, seed=99, train=replace(tiny_run.train, learning_rate=1e30))


# Submitting here


def test_runs_end_side_by_side_and_are_not_submitted_twice(
    runs: list[RunConfig], submit: Submit, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    slow_down(store, after=20)  # so that the first has not ended before the second begins
    outcome = submit(runs, store)
    ids = [run.run_id for run in runs]
    assert (outcome.submitted, outcome.skipped, outcome.unsuccessful) == (ids, {}, [])
    assert states.find(store) == sorted(ids)
    assert {state.state for state in outcome.ended} == {"complete"}
    spans = []
    for run_id in ids:
        assert read_json(store / run_id / "attempt-0001.json")["sharing"] in {
            1,
            max(1, 2 // len(os.sched_getaffinity(0))),
        }
        config, job = (read_json(store / run_id / name) for name in ("config.json", "job.json"))
        assert config["code_commit"]
        spans.append((job["submitted_at"], read_json(store / run_id / "run.json")["finished_at"]))
    most = max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)
    assert most == HERE.max_parallel
    again = launch.submit(runs, HERE, store, cache=tmp_path / "empty")
    assert (again.submitted, again.skipped) == ([], {"complete": ids})
    assert not (tmp_path / "empty").exists()  # what is finished needs no data


def test_jobs_run_the_code_that_was_submitted_on_the_gpu_of_their_slot(
    tiny_run: RunConfig, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,4")
    code = snapshot.take(tmp_path)
    assert snapshot.take(tmp_path) == code
    with (code / "experiments" / "training" / "run.py").open("a") as file:
        file.write('\nimport os\n\nprint("from the snapshot, with GPUs", os.environ["CUDA_VISIBLE_DEVICES"])\n')
    outcome = submit([tiny_run], tmp_path, Profile("local"))
    assert outcome.unsuccessful == []
    assert "from the snapshot, with GPUs 6\n" in Path(str(outcome.ended[0].log)).read_text()
    assert read_json(tmp_path / tiny_run.run_id / "job.json")["code"] == code.name


@pytest.mark.parametrize("profile", [HERE, Profile("debug", default=Job(device="cpu"))], ids=["local", "debug"])
def test_a_failed_run_is_named_with_its_cause_and_waits_for_retry(
    profile: Profile, diverging_run: RunConfig, tiny_run: RunConfig, submit: Submit, dataset: Dataset, tmp_path: Path
) -> None:
    outcome = submit([diverging_run, tiny_run], tmp_path, profile)
    (failed,) = outcome.unsuccessful
    assert (failed.run_id, failed.state) == (diverging_run.run_id, "failed")
    assert failed.cause is not None
    assert failed.cause.startswith("NonFiniteLoss: ")
    assert state_of(tmp_path, tiny_run).state == "complete"
    again = submit([diverging_run, tiny_run], tmp_path, profile)
    assert again.skipped == {"failed": [diverging_run.run_id], "complete": [tiny_run.run_id]}
    retried = launch.retry([diverging_run, tiny_run], profile, tmp_path, cache=dataset.path.parent)
    assert retried.submitted == [diverging_run.run_id]
    assert [state.attempts for state in retried.unsuccessful] == [2]


@pytest.fixture
def in_another_process(dataset: Dataset, tmp_path: Path) -> Callable[[list[RunConfig], Path], subprocess.Popen[bytes]]:
    """`submit` as in a terminal of its own: a process group that Ctrl-C reaches as a whole."""

    def start(runs: list[RunConfig], store: Path) -> subprocess.Popen[bytes]:
        arguments = tmp_path / "arguments.pkl"
        arguments.write_bytes(pickle.dumps((runs, HERE, store, dataset.path.parent)))
        code = (
            "import pickle, sys; from experiments.launching import submit as launch; "
            "runs, profile, store, cache = pickle.load(open(sys.argv[1], 'rb')); "
            "sys.exit(len(launch.submit(runs, profile, store, cache=cache).unsuccessful))"
        )
        command = [sys.executable, "-c", code, str(arguments)]
        with (tmp_path / "stderr").open("w") as stderr:
            return subprocess.Popen(command, start_new_session=True, stderr=stderr)

    return start


def test_the_bar_counts_what_was_done_since_the_last_entry_of_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that took 30 s for its first fifth, and whose log is 6 s old, or older than it may be."""
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    logged = states.RunState("a", "running", progress=0.2, eta=120.0, elapsed=36.0, last_logged=994.0)
    assert progress._share_now(logged) == pytest.approx(36 / 150)
    late = replace(logged, last_logged=800.0, elapsed=230.0)
    assert progress._share_now(late) == pytest.approx((30 + 10 + 2.3) / 150)
    assert progress._share_now(replace(logged, eta=1.0)) == 1.0
    assert progress._share_now(replace(logged, state="stopped")) == 0.2
    assert progress._share_now(replace(logged, eta=None)) == 0.2


@pytest.mark.parametrize(
    ("state", "percent"), [("stopped", 20.0), ("lost", 20.0), ("running", 20.0), ("failed", 100.0)]
)
def test_a_run_that_submit_takes_up_again_is_not_done(
    state: str, percent: float, tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = states.RunState(tiny_run.run_id, state, progress=0.2)
    monkeypatch.setattr(states, "read", lambda *_: [here])
    assert progress.Progress(tmp_path, [tiny_run])._share() == (pytest.approx(percent), [here])


def test_the_longest_runs_of_a_seed_are_started_first(tiny_run: RunConfig) -> None:
    short = [replace(tiny_run, seed=seed) for seed in (0, 1)]
    long = [replace(run, train=replace(run.train, tokens=2 * run.train.tokens)) for run in short]
    assert local_loop.in_order([short[1], short[0], long[1], long[0]]) == [long[0], short[0], long[1], short[1]]


@pytest.mark.slow
def test_ctrl_c_saves_the_state_and_submit_goes_on(
    long_run: RunConfig, in_another_process: Callable, submit: Submit, tmp_path: Path
) -> None:
    store, run_dir = tmp_path / "store", tmp_path / "store" / long_run.run_id
    slow = slow_down(store, after=100)
    launcher = in_another_process([long_run], store)
    wait_until(lambda: state_of(store, long_run).state == "running" and "step 100/" in log_of(run_dir))
    assert submit([long_run], store).skipped == {"running": [long_run.run_id]}
    os.killpg(launcher.pid, signal.SIGINT)
    assert launcher.wait(PATIENCE) != 0
    assert "stopping 1 runs; their state is being saved" in (tmp_path / "stderr").read_text()
    stopped = state_of(store, long_run)
    assert (stopped.state, stopped.cause) == ("stopped", "stopped with its state saved; submit again to go on")
    assert len(list((run_dir / "checkpoint").glob("step-*"))) == 1
    done = read_rows(run_dir, "steps").table["step"].to_pylist()
    assert done == list(range(1, len(done) + 1))
    slow.unlink()
    assert submit([long_run], store).unsuccessful == []
    rows = read_rows(run_dir, "steps").table
    assert rows["step"].to_pylist() == list(range(1, long_run.train.steps + 1))
    assert rows["attempt"].to_pylist() == [1] * len(done) + [2] * (long_run.train.steps - len(done))


@pytest.mark.slow
def test_cancelled_runs_stay_cancelled_until_they_are_retried(
    long_run: RunConfig, runs: list[RunConfig], in_another_process: Callable, dataset: Dataset, tmp_path: Path
) -> None:
    """One running, one waiting for a slot, one complete before."""
    others = [replace(long_run, seed=seed) for seed in (10, 11)]
    first = launch.submit(runs[:1], HERE, tmp_path, cache=dataset.path.parent)
    assert first.unsuccessful == []
    everything = [runs[0], long_run, *others]
    slow = slow_down(tmp_path, after=100)
    launcher = in_another_process(everything, tmp_path)
    wait_until(lambda: all("step 100/" in log_of(tmp_path / run.run_id) for run in (long_run, others[0])))
    assert state_of(tmp_path, others[1]).state == "pending"
    cancelled = cancel(tmp_path, [run.run_id for run in everything])
    assert cancelled == [run.run_id for run in everything[1:]]
    assert launcher.wait(PATIENCE) == 3
    slow.unlink()
    assert [state_of(tmp_path, run).state for run in everything] == ["complete", *["cancelled"] * 3]
    assert states.busy(tmp_path, cancelled) == {}
    assert not (tmp_path / others[1].run_id / "job.json").exists()
    again = launch.submit(everything, HERE, tmp_path, cache=dataset.path.parent)
    assert (again.submitted, set(again.skipped)) == ([], {"complete", "cancelled"})
    retried = launch.retry([long_run], HERE, tmp_path, cache=dataset.path.parent)
    assert [(state.state, state.attempts) for state in retried.ended] == [("complete", 2)]


@pytest.mark.slow
def test_a_killed_run_is_lost_and_submit_takes_it_up(
    long_run: RunConfig, in_another_process: Callable, submit: Submit, tmp_path: Path
) -> None:
    """As after a power cut: launcher, controller and task all die by SIGKILL."""
    slow = slow_down(tmp_path, after=100)
    launcher = in_another_process([long_run], tmp_path)
    run_dir = tmp_path / long_run.run_id
    wait_until(lambda: "step 100/" in log_of(run_dir))
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    wait_until(lambda: state_of(tmp_path, long_run).state == "lost")
    slow.unlink()
    assert submit([long_run], tmp_path).unsuccessful == []
    assert read_rows(run_dir, "steps").table["step"].to_pylist() == list(range(1, long_run.train.steps + 1))


def test_who_waits_for_another_submit_is_told(
    tiny_run: RunConfig, in_another_process: Callable, tmp_path: Path
) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        launcher = in_another_process([tiny_run], tmp_path)
        wait_until(lambda: f"waiting for another submit to {tmp_path}\n" in (tmp_path / "stderr").read_text())
        assert not (tmp_path / tiny_run.run_id).exists()
    assert launcher.wait(PATIENCE) == 0


def test_no_job_outlives_a_launcher_that_fails(
    long_run: RunConfig, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full just when the job has begun: left to itself it would meet the next submission's."""
    begun = []

    def full(_run_dir: Path, _executor: str, job_id: str, *_: object) -> None:
        begun.append(job_id)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jobs, "write_job", full)
    with pytest.raises(OSError, match="No space left"):
        submit([long_run], tmp_path)
    (job_id,) = begun
    assert jobs.process_started(job_id) is None
    assert not list((tmp_path / ".jobs").rglob("*result.pkl"))  # nor did it come to its end


def test_a_signal_waits_for_the_job_that_is_being_started() -> None:
    reached = []

    def start() -> None:
        with signals_deferred():
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
                os.kill(os.getpid(), number)
                reached.append(number)

    with termination_as_interrupt(), pytest.raises(KeyboardInterrupt):
        start()
    assert len(reached) == 3


def test_nohup_survives_the_logout() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with termination_as_interrupt():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def log_of(run_dir: Path) -> str:
    job = jobs.job_of(run_dir)
    return Path(job["log"]).read_text() if job and Path(job["log"]).exists() else ""


def test_slots_share_the_gpus_round_robin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    slots = local.Slots(Profile("local", max_parallel=4), [Job(gpus=1), Job(gpus=2)])
    assert slots._gpus == [[4, 6], [7, 4], [6, 7], [4, 6]]
    assert len(local.Slots(Profile("local"), [Job()]).free) == 3
    with pytest.raises(ValueError, match="gpus = 4 a run were asked for; this machine shows 3"):
        local.Slots(Profile("local"), [Job(gpus=4)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match="'cuda' was asked for and this machine shows no GPU"):
        local.Slots(Profile("local"), [Job(device="cuda")])
    for hidden, shown in (("-1", []), ("2,-1,3", [2])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert local.visible_gpus() == shown
    assert len(local.Slots(Profile("local"), [Job(threads=10**6)]).free) == 1


def test_gpus_are_counted_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert local.visible_gpus() == []
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-a)'\necho 'GPU 1: NVIDIA H200 (UUID: GPU-b)'\n")
    script.chmod(0o755)
    assert local.visible_gpus() == [0, 1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=GPU-a: wanted numbers"):
        local.visible_gpus()
