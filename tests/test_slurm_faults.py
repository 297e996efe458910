"""Faults of nodes and of the start of a job, on a real Slurm with two nodes on this machine."""

import contextlib
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from clusters import (
    PROFILE,
    ask,
    call,
    cluster_of,
    hasten,
    losses,
    submit,
    wait_until,
)
from launches import Submit, slow_down, state_of

from analysis.logs.files import read_json
from analysis.logs.reader import read_rows
from experiments.design.config import RunConfig
from experiments.launching import submit as launch
from experiments.launching.profile import Job, Profile, Slurm
from experiments.training.run import Run

__all__ = ["submit"]  # a fixture
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.xdist_group("slurm"),  # one worker, one cluster
]
ONE = replace(PROFILE, default=replace(PROFILE.default, checkpoint_minutes=0.005))
PAIR = replace(
    PROFILE,
    slurm=Slurm("pair", signal_seconds=30, setup=("export GLOO_SOCKET_IFNAME=lo",)),
    default=Job(device="cpu", hours=0.5, gpus=2, gpus_per_node=1, checkpoint_minutes=0.005),
)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[dict[str, str]]:
    """A cluster of two nodes; the variables that name it."""
    with cluster_of(2) as environment:
        yield environment


@pytest.fixture
def run(tiny_run: RunConfig) -> RunConfig:
    """Some seconds, by two processes."""
    return replace(tiny_run, train=replace(tiny_run.train, tokens=16 * 8 * 300, evaluate_every=16 * 8 * 50))


def process_of(run_dir: Path, rank: int) -> int:
    """The process by which `rank` trains a run: the worker, which slurmstepd started."""
    job = f"SLURM_JOB_ID={read_json(run_dir / 'job.json')['job_id']}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes().split(b"\0")
            if b"experiments.launching.worker" in command and not command[0].endswith(b"srun"):
                variables = (entry / "environ").read_bytes().split(b"\0")
                if job in variables and f"SLURM_PROCID={rank}".encode() in variables:
                    found.append(int(entry.name))
    return min(found)  # its children, until they execute another program, look the same


def wait_for_checkpoint(run_dir: Path) -> None:
    wait_until(lambda: bool(list(run_dir.glob("checkpoint/step-*"))))


def go_on(store: Path, run: RunConfig, slow: Path) -> None:
    """Wait for the run to be queued again, and for its end, to which it is not slow any more."""
    wait_until(lambda: state_of(store, run).state == "requeued")
    slow.unlink()
    hasten(str(state_of(store, run).job_id))
    wait_until(lambda: state_of(store, run).state == "complete")


def steps_and_attempts(run_dir: Path) -> tuple[list[int], list[int]]:
    rows = read_rows(run_dir, "steps").table
    return rows["step"].to_pylist(), sorted(set(rows["attempt"].to_pylist()))


def test_a_run_whose_folder_is_removed_is_trained_by_its_new_job_alone(
    run: RunConfig, submit: Submit, submitted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rm -rf RUN_DIR; dynconv submit`, while its job goes on: the log is that of an undisturbed run."""
    long, store = replace(run, train=replace(run.train, tokens=16 * 8 * 600)), tmp_path / "store"
    run_dir = store / long.run_id
    slow = slow_down(store)
    submit([long], store, ONE)
    wait_for_checkpoint(run_dir)
    first = str(state_of(store, long).job_id)
    while run_dir.exists():  # a file that the run makes meanwhile keeps its folder there
        shutil.rmtree(run_dir, ignore_errors=True)
    slow.unlink()
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.5)
    assert submit([long], store, ONE, wait=True).unsuccessful == []
    wait_until(lambda: first not in ask("squeue", "--noheader", "--me", "--format=%i").split())
    (attempt,) = read_json(run_dir / "run.json")["attempts_made"]
    assert attempt["job_id"] not in (None, first)
    reference = submitted(long, tmp_path / "reference")
    Run(reference)()
    assert losses(run_dir) == losses(reference)
    assert "was removed while this run trained" in next((store / ".jobs").rglob(f"{first}_0_log.out")).read_text()


def test_a_killed_process_of_another_node_has_the_job_queued_again(
    run: RunConfig, submit: Submit, tmp_path: Path
) -> None:
    run_dir = tmp_path / run.run_id
    slow = slow_down(tmp_path)
    submit([run], tmp_path, PAIR)
    wait_for_checkpoint(run_dir)
    victim = process_of(run_dir, rank=1)
    os.kill(victim, signal.SIGKILL)
    go_on(tmp_path, run, slow)
    assert steps_and_attempts(run_dir) == (list(range(1, run.train.steps + 1)), [1, 2])
    first, second = read_json(run_dir / "run.json")["attempts_made"]
    assert first["interrupted"].startswith("another process of the job is gone (")
    assert second["first_step"] > 1


def test_a_killed_process_of_rank_0_leaves_the_run_lost_with_its_cause(
    run: RunConfig, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is left to ask for another start; the next `submit` takes it up."""
    run_dir = tmp_path / run.run_id
    slow = slow_down(tmp_path)
    submit([run], tmp_path, PAIR)
    wait_for_checkpoint(run_dir)
    victim = process_of(run_dir, rank=0)
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: state_of(tmp_path, run).state == "lost")
    slow.unlink()
    wait_until(lambda: "Killed" in str(state_of(tmp_path, run).cause))
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.5)
    assert submit([run], tmp_path, PAIR, wait=True).unsuccessful == []
    assert steps_and_attempts(run_dir) == (list(range(1, run.train.steps + 1)), [1, 2])


@pytest.mark.parametrize("profile", [ONE, PAIR], ids=["one process", "two nodes"])
def test_a_job_preempted_while_python_starts_is_queued_again_at_no_attempt(
    profile: Profile, run: RunConfig, submit: Submit, tmp_path: Path
) -> None:
    """TERM comes before any handler of ours; only one attempt is allowed."""
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(
        f"import os, time\nwhile 'SLURM_PROCID' in os.environ and os.path.exists({str(slow / 'down')!r}):\n"
        f"    open({str(slow)!r} + '/started', 'w').close(); time.sleep(0.1)\n"
    )
    assert profile.slurm is not None
    setup = (*profile.slurm.setup, f"export PYTHONPATH={slow}")
    profile = replace(
        profile,
        slurm=replace(profile.slurm, setup=setup),
        default=replace(profile.default, max_attempts=1, checkpoint_minutes=5.0),
    )
    store = tmp_path / "store"
    (slow / "down").touch()
    submit([run], store, profile)
    wait_until((slow / "started").exists)
    high = ask("sbatch", "--parsable", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    job = str(state_of(store, run).job_id)
    wait_until(lambda: ask("squeue", "--noheader", f"--jobs={job}", "--format=%T").strip() == "PENDING")
    assert state_of(store, run).state in ("queued", "requeued")
    (slow / "down").unlink()
    wait_until(lambda: high.strip() not in ask("squeue", "--noheader", "--me", "--format=%i").split())
    hasten(job)
    wait_until(lambda: state_of(store, run).state == "complete")
    assert read_json(store / run.run_id / "run.json")["attempts"] == 1


def test_a_node_that_dies_has_the_job_queued_again(
    cluster: dict[str, str], run: RunConfig, submit: Submit, tmp_path: Path
) -> None:
    """Its slurmd and all that it started are killed at once, as by a power cut. Slurm sees that later."""
    run_dir = tmp_path / run.run_id
    slow = slow_down(tmp_path)
    submit([run], tmp_path, PAIR)
    wait_for_checkpoint(run_dir)
    slurmd = int((Path(cluster["DYNCONV_SLURM_STATE"]) / "run" / "slurmd2.pid").read_text())
    worker = process_of(run_dir, rank=1)
    stepd = int(re.findall(r"^PPid:\s+(\d+)", Path(f"/proc/{worker}/status").read_text(), re.MULTILINE)[0])
    for victim in (slurmd, stepd, worker):
        os.kill(victim, signal.SIGKILL)
    wait_until(lambda: state_of(tmp_path, run).state in ("requeued", "failed", "lost"))
    assert state_of(tmp_path, run).state == "requeued"
    assert call("up", cluster).returncode == 0
    go_on(tmp_path, run, slow)
    assert steps_and_attempts(run_dir) == (list(range(1, run.train.steps + 1)), [1, 2])
