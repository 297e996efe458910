"""Runs that are forked from a process which has imported torch."""

from dataclasses import replace
from pathlib import Path

import pytest

from analysis.errors import WorkFailed
from analysis.logs.files import read_json
from experiments.data.dataset import Dataset
from experiments.design.config import RunConfig
from experiments.launching import fork_server
from experiments.launching import submit as launch
from experiments.launching.profile import Job, Profile


def test_a_run_of_two_processes_and_variables_of_its_own(
    tiny_run: RunConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both tasks meet, which takes the rank that submitit's controller gives each, and have their own output."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    profile = Profile("local", default=Job(device="cpu", gpus=2))
    run = replace(tiny_run, train=replace(tiny_run.train, tokens=16 * 8 * 3))
    outcome = launch.submit([run], profile, tmp_path, cache=dataset.path.parent)
    assert outcome.unsuccessful == []
    attempt = read_json(tmp_path / run.run_id / "attempt-0001.json")
    job = read_json(tmp_path / run.run_id / "job.json")
    assert (attempt["gpus"], attempt["job_id"]) == (2, job["job_id"])
    outputs = sorted(Path(job["log"]).parent.glob("*.out"))
    assert [path.name for path in outputs] == [f"{job['job_id']}_{rank}_log.out" for rank in range(2)]
    assert all("Job completed successfully" in path.read_text() for path in outputs)


def test_a_server_that_cannot_start_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server, "_COMPILER", ("no_such_module",))
    with (
        pytest.raises(WorkFailed, match=r"the process that starts runs ended with code 1; see above for why"),
        fork_server.fork_server({}, compiler=True) as server,
    ):
        server.wait_until_ready()


def start_after_its_end(server: fork_server.ForkServer, folder: Path) -> None:
    server._process.wait()
    server.start(folder, {})


def test_a_server_that_has_ended_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not a broken pipe, which the request that nobody reads would be."""
    monkeypatch.setattr(fork_server, "_COMPILER", ("no_such_module",))
    with (
        pytest.raises(WorkFailed, match=r"the process that starts runs ended with code 1; see above for why"),
        fork_server.fork_server({}, compiler=True) as server,
    ):
        start_after_its_end(server, tmp_path)
