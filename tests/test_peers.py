"""A job of several processes in which one fails or is killed: what becomes of the run, and which cause is kept.

Real processes, by gloo on a CPU. What a scheduler does then is in test_slurm.py.
"""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launches import PATIENCE, slow_down
from test_ownership import FORK
from test_presence import submit_in_a_process
from test_run import result, wait_for

from analysis.logs.provenance import count_attempts
from analysis.logs.reader import read_rows, status
from experiments.data.dataset import Dataset
from experiments.design.config import RunConfig
from experiments.launching import states
from experiments.launching import submit as launch
from experiments.launching.profile import Job, Profile
from experiments.training import run as running
from experiments.training.job import Place
from experiments.training.parallel import PeersMissing, lost_peer
from experiments.training.run import Run, RunFailed
from experiments.training.trainer import NonFiniteLoss, Trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # fork beside threads
    pytest.mark.skipif(torch.cuda.is_available(), reason="the processes are forked and run on CPUs"),
]
Submitted = Callable[..., Path]
REQUEUED, FAILED = 75, 3


def one_of(size: int, rank: int, run_dir: Path, fault: Callable[[int, Trainer], None]) -> None:
    """A process of a job under a scheduler; `fault` is called before each step, with the rank."""
    advance = Trainer.advance

    def faulty(trainer: Trainer) -> object:
        fault(rank, trainer)
        return advance(trainer)

    Trainer.advance = faulty  # type: ignore[method-assign,assignment]  # in this process only
    running.this_place = lambda: Place(rank, size, rank, "1", ("here",))
    running.CAUSE_SECONDS, running.LEAVE_SECONDS = 1.0, 3.0
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "TERM"
    signal.signal(signal.SIGTERM, lambda *_: os._exit(REQUEUED) if rank == 0 else None)
    try:
        Run(run_dir)()
    except RunFailed as error:
        print(f"rank {rank}: {error}", flush=True)
        os._exit(FAILED)


def started(size: int, run_dir: Path, fault: Callable[[int, Trainer], None] = lambda *_: None) -> list[BaseProcess]:
    processes = [FORK.Process(target=one_of, args=(size, rank, run_dir, fault)) for rank in range(size)]
    for process in processes:
        process.start()
    return processes


def codes(processes: list[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join(PATIENCE)
        process.kill()
    return [process.exitcode for process in processes]


@pytest.fixture
def run(tiny_run: RunConfig) -> RunConfig:
    return replace(tiny_run, train=replace(tiny_run.train, tokens=16 * 8 * 30, evaluate_every=16 * 8 * 15))


@pytest.mark.parametrize(("victim", "parallel"), [(0, "ddp"), (1, "ddp"), (1, "fsdp")])
def test_a_killed_process_requeues_the_job_and_costs_only_steps(
    victim: int, parallel: str, run: RunConfig, submitted: Submitted, tmp_path: Path
) -> None:
    """Also rank 0, which alone can ask for it: then the run is lost, for `submit` to take up."""
    run_dir = submitted(run, tmp_path, checkpoint_minutes=0.002, parallel=parallel)

    def killed(rank: int, trainer: Trainer) -> None:
        if rank == victim and trainer.steps_done == 20:
            os.kill(os.getpid(), signal.SIGKILL)

    found = codes(started(2, run_dir, killed))
    assert found == ([REQUEUED, -signal.SIGKILL] if victim else [-signal.SIGKILL, FAILED])
    assert status(run_dir) == "unfinished"  # not failed
    attempt = json.loads((run_dir / "attempt-0001.json").read_text())
    if victim:
        assert attempt["interrupted"].startswith("another process of the job is gone (")
    assert codes(started(2, run_dir)) == [0, 0]
    steps = read_rows(run_dir, "steps").table["step"].to_pylist()
    assert steps == list(range(1, run.train.steps + 1))
    assert result(run_dir)["attempts"] == 2


@pytest.mark.parametrize("victim", [0, 2])
def test_the_cause_of_the_process_that_failed_is_kept(
    victim: int, run: RunConfig, submitted: Submitted, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = submitted(run, tmp_path)

    def fails(rank: int, trainer: Trainer) -> None:
        if rank == victim and trainer.steps_done == 20:
            raise ValueError("no data on this node")

    assert codes(started(3, run_dir, fails)) == [FAILED] * 3
    failure = json.loads((run_dir / "failure.json").read_text())
    assert (failure["cause"], failure["step"]) == ("ValueError: no data on this node", 21)
    others = {0, 1, 2} - {victim}
    said = capfd.readouterr().out
    for rank in others:
        assert f"rank {rank}: {run.run_id}: another process of the job failed: ValueError: no data on this" in said


def test_a_process_killed_before_all_have_met_fails_nothing(
    run: RunConfig, submitted: Submitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for it as long as for a node that starts late, and then have the job started again."""
    from datetime import timedelta

    monkeypatch.setattr("experiments.training.rendezvous._TIMEOUT", timedelta(seconds=3))
    monkeypatch.setattr("experiments.training.rendezvous.MINUTES", 0.05)
    run_dir = submitted(run, tmp_path)
    first = FORK.Process(target=one_of, args=(2, 0, run_dir, lambda *_: None))
    first.start()
    assert codes([first]) == [REQUEUED]
    second = FORK.Process(target=one_of, args=(2, 1, run_dir, lambda *_: None))
    second.start()
    assert codes([second]) == [FAILED]
    assert status(run_dir) == "unfinished"
    assert not list(run_dir.glob("attempt-*"))


def test_a_run_that_loses_a_process_again_and_again_has_failed_in_the_end(
    run: RunConfig, submitted: Submitted, tmp_path: Path
) -> None:
    run_dir = submitted(run, tmp_path, max_attempts=1)

    def killed(rank: int, trainer: Trainer) -> None:
        if rank == 1 and trainer.steps_done == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    assert codes(started(2, run_dir, killed))[0] == REQUEUED
    assert codes(started(2, run_dir, killed)) == [FAILED] * 2
    cause = json.loads((run_dir / "failure.json").read_text())["cause"]
    assert cause.startswith(
        "AttemptsSpent: started 1 times already (the last time another process of the job is gone ("
    )


def test_what_a_process_knows_of_itself_is_its_own_failure() -> None:
    for error in (
        ValueError("a corpus that was reset by peer review"),
        NonFiniteLoss("loss nan"),
        OSError(28, "No space left on device"),
        dist.DistBackendError("NCCL error in: x.cpp:1, unhandled cuda error (run with NCCL_DEBUG=INFO)"),
        dist.DistBackendError("ncclSystemError: System call failed.\nLast error: no shared memory segment /dev/shm/x"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ):
        assert not lost_peer(error)
    for error in (
        RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"),
        RuntimeError("[/x/gloo/gloo/transport/tcp/pair.cc:566] Read error [127.0.0.1]:1: Connection reset by peer"),
        dist.DistBackendError("NCCL error: ncclRemoteError: A call failed possibly due to a network error"),
        dist.DistBackendError("ncclSystemError: System call failed.\nLast error: Connect failed: No route to host"),
        dist.DistNetworkError("recvValueWithTimeout failed: Broken pipe"),
        dist.DistStoreError("Timed out after 601 seconds waiting for clients. 1/2 clients joined."),
        PeersMissing("rank 0 has not published its address"),
    ):
        assert lost_peer(error)


# Told to stop while the run starts


def test_starts_that_were_told_to_stop_end_some_time() -> None:
    stopped, counted = {"step": None, "preempted": True}, {"step": None}
    assert count_attempts([stopped] * 9 + [{"step": 3, "preempted": True}, counted]) == 2
    assert count_attempts([stopped] * 40) == 4


def preempted_at(where: str, times: int, run_dir: Path) -> None:
    """A process of a scheduler that wants it to stop, `times` times, when it comes to the function `where`."""
    told = 0

    class Told:
        def __init__(self, original: Callable[..., object]) -> None:
            self.original = original

        def __call__(self, *arguments: object, **options: object) -> object:
            nonlocal told
            told += 1
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGTERM)
            return self.original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        target, name = {
            "the lock": ("experiments.training.folder", "held"),
            "the imports": ("experiments.training.run", "read_record"),
            "the trainer": ("experiments.training.assembly", "assemble"),
            "the checkpoint": ("experiments.training.checkpoints", "load_newest"),
            "the log": ("experiments.training.run", "provenance"),
            "the loop": ("experiments.training.trainer", "Trainer.evaluation_due"),
        }[where]
        module = __import__(target, fromlist=["x"])
        if where == "the loop":
            fget = Told(Trainer.evaluation_due.fget)  # type: ignore[attr-defined]
            patch.setattr(Trainer, "evaluation_due", property(lambda trainer: fget(trainer)))
        else:
            patch.setattr(module, name, Told(getattr(module, name)))
        one_of(1, 0, run_dir, lambda *_: None)


@pytest.mark.parametrize("where", ["the lock", "the imports", "the trainer", "the checkpoint", "the log", "the loop"])
def test_a_run_told_to_stop_while_it_starts_is_requeued_and_costs_no_attempt(
    where: str, run: RunConfig, submitted: Submitted, tmp_path: Path
) -> None:
    run_dir = submitted(run, tmp_path, max_attempts=1)
    for times in (1, 1, 3):
        process = FORK.Process(target=preempted_at, args=(where, times, run_dir))
        process.start()
        assert codes([process]) == [REQUEUED]
    assert status(run_dir) == "unfinished"
    for path in run_dir.glob("attempt-*"):
        attempt = json.loads(path.read_text())
        assert (attempt["step"], attempt["preempted"]) == (None, True)
    assert codes(started(1, run_dir)) == [0]
    assert result(run_dir)["steps"] == run.train.steps


def test_a_run_told_to_stop_after_a_step_has_used_an_attempt(
    run: RunConfig, submitted: Submitted, tmp_path: Path
) -> None:
    run_dir = submitted(run, tmp_path, max_attempts=1)

    def told(_: int, trainer: Trainer) -> None:
        if trainer.steps_done == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    assert codes(started(1, run_dir, told)) == [REQUEUED]
    assert codes(started(1, run_dir)) == [FAILED]
    assert json.loads((run_dir / "failure.json").read_text())["cause"] == (
        "AttemptsSpent: started 1 times already (the last time it was told to stop); max_attempts = 1 is allowed; "
        "raise it in the profile, then retry"
    )


def test_one_of_two_processes_told_to_stop_earlier_than_the_other(
    run: RunConfig, submitted: Submitted, tmp_path: Path
) -> None:
    """While the first leaves, the second waits for it in a collective operation; both are told in the end."""
    run_dir = submitted(run, tmp_path)

    def late(rank: int, _: Trainer) -> None:
        time.sleep(0.05 * rank)

    processes = started(2, run_dir, late)
    wait_for(lambda: bool(list(run_dir.glob("attempt-*"))))
    for process in processes:
        os.kill(process.pid or 0, signal.SIGTERM)
        time.sleep(0.3)
    found = codes(processes)
    assert found[0] == REQUEUED
    assert status(run_dir) == "unfinished"
    assert codes(started(2, run_dir)) == [0, 0]
    assert read_rows(run_dir, "steps").table["step"].to_pylist() == list(range(1, run.train.steps + 1))


def test_a_process_killed_on_this_machine_is_named(run: RunConfig, dataset: Dataset, tmp_path: Path) -> None:
    """The run is lost, not failed, and the next `submit` takes it up."""
    long = replace(run, train=replace(run.train, tokens=16 * 8 * 300, evaluate_every=16 * 8 * 100))
    profile = Profile("local", default=Job(device="cpu", gpus=2, checkpoint_minutes=0.005))
    cache, store = dataset.path.parent, tmp_path / "store"
    slow = slow_down(store)
    launcher = submit_in_a_process([long], store, cache, tmp_path / "said", profile)
    run_dir = store / long.run_id
    wait_for(lambda: bool(list(run_dir.glob("checkpoint/step-*"))))
    controller = json.loads((run_dir / "job.json").read_text())["job_id"]
    _, second = map(int, Path(f"/proc/{controller}/task/{controller}/children").read_text().split())  # as they began
    os.kill(second, signal.SIGKILL)
    assert launcher.wait(PATIENCE) == 1
    slow.unlink()
    (state,) = states.read(store, [long.run_id])
    assert (state.state, state.cause) == ("lost", "process 1 was ended by SIGKILL")
    assert launch.submit([long], profile, store, cache=cache).unsuccessful == []
    assert read_rows(run_dir, "steps").table["step"].to_pylist() == list(range(1, long.train.steps + 1))
