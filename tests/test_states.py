"""Where each run of a store is said to stand, and what the log calls the code that it ran."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import source
from experiments.cli.main import main
from experiments.data.dataset import Dataset
from experiments.design.config import RunConfig
from experiments.launching import jobs, slurm, snapshot, states
from experiments.launching import submit as launch
from experiments.launching.overview import render
from experiments.launching.profile import Profile


def test_status_of_a_hundred_runs_loads_nothing_slow(
    tiny_run: RunConfig, submitted: Callable[..., Path], tmp_path: Path
) -> None:
    run_dir = submitted(tiny_run, tmp_path)
    attempt = {"step": 5, "tokens": 640, "loss": 3.5, "first_step": 1, "started_at": 1.0, "updated_at": 2.0}
    (run_dir / "attempt-0001.json").write_text(json.dumps(attempt))
    for copy in range(99):
        shutil.copytree(run_dir, tmp_path / f"copy-{copy}")
    (tmp_path / "foreign").mkdir()
    code = (
        "import sys; from pathlib import Path; from experiments.launching import states; "
        "store = Path(sys.argv[1]); rows = states.read(store, states.find(store)); "
        "assert not {'torch', 'pandas', 'numpy'} & set(sys.modules); print(len(rows), rows[0].progress)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["100", str(640 / tiny_run.train.tokens)]


def test_a_run_whose_record_was_edited_is_not_called_pending(
    tiny_run: RunConfig, submitted: Callable[..., Path], tmp_path: Path
) -> None:
    path = submitted(tiny_run, tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"parameters": 1}))
    (state,) = states.read(tmp_path, [tiny_run.run_id])
    assert (state.state, str(state.cause).startswith(f"{path} was edited or damaged")) == ("unreadable", True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", {"loss": 3.0}),
        ("run.json", {"seconds": {}, "loss": None, "attempts": 1}),
        ("run.json", None),
        ("attempt-0001.json", {}),
        ("failure.json", {}),
        ("job.json", {}),
    ],
)
def test_one_unreadable_run_takes_nothing_from_the_others(
    name: str,
    content: dict[str, object] | None,
    tiny_run: RunConfig,
    submitted: Callable[..., Path],
    dataset: Dataset,
    tmp_path: Path,
) -> None:
    strange, good = (submitted(run, tmp_path) for run in (tiny_run, replace(tiny_run, seed=9)))
    (strange / name).write_text('{"torn' if content is None else json.dumps(content))
    bad, other = states.read(tmp_path, [strange.name, good.name])
    assert (bad.state, other.state) == ("unreadable", "pending")
    assert str(bad.cause).startswith(f"{strange}/{name.replace('0001', '*')} is ")
    assert "2 runs: 1 pending, 1 unreadable" in render([bad, other], 200)
    outcome = launch.submit([tiny_run], Profile("local"), tmp_path, cache=dataset.path.parent)
    assert outcome.skipped == {"unreadable": [strange.name]}


@pytest.mark.parametrize("ignored", [False, True])
def test_a_repository_that_we_merely_lie_in_is_not_ours(
    ignored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a virtual environment inside a project of the user's own."""
    root = tmp_path / "theirs" / "lib"
    (root / "experiments").mkdir(parents=True)
    (root / "experiments" / "run.py").write_text("")
    (root.parent / ".gitignore").write_text("lib\n" if ignored else "")
    git = ["git", "-C", str(root.parent), "-c", "user.name=n", "-c", "user.email=e"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "theirs"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(source, "root", lambda: root)
    assert snapshot.commit(Path("abc")) == "snapshot-abc"
    monkeypatch.setattr(source, "root", lambda: root.parent)
    assert len(snapshot.commit(Path("abc"))) == 40  # a clean checkout


@pytest.mark.parametrize(
    ("ids", "single"),
    [("7", ["7"]), ("7_3", ["7_3"]), ("7_[0-2,5%4]", ["7_0", "7_1", "7_2", "7_5"]), ("7_[4]", ["7_4"])],
)
def test_array_elements_that_never_started_are_told_apart(ids: str, single: list[str]) -> None:
    assert slurm._expanded(ids) == single


def test_a_running_run_that_logs_nothing_any_more_is_said_to_be_silent(
    tiny_run: RunConfig, submitted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = submitted(tiny_run, tmp_path)
    jobs.write_job(run_dir, "local", str(os.getpid()), None, tmp_path / "code")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    job = json.loads((run_dir / "job.json").read_text())
    (run_dir / "job.json").write_text(json.dumps(job | {"submitted_at": now - 1000}))
    for silent, said in ((60.0, None), (840.0, "no step for 14m00s")):
        attempt = {"step": 5, "tokens": 640, "loss": 3.5, "first_step": 1, "started_at": now - 900}
        (run_dir / "attempt-0001.json").write_text(json.dumps(attempt | {"updated_at": now - silent}))
        (state,) = states.read(tmp_path, [tiny_run.run_id])
        assert state.state == "running"
        assert (state.cause is None) if said is None else said in str(state.cause)


def test_logs_prints_what_the_job_wrote(
    tiny_run: RunConfig, submitted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = submitted(tiny_run, tmp_path)
    assert main(["logs", str(run_dir)]) == 0
    assert "is pending and has written nothing yet, as no job was given it" in capsys.readouterr().err
    log = tmp_path / "output.txt"
    ended = subprocess.Popen(["true"])
    ended.wait()
    jobs.write_job(run_dir, "local", str(ended.pid), log, tmp_path / "code")
    log.write_text("step 8\nstep 16  naïve\n")
    assert main(["logs", str(run_dir), "--follow"]) == 0  # its process is gone, so there is nothing to wait for
    assert capsys.readouterr().out == "step 8\nstep 16  naïve\n"
    assert main(["logs", str(tmp_path)]) == 2
    assert "must be the folder of a run" in capsys.readouterr().err
