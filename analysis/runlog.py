"""The run log: one definition of its schema for the writer, which a training run calls, and for the reader.

A run is one directory. While it trains it holds `attempt-0001.json` (one an attempt) and immutable parts
`steps-0001-00001.parquet`, `evals-0001-00001.parquet` (<attempt>-<part>); every file appears whole or not at all
(temporary file, fsync, rename). At the end the parts merge into `steps.parquet` and `evals.parquet`, and `run.json`,
written last, means "complete". With `run.json` present only the merged files are read; without it only the parts. So
a run may be killed at any instant: the log stays readable, and since the trainer calls `flush` before each checkpoint
it always covers the checkpoint. Steps that a resumed attempt repeats are kept once, from the later attempt.

Units: losses in nats a token, seconds of wall clock, tokens cumulative over the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.errors import first_line

if TYPE_CHECKING:  # pandas and pyarrow cost up to a second, and `status` needs neither
    import pyarrow as pa

SCHEMA = 1
AGE_PER_PART = 0.01  # of an attempt's age goes into a part, once it is old enough
STEP_COLUMNS = {
    "attempt": "int64",
    "step": "int64",
    "tokens": "int64",
    "loss": "float64",
    "gradient_norm": "float64",
    "learning_rate": "float64",
    "seconds": "float64",
}
EVAL_COLUMNS = {
    "attempt": "int64",
    "step": "int64",
    "tokens": "int64",
    "loss": "float64",
    "bits_per_byte": "float64",
    "seconds": "float64",
}
COLUMNS = {"steps": STEP_COLUMNS, "evals": EVAL_COLUMNS}
CLOCKS = ("queue", "startup", "compile", "train", "eval", "checkpoint", "lost")
ADDED_CLOCKS = ("queue", "startup", "compile", "checkpoint")  # the others are sums of rows
IDENTITY = {  # stored by the sweep in config.json, repeated in run.json; FLOPs pass 2^63, hence floats
    "run_id": "string",
    "sweep": "string",
    "arm": "string",
    "size": "string",
    "seed": "Int64",
    "baseline": "string",
    "parameters": "Int64",
    "parameters_nonembedding": "Int64",
    "tokens": "Int64",
    "flops_exact": "float64",
    "flops_6nd": "float64",
    "flops_6n_nonemb_d": "float64",
}
ARM_FACTS = {  # how the arm is declared: the keys of a sweep's [arm.NAME]; missing where its kind has none
    "kind": "string",
    "site": "string",  # as "qkv", or "all-linear"
    "width": "Int64",  # taps
    "rank": "Int64",
    "head_size": "Int64",
    "residual": "boolean",
    "static_filter": "boolean",
    "qk_norm": "boolean",
    "kv_heads": "Int64",
}
RUN_COLUMNS = {
    **IDENTITY,
    **ARM_FACTS,
    "loss": "float64",
    "bits_per_byte": "float64",
    "steps": "Int64",
    "attempts": "Int64",
    **{f"{clock}_seconds": "float64" for clock in CLOCKS},
    "tokens_per_second": "float64",
    "device": "string",
    "gpus": "Int64",
    "dtype": "string",
    "torch": "string",
    "code_commit": "string",
    "data_sha256": "string",
    "tokenizer_sha256": "string",
    "status": "string",
}

CONVENTIONS = {  # a way to count training FLOPs -> its column of the run table
    "exact": "flops_exact",
    "6ND": "flops_6nd",
    "6N_nonemb D": "flops_6n_nonemb_d",
    "given": "flops_given",  # column C of a table of points
}


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour of `path`, sync it to disk and rename it: whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Put a rename itself on disk, so that files survive a power cut in the order in which they were written."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically; NaN is refused, since JSON has none."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def _write_parquet(path: Path, table: pa.Table) -> None:
    from pyarrow import parquet

    write_atomically(path, lambda temporary: parquet.write_table(table, temporary))


def _arrow_schema(kind: str) -> pa.Schema:
    import pyarrow as pa

    return pa.schema([(name, pa.type_for_alias(dtype)) for name, dtype in COLUMNS[kind].items()])


def next_attempt(run_dir: Path) -> int:
    """The number that the next attempt at this run takes; the first is 1."""
    return max(_attempt_numbers(run_dir), default=0) + 1


def record_failure(run_dir: Path, *, attempt: int, step: int, cause: str, time: float) -> None:
    """Write failure.json, unless it is there: of several processes the first to fail knows the cause."""
    failure = {"attempt": attempt, "step": step, "cause": cause, "time": time}
    own = run_dir / f".failure-{os.getpid()}.json"
    write_json(own, failure)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(own, run_dir / "failure.json")
    finally:
        own.unlink(missing_ok=True)


class RunLog:
    """Writes the log of one attempt at a run.

    `first_step` is the number of the first step that this attempt takes (a resumed one: the checkpoint's last step
    plus one); rows carry the same numbering. An evaluation after step s is logged under s, before any checkpoint of
    s. `about` names the device, gpus, dtype, torch and job_id of the attempt.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        attempt: int,
        first_step: int,
        about: Mapping[str, Any],
        clock: Callable[[], float] = time.time,
        flush_seconds: float = 10.0,
    ) -> None:
        if (run_dir / "run.json").exists():
            raise ValueError(f"{run_dir} holds a complete run (run.json is there); give the new run another directory")
        if (run_dir / f"attempt-{attempt:04d}.json").exists():
            raise ValueError(f"{run_dir} has an attempt {attempt} already; the next is {next_attempt(run_dir)}")
        self._config = read_json(run_dir / "config.json")  # read now: finish must not fail after days of training
        self._run_dir = run_dir
        self._clock = clock
        self._flush_seconds = flush_seconds
        self._rows: dict[str, list[tuple[Any, ...]]] = {"steps": [], "evals": []}
        self._part = 0
        self._flushed_at = clock()
        self._attempt: dict[str, Any] = {
            **about,
            "attempt": attempt,
            "first_step": first_step,
            "started_at": self._flushed_at,
            "updated_at": self._flushed_at,
            "step": None,
            "tokens": None,
            "loss": None,
            "seconds": dict.fromkeys(ADDED_CLOCKS, 0.0),
        }
        self._write_attempt()

    def step(
        self, step: int, tokens: int, loss: float, gradient_norm: float, learning_rate: float, seconds: float
    ) -> None:
        """Log one optimiser step; `tokens` is the run's total after it.

        Written to disk every `flush_seconds`, and less often as the attempt grows old: a day is some 500 parts.
        """
        row = (self._attempt["attempt"], step, tokens, loss, gradient_norm, learning_rate, seconds)
        self._rows["steps"].append(row)
        self._attempt.update(step=step, tokens=tokens, loss=loss)
        now = self._clock()
        if now - self._flushed_at >= max(self._flush_seconds, AGE_PER_PART * (now - self._attempt["started_at"])):
            self.flush()

    def evaluation(self, step: int, tokens: int, loss: float, bits_per_byte: float | None, seconds: float) -> None:
        """Log one evaluation on the held-out set; the last one of a finished run is the run's loss."""
        self._rows["evals"].append((self._attempt["attempt"], step, tokens, loss, bits_per_byte, seconds))

    def add_seconds(self, clock_name: str, seconds: float) -> None:
        """Add to one of the clocks queue, startup, compile, checkpoint."""
        if clock_name not in ADDED_CLOCKS:
            raise ValueError(f"no clock {clock_name!r} to add to; the clocks are {', '.join(ADDED_CLOCKS)}")
        self._attempt["seconds"][clock_name] += seconds

    def flush(self) -> None:
        """Put everything logged so far on disk. The trainer calls this just before it writes a checkpoint."""
        if any(self._rows.values()):
            self._part += 1
        for kind, rows in self._rows.items():
            if rows:
                name = f"{kind}-{self._attempt['attempt']:04d}-{self._part:05d}.parquet"
                _write_parquet(self._run_dir / name, _table(kind, rows))
                rows.clear()
        self._flushed_at = self._attempt["updated_at"] = self._clock()
        self._write_attempt()

    def fail(self, step: int, cause: str) -> None:
        """Record why this attempt gave up. What it logged stays."""
        with contextlib.suppress(OSError):  # the cause matters more than the last seconds of the log
            self.flush()
        record_failure(self._run_dir, attempt=self._attempt["attempt"], step=step, cause=cause, time=self._clock())

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Merge the parts, write run.json and remove the parts, in this order.

        run.json repeats the identity in config.json and adds the final held-out loss, bits per byte, step count,
        clocks and this attempt's device; `summary` adds to these and wins over them.
        """
        self.flush()
        config = self._config
        steps = read_rows(self._run_dir, "steps")
        evals = read_rows(self._run_dir, "evals")
        if evals.table.num_rows == 0:
            raise ValueError(f"{self._run_dir} has no evaluation, so no held-out loss; evaluate before finish")
        gaps = steps.table["step"].to_pylist() != list(range(1, steps.table.num_rows + 1))
        if problems := [*steps.problems, *evals.problems, *(["steps are missing"] if gaps else [])]:
            raise ValueError(
                f"{self._run_dir} has a torn log: {problems[0]}; nothing was removed; mend it, or remove the folder "
                "and submit the run anew"
            )
        seconds = dict.fromkeys(CLOCKS, 0.0)
        for attempt in _attempts(self._run_dir)[0].values():
            for clock in ADDED_CLOCKS:
                seconds[clock] += attempt["seconds"][clock]
        seconds["train"] = sum(steps.table["seconds"].to_pylist())
        seconds["eval"] = sum(evals.table["seconds"].to_pylist())
        seconds["lost"] = steps.lost_seconds + evals.lost_seconds
        final = evals.table.slice(evals.table.num_rows - 1).to_pylist()[0]
        run = {key: config[key] for key in ("schema", *IDENTITY)}
        run |= {"loss": final["loss"], "bits_per_byte": final["bits_per_byte"], "steps": steps.table.num_rows}
        run |= {"attempts": self._attempt["attempt"], "seconds": seconds}
        if seconds["train"] > 0:
            run["tokens_per_second"] = config["tokens"] / seconds["train"]
        run |= {key: self._attempt.get(key) for key in ("device", "gpus", "dtype", "torch")}
        run |= {key: config.get(key) for key in ("code_commit", "data_sha256", "tokenizer_sha256")}
        run |= {"finished_at": self._clock(), **summary}
        _write_parquet(self._run_dir / "steps.parquet", steps.table)
        _write_parquet(self._run_dir / "evals.parquet", evals.table)
        write_json(self._run_dir / "run.json", run)
        leftover = [*self._run_dir.glob("*-*-*.parquet"), *self._run_dir.glob(".*.tmp")]
        for path in leftover:
            path.unlink(missing_ok=True)

    def _write_attempt(self) -> None:
        write_json(self._run_dir / f"attempt-{self._attempt['attempt']:04d}.json", self._attempt)


def _table(kind: str, rows: list[tuple[Any, ...]]) -> pa.Table:
    import pyarrow as pa

    schema = _arrow_schema(kind)
    columns = zip(*rows, strict=True)
    return pa.table([pa.array(values, f.type) for values, f in zip(columns, schema, strict=True)], schema=schema)


@dataclass(frozen=True)
class Progress:
    """Where the run stood when it last flushed; None where nothing is logged yet.

    An attempt that has logged no step yet shows where the one before it came to.
    """

    attempt: int
    first_step: int  # of this attempt
    step: int | None
    tokens: int | None
    loss: float | None  # of the last training step, nats a token
    started_at: float  # of this attempt, unix seconds
    updated_at: float  # unix seconds


def progress(run_dir: Path) -> Progress | None:
    """The run's state from one or two small files, for `status`; None before the first attempt."""
    numbers = _attempt_numbers(run_dir)
    if not numbers:
        return None
    latest = read_json(run_dir / f"attempt-{numbers[-1]:04d}.json")
    logged = latest
    for number in reversed(numbers[:-1]):
        if logged["step"] is not None:
            break
        logged = read_json(run_dir / f"attempt-{number:04d}.json")
    return Progress(
        numbers[-1],
        latest["first_step"],
        **{key: logged[key] for key in ("step", "tokens", "loss")},
        started_at=latest["started_at"],
        updated_at=latest["updated_at"],
    )


def status(run_dir: Path) -> str:
    """ "complete", "cancelled", "failed" or "unfinished"."""
    marks = {"run.json": "complete", "cancelled": "cancelled", "failure.json": "failed"}
    return next((name for mark, name in marks.items() if (run_dir / mark).exists()), "unfinished")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or ValueError naming the file."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is unreadable ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def _attempt_numbers(run_dir: Path) -> list[int]:
    names = [path.stem.removeprefix("attempt-") for path in run_dir.glob("attempt-*.json")]
    return sorted(int(name) for name in names if name.isdigit())


def _attempts(run_dir: Path) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """The readable attempts by number, and what was wrong with the others."""
    attempts, problems = {}, []
    for number in _attempt_numbers(run_dir):
        try:
            attempts[number] = read_json(run_dir / f"attempt-{number:04d}.json")
        except ValueError as error:
            problems.append(f"{error}; its rows are left out")
    return attempts, problems


@dataclass(frozen=True)
class Rows:
    """The steps or the evaluations of one run, in order, each step once."""

    table: pa.Table
    lost_seconds: float = 0.0  # spent on rows that a later attempt repeated
    problems: list[str] = field(default_factory=list)


def read_rows(run_dir: Path, kind: str) -> Rows:
    """The rows of `kind` ("steps" or "evals"): of the merged file if the run is complete, else of the parts."""
    import pyarrow as pa
    from pyarrow import parquet

    schema = _arrow_schema(kind)
    complete = (run_dir / "run.json").exists()
    attempts, problems = _attempts(run_dir)
    paths = [run_dir / f"{kind}.parquet"] if complete else sorted(run_dir.glob(f"{kind}-*.parquet"))
    tables = []
    for path in paths:
        number = path.stem.split("-")[1] if not complete else ""
        if not complete and not (number.isdigit() and int(number) in attempts):
            problems.append(f"{path} belongs to no readable attempt; left out")
            continue
        try:
            table = parquet.read_table(path)
        except (OSError, pa.ArrowException) as error:
            if not complete and (run_dir / "run.json").exists():  # it finished while we read: the parts are gone
                return read_rows(run_dir, kind)
            problems.append(f"{path} is unreadable ({first_line(error)}); left out")
            continue
        if table.schema.equals(schema):
            tables.append(table)
        else:
            problems.append(f"{path} has columns {table.schema.names}, not {schema.names}; left out")
    table = pa.concat_tables(tables) if tables else schema.empty_table()
    if complete:
        return Rows(table, problems=problems)
    kept, lost_seconds = _each_step_once(table, {n: attempt["first_step"] for n, attempt in attempts.items()})
    return Rows(kept, lost_seconds, problems)


def _each_step_once(table: pa.Table, first_steps: Mapping[int, int]) -> tuple[pa.Table, float]:
    """Drop the rows that a later attempt started over, and return the seconds that they had taken."""
    import numpy as np

    attempt, step = table["attempt"].to_numpy(), table["step"].to_numpy()
    keep = np.ones(len(step), dtype=bool)
    for number, first_step in first_steps.items():
        keep &= (attempt >= number) | (step < first_step)
    order = np.lexsort((attempt, step))
    order = order[keep[order]]
    # An evaluation before the first step can occur in two attempts that start alike: the later one stands.
    last_of_step = np.append(np.diff(step[order]) != 0, True)[: len(order)]
    order = order[last_of_step]
    seconds = table["seconds"].to_numpy()
    return table.take(order), float(seconds.sum() - seconds[order].sum())
