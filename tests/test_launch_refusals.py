"""Submissions, cancels and retries that are refused, or come at the same time."""

import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launches import HERE, Submit, state_of

from analysis.logs.files import read_json
from experiments.data.dataset import Dataset
from experiments.design.config import RunConfig
from experiments.launching import jobs, local_loop, sbatch, slurm
from experiments.launching import submit as launch
from experiments.launching.cancel import cancel
from experiments.launching.locks import store_lock
from experiments.launching.profile import Job, Profile, Slurm


def test_data_is_built_while_the_store_is_free(
    tiny_run: RunConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build may take hours; a launcher with a free slot must not wait for it."""
    profile = Profile("debug", default=Job(device="cpu"))

    def build(*_: object) -> Path:
        with (tmp_path / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return dataset.path

    monkeypatch.setattr("experiments.data.build.build", build)
    assert launch.submit([tiny_run], profile, tmp_path, cache=tmp_path / "unused").unsuccessful == []


def test_a_cancel_while_runs_are_being_submitted_is_heeded(
    runs: list[RunConfig],
    submitted: Callable[..., Path],
    submit: Submit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To freeze thousands of runs takes minutes, after which the markers of earlier launches are deleted."""
    submitted(runs[0], tmp_path)
    freeze, cancelled = launch._freeze, list[str]()
    canceller = threading.Thread(target=lambda: cancelled.extend(cancel(tmp_path, [runs[0].run_id])))

    def freeze_slowly(*arguments: Any) -> None:
        freeze(*arguments)
        canceller.start()
        canceller.join(2)

    monkeypatch.setattr(launch, "_freeze", freeze_slowly)
    monkeypatch.setattr(local_loop, "run_in_slots", lambda *_: canceller.join(60))
    submit(runs[:1], tmp_path)
    assert cancelled == [runs[0].run_id]
    assert state_of(tmp_path, runs[0]).state == "cancelled"


@pytest.mark.parametrize("existed", [True, False])
def test_a_refused_submission_leaves_nothing(
    existed: bool, tiny_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.data.build.build", refuse)
    store = tmp_path / "store"
    if existed:
        store.mkdir()
    with pytest.raises(ValueError, match="refused"):
        launch.submit([tiny_run], HERE, store, cache=tmp_path / "unused")
    assert store.exists() == existed
    assert list(tmp_path.rglob("*")) == ([store] if existed else [])


def test_a_lock_that_was_deleted_while_waited_for_locks_nothing(tmp_path: Path) -> None:
    """Three submissions: the second waits for the first, and the third comes when the first has gone."""
    inside, most = 0, 0

    def submit() -> None:
        nonlocal inside, most
        with store_lock(tmp_path):
            inside += 1
            most = max(most, inside)
            time.sleep(0.05)
            inside -= 1

    threads = [threading.Thread(target=submit) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert list(tmp_path.iterdir()) == []


def mark(run_dir: Path, cause: str = "ValueError: such is life") -> str:
    failure = {"attempt": 1, "step": 3, "cause": cause, "time": 0.0}
    (run_dir / "failure.json").write_text(json.dumps(failure))
    return f"{cause} (step 3)"


@pytest.mark.parametrize("executor", ["local", "slurm"])
def test_a_retry_that_is_refused_leaves_the_cause(
    executor: str,
    tiny_run: RunConfig,
    submitted: Callable[..., Path],
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a missing corpus, and by sbatch."""
    cause = mark(submitted(tiny_run, tmp_path))
    run, profile = tiny_run, HERE
    if executor == "slurm":
        profile = Profile("slurm", slurm=Slurm("low", signal_seconds=30))
        monkeypatch.setattr(slurm, "check", lambda _: None)
        monkeypatch.setattr("submitit.slurm.slurm.SlurmExecutor.affinity", lambda _: 2)
        monkeypatch.setattr(sbatch, "submit", refuse)
        monkeypatch.setattr(slurm, "max_array_size", lambda: 10)
    else:
        monkeypatch.setattr("experiments.data.build.build", refuse)
    with pytest.raises(ValueError, match="refused"):
        launch.retry([run], profile, tmp_path, cache=dataset.path.parent)
    assert (state_of(tmp_path, run).state, state_of(tmp_path, run).cause) == ("failed", cause)


def refuse(*_: object) -> None:
    raise ValueError("refused")


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"executor": "local", "host": "elsewhere"}, "they run on elsewhere; cancel there"),
        ({"executor": "slurm"}, "this machine has no scancel; cancel from a login node"),
        ({"executor": "local", "job_id": "1"}, "process 1 is another user's"),
        ({"executor": "debug"}, "press Ctrl-C there"),
    ],
)
def test_a_job_out_of_reach_is_not_called_cancelled(
    job: dict[str, str],
    message: str,
    runs: list[RunConfig],
    submitted: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run beside it, which is pending, is cancelled all the same."""
    running, _ = (submitted(run, tmp_path) for run in runs[:2])
    jobs.write_job(running, "local", job.get("job_id", str(os.getpid())), None, Path("code"))
    (running / "job.json").write_text(json.dumps(read_json(running / "job.json") | job))
    monkeypatch.setenv("PATH", "")  # neither squeue nor scancel

    def kill(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    with pytest.raises(ValueError, match=f"1 of 2 runs cancelled; 1 go on: .*{message}"):
        cancel(tmp_path, [run.run_id for run in runs])
    assert state_of(tmp_path, runs[0]).state in ("running", "unknown")
    assert state_of(tmp_path, runs[1]).state == "cancelled"


def test_nothing_is_submitted_into_a_store_of_an_older_log(
    runs: list[RunConfig], submitted: Callable[..., Path], dataset: Dataset, tmp_path: Path
) -> None:
    old = submitted(runs[0], tmp_path)
    (old / "config.json").write_text(json.dumps(read_json(old / "config.json") | {"schema": 1}))
    message = f"holds runs of schema 1 of the log, such as {old.name}; runs of schema 2 are wanted; choose"
    for verb in (launch.submit, launch.retry):
        with pytest.raises(ValueError, match=message):
            verb(runs[1:], HERE, tmp_path, cache=dataset.path.parent)
    assert [path.parent for path in tmp_path.glob("*/config.json")] == [old]
    assert not (tmp_path / ".lock").exists()


def test_a_store_that_takes_no_files_is_refused(tiny_run: RunConfig, submit: Submit, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match=r"file/store takes no files \(Not a directory\); choose another"):
        submit([tiny_run], file / "store")


def test_a_missing_cluster_is_refused_before_anything_is_written(
    tiny_run: RunConfig, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = Profile("slurm", slurm=Slurm("low"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="this machine has no sbatch"):
        submit([tiny_run], tmp_path / "store", profile)
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    with pytest.raises(ValueError, match=r"SLURM_CONF=.*/slurm.conf does not exist"):
        submit([tiny_run], tmp_path / "store", profile)
    assert not (tmp_path / "store").exists()


def test_a_run_of_this_process_whose_folder_is_removed_does_not_stop_the_next(
    runs: list[RunConfig], submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments.training.trainer import Trainer

    evaluate = Trainer.evaluate

    def removed_meanwhile(self: Trainer, interrupted: Callable[[], bool]) -> object:
        shutil.rmtree(tmp_path / runs[0].run_id, ignore_errors=True)
        return evaluate(self, interrupted)

    monkeypatch.setattr(Trainer, "evaluate", removed_meanwhile)
    outcome = submit(runs[:2], tmp_path, Profile("debug", default=Job(device="cpu")))
    assert [state.state for state in outcome.ended] == ["pending", "complete"]
