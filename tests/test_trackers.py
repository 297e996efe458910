"""Trackers get what the log has: each step once, whatever was exported before, read back by the trackers' own means."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis.logs.reader import read_rows
from analysis.logs.writer import RunLog, add_evaluations
from experiments.cli.main import main
from experiments.design.config import RunConfig
from experiments.launching import trackers
from experiments.launching.trackers import Tracker, export, read_entries

ABOUT = {"device": "cpu", "gpus": 1, "dtype": "float32", "torch": "2", "triton": None, "python": "3", "sharing": 1}


@pytest.fixture
def run_dir(tiny_run: RunConfig, submitted: Callable[..., Path], tmp_path: Path) -> Path:
    return submitted(tiny_run, tmp_path / "store")


def log(run_dir: Path, run: RunConfig, attempt: int, steps: range, finish: bool = False) -> None:
    """Steps with a loss of 100 attempts plus the step, the last evaluated."""
    about = {**ABOUT, "parallel": None, "job_id": None, "code_commit": None, "damaged_checkpoints": []}
    writer = RunLog(run_dir, attempt=attempt, first_step=steps[0], about=about)
    for step in steps:
        tokens = min(128 * step, run.train.tokens)
        writer.step(step, tokens, 100.0 * attempt + step, 1.0, 1e-3, 0.5)
    writer.evaluation(steps[-1], tokens, "text", {"loss": 3.0 + attempt, "bits_per_byte": 1.0}, 2.0)
    writer.flush()
    if finish:
        writer.finish({})


def read_board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """By TensorBoard's own reader: name -> step and value."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = loader.EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}


def train_losses(run_dir: Path) -> list[tuple[int, float]]:
    rows = read_rows(run_dir, "steps").table.to_pylist()
    return [(row["step"], row["loss"]) for row in rows]


def test_tensorboard_shows_each_step_once(tiny_run: RunConfig, run_dir: Path, tmp_path: Path) -> None:
    """Exported while the run trains, after steps were done again, after an export was cut off, and at its end."""
    pytest.importorskip("tensorboard")
    board = tmp_path / "boards" / run_dir.name
    assert export(run_dir, board, "tensorboard") == 0  # nothing is logged
    log(run_dir, tiny_run, 1, range(1, 9))
    assert export(run_dir, board, "tensorboard") == 8
    assert export(run_dir, board, "tensorboard") == 0
    assert read_board(board)["train/loss"] == train_losses(run_dir) == [(n, 100.0 + n) for n in range(1, 9)]
    log(run_dir, tiny_run, 2, range(6, 13))
    before = (board / trackers.STATE).read_bytes()
    assert export(run_dir, board, "tensorboard") == 7
    (board / trackers.STATE).write_bytes(before)  # as if the export had been killed before it noted how far it was
    assert export(run_dir, board, "tensorboard") == 7
    assert read_board(board)["train/loss"] == train_losses(run_dir)
    log(run_dir, tiny_run, 3, range(13, 26), finish=True)
    assert export(run_dir, board, "tensorboard") == 13
    found = read_board(board)
    assert found["train/loss"] == train_losses(run_dir)
    assert found["train/loss"][4:6] == [(5, 105.0), (6, 206.0)]
    assert found["text/loss"] == [(12, 5.0), (25, 6.0)]  # the evaluation at step 8 was made by steps that were lost
    add_evaluations(run_dir, {"later": {"accuracy": 0.5}}, 1.0)
    assert export(run_dir, board, "tensorboard") == 1
    found = read_board(board)
    assert found["later/accuracy"] == [(25, 0.5)]
    assert found["train/loss"] == train_losses(run_dir)


def test_times_are_those_of_the_attempts(tiny_run: RunConfig, run_dir: Path) -> None:
    """Half a second a step and two an evaluation, from the start of its attempt."""
    log(run_dir, tiny_run, 1, range(1, 9))
    started = json.loads((run_dir / "attempt-0001.json").read_text())["started_at"]
    entries, record = read_entries(run_dir)
    assert [entry.time - started for entry in entries] == pytest.approx(
        [*(0.5 * n for n in range(1, 8)), 6.0], abs=1e-3
    )
    assert trackers.describe(record)["conv.kind"] == "lowrank"


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a file of W&B, which are in blocks of LevelDB's log format."""
    record = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record
    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record.FromString(whole)
            whole = b""
        left = 32768 - place % 32768
        place += left if left < 7 else 0


def history(folder: Path) -> list[dict[str, Any]]:
    """What all offline runs in a folder log, in order."""
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))
        for record in wandb_records(path)
        if record.HasField("history")
    ]


@pytest.mark.slow
def test_wandb_gets_each_step_once_and_offline(
    tiny_run: RunConfig, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "boards" / run_dir.name
    log(run_dir, tiny_run, 1, range(1, 9))
    assert export(run_dir, folder, "wandb") == 8
    assert export(run_dir, folder, "wandb") == 0
    log(run_dir, tiny_run, 2, range(6, 26), finish=True)
    assert export(run_dir, folder, "wandb") == 17  # steps 6 to 8 keep what was exported first
    rows = history(folder)
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [(n, (100.0 if n < 9 else 200.0) + n) for n in range(1, 26)]
    assert [(row["step"], row["text/loss"]) for row in rows if "text/loss" in row] == [(8, 4.0), (25, 5.0)]
    runs = [
        record.run
        for path in folder.glob("wandb/offline-run-*/*.wandb")
        for record in wandb_records(path)
        if record.HasField("run")
    ]
    assert {(run.run_id, run.project, run.run_group) for run in runs} == {(run_dir.name, "test", "lowrank-qkv")}


class Listed(trackers.Writer):
    """A tracker that keeps what it was given."""

    got: list[int] = []  # noqa: RUF012 # of all of them

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> "Listed":
        return self

    def __exit__(self, *_: object) -> None: ...

    def write(self, entry: trackers.Entry) -> None:
        self.got.append(entry.step)


@pytest.mark.parametrize(
    ("tracker", "want"), [("tensorboard", [*range(3, 6), *range(6, 13)]), ("wandb", list(range(9, 13)))]
)
def test_steps_that_are_done_again_a_few_at_a_time(
    tracker: Tracker,
    want: list[int],
    tiny_run: RunConfig,
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exports between which an attempt does steps again: TensorBoard replaces them, and W&B has them already."""
    monkeypatch.setitem(trackers.WRITERS, tracker, Listed)
    log(run_dir, tiny_run, 1, range(1, 9))
    export(run_dir, tmp_path / "board", tracker)
    monkeypatch.setattr(Listed, "got", [])
    for attempt, steps in ((2, range(3, 6)), (3, range(6, 13))):
        log(run_dir, tiny_run, attempt, steps)
        export(run_dir, tmp_path / "board", tracker)
    assert Listed.got == want


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_the_verb(
    tracker: Tracker,
    tiny_run: RunConfig,
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(trackers.WRITERS, tracker, Listed)
    log(run_dir, tiny_run, 1, range(1, 26), finish=True)
    command = ["track", str(run_dir.parent), "--to", tracker, "-o", str(tmp_path / "boards"), "--follow"]
    assert main(command) == 0
    assert capsys.readouterr().out.endswith(f"25 entries of 1 runs, of 1 in {run_dir.parent}\n")
    assert main(command) == 0
    assert capsys.readouterr().out == ""
    other = {"tensorboard": "wandb", "wandb": "tensorboard"}[tracker]
    command[3] = other
    assert main(command) == 1
    assert f"was exported for {tracker}; give another folder for {other}" in capsys.readouterr().err
    command[1] = str(tmp_path / "boards")
    assert main(command) == 2
    assert "holds no runs; give a store" in capsys.readouterr().err
    command[1] = str(run_dir.parents[1])
    assert main(command) == 2
    assert f"is no store, but holds some ({run_dir.parent.name}); give one of them" in capsys.readouterr().err


def test_a_package_that_is_missing_is_named(
    tiny_run: RunConfig, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log(run_dir, tiny_run, 1, range(1, 9))
    for tracker, module in (("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(ValueError, match=rf"the package {tracker} is not installed; pip install"):
            export(run_dir, tmp_path / tracker, tracker)  # type: ignore[arg-type]
