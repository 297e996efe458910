"""One run from its directory: to the end, through kills and preemptions, and with bad input."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from launches import PATIENCE, slow_down
from submitit.local.local import LocalExecutor, LocalJob

from analysis.logs.reader import read_rows, status
from analysis.logs.record import read_run, record_sha256
from analysis.logs.writer import next_attempt, record_failure
from experiments.design.config import RunConfig
from experiments.training.checkpoints import State, save
from experiments.training.job import Place
from experiments.training.parallel import World
from experiments.training.run import Run, RunFailed
from experiments.training.trainer import Step, Trainer

Submitted = Callable[..., Path]


def result(run_dir: Path) -> dict:
    return json.loads((run_dir / "run.json").read_text())


def losses(run_dir: Path) -> list[float]:
    return pq.read_table(run_dir / "steps.parquet")["loss"].to_pylist()


def expect_whole(run_dir: Path, reference: Path) -> None:
    """The same steps and evaluations, once each and bit for bit, as an uninterrupted run."""
    steps, evals = (pq.read_table(run_dir / f"{kind}.parquet") for kind in ("steps", "evals"))
    want_steps, want_evals = (pq.read_table(reference / f"{kind}.parquet") for kind in ("steps", "evals"))
    for got, want, value in ((steps, want_steps, "loss"), (evals, want_evals, "value")):
        for column in ("step", "tokens", value):
            assert got[column].to_pylist() == want[column].to_pylist()
    got, want = torch.load(run_dir / "model.pt"), torch.load(reference / "model.pt")
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.fixture
def reference(tiny_run: RunConfig, submitted: Submitted, tmp_path: Path) -> Path:
    run_dir = submitted(tiny_run, tmp_path / "reference")
    Run(run_dir)()
    return run_dir


def test_a_run_goes_to_its_end_and_is_not_run_again(reference: Path, tiny_run: RunConfig) -> None:
    run = result(reference)
    assert run["steps"] == 25 == len(losses(reference))
    assert run["tokens"] == tiny_run.train.tokens
    evals = pq.read_table(reference / "evals.parquet")
    assert evals["step"].to_pylist() == [step for step in (8, 16, 24, 25) for _ in ("loss", "bits_per_byte")]
    assert evals["metric"].to_pylist() == ["loss", "bits_per_byte"] * 4
    assert evals["value"].to_pylist()[-2:] == [run["loss"], run["bits_per_byte"]]
    assert run["seconds"]["eval"] == pytest.approx(sum(evals["seconds"].to_pylist()[::2]))
    assert evals["seconds"].to_pylist()[1::2] == [None] * 4
    assert run["seconds"]["train"] > 0
    assert run["tokens_per_second"] == pytest.approx(tiny_run.train.tokens / run["seconds"]["train"])
    assert not (reference / "checkpoint").exists()
    before = sorted((path.name, path.stat().st_mtime_ns) for path in reference.iterdir())
    Run(reference)()
    assert sorted((path.name, path.stat().st_mtime_ns) for path in reference.iterdir()) == before


def newest_checkpoint(run_dir: Path) -> str:
    return max((path.name for path in run_dir.glob("checkpoint/step-*")), default="")


def test_a_run_killed_at_random_moments_loses_and_doubles_nothing(
    tiny_run: RunConfig, submitted: Submitted, tmp_path: Path
) -> None:
    """SIGKILL, again and again, while every step is checkpointed; then left to finish."""
    long = replace(tiny_run, train=replace(tiny_run.train, tokens=16 * 8 * 150))
    reference = submitted(long, tmp_path / "reference")
    Run(reference)()
    run_dir = submitted(long, tmp_path / "killed", checkpoint_minutes=0.0, max_attempts=1000)
    context = multiprocessing.get_context("fork")
    moments = random.Random(0)
    kills, window = 0, 0.02
    while not (run_dir / "run.json").exists():
        begun, saved = next_attempt(run_dir), newest_checkpoint(run_dir)
        child = context.Process(target=Run(run_dir))
        child.start()
        child.join(window * moments.random() if kills < 15 else PATIENCE)
        if child.is_alive():
            child.kill()
            child.join()
            kills += next_attempt(run_dir) > begun  # others came while it started
        assert child.exitcode in (0, -signal.SIGKILL)
        # So that at any speed about half of the attempts are killed before they have saved a state, and all get on.
        window *= 1.25 if newest_checkpoint(run_dir) == saved else 0.8
        for kind in ("steps", "evals"):  # readable at any instant
            rows = read_rows(run_dir, kind)
            logged = rows.table["step"].to_pylist()[:: 1 if kind == "steps" else 2]  # an evaluation has two metrics
            assert rows.problems == []
            assert logged == sorted(set(logged))
    assert kills >= 5
    expect_whole(run_dir, reference)
    assert result(run_dir)["attempts"] > 1


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before_and_says_so(
    tiny_run: RunConfig, submitted: Submitted, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = submitted(tiny_run, tmp_path / "damaged", checkpoint_minutes=0.0)
    advance = Trainer.advance

    def killed_after_12(trainer: Trainer) -> list[Step]:
        if trainer.steps_done == 12:
            raise SystemExit
        return advance(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", killed_after_12)
        with pytest.raises(SystemExit):
            Run(run_dir)()
    older, newest = sorted((run_dir / "checkpoint").iterdir())
    (path,) = newest.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    Run(run_dir)()
    expect_whole(run_dir, reference)
    first, second = result(run_dir)["attempts_made"]
    assert (first["damaged_checkpoints"], second["first_step"]) == ([], int(older.name.removeprefix("step-")) + 1)
    assert second["damaged_checkpoints"] == [
        f"{newest.name}: the checksum of {path.name} differs from that in manifest.json"
    ]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LocalJob]:
    """Start a run under submitit's own controller, in several processes if asked."""
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "TERM")  # the one that the local controller passes on

    def submit(run_dir: Path, processes: int) -> LocalJob:
        executor = LocalExecutor(folder=tmp_path / "jobs")
        executor.update_parameters(timeout_min=5, tasks_per_node=processes)
        return executor.submit(Run(run_dir))

    return submit


@pytest.mark.parametrize(("processes", "steps"), [(1, 600), (2, 200)])
def test_a_preempted_run_saves_requeues_and_resumes(
    processes: int,
    steps: int,
    tiny_run: RunConfig,
    submitted: Submitted,
    tmp_path: Path,
    start: Callable[..., LocalJob],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The signal arrives in the middle of training, in every process. An earlier attempt's failure is gone then."""
    long = replace(tiny_run, train=replace(tiny_run.train, tokens=16 * 8 * steps, evaluate_every=16 * 8 * 100))
    run_dir = submitted(long, tmp_path / "store", checkpoint_minutes=0.005, parallel="fsdp")
    record_failure(run_dir, attempt=1, step=0, cause="an earlier attempt's", time=1.0)
    slow = slow_down(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(slow.parent))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    job = start(run_dir, processes)
    wait_for(lambda: bool(list(run_dir.glob("checkpoint/step-*"))))
    job._process.send_signal(signal.SIGTERM)
    wait_for((run_dir / "attempt-0002.json").exists)
    slow.unlink()
    job.results()
    run = result(run_dir)
    assert (run["attempts"], run["gpus"]) == (2, processes)
    assert pq.read_table(run_dir / "steps.parquet")["step"].to_pylist() == list(range(1, steps + 1))
    assert run["seconds"]["lost"] == 0  # saved at the step where the signal arrived
    assert not (run_dir / "failure.json").exists()


def test_a_failure_of_a_faster_process_is_kept(
    tiny_run: RunConfig, submitted: Submitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 has failed before rank 0 starts; the scheduler then ends rank 0 while it waits to meet rank 1."""
    run_dir = submitted(tiny_run, tmp_path)
    record_failure(run_dir, attempt=1, step=0, cause="ValueError: no data on this node", time=1.0)

    @contextlib.contextmanager
    def killed_while_waiting(*_: object) -> Iterator[World]:
        raise SystemExit(1)
        yield

    monkeypatch.setattr("experiments.training.run.this_place", lambda: Place(rank=0, size=2))
    monkeypatch.setattr("experiments.training.run.joined", killed_while_waiting)
    with pytest.raises(SystemExit):
        Run(run_dir)()
    assert json.loads((run_dir / "failure.json").read_text())["cause"] == "ValueError: no data on this node"
    assert status(run_dir) == "failed"


def test_two_processes_do_not_train_one_run(tiny_run: RunConfig, submitted: Submitted, tmp_path: Path) -> None:
    run_dir = submitted(tiny_run, tmp_path)
    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunFailed, match="another process has this run"):
            Run(run_dir)()
    assert sorted(path.name for path in run_dir.iterdir()) == [".lock", "config.json", "tokenizer.json"]
    Run(run_dir)()
    assert result(run_dir)["attempts"] == 1


def test_a_failure_on_a_full_disk_names_the_failure(
    tiny_run: RunConfig, submitted: Submitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = submitted(tiny_run, tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("analysis.logs.writer.write_parquet", full)
    monkeypatch.setattr("experiments.training.run.record_failure", full)
    with pytest.raises(RunFailed, match="No space left on device"):
        Run(run_dir)()
    assert not (run_dir / "run.json").exists()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def test_a_cancelled_run_is_neither_started_nor_requeued(
    tiny_run: RunConfig, submitted: Submitted, tmp_path: Path
) -> None:
    run_dir = submitted(tiny_run, tmp_path)
    assert Run(run_dir).checkpoint() is not None
    (run_dir / "cancelled").touch()
    assert Run(run_dir).checkpoint() is None
    Run(run_dir)()
    assert sorted(path.name for path in run_dir.iterdir()) == ["cancelled", "config.json", "tokenizer.json"]


def test_divergence_is_recorded_with_step_and_cause(tiny_run: RunConfig, submitted: Submitted, tmp_path: Path) -> None:
    run_dir = submitted(replace(tiny_run, train=replace(tiny_run.train, learning_rate=1e36)), tmp_path)
    with pytest.raises(RunFailed, match="step 2: NonFiniteLoss: loss"):
        Run(run_dir)()
    failure = json.loads((run_dir / "failure.json").read_text())
    steps = read_rows(run_dir, "steps").table["step"].to_pylist()
    assert failure["step"] == len(steps) + 1
    assert re.match(r"NonFiniteLoss: loss [\d.]+, gradient norm nan, first in embedding.weight", failure["cause"])
    assert not (run_dir / "run.json").exists()


def test_a_run_logs_windows_step_by_step(
    tiny_run: RunConfig, submitted: Submitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an evaluation, a branch point and a checkpoint where they belong, and the step that diverged by its name."""
    monkeypatch.setattr("experiments.training.trainer.runs_ahead", lambda *_: True)
    run_dir = submitted(replace(tiny_run, train=replace(tiny_run.train, branch_steps=(11,))), tmp_path)
    Run(run_dir)()
    steps, evals = (pq.read_table(run_dir / f"{kind}.parquet") for kind in ("steps", "evals"))
    assert steps["step"].to_pylist() == list(range(1, 26))
    assert evals["step"].to_pylist()[::2] == [8, 16, 24, 25]
    assert [path.name for path in (run_dir / "branch-points").iterdir()] == ["step-0000000011"]
    seconds = json.loads((run_dir / "run.json").read_text())["seconds"]
    assert seconds["train"] == pytest.approx(sum(steps["seconds"].to_pylist()))

    diverging = submitted(replace(tiny_run, train=replace(tiny_run.train, learning_rate=1e36)), tmp_path)
    with pytest.raises(RunFailed, match=r"step 2: NonFiniteLoss: loss .* first in embedding\.weight"):
        Run(diverging)()
    assert json.loads((diverging / "failure.json").read_text())["step"] == 2
    assert read_run(diverging)["did_not_learn"] == "it diverged at step 2"
    learned = read_run(run_dir)
    assert (learned["vocabulary"], learned["did_not_learn"]) == (300, None)
    assert learned["gradient_norm"] == steps["gradient_norm"].to_pylist()[-1] > 0
    assert read_rows(diverging, "steps").table["step"].to_pylist() == [1]


def fails_with(run_dir: Path, message: str) -> None:
    with pytest.raises(RunFailed, match=message):
        Run(run_dir)()
    cause = json.loads((run_dir / "failure.json").read_text())["cause"]
    assert "\n" not in cause
    assert not (run_dir / "run.json").exists()


def test_bad_input_is_named(tiny_run: RunConfig, submitted: Submitted, tmp_path: Path) -> None:
    edited = submitted(tiny_run, tmp_path / "edited")
    config = json.loads((edited / "config.json").read_text())
    config["config"]["train"]["learning_rate"] = 1.0
    (edited / "config.json").write_text(json.dumps(config))
    fails_with(edited, "edited after it was submitted")

    beside = submitted(tiny_run, tmp_path / "beside")  # what the id does not cover
    config = json.loads((beside / "config.json").read_text())
    (beside / "config.json").write_text(json.dumps(config | {"parameters": 1}))
    fails_with(beside, "config.json was edited or damaged after its run was submitted, as its record_sha256 tells")

    other_data = submitted(tiny_run, tmp_path / "other_data")
    config = json.loads((other_data / "config.json").read_text())
    config |= {"data_sha256": "f" * 64}
    (other_data / "config.json").write_text(json.dumps(config | {"record_sha256": record_sha256(config)}))
    fails_with(other_data, "the run was submitted with ffffffffffff")

    other_run = submitted(tiny_run, tmp_path / "other_run")
    somebody_elses = State({"run_id": "somebody-elses", "steps_done": 3}, {"w": torch.ones(2)})
    save(other_run, somebody_elses, World(0, 1, torch.device("cpu")))
    fails_with(other_run, "is a checkpoint of run somebody-elses; wanted lowrank-qkv-tiny")

    no_gpu = submitted(tiny_run, tmp_path / "no_gpu", device="cuda")
    if not torch.cuda.is_available():
        fails_with(no_gpu, "'cuda' was asked for and torch .* set device = 'auto' or 'cpu'")


def test_a_run_started_too_often_has_failed(tiny_run: RunConfig, submitted: Submitted, tmp_path: Path) -> None:
    run_dir = submitted(tiny_run, tmp_path, max_attempts=0)
    fails_with(run_dir, "started 0 times already; max_attempts = 0 is allowed")


def test_a_run_whose_folder_was_removed_leaves_its_successor_alone(
    tiny_run: RunConfig, submitted: Submitted, tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rm -rf` and `submit` while it trains: the second run is whole, and the first writes nothing into its folder."""
    run_dir = submitted(tiny_run, tmp_path / "store")
    evaluate = Trainer.evaluate
    second: list[Path] = []

    def removed_meanwhile(self: Trainer, interrupted: Callable[[], bool]) -> object:
        if not second:
            shutil.rmtree(run_dir)
            second.append(submitted(tiny_run, tmp_path / "store"))
        return evaluate(self, interrupted)

    monkeypatch.setattr(Trainer, "evaluate", removed_meanwhile)
    with pytest.raises(RunFailed, match="was removed while this run trained"):
        Run(run_dir)()
    assert {path.name for path in run_dir.iterdir()} == {"config.json", "tokenizer.json"}
    monkeypatch.undo()
    Run(run_dir)()
    expect_whole(run_dir, reference)


def one_of_two(rank: int, run_dir: Path, submit_again: Callable[[], object]) -> None:
    """A process of a run whose folder is removed and made anew at its first evaluation."""
    evaluate = Trainer.evaluate

    def removed_meanwhile(self: Trainer, interrupted: Callable[[], bool]) -> object:
        if rank == 0:
            shutil.rmtree(run_dir)
            submit_again()
        return evaluate(self, interrupted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "evaluate", removed_meanwhile)
        patch.setattr("experiments.training.run.this_place", lambda: Place(rank, 2, rank, "1", ("here",)))
        with pytest.raises(RunFailed, match="was removed while this run trained"):
            Run(run_dir)()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork beside threads
def test_no_process_of_a_run_whose_folder_was_removed_writes_a_failure_into_its_successors(
    tiny_run: RunConfig, submitted: Submitted, tmp_path: Path
) -> None:
    run_dir = submitted(tiny_run, tmp_path)
    context = multiprocessing.get_context("fork")
    arguments = (run_dir, lambda: submitted(tiny_run, tmp_path))
    processes = [context.Process(target=one_of_two, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        process.kill()
    assert {path.name for path in run_dir.iterdir()} == {"config.json", "tokenizer.json"}
    assert [process.exitcode for process in processes] == [0, 0]
