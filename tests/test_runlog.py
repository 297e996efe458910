"""The run log: whole or not at all, killed at any instant, resumed without losing or doubling a step."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest
from planted import ABOUT, write_config, write_run

from analysis.logs.files import read_json, write_atomically
from analysis.logs.provenance import summarize
from analysis.logs.reader import progress, read_rows, status
from analysis.logs.store import load
from analysis.logs.writer import RunLog, next_attempt, record_failure

LAST_STEP = 40


def test_two_processes_of_one_number_write_a_file_side_by_side(tmp_path: Path) -> None:
    """As they may on two hosts or in two containers: both whole, and the last one stays."""
    path = tmp_path / "job.json"

    def write(temporary: Path) -> None:
        temporary.write_text("first")
        write_atomically(path, lambda other: other.write_text("second"))

    write_atomically(path, write)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def loss_at(step: int) -> float:
    return 4 + 1 / step


def train(run_dir: Path) -> None:
    """What a trainer does, in small: resume from the checkpoint, log, flush before each checkpoint, finish."""
    checkpoint = run_dir / "checkpoint.json"
    done = read_json(checkpoint)["step"] if checkpoint.exists() else 0
    log = RunLog(run_dir, attempt=next_attempt(run_dir), first_step=done + 1, about=ABOUT, flush_seconds=0.002)
    for step in range(done + 1, LAST_STEP + 1):
        log.step(step, step * 100, loss_at(step), 1.0, 3e-4, 0.01)
        if step % 10 == 0:
            log.evaluation(step, step * 100, "text", {"loss": loss_at(step)}, 0.02)
        if step % 5 == 0:
            log.flush()
            temporary = run_dir / "checkpoint.tmp"
            temporary.write_text(json.dumps({"step": step}))
            temporary.replace(checkpoint)
    log.finish({})


def check_log(run_dir: Path) -> int:
    """Every step up to the last logged one is there once and right; the log covers the checkpoint."""
    steps = read_rows(run_dir, "steps")
    numbers = steps.table["step"].to_pylist()
    assert steps.problems == []
    assert numbers == list(range(1, len(numbers) + 1))
    assert steps.table["loss"].to_pylist() == [loss_at(step) for step in numbers]
    evals = read_rows(run_dir, "evals").table["step"].to_pylist()
    assert evals == [step for step in range(10, LAST_STEP + 1, 10) if step <= (evals or [0])[-1]]
    if (run_dir / "checkpoint.json").exists():
        saved = read_json(run_dir / "checkpoint.json")["step"]
        assert len(numbers) >= saved
        assert len(evals) >= saved // 10
    return len(numbers)


def test_killed_at_random_moments_it_neither_loses_nor_doubles_a_step(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "pyarrow.parquet", "numpy"])
    moments = random.Random(2)
    kills, runs, window = 0, 0, 0.04
    while runs < 4 or kills <= 15:
        run_dir = write_config(tmp_path, seed=runs, tokens=100 * LAST_STEP)
        while not (run_dir / "run.json").exists():
            attempt = next_attempt(run_dir)
            child = context.Process(target=train, args=(run_dir,))
            child.start()
            while child.is_alive() and next_attempt(run_dir) == attempt:
                time.sleep(0.0005)
            time.sleep(moments.uniform(0, window))
            child.kill()
            child.join()
            assert child.exitcode in (0, -signal.SIGKILL)
            killed = child.exitcode == -signal.SIGKILL
            kills += killed
            window *= 1.2 if killed else 0.5  # so that at any speed about four are killed to one that ends
            check_log(run_dir)
        assert check_log(run_dir) == LAST_STEP
        run_json = read_json(run_dir / "run.json")
        assert (run_json["steps"], run_json["loss"]) == (LAST_STEP, loss_at(LAST_STEP))
        assert run_json["seconds"]["train"] == pytest.approx(0.01 * LAST_STEP)
        runs += 1


def test_a_step_that_a_resumed_attempt_repeats_is_kept_once(tmp_path: Path) -> None:
    run_dir = write_config(tmp_path)
    first = RunLog(run_dir, attempt=1, first_step=1, about=ABOUT)
    first.evaluation(0, 0, "text", {"loss": 9.0}, 0.5)
    for step in range(1, 9):
        first.step(step, 2_000_000 * step, 5.0, 1.0, 1e-3, 0.1)
    first.add_seconds("queue", 2.0)
    first.flush()
    second = RunLog(run_dir, attempt=2, first_step=6, about=ABOUT)
    for step in range(6, 11):
        second.step(step, 2_000_000 * step, 4.0, 1.0, 1e-3, 0.1)
    second.evaluation(10, 20_000_000, "text", {"loss": 3.5, "bits_per_byte": 1.2}, 0.5)
    second.add_seconds("queue", 3.0)
    second.finish({"note": "kept"})
    run = read_json(run_dir / "run.json")
    assert run["seconds"] == pytest.approx(
        {"queue": 5, "startup": 0, "compile": 0, "train": 1.0, "eval": 1.0, "checkpoint": 0, "lost": 0.3}
    )
    assert (run["attempts"], run["steps"], run["loss"], run["bits_per_byte"]) == (2, 10, 3.5, 1.2)
    assert run["tokens_per_second"] == pytest.approx(20_000_000)
    assert (run["arm"], run["flops_6nd"], run["device"], run["note"]) == ("transformer", 1.2e14, "cpu", "kept")
    steps = read_rows(run_dir, "steps").table
    assert steps["step"].to_pylist() == list(range(1, 11))
    assert steps["attempt"].to_pylist() == [1] * 5 + [2] * 5
    assert read_rows(run_dir, "evals").table["step"].to_pylist() == [0, 10, 10]
    assert list(run_dir.glob("*-*-*.parquet")) == []


def test_every_attempt_keeps_its_own_provenance(tmp_path: Path) -> None:
    """On one H100 and then on eight A100: the run's own device is neither, and its seconds are no one clock."""
    run_dir = write_config(tmp_path)
    for number, own in enumerate(({"device": "H100", "gpus": 1}, {"device": "A100", "gpus": 8, "job_id": "7_1"}), 1):
        log = RunLog(run_dir, attempt=number, first_step=number, about=ABOUT | own)
        log.step(number, number * 10_000_000, 5.0, 1.0, 1e-3, 0.1 * number)
        log.add_seconds("startup", 1.0)
        log.flush()
    log.evaluation(2, 20_000_000, "text", {"loss": 3.0}, 0.5)
    log.finish({})
    run = read_json(run_dir / "run.json")
    assert [(made["device"], made["gpus"], made["job_id"]) for made in run["attempts_made"]] == [
        ("H100", 1, None),
        ("A100", 8, "7_1"),
    ]
    assert [made["seconds"]["train"] for made in run["attempts_made"]] == pytest.approx([0.1, 0.2])
    assert [made["seconds"]["eval"] for made in run["attempts_made"]] == [0.0, 0.5]
    assert run["seconds"]["train"] == pytest.approx(0.3)
    assert (run["device"], run["gpus"], run["torch"], run["clock"]) == (None, None, "2.13.0", "mixed")
    row = load(tmp_path).runs.iloc[0]
    assert row[["device", "gpus"]].isna().all()
    assert (row["dtype"], row["sharing"], row["clock"], row["attempts"]) == ("float32", 1, "mixed", 2)


@pytest.mark.parametrize(
    ("attempts", "clock"),
    [
        ([{}], "alone"),
        ([{}, {}], "alone"),
        ([{"sharing": 2}, {"sharing": 3}], "shared"),
        ([{}, {"sharing": 2}], "mixed"),
        ([{}, {"sharing": None}], "unknown"),
        ([{"device": None}], "unknown"),
        ([{}, {"torch": "2.14.0"}], "mixed"),
        ([{}, {"device": "A100", "step": None}], "alone"),  # it took no step, so the train seconds know nothing of it
        ([{"device": "A100", "step": None}], "alone"),
        ([], "unknown"),
    ],
)
def test_only_a_clock_of_one_kind_that_nobody_shared_is_alone(attempts: list[dict[str, object]], clock: str) -> None:
    assert summarize([ABOUT | {"step": 4} | attempt for attempt in attempts])["clock"] == clock


def test_the_loss_is_that_of_the_runs_own_task(tmp_path: Path) -> None:
    run_dir = write_config(tmp_path, task="recall", tokens=10)
    log = RunLog(run_dir, attempt=1, first_step=1, about=ABOUT)
    log.step(1, 10, 5.0, 1.0, 1e-3, 0.1)
    with pytest.raises(ValueError, match="no metrics"):
        log.evaluation(1, 10, "recall", {}, 0.5)
    log.evaluation(0, 0, "recall", {"loss": 9.0, "accuracy": 0.25}, 0.5)
    log.evaluation(1, 10, "text", {"loss": 4.0, "bits_per_byte": 2.0}, 0.25)
    incomplete = RunLog(write_config(tmp_path, seed=1, task="recall"), attempt=1, first_step=1, about=ABOUT)
    incomplete.evaluation(0, 0, "recall", {"accuracy": 1.0}, 0.1)
    with pytest.raises(ValueError, match="no evaluation of its task 'recall' with a metric loss"):
        incomplete.finish({})
    log.evaluation(1, 10, "recall", {"accuracy": 0.5, "loss": 3.0}, 0.5)
    log.finish({})
    run = read_json(run_dir / "run.json")
    assert (run["loss"], run["bits_per_byte"], run["seconds"]["eval"]) == (3.0, None, 1.25)
    evals = read_rows(run_dir, "evals").table
    assert list(zip(*(evals[name].to_pylist() for name in ("step", "task", "metric", "seconds")), strict=True)) == [
        (0, "recall", "loss", 0.5),
        (0, "recall", "accuracy", None),
        (1, "text", "loss", 0.25),
        (1, "text", "bits_per_byte", None),
        (1, "recall", "accuracy", 0.5),
        (1, "recall", "loss", None),
    ]
    assert load(tmp_path).loss_curves()[["step", "loss"]].values.tolist() == [[0, 9.0], [1, 3.0]]


def test_leftover_parts_of_a_complete_run_are_not_read(tmp_path: Path) -> None:
    run_dir = write_config(tmp_path)
    write_run(run_dir, 3.0)
    (run_dir / "steps-0001-00001.parquet").write_bytes((run_dir / "steps.parquet").read_bytes())
    assert read_rows(run_dir, "steps").table.num_rows == 4


def test_a_merge_without_run_json_is_not_read(tmp_path: Path) -> None:
    run_dir = write_config(tmp_path)
    log = RunLog(run_dir, attempt=1, first_step=1, about=ABOUT)
    log.step(1, 10, 5.0, 1.0, 1e-3, 0.1)
    log.flush()
    part = next(run_dir.glob("steps-*.parquet"))
    (run_dir / "steps.parquet").write_bytes(part.read_bytes())
    assert read_rows(run_dir, "steps").table.num_rows == 1


def test_torn_and_foreign_parts_are_named_and_left_out(tmp_path: Path) -> None:
    run_dir = write_config(tmp_path)
    log = RunLog(run_dir, attempt=1, first_step=1, about=ABOUT, flush_seconds=0)
    log.step(1, 10, 5.0, 1.0, 1e-3, 0.1)
    log.step(2, 20, 5.0, 1.0, 1e-3, 0.1)
    log.evaluation(2, 20, "text", {"loss": 5.0}, 0.1)
    log.flush()
    second = run_dir / "steps-0001-00002.parquet"
    torn = second.read_bytes()[:-20]
    second.write_bytes(torn)
    (run_dir / "steps-0007-00001.parquet").write_bytes(torn)
    (run_dir / "steps-0001-00009.parquet").write_bytes(next(run_dir.glob("evals-*")).read_bytes())
    rows = read_rows(run_dir, "steps")
    assert rows.table["step"].to_pylist() == [1]
    assert [problem.split(" ", 1)[1].split(";")[0][:20] for problem in rows.problems] == [
        "is unreadable (Could",
        "has columns ['attemp",
        "belongs to no readab",
    ]


def test_status_and_progress(tmp_path: Path) -> None:
    run_dir = write_config(tmp_path)
    assert (status(run_dir), progress(run_dir)) == ("unfinished", None)
    log = RunLog(run_dir, attempt=1, first_step=1, about=ABOUT, clock=lambda: 50.0)
    log.step(1, 10, 5.0, 1.0, 1e-3, 0.1)
    log.fail(2, "loss is nan")
    assert status(run_dir) == "failed"
    assert read_json(run_dir / "failure.json") == {"attempt": 1, "step": 2, "cause": "loss is nan", "time": 50.0}
    at = progress(run_dir)
    assert at is not None
    assert (at.attempt, at.step, at.tokens, at.loss, at.updated_at) == (1, 1, 10, 5.0, 50.0)
    (run_dir / "failure.json").unlink()
    assert status(run_dir) == "unfinished"
    (run_dir / "cancelled").touch()
    assert status(run_dir) == "cancelled"


def test_a_directory_that_is_no_run_or_a_finished_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is missing"):
        RunLog(tmp_path, attempt=1, first_step=1, about=ABOUT)
    run_dir = write_config(tmp_path)
    log = RunLog(run_dir, attempt=1, first_step=1, about=ABOUT)
    with pytest.raises(ValueError, match="has an attempt 1 already; the next is 2"):
        RunLog(run_dir, attempt=1, first_step=1, about=ABOUT)
    with pytest.raises(ValueError, match="no evaluation"):
        log.finish({})
    with pytest.raises(ValueError, match="no clock 'train'"):
        log.add_seconds("train", 1.0)
    write_run(run_dir, 3.0)
    with pytest.raises(ValueError, match="complete run"):
        RunLog(run_dir, attempt=3, first_step=1, about=ABOUT)


@pytest.mark.parametrize(("steps", "evaluated", "said"), [(3, 3, "15000000 of its 20000000"), (4, 2, "at step 2 of 4")])
def test_a_log_that_ends_early_is_not_complete(tmp_path: Path, steps: int, evaluated: int, said: str) -> None:
    """Two jobs that had one folder left the steps of one of them, and an evaluation on the way, as the result."""
    run_dir = write_config(tmp_path)
    log = RunLog(run_dir, attempt=1, first_step=1, about=ABOUT)
    for step in range(1, steps + 1):
        log.step(step, 5_000_000 * step, 5.0, 1.0, 1e-3, 0.1)
    log.evaluation(evaluated, 5_000_000 * evaluated, "text", {"loss": 3.0}, 0.5)
    with pytest.raises(ValueError, match=said):
        log.finish({})
    assert not (run_dir / "run.json").exists()


def test_the_first_of_several_processes_to_fail_knows_the_cause(tmp_path: Path) -> None:
    record_failure(tmp_path, attempt=1, step=5, cause="out of memory", time=1.0)
    record_failure(tmp_path, attempt=1, step=5, cause="connection closed by peer", time=2.0)
    assert read_json(tmp_path / "failure.json")["cause"] == "out of memory"
    assert [path.name for path in tmp_path.iterdir()] == ["failure.json"]


@pytest.mark.parametrize("torn", [True, False])
def test_a_run_with_a_torn_log_is_not_called_complete(tmp_path: Path, torn: bool) -> None:
    run_dir = write_config(tmp_path)
    log = RunLog(run_dir, attempt=1, first_step=1, about=ABOUT)
    for step in range(1, 11):
        log.step(step, 10 * step, 5.0, 1.0, 1e-3, 0.1)
        if step == 5:
            log.flush()
    log.evaluation(10, 100, "text", {"loss": 5.0, "bits_per_byte": 2.0}, 0.1)
    log.flush()
    part = run_dir / "steps-0001-00001.parquet"
    if torn:
        part.write_bytes(part.read_bytes()[:-20])
    else:
        part.unlink()
    before = sorted(path.name for path in run_dir.iterdir())
    with pytest.raises(ValueError, match="has a torn log: .*unreadable" if torn else "steps are missing"):
        log.finish({})
    assert sorted(path.name for path in run_dir.iterdir()) == before
