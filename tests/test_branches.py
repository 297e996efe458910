"""Warm-up-stable-decay: branches take their trunk's state up, wait for it, and are the runs they would have been."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from analysis.logs.files import read_json
from experiments.data.dataset import Dataset
from experiments.design.config import RunConfig
from experiments.design.schedules import WarmupStableDecay
from experiments.design.trunks import with_trunks
from experiments.launching import branches, jobs, states, submit
from experiments.launching.overview import render
from experiments.launching.profile import Job, Profile
from experiments.training.run import Run, RunFailed

HERE = Profile("local", max_parallel=2, default=Job(device="cpu"))


@pytest.fixture
def sharing(tiny_run: RunConfig) -> list[RunConfig]:
    """A trunk and two branches, of 20 and 30 steps."""
    train = replace(tiny_run.train, schedule=WarmupStableDecay(0.25))
    runs = [
        replace(tiny_run, budget=f"{steps} steps", train=replace(train, tokens=16 * 8 * steps)) for steps in (20, 30)
    ]
    return with_trunks(runs)


def test_a_branch_is_bit_for_bit_the_run_from_its_first_step(
    sharing: list[RunConfig], submitted: Callable[..., Path], tmp_path: Path
) -> None:
    trunk, branch, _ = sharing
    for run in (trunk, branch):
        Run(submitted(run, tmp_path / "shared"))()
    whole = replace(branch, trunk=None, branch_step=0)
    Run(submitted(whole, tmp_path / "alone"))()
    assert whole.run_id == branch.run_id
    shared, alone = tmp_path / "shared" / branch.run_id, tmp_path / "alone" / branch.run_id
    got, want = (torch.load(folder / "model.pt", weights_only=True) for folder in (shared, alone))
    assert all(torch.equal(got[name], value) for name, value in want.items())
    steps = pq.read_table(alone / "steps.parquet")["loss"].to_pylist()
    assert pq.read_table(shared / "steps.parquet")["loss"].to_pylist() == steps[branch.branch_step :]
    one, other = read_json(shared / "run.json"), read_json(alone / "run.json")
    for key in ("loss", "steps", "tokens", "flops_exact"):
        assert one[key] == other[key]
    assert (one["trunk"], one["clock"], other["clock"]) == (trunk.run_id, "mixed", other["clock"])
    rate = one["tokens_per_second"] * one["seconds"]["train"]
    assert rate == pytest.approx(branch.own_tokens) == pytest.approx(16 * 8 * 5)


def test_branches_wait_for_their_trunk(sharing: list[RunConfig], dataset: Dataset, tmp_path: Path) -> None:
    outcome = submit.submit(sharing[::-1], HERE, tmp_path, cache=dataset.path.parent)
    assert outcome.unsuccessful == []
    trunk, *rest = (read_json(tmp_path / run.run_id / "run.json") for run in sharing)
    begun = [read_json(tmp_path / run["run_id"] / "attempt-0001.json")["started_at"] for run in rest]
    assert min(begun) > trunk["finished_at"]


def test_a_failed_trunk_says_so_on_its_branches(sharing: list[RunConfig], dataset: Dataset, tmp_path: Path) -> None:
    trunk, *rest = [replace(run, train=replace(run.train, learning_rate=1e30)) for run in sharing]
    rest = [replace(run, trunk=trunk.run_id) for run in rest]
    outcome = submit.submit([trunk, *rest], HERE, tmp_path, cache=dataset.path.parent)
    assert [state.state for state in outcome.ended] == ["failed", "pending", "pending"]
    assert {state.cause for state in outcome.ended[1:]} == {f"its trunk {trunk.run_id} failed; retry that"}
    again = submit.submit([trunk, *rest], HERE, tmp_path, cache=dataset.path.parent)
    assert again.submitted == []
    assert again.skipped["behind a trunk that failed"] == [run.run_id for run in rest]
    assert "its trunk" in render(states.read(tmp_path, [run.run_id for run in rest]), 200)


def test_a_branch_is_not_submitted_behind_a_job_that_nobody_knows(sharing: list[RunConfig], tmp_path: Path) -> None:
    """A colleague's, which sbatch left unanswered: `afterok:None` would be refused without a reason."""
    trunk, branch, _ = sharing
    (tmp_path / trunk.run_id).mkdir()
    jobs.write_job(tmp_path / trunk.run_id, "slurm", None, None, Path("code"), "a-submission")
    with pytest.raises(ValueError, match=f"{branch.run_id} waits for its trunk {trunk.run_id}, which has no job here"):
        branches.dependency(branch, tmp_path)


def test_a_branch_takes_no_state_of_another_trunk(
    sharing: list[RunConfig], submitted: Callable[..., Path], tmp_path: Path
) -> None:
    """That of another seed has the same shapes, and was trained on the same data."""
    trunk, branch, _ = sharing
    other = replace(trunk, seed=trunk.seed + 1)
    Run(submitted(other, tmp_path))()
    submitted(trunk, tmp_path)
    shutil.copytree(tmp_path / other.run_id / "branch-points", tmp_path / trunk.run_id / "branch-points")
    with pytest.raises(RunFailed, match=rf"is a state of run {other.run_id}; wanted one of {trunk.run_id}; train the"):
        Run(submitted(branch, tmp_path))()


def test_a_branch_without_its_trunks_state_fails_with_the_reason(
    sharing: list[RunConfig], submitted: Callable[..., Path], tmp_path: Path
) -> None:
    run_dir = submitted(sharing[1], tmp_path)
    with pytest.raises(RunFailed, match=r"the trunk .* has kept no state after step 15; retry when it has"):
        Run(run_dir)()
    with pytest.raises(ValueError, match=r"waits for its trunk .*, which has no job here; submit the whole sweep"):
        branches.dependency(sharing[1], tmp_path)
