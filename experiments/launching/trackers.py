"""Exports a store's logs to run trackers: as TensorBoard's event files, or as runs of Weights & Biases (W&B).

Trackers are fed from the parquet logs, while runs train or afterwards. So no training process depends on a tracker,
every tracker gets the same numbers, and a tracker can be added to a store that is years old.
"""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from analysis.logs.files import read_json, write_json
from analysis.logs.reader import attempt_records, read_rows
from analysis.logs.record import check_unedited
from experiments.launching.jobs import errors_naming

Tracker = Literal["tensorboard", "wandb"]
TRAIN = ("loss", "gradient_norm", "learning_rate", "seconds")  # columns of the steps that are exported
STATE = "exported.json"  # in the folder of each exported run: how far it was exported
# Settings that a tracker may group and filter runs by, in addition to the facts and the axes of [vary]
DESCRIPTION = ("sweep", "arm", "size", "budget", "seed", "baseline", "task", "parameters", "tokens", "flops_exact")


@dataclass(frozen=True)
class Entry:
    """The values that a run logged after one step, by name, such as "train/loss" or "text/loss"."""

    step: int
    attempt: int
    time: float  # unix seconds: the start of the attempt, plus the time of compiling and of all its entries so far
    values: Mapping[str, float]


class Writer(ABC):
    """Writes the entries of one run for one tracker. Use it as a context, which closes it."""

    @abstractmethod
    def __enter__(self) -> "Writer": ...

    @abstractmethod
    def __exit__(self, *_: object) -> None: ...

    @abstractmethod
    def write(self, entry: Entry) -> None:
        """Write one entry."""


class TensorBoard(Writer):
    """A new event file of a run. It replaces what earlier files hold from `first_step` on."""

    def __init__(self, folder: Path, first_step: int, run: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("the package tensorboard is not installed; pip install 'dynconv[tensorboard]'") from None
        self._writer = SummaryWriter(str(folder), purge_step=first_step)
        self._writer.add_text("run", f"    {json.dumps(run, indent=1)}".replace("\n", "\n    "), first_step)

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, entry: Entry) -> None:
        for name, value in entry.values.items():
            self._writer.add_scalar(name, value, entry.step, walltime=entry.time)


class WeightsAndBiases(Writer):
    """A run of W&B with the run's id, in files for `wandb sync`. With WANDB_MODE=online it is sent at once.

    W&B cannot replace values, so steps that a later attempt did again keep the values that were exported first.
    """

    def __init__(self, folder: Path, _first_step: int, run: Mapping[str, Any]) -> None:
        # Send nothing unless the user asks for it, not even W&B's error reports.
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb
        except ImportError:
            raise ValueError("the package wandb is not installed; pip install 'dynconv[wandb]'") from None
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", run["sweep"]),
            id=folder.name,
            name=folder.name,
            group=run["arm"],
            config=dict(run),
            dir=str(folder),
            resume="allow",
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, save_code=False, x_disable_stats=True
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def __enter__(self) -> "WeightsAndBiases":
        return self

    def __exit__(self, *_: object) -> None:
        self._run.finish()

    def write(self, entry: Entry) -> None:
        self._run.log({"step": entry.step, "time": entry.time, **entry.values})


WRITERS: dict[Tracker, Callable[[Path, int, Mapping[str, Any]], Writer]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def export(run_dir: Path, folder: Path, tracker: Tracker) -> int:
    """Export what a run has logged since its last export into `folder`. Returns the number of new entries.

    An export that was interrupted is repeated. Raises ValueError if a file of the run was not written by us, if
    `folder` was exported for another tracker, or if the tracker's package is missing.
    """
    path = folder / STATE
    before = read_json(path) if path.exists() else {}
    if before and before["tracker"] != tracker:
        raise ValueError(f"{folder} was exported for {before['tracker']}; give another folder for {tracker}")
    stamp = _stamp(run_dir)
    if not stamp or before.get("stamp") == stamp:
        return 0
    entries, record = read_entries(run_dir)
    last = {name: _Seen(*seen) for name, seen in before.get("seen", {}).items()}
    new = [entry for entry in entries if _has_news(entry, last)]
    if new and tracker == "tensorboard":  # A new event file replaces everything from the first new step on.
        first = min(entry.step for entry in new)
        new = [entry for entry in entries if entry.step >= first]
    elif new:
        new = [_only_later(entry, last) for entry in new]
        new = [entry for entry in new if entry.values]
    if new:
        folder.mkdir(parents=True, exist_ok=True)
        with WRITERS[tracker](folder, min(entry.step for entry in new), describe(record)) as writer:
            for entry in new:
                writer.write(entry)
    seen = last | {name: _Seen(entry.attempt, entry.step) for entry in entries for name in entry.values}
    if tracker == "wandb":  # W&B keeps later steps of an earlier attempt that the current one has not reached yet.
        seen |= {name: _Seen(seen[name].attempt, max(seen[name].step, one.step)) for name, one in last.items()}
    state = {"tracker": tracker, "stamp": stamp, "seen": {name: [one.attempt, one.step] for name, one in seen.items()}}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, state)
    return len(new)


@dataclass(frozen=True)
class _Seen:
    """The last entry that was exported of one name."""

    attempt: int
    step: int


def _has_news(entry: Entry, last: Mapping[str, _Seen]) -> bool:
    """Whether the entry has a value of a later step or attempt than was exported."""
    return any(
        name not in last or entry.step > last[name].step or entry.attempt > last[name].attempt for name in entry.values
    )


def _only_later(entry: Entry, last: Mapping[str, _Seen]) -> Entry:
    """The entry without values of steps that were exported already, perhaps by an earlier attempt."""
    values = {name: value for name, value in entry.values.items() if name not in last or entry.step > last[name].step}
    return Entry(entry.step, entry.attempt, entry.time, values)


def describe(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run for a tracker: its names, counts, facts and axes of [vary]."""
    return {**{name: record.get(name) for name in DESCRIPTION}, **record["facts"], **record["vary"]}


def read_entries(run_dir: Path) -> tuple[list[Entry], dict[str, Any]]:
    """(entries, config.json) of a run: what it has logged so far by step, without steps that were done again later.

    Raises ValueError if a file was not written by us.
    """
    with errors_naming(run_dir / "config.json"):
        record = read_json(run_dir / "config.json")
        check_unedited(run_dir / "config.json", record)
        describe(record)
    finished = run_dir / "run.json"
    with errors_naming(finished if finished.exists() else run_dir / "attempt-*.json"):
        made = read_json(finished)["attempts_made"] if finished.exists() else attempt_records(run_dir)
        clock = {one["attempt"]: one["started_at"] + one["seconds"]["compile"] for one in made}
    steps, evals = (read_rows(run_dir, kind).table.to_pylist() for kind in ("steps", "evals"))
    entries = []
    for _, row in sorted(
        [((row["step"], 0), row) for row in steps] + [((row["step"], 1), row) for row in evals],
        key=lambda item: item[0],
    ):
        attempt = row["attempt"]
        clock[attempt] = clock.get(attempt, 0.0) + (row["seconds"] or 0.0)
        if "metric" in row:
            values = {f"{row['task']}/{row['metric']}": row["value"]}
        else:
            values = {f"train/{name}": row[name] for name in TRAIN} | {"train/tokens": row["tokens"]}
        entries.append(Entry(row["step"], attempt, clock[attempt], values))
    return _merged(entries), record


def _merged(entries: Iterable[Entry]) -> list[Entry]:
    """The entries with those of the same step and attempt merged into one."""
    merged: dict[tuple[int, int], Entry] = {}
    for entry in entries:
        at = (entry.step, entry.attempt)
        earlier = merged[at].values if at in merged else {}
        merged[at] = Entry(entry.step, entry.attempt, entry.time, {**earlier, **entry.values})
    return list(merged.values())


def _stamp(run_dir: Path) -> dict[str, int]:
    """When each of the files that change with a run's log was last written; empty before the first attempt."""
    paths = [*run_dir.glob("attempt-*.json"), run_dir / "run.json", run_dir / "evals.parquet"]
    return {path.name: path.stat().st_mtime_ns for path in paths if path.exists()}
