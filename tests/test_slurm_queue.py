"""Faults on the way into the queue of a real Slurm and back into it: answers of sbatch, limits, requeues, scancel."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from clusters import (
    ON_THE_CLUSTER,
    PROFILE,
    SCRIPTS,
    ask,
    cluster,
    hasten,
    log_of,
    submit,
    wait_until,
)
from launches import Submit, slow_down, state_of
from texts import CHEAP_SWEEP

from analysis.logs.files import read_json
from experiments.cli.main import main
from experiments.design.config import RunConfig
from experiments.launching import sbatch
from experiments.launching import submit as launch
from experiments.launching.cancel import cancel
from experiments.launching.profile import Slurm

__all__ = ["cluster", "submit"]  # fixtures
pytestmark = ON_THE_CLUSTER

REAL = shutil.which("sbatch")
HELD = replace(PROFILE, slurm=Slurm("low", signal_seconds=30, options={"hold": ""}))


@pytest.fixture
def sbatch_becomes(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a script before sbatch; `REAL` in it is the real one, `$PPID` whoever submits."""

    def put(script: str) -> None:
        folder = tmp_path_factory.mktemp("bin")
        (folder / "sbatch").write_text(f"#!/bin/bash\nREAL={REAL}\n{script}\n")
        (folder / "sbatch").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    return put


def arrays_of(store: Path) -> list[str]:
    """The arrays in the queue that belong to a store."""
    queue = [line.split("|") for line in ask("squeue", "--noheader", "--format=%F|%j").splitlines()]
    names = {read_json(path)["name"] for path in store.glob(".jobs/*/submission.json")}
    return sorted({array for array, name in queue if name in names})


def test_jobs_that_sbatch_denies_are_found(
    runs: list[RunConfig],
    submit: Submit,
    sbatch_becomes: Callable[[str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The controller accepts, and its answer comes too late."""
    sbatch_becomes(f'$REAL "$@" >/dev/null; echo "{TIMED_OUT}" >&2; exit 1')
    assert len(submit(runs, tmp_path, HELD).submitted) == 3
    (array,) = arrays_of(tmp_path)
    assert f"{TIMED_OUT}; Slurm has the jobs all the same, as {array}\n" in capsys.readouterr().err
    assert [state_of(tmp_path, run).job_id for run in runs] == [f"{array}_{index}" for index in range(3)]
    assert submit(runs, tmp_path, HELD).submitted == []
    assert arrays_of(tmp_path) == [array]
    cancel(tmp_path, [run.run_id for run in runs])


def test_a_submission_that_is_interrupted_is_taken_up(
    runs: list[RunConfig],
    submit: Submit,
    sbatch_becomes: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C while sbatch waits for an answer: before the controller has the jobs, and after."""
    with monkeypatch.context() as patch:
        for number, script in enumerate(("kill -INT $PPID; sleep 60", '$REAL "$@"; kill -INT $PPID; sleep 60')):
            patch.setattr(sbatch, "LOOK_SECONDS", 0.0)
            sbatch_becomes(script)
            with pytest.raises(KeyboardInterrupt):
                submit(runs, tmp_path, HELD)
            assert {state_of(tmp_path, run).state for run in runs} == {"unknown"}
            assert "sbatch has not answered" in str(state_of(tmp_path, runs[0]).cause)
            assert len(arrays_of(tmp_path)) == number
    (array,) = arrays_of(tmp_path)
    capsys.readouterr()
    assert submit(runs, tmp_path, HELD).skipped == {"held": [run.run_id for run in runs]}
    told = "sbatch had left the submission of 3 runs unanswered; Slurm has it, as job"
    assert f"{tmp_path}: {told} {array}\n" in capsys.readouterr().err
    assert arrays_of(tmp_path) == [array]
    cancel(tmp_path, [run.run_id for run in runs])


NOTICE = "echo 'maintenance: job 1 of 2 is done'"  # sites print such things on standard output
TIMED_OUT = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"


def test_a_submission_that_is_accepted_after_it_was_given_up_trains_nothing(
    tiny_run: RunConfig,
    submit: Submit,
    sbatch_becomes: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The controller takes it up when the run has been submitted again: the late job ends, the other one trains."""
    again = tmp_path / "again"
    late = f'(until [ -e {again} ]; do sleep 0.1; done; $REAL "$@") >/dev/null 2>&1 &'
    sbatch_becomes(f'{late} echo "{TIMED_OUT}" >&2; exit 1')
    monkeypatch.setattr(sbatch, "LOOK_SECONDS", 0.0)
    store = tmp_path / "store"
    with pytest.raises(ValueError, match=r"Socket timed out .*; whether Slurm has the jobs is not known yet: submit"):
        submit([tiny_run], store)
    assert state_of(store, tiny_run).state == "unknown"
    sbatch_becomes('$REAL --hold "$@"')
    assert submit([tiny_run], store).submitted == [tiny_run.run_id]
    assert "left the submission of 1 runs unanswered; Slurm does not have it" in capsys.readouterr().err
    again.touch()
    wait_until(lambda: any("not this job's any more" in log.read_text() for log in store.glob(".jobs/*/*.out")))
    job_id = str(state_of(store, tiny_run).job_id)
    assert state_of(store, tiny_run).state == "held"
    ask("scontrol", "release", job_id)
    wait_until(lambda: state_of(store, tiny_run).state == "complete")
    assert read_json(store / tiny_run.run_id / "run.json")["attempts"] == 1


def test_cancel_finds_the_jobs_of_an_unanswered_submission(
    runs: list[RunConfig], submit: Submit, sbatch_becomes: Callable[[str], None], tmp_path: Path
) -> None:
    sbatch_becomes('$REAL "$@"; kill -INT $PPID; sleep 60')
    with pytest.raises(KeyboardInterrupt):
        submit(runs, tmp_path, HELD)
    assert len(arrays_of(tmp_path)) == 1
    cancel(tmp_path, [run.run_id for run in runs])
    assert arrays_of(tmp_path) == []


def test_a_job_does_not_wait_for_sbatch(
    tiny_run: RunConfig, submit: Submit, sbatch_becomes: Callable[[str], None], tmp_path: Path
) -> None:
    """sbatch answers only when the run has ended. submitit's jobs would wait for a minute, and fail."""
    done = tmp_path / tiny_run.run_id / "run.json"
    sbatch_becomes(f'answer=$($REAL "$@"); until [ -e {done} ]; do sleep 0.2; done; {NOTICE}; echo "$answer"')
    submit([tiny_run], tmp_path)
    assert state_of(tmp_path, tiny_run).state == "complete"
    assert read_json(done)["attempts"] == 1


def test_a_submission_that_was_accepted_twice_trains_once(
    long_run: RunConfig, submit: Submit, sbatch_becomes: Callable[[str], None], tmp_path: Path
) -> None:
    """A wrapper that tries again after a timeout, as sites have them: two jobs begin, side by side."""
    sbatch_becomes('$REAL "$@"; $REAL "$@"')
    submit([long_run], tmp_path)
    first, second = arrays_of(tmp_path)
    wait_until(lambda: state_of(tmp_path, long_run).state == "complete")
    assert state_of(tmp_path, long_run).job_id == first
    wait_until(lambda: arrays_of(tmp_path) == [])
    (other,) = tmp_path.glob(f".jobs/*/{second}_0_log.out")
    assert "is not this job's any more" in other.read_text()
    assert read_json(tmp_path / long_run.run_id / "run.json")["attempts"] == 1


@pytest.fixture
def limited() -> Iterator[Callable[[int], None]]:
    """Set how many jobs the user may have in the queue, until the test ends."""

    def limit(count: int) -> None:
        user = ask("id", "--user", "--name").strip()
        ask("sacctmgr", "--immediate", "modify", "user", f"name={user}", "set", f"maxsubmitjobs={count}")

    wait_until(lambda: ask("squeue", "--noheader") == "")  # jobs of earlier tests count
    yield limit
    limit(-1)


def test_what_the_limit_on_jobs_allows_is_submitted(
    runs: list[RunConfig],
    submit: Submit,
    limited: Callable[[int], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    limited(2)
    first = submit(runs, tmp_path, HELD)
    assert (len(first.submitted), first.waiting) == (2, [runs[2].run_id])
    told = f"{tmp_path}: 2 runs submitted; 1 wait, as Slurm takes no more now (sbatch refused: "
    assert f"{told}sbatch: error: AssocMaxSubmitJobLimit)" in capsys.readouterr().err
    assert state_of(tmp_path, runs[2]).state == "pending"
    with pytest.raises(ValueError, match=r"AssocMaxSubmitJobLimit; none of 1 runs is queued; submit again when"):
        submit(runs, tmp_path, HELD)
    assert state_of(tmp_path, runs[2]).state == "pending"
    cancel(tmp_path, first.submitted)
    wait_until(lambda: arrays_of(tmp_path) == [])
    assert submit(runs, tmp_path, HELD).submitted == [runs[2].run_id]
    cancel(tmp_path, [run.run_id for run in runs])


def preempt(job_id: str, slow: Path) -> None:
    """Have a job of the higher partition, which ends soon, and let the preempted one start again: not slow any more."""
    ask("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    wait_until(lambda: "Restarts=1" in ask("scontrol", "show", "job", job_id))
    slow.unlink()
    hasten(job_id)


def test_a_run_is_queued_again_where_nodes_have_no_scontrol(
    long_run: RunConfig, submit: Submit, tmp_path: Path
) -> None:
    """Its state is saved, and the job lives on until Slurm, whose grace time is over, queues it again."""
    missing = "scontrol() { echo 'scontrol: command not found' >&2; return 127; }"
    without = replace(
        PROFILE,
        slurm=Slurm("low", signal_seconds=30, setup=(missing,)),
        default=replace(PROFILE.default, checkpoint_minutes=0.02),  # the first save takes long
    )
    slow = slow_down(tmp_path, after=100)
    ask("scontrol", "update", "partition=low", "gracetime=8")
    try:
        submit([long_run], tmp_path, without)
        wait_until(lambda: "step 100/" in log_of(tmp_path, long_run))
        wait_until(lambda: bool(list((tmp_path / long_run.run_id).glob("checkpoint/step-*"))))
        preempt(str(state_of(tmp_path, long_run).job_id), slow)
        assert "scontrol: command not found" in log_of(tmp_path, long_run)
        wait_until(lambda: state_of(tmp_path, long_run).state == "complete")
    finally:
        ask("scontrol", "update", "partition=low", "gracetime=30")
    wait_until(lambda: arrays_of(tmp_path) == [])  # else the next test's job preempts it, and Slurm queues it once more
    run = read_json(tmp_path / long_run.run_id / "run.json")
    assert (run["attempts"], run["seconds"]["lost"]) == (2, 0.0)


def test_a_job_that_is_preempted_before_python_runs_is_queued_again(
    tiny_run: RunConfig, submit: Submit, tmp_path: Path
) -> None:
    """TERM ends what would start Python; Slurm by itself would call that a failure. It costs no attempt."""
    python, begun, slow = (tmp_path / name for name in ("slow-python", "begun", "slow"))
    slow.touch()
    wait = f"if [ -e {slow} ]; then touch {begun}; while [ -e {slow} ]; do sleep 0.1; done; fi"
    python.write_text(f'#!/bin/bash\n{wait}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    store = tmp_path / "store"
    submit([tiny_run], store, replace(PROFILE, slurm=Slurm("low", signal_seconds=30, python=str(python))))
    wait_until(begun.exists)
    preempt(str(state_of(store, tiny_run).job_id), slow)
    wait_until(lambda: state_of(store, tiny_run).state == "complete")
    wait_until(lambda: arrays_of(store) == [])
    assert read_json(store / tiny_run.run_id / "run.json")["attempts"] == 1


def test_a_running_job_that_is_cancelled_by_scancel_stays_so(
    long_run: RunConfig, submit: Submit, tmp_path: Path
) -> None:
    """scancel's signal looks like a preemption; the batch script asks Slurm which it is."""
    slow_down(tmp_path, after=100)
    submit([long_run], tmp_path)
    wait_until(lambda: "step 100/" in log_of(tmp_path, long_run))
    ask("scancel", str(state_of(tmp_path, long_run).job_id))
    wait_until(lambda: state_of(tmp_path, long_run).state == "cancelled")
    assert str(state_of(tmp_path, long_run).cause).startswith("Slurm says CANCELLED by")
    assert arrays_of(tmp_path) == []


def test_waiting_submits_the_rest_when_there_is_room(
    runs: list[RunConfig],
    submit: Submit,
    limited: Callable[[int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.5)
    monkeypatch.setattr(launch, "ROOM_SECONDS", 0.5)
    limited(1)
    outcome = submit(runs[:2], tmp_path, wait=True)
    assert (outcome.submitted, outcome.waiting) == ([run.run_id for run in runs[:2]], [])
    assert [state.state for state in outcome.ended] == ["complete"] * 2


def test_waiting_waits_for_what_another_submit_has_queued(
    tiny_run: RunConfig, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.5)
    submit([tiny_run], tmp_path)
    again = submit([tiny_run], tmp_path, wait=True)
    assert (again.submitted, [state.state for state in again.ended]) == ([], ["complete"])


def test_a_launcher_that_is_killed_leaves_no_job_that_nobody_knows(
    text_folder: Path,
    sbatch_becomes: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DYNCONV_CACHE", str(tmp_path / "cache"))
    sweep, profile, store = tmp_path / "cheap.toml", tmp_path / "profile.toml", tmp_path / "store"
    sweep.write_text(CHEAP_SWEEP.format(source=text_folder))
    text = (SCRIPTS.parent / "profiles" / "one-node.toml").read_text()
    profile.write_text(text.replace("[default]", 'options = { hold = "" }\n[default]'))
    arguments = ["submit", str(sweep), "--store", str(store), "--profile", str(profile)]
    sbatch_becomes('$REAL "$@"; kill -KILL $PPID; sleep 60')
    killed = subprocess.run([sys.executable, "-m", "experiments.cli.main", *arguments], check=False)
    assert killed.returncode == -9
    (array,) = arrays_of(store)
    assert main(arguments) == 0
    assert f"{store}: 0 runs submitted; 1 held already" in capsys.readouterr().err
    assert arrays_of(store) == [array]
    assert main(["cancel", str(sweep), "--store", str(store)]) == 0


def test_the_limit_on_jobs_that_run_at_once_can_be_changed(
    runs: list[RunConfig], submit: Submit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(runs, tmp_path, replace(HELD, max_parallel=1))
    (array,) = arrays_of(tmp_path)
    assert "ArrayTaskThrottle=1" in ask("scontrol", "show", "job", array)
    capsys.readouterr()
    submit(runs, tmp_path, replace(HELD, max_parallel=2))
    assert "ArrayTaskThrottle=2" in ask("scontrol", "show", "job", array)
    assert f"2 of the runs of array {array} may run at once; before, 1\n" in capsys.readouterr().err
    cancel(tmp_path, [run.run_id for run in runs])
