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


def test_a_profile_spreads_a_run_over_processes_with_variables_of_their_own(
    tiny_run: RunConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both tasks meet, which takes the rank that submitit's controller gives each, and have their own output."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    profile = Profile("local", default=Job(device="cpu", gpus=2, parallel="fsdp"))
    run = replace(tiny_run, train=replace(tiny_run.train, tokens=16 * 8 * 3))
    outcome = launch.submit([run], profile, tmp_path, cache=dataset.path.parent)
    assert outcome.unsuccessful == []
    attempt = read_json(tmp_path / run.run_id / "attempt-0001.json")
    job = read_json(tmp_path / run.run_id / "job.json")
    assert (attempt["gpus"], attempt["parallel"], attempt["job_id"]) == (2, "fsdp", job["job_id"])
    assert not list((tmp_path / run.run_id).glob(".rendezvous*"))
    outputs = sorted(Path(job["log"]).parent.glob("*.out"))
    assert [path.name for path in outputs] == [f"{job['job_id']}_{rank}_log.out" for rank in range(2)]
    assert all("Job completed successfully" in path.read_text() for path in outputs)


ENDED = "the process that starts runs ended with code 1; see above for why"


def use_one_that_has_ended(server: fork_server.ForkServer, folder: Path) -> None:
    with pytest.raises(WorkFailed, match=ENDED):
        server.wait_until_ready()
    server.start(folder, {})


def test_a_server_that_has_ended_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not a broken pipe, which the request that nobody reads would be."""
    monkeypatch.setattr(fork_server, "_COMPILER", ("no_such_module",))
    with pytest.raises(WorkFailed, match=ENDED), fork_server.fork_server({}, compiler=True) as server:
        use_one_that_has_ended(server, tmp_path)
