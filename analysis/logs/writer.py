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
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.logs.files import read_json, write_json, write_parquet
from analysis.logs.reader import attempt_numbers, read_attempts, read_rows
from analysis.logs.schema import ADDED_CLOCKS, CLOCKS, IDENTITY, arrow_schema

if TYPE_CHECKING:
    import pyarrow as pa

AGE_PER_PART = 0.01  # of an attempt's age goes into a part, once it is old enough


def next_attempt(run_dir: Path) -> int:
    """The number that the next attempt at this run takes; the first is 1."""
    return max(attempt_numbers(run_dir), default=0) + 1


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
                write_parquet(self._run_dir / name, _table(kind, rows))
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
        for attempt in read_attempts(self._run_dir)[0].values():
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
        write_parquet(self._run_dir / "steps.parquet", steps.table)
        write_parquet(self._run_dir / "evals.parquet", evals.table)
        write_json(self._run_dir / "run.json", run)
        leftover = [*self._run_dir.glob("*-*-*.parquet"), *self._run_dir.glob(".*.tmp")]
        for path in leftover:
            path.unlink(missing_ok=True)

    def _write_attempt(self) -> None:
        write_json(self._run_dir / f"attempt-{self._attempt['attempt']:04d}.json", self._attempt)


def _table(kind: str, rows: list[tuple[Any, ...]]) -> pa.Table:
    import pyarrow as pa

    schema = arrow_schema(kind)
    columns = zip(*rows, strict=True)
    return pa.table([pa.array(values, f.type) for values, f in zip(columns, schema, strict=True)], schema=schema)
