"""Writes the run log while a run trains. reader.py reads it, by the same schema (schema.py).

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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.logs.files import read_json, write_json, write_parquet
from analysis.logs.provenance import summarize, with_trunk
from analysis.logs.reader import Rows, attempt_numbers, last_of, read_attempts, read_rows
from analysis.logs.record import sealed
from analysis.logs.schema import ADDED_CLOCKS, CLOCKS, IDENTITY, RECORDED, SCHEMA, arrow_schema

if TYPE_CHECKING:
    import pyarrow as pa

OWN_CLOCKS = ("train", "eval")  # of one attempt, including rows that a later attempt repeated
MIN_SHARE_PER_PART = 0.01  # a part covers at least this share of the attempt's duration, which limits their number


def next_attempt(run_dir: Path) -> int:
    """The number that the next attempt at this run takes; the first is 1."""
    return max(attempt_numbers(run_dir), default=0) + 1


def record_failure(run_dir: Path, *, attempt: int, step: int, cause: str, time: float) -> None:
    """Write failure.json unless it exists: of several processes, the first to fail has the actual cause.

    Raises OSError where the disk takes no files.
    """
    failure = {"attempt": attempt, "step": step, "cause": cause, "time": time}
    own = run_dir / f".failure-{os.getpid()}.json"
    write_json(own, failure)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(own, run_dir / "failure.json")
    finally:
        own.unlink(missing_ok=True)


def add_evaluations(run_dir: Path, results: Mapping[str, Mapping[str, float]], seconds: float) -> None:
    """Add metrics by task to the evaluations of a complete run, in place of earlier ones of the same tasks.

    They stand at the run's last step. Of the run's own task only metrics of further held-out sets are added, whose
    names have an "@", beside those that it has. Raises ValueError if the run is not complete, and for other metrics of
    its own task, whose last "loss" is the run's.
    """
    run = read_json(run_dir / "run.json")
    own = results.get(run["task"], {})
    if any("@" not in metric for metric in own):
        raise ValueError(
            f"{run_dir.name} was trained on {run['task']!r}, whose evaluations stay; name the new task else"
        )
    replaced = {(task, metric) for task, metrics in results.items() for metric in metrics}
    kept = [
        row
        for row in read_rows(run_dir, "evals").table.to_pylist()
        if row["task"] not in results or (row["task"] == run["task"] and (row["task"], row["metric"]) not in replaced)
    ]
    new = [(task, metric, value) for task, metrics in results.items() for metric, value in metrics.items()]
    rows = [tuple(row.values()) for row in kept]
    rows += [
        (run["attempts"], run["steps"], run["tokens"], *row, seconds if number == 0 else None)
        for number, row in enumerate(new)
    ]
    write_parquet(run_dir / "evals.parquet", _table("evals", rows))


class RunLog:
    """Writes the log of one attempt at a run.

    `first_step` is the number of the first step that this attempt takes (a resumed one: the checkpoint's last step
    plus one); rows carry the same numbering. An evaluation after step s is logged under s, before any checkpoint of
    s. `about` is the attempt's provenance: device, gpus (processes, one a device), parallel (how several processes
    share the model), dtype, torch, triton, python, job_id, code_commit, damaged_checkpoints (a line for each that was
    skipped), and `sharing`: how many runs share the device at first (1: this one alone; None: not known).
    `require_owner` is called before anything is written, and raises where the directory is no longer this attempt's.
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
        require_owner: Callable[[], None] = lambda: None,
    ) -> None:
        if (run_dir / "run.json").exists():
            raise ValueError(f"{run_dir} holds a complete run (run.json is there); give the new run another directory")
        if (run_dir / f"attempt-{attempt:04d}.json").exists():
            raise ValueError(f"{run_dir} has an attempt {attempt} already; the next is {next_attempt(run_dir)}")
        self._config = _read_config(run_dir / "config.json")  # now: finish must not fail after days of training
        self._run_dir = run_dir
        self._clock = clock
        self._flush_seconds = flush_seconds
        self._require_owner = require_owner
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
            "seconds": dict.fromkeys((*ADDED_CLOCKS, *OWN_CLOCKS), 0.0),
        }
        require_owner()
        self._write_attempt()

    def step(
        self, step: int, tokens: int, loss: float, gradient_norm: float, learning_rate: float, seconds: float
    ) -> None:
        """Log one optimiser step; `tokens` is the run's total after it.

        Rows are written to disk every `flush_seconds`, and less often as the attempt gets longer, so that a day gives
        about 500 parts.
        """
        row = (self._attempt["attempt"], step, tokens, loss, gradient_norm, learning_rate, seconds)
        self._rows["steps"].append(row)
        self._attempt.update(step=step, tokens=tokens, loss=loss)
        self._attempt["seconds"]["train"] += seconds
        now = self._clock()
        if now - self._flushed_at >= max(self._flush_seconds, MIN_SHARE_PER_PART * (now - self._attempt["started_at"])):
            self.flush()

    def evaluation(self, step: int, tokens: int, task: str, metrics: Mapping[str, float], seconds: float) -> None:
        """Log one evaluation on the held-out set of `task`, a row for each metric.

        The metric "loss" of the run's own task, at the last evaluation of a finished run, is the run's loss. `seconds`,
        of the whole evaluation, stand in the first row only, so that their sum counts each evaluation once.
        """
        if not metrics:
            raise ValueError(f"an evaluation of task {task!r} at step {step} has no metrics; name at least one")
        first_row_seconds = (seconds, *[None] * (len(metrics) - 1))
        for (metric, value), own in zip(metrics.items(), first_row_seconds, strict=True):
            self._rows["evals"].append((self._attempt["attempt"], step, tokens, task, metric, value, own))
        self._attempt["seconds"]["eval"] += seconds

    def add_seconds(self, clock_name: str, seconds: float) -> None:
        """Add to one of the clocks queue, startup, compile, checkpoint."""
        if clock_name not in ADDED_CLOCKS:
            raise ValueError(f"no clock {clock_name!r} to add to; the clocks are {', '.join(ADDED_CLOCKS)}")
        self._attempt["seconds"][clock_name] += seconds

    def sharing(self, runs: int | None) -> None:
        """Note how many runs share the device now. The attempt keeps the most, and whether the number changed."""
        most = self._attempt.get("sharing")
        if runs != most:
            self._attempt["sharing"] = None if runs is None or most is None else max(runs, most)
            self._attempt["sharing_changed"] = True

    def flush(self) -> None:
        """Put everything logged so far on disk. The trainer calls this just before it writes a checkpoint."""
        self._require_owner()
        if any(self._rows.values()):
            self._part += 1
        for kind, rows in self._rows.items():
            if rows:
                name = f"{kind}-{self._attempt['attempt']:04d}-{self._part:05d}.parquet"
                write_parquet(self._run_dir / name, _table(kind, rows))
                rows.clear()
        self._flushed_at = self._attempt["updated_at"] = self._clock()
        self._write_attempt()

    def interrupt(self, cause: str, *, preempted: bool) -> None:
        """Record why this attempt ends before the run does, which has not failed by that."""
        self._attempt.update(interrupted=cause, preempted=preempted)
        self.flush()

    def fail(self, step: int, cause: str) -> None:
        """Record why this attempt gave up. What it logged stays."""
        with contextlib.suppress(OSError):  # recording the cause matters more than the last rows
            self.flush()
        record_failure(self._run_dir, attempt=self._attempt["attempt"], step=step, cause=cause, time=self._clock())

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Merge the parts, write run.json and remove the parts, in this order.

        run.json repeats the record in config.json and adds the final held-out loss, bits per byte, step count, the last
        gradient norm, clocks, and the provenance of all attempts; `summary` adds to these and wins over them. Its
        checksum tells later edits. Raises ValueError, and leaves everything as it was, where the log is torn or has no
        held-out loss.
        """
        self.flush()
        steps, evals = (read_rows(self._run_dir, kind) for kind in ("steps", "evals"))
        before = self._config.get("branch_step", 0)  # steps before the branch are in the log of its trunk
        last = before + steps.table.num_rows
        gaps = steps.table["step"].to_pylist() != list(range(before + 1, last + 1))
        if problems := [*steps.problems, *evals.problems, *(["steps are missing"] if gaps else [])]:
            raise ValueError(
                f"{self._run_dir} has a torn log: {problems[0]}; nothing was removed; mend it, or remove the folder "
                "and submit the run anew"
            )
        final = self._final_metrics(evals)
        self._require_end(steps, evals)
        attempts = [attempt for _, attempt in sorted(read_attempts(self._run_dir)[0].items())]
        seconds = _clocks(attempts, steps, evals)
        run = {key: self._config.get(key) for key in ("schema", *RECORDED, "facts", "vary")}
        run |= {"loss": final["loss"], "bits_per_byte": final.get("bits_per_byte"), "steps": last}
        run |= {"gradient_norm": last_of(steps.table), "attempts": self._attempt["attempt"], "seconds": seconds}
        if seconds["train"] > 0:
            own = self._config.get("tokens_own", self._config["tokens"])  # of a branch, without those of its trunk
            run["tokens_per_second"] = own / seconds["train"]
        provenance = summarize(attempts)
        if before:
            trunk = read_attempts(self._run_dir.parent / str(self._config["trunk"]))[0]
            provenance |= with_trunk(attempts, [attempt for _, attempt in sorted(trunk.items())], before)
        run |= {**provenance, "attempts_made": attempts, "finished_at": self._clock(), **summary}
        self._require_owner()
        write_parquet(self._run_dir / "steps.parquet", steps.table)
        write_parquet(self._run_dir / "evals.parquet", evals.table)
        write_json(self._run_dir / "run.json", sealed(run))
        leftover = [*self._run_dir.glob("*-*-*.parquet"), *self._run_dir.glob(".*.tmp")]
        for path in leftover:
            path.unlink(missing_ok=True)

    def _require_end(self, steps: Rows, evals: Rows) -> None:
        """Raises ValueError where the log ends before the planned tokens, or its last evaluation before the end."""
        planned = self._config["tokens"]
        done = steps.table["tokens"].to_pylist()[-1] if steps.table.num_rows else 0
        at_end = steps.table["step"].to_pylist()[-1:]
        task = self._config["task"]
        evaluated = [row["step"] for row in evals.table.to_pylist() if row["task"] == task][-1:]
        if done != planned:
            raise ValueError(
                f"{self._run_dir} was trained on {done} of its {planned} tokens by its log, so it is not complete; two "
                "jobs may have had it: remove the folder and submit the run anew"
            )
        if evaluated and evaluated != at_end:
            raise ValueError(
                f"{self._run_dir} was last evaluated at step {evaluated[0]} of {at_end[0]}; evaluate before finish"
            )

    def _final_metrics(self, evals: Rows) -> dict[str, float]:
        """The metrics of the run's own task at its last evaluation. Raises ValueError where it has no "loss"."""
        task = self._config["task"]
        own = [row for row in evals.table.to_pylist() if row["task"] == task]
        metrics = {row["metric"]: row["value"] for row in own if row["step"] == own[-1]["step"]}
        if "loss" not in metrics:
            raise ValueError(
                f"{self._run_dir} has no evaluation of its task {task!r} with a metric loss, so no held-out loss; "
                "evaluate before finish"
            )
        return metrics

    def _write_attempt(self) -> None:
        write_json(self._run_dir / f"attempt-{self._attempt['attempt']:04d}.json", self._attempt)


def _read_config(path: Path) -> dict[str, Any]:
    """The run's config.json, checked for all keys that run.json repeats."""
    config = read_json(path)
    missing = [key for key in (*IDENTITY, "facts", "vary") if key not in config]
    if missing or config.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} is not of schema {SCHEMA} (lacks {', '.join(missing) or 'schema'}); submit the sweep into a new "
            "store"
        )
    return config


def _clocks(attempts: Sequence[Mapping[str, Any]], steps: Rows, evals: Rows) -> dict[str, float]:
    """Seconds of the whole run by clock: `train` and `eval` of the rows kept, `lost` of rows that were repeated."""
    seconds = {clock: sum(attempt["seconds"][clock] for attempt in attempts) for clock in ADDED_CLOCKS}
    seconds |= {"train": _total(steps), "eval": _total(evals), "lost": steps.lost_seconds + evals.lost_seconds}
    return {clock: float(seconds[clock]) for clock in CLOCKS}


def _total(rows: Rows) -> float:
    return sum(seconds for seconds in rows.table["seconds"].to_pylist() if seconds is not None)


def _table(kind: str, rows: list[tuple[Any, ...]]) -> pa.Table:
    import pyarrow as pa

    schema = arrow_schema(kind)
    columns = zip(*rows, strict=True)
    return pa.table([pa.array(values, f.type) for values, f in zip(columns, schema, strict=True)], schema=schema)
