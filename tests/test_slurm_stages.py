"""What comes before runs on a Slurm, and between them: building data, calibrations, trunks before their branches, and
programs that an earlier run has compiled."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from clusters import ON_THE_CLUSTER, PROFILE, ask, cluster, submit, wait_until
from launches import Submit
from texts import CHEAP_SWEEP

from analysis.errors import WorkFailed
from analysis.logs.files import read_json
from experiments.cli.main import main
from experiments.data.build import build
from experiments.data.dataset import Dataset
from experiments.design.config import RunConfig
from experiments.design.data import DataConfig
from experiments.design.schedules import WarmupStableDecay
from experiments.design.trunks import with_trunks
from experiments.launching import data_jobs, snapshot
from experiments.launching import submit as launch
from experiments.launching.profile import DataJobs

__all__ = ["cluster", "submit"]  # fixtures
pytestmark = ON_THE_CLUSTER


OUTLIVE = """
import atexit, os, sys, time

def outlive():
    while set(sys.orig_argv) & set(os.listdir({slow!r})):
        time.sleep(0.1)

if set(sys.orig_argv) & set(os.listdir({slow!r})):
    atexit.register(outlive)
    open({slow!r} + "/begun-" + os.environ["SLURM_ARRAY_TASK_ID"], "w").close()
"""  # sitecustomize.py: a process of a step outlives its work as long as a file of the step's name is there


def test_data_is_built_by_arrays_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed while it reads, which ends all jobs, and again while it tokenizes; then the bytes of a build at once."""
    monkeypatch.setattr(data_jobs, "POLL_SECONDS", 0.5)
    (tmp_path / "text").mkdir()
    base = "".join(f"line {number * number} of the text\n" for number in range(5000))
    for part in range(2):  # of more than 64 MiB each: a part, that is a piece of work
        with (tmp_path / "text" / f"{part}.jsonl").open("w") as file:
            for number in range(3500):
                start = (part * 3500 + number) * 11 % 100_000
                file.write(json.dumps({"text": f"{part} {number}\n{base[start : start + 20_000]}"}) + "\n")
    spec = DataConfig(source=str(tmp_path / "text"), vocabulary=300, train_tokens=4_000_000, validation_tokens=10_000)
    profile = replace(PROFILE, data=DataJobs(cores=2, hours=0.5))
    cache = tmp_path / "cache"

    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(OUTLIVE.format(slow=str(slow)))

    def kill(step: str) -> None:
        """One of the two jobs of the array, once it has begun. The processes of both outlive their work until then."""
        (slow / step).touch()
        with monkeypatch.context() as patch:
            patch.setenv("PYTHONPATH", str(slow))
            assert data_jobs.build(spec, profile, cache) is None
        (submitted,) = [
            job for job in json.loads(next(cache.glob(".*/jobs.json")).read_text())["jobs"] if job["step"] == step
        ]
        element = f"{submitted['id']}_1"
        wait_until((slow / "begun-1").exists)
        ask("scancel", "--signal=KILL", "--full", element)
        with pytest.raises(ValueError, match=r"the data are being built by Slurm \(\d of 2 parts read"):
            data_jobs.require_nothing_under_way([spec], cache)
        for path in (slow / step, *slow.glob("begun-*")):
            path.unlink()
        with pytest.raises(WorkFailed, match="building the data failed: its jobs were killed"):
            data_jobs.build(spec, profile, cache, wait=True)

    kill("read")
    read = {path: path.stat().st_ino for path in cache.glob(".*/spill/part-*")}
    kill("tokenize")
    path = data_jobs.build(spec, profile, cache, wait=True)
    assert path is not None
    assert {path: path.stat().st_ino for path in read if path.exists()} in (read, {})
    assert data_jobs.build(spec, profile, cache) == path
    assert "2 of 2 parts read" in capsys.readouterr().err
    data_jobs.require_nothing_under_way([spec], cache)
    assert Dataset.open(path).sha256 == Dataset.open(build(spec, tmp_path / "at once")).sha256


def _shared(run: RunConfig) -> list[RunConfig]:
    """A trunk and its branches of 40 and 60 steps."""
    train = replace(run.train, schedule=WarmupStableDecay(0.25))
    budgets = [(f"{steps} steps", replace(train, tokens=16 * 8 * steps)) for steps in (40, 60)]
    return with_trunks([replace(run, budget=budget, train=train) for budget, train in budgets])


def test_a_calibration_is_a_job_whose_speed_sets_the_time_limit(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two processes, as the profile wants; the run that is submitted then has a limit of its own."""
    monkeypatch.setenv("DYNCONV_CACHE", str(tmp_path / "cache"))
    sweep, profile, store = tmp_path / "cheap.toml", tmp_path / "p.toml", tmp_path / "store"
    sweep.write_text(CHEAP_SWEEP.format(source=text_folder))
    text = 'executor = "slurm"\nmax_gpu_hours = 5\n[slurm]\npartition = "low"\nsignal_seconds = 30\n'
    profile.write_text(text + '[default]\ndevice = "cpu"\ngpus = 2\nhours = "auto"\n')
    words = [str(sweep), "--profile", str(profile), "--store", str(store)]
    assert main(["plan", *words, "--json", "--calibrate"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    (kept,) = (tmp_path / "cache" / "calibrations").glob("*.json")
    assert read_json(kept)["place"] == "slurm cpu partition=low"
    assert (row["gpus"], row["tokens_per_second"]) == (2, read_json(kept)["tokens_per_second"])
    assert not store.exists()
    assert main(["submit", *words]) == 0
    assert "the time limit of 25k is 0.5" in capsys.readouterr().err
    job_id = read_json(store / row["run_id"] / "job.json")["job_id"]
    minutes = round(60 * (1.5 * row["hours"] + 0.5))
    limit = ask("squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%l")  # it may have ended
    assert limit.strip() == f"{minutes}:00"
    assert main(["cancel", str(sweep), "--store", str(store)]) == 0


def test_branches_begin_when_their_trunk_has_ended(tiny_run: RunConfig, submit: Submit, tmp_path: Path) -> None:
    sharing = _shared(tiny_run)
    outcome = submit(sharing[::-1], tmp_path, wait=True)
    assert outcome.unsuccessful == []
    trunk, *branches = (read_json(tmp_path / run.run_id / "run.json") for run in sharing)
    begun = [read_json(tmp_path / run["run_id"] / "attempt-0001.json")["started_at"] for run in branches]
    assert min(begun) > trunk["finished_at"]


def test_slurm_drops_the_branches_of_a_trunk_that_failed(tiny_run: RunConfig, submit: Submit, tmp_path: Path) -> None:
    trunk, *branches = [
        replace(run, train=replace(run.train, learning_rate=1e30)) for run in _shared(replace(tiny_run, seed=4))
    ]
    branches = [replace(run, trunk=trunk.run_id) for run in branches]
    outcome = submit([trunk, *branches], tmp_path, wait=True)
    assert [state.state for state in outcome.ended] == ["failed", "lost", "lost"]
    assert {state.cause for state in outcome.ended[1:]} == {f"its trunk {trunk.run_id} failed; retry that"}


COMPILE = """
import torch
from torch._dynamo.utils import counters
from analysis.logs.files import write_json
from experiments.training.compile_cache import VARIABLES, compile_cache

def compile_and_work(attempt, config, run, world, work=_Attempt._work):
    with compile_cache():
        torch.compile(lambda x: x @ x)(torch.ones(8, 8))
        found = {name: os.environ[name] for name in VARIABLES} | {"hits": counters["inductor"]["fxgraph_cache_hit"]}
        write_json(attempt._run_dir / "compiled.json", found)
        return work(attempt, config, run, world)

_Attempt._work = compile_and_work
"""  # a run on a CPU compiles nothing by itself


def test_later_seeds_on_a_node_find_the_program_of_the_first(
    runs: list[RunConfig], submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One alone, then two at a time. What the shell of the submission says of the folder counts for nothing."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "shared"))
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.5)
    store, node = tmp_path / "store", tmp_path / "node"
    for folder in (store, node):
        folder.mkdir()
    with (snapshot.take(store) / "experiments" / "training" / "run.py").open("a") as code:
        code.write(f"\nimport os\n{COMPILE}")
    assert PROFILE.slurm is not None
    profile = replace(PROFILE, slurm=replace(PROFILE.slurm, setup=(f"export TMPDIR={node}",)))

    def compiled(chosen: list[RunConfig]) -> list[dict[str, Any]]:
        assert submit(chosen, store, profile, wait=True).unsuccessful == []
        return [read_json(store / run.run_id / "compiled.json") for run in chosen]

    (first,) = compiled(runs[:1])
    folder = Path(first["TRITON_CACHE_DIR"]).parent
    assert folder.parent == node / f"dynconv-cache-{os.getuid()}"
    assert first["TORCHINDUCTOR_CACHE_DIR"] == str(folder / "inductor")
    kept = {path for path in folder.rglob("*") if path.is_file()}
    assert first["hits"] == 0
    assert kept
    assert compiled(runs[1:]) == [first | {"hits": 1}] * 2
    assert {path for path in folder.rglob("*") if path.is_file()} == kept
    assert not (tmp_path / "shared").exists()
