"""Reads the log of a run: its progress, and its rows, with each step once."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.errors import first_line
from analysis.logs import schema1
from analysis.logs.files import read_json, read_parquet
from analysis.logs.schema import arrow_schema

if TYPE_CHECKING:
    import pyarrow as pa


REMEDY = "copy it again, or remove the run's folder and submit the sweep again"


@dataclass(frozen=True)
class Progress:
    """The progress of a run when its log was last written to disk; fields are None where nothing is logged yet.

    An attempt that has logged no step yet shows the last step of the attempt before it.
    """

    attempt: int
    first_step: int  # of this attempt
    step: int | None
    tokens: int | None
    loss: float | None  # of the last training step, nats a token
    started_at: float  # of this attempt, unix seconds
    updated_at: float  # unix seconds


def progress(run_dir: Path) -> Progress | None:
    """The run's state from its small files; None before the first attempt."""
    return progress_of(attempt_records(run_dir))


def attempt_records(run_dir: Path, files: Collection[str] | None = None) -> list[dict[str, Any]]:
    """What the attempts at an unfinished run wrote of themselves, in order. Raises ValueError if one is unreadable.

    `files` are the names in the directory, where they are known already.
    """
    numbers = attempt_numbers(run_dir, files)
    return [read_json(run_dir / f"attempt-{number:04d}.json") | {"attempt": number} for number in numbers]


def progress_of(attempts: Sequence[Mapping[str, Any]]) -> Progress | None:
    """The run's state from the files of its attempts, in their order; None where there is none."""
    if not attempts:
        return None
    latest = attempts[-1]
    logged = next((attempt for attempt in reversed(attempts) if attempt["step"] is not None), attempts[0])
    return Progress(
        latest["attempt"],
        latest["first_step"],
        **{key: logged[key] for key in ("step", "tokens", "loss")},
        started_at=latest["started_at"],
        updated_at=latest["updated_at"],
    )


def list_files(run_dir: Path) -> frozenset[str]:
    """The names in a run's directory; empty where there is none. One call, where each look at a single file is a call
    to the server of a network file system."""
    try:
        with os.scandir(run_dir) as entries:
            return frozenset(entry.name for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()


def status(run_dir: Path, files: Collection[str] | None = None) -> str:
    """The status of a run, from the files in its directory: "complete", "cancelled", "failed" or "unfinished".

    `files` are the names in the directory, where they are known already.
    """
    files = list_files(run_dir) if files is None else files
    marks = {"run.json": "complete", "cancelled": "cancelled", "failure.json": "failed"}
    return next((name for mark, name in marks.items() if mark in files), "unfinished")


def attempt_numbers(run_dir: Path, files: Collection[str] | None = None) -> list[int]:
    files = list_files(run_dir) if files is None else files
    found = [re.fullmatch(r"attempt-(\d+)\.json", name) for name in files]
    return sorted(int(match[1]) for match in found if match)


def read_attempts(run_dir: Path) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """The readable attempts by number, and a line for each one that is unreadable."""
    attempts, problems = {}, []
    for number in attempt_numbers(run_dir):
        try:
            attempts[number] = read_json(run_dir / f"attempt-{number:04d}.json")
        except ValueError as error:
            problems.append(f"{error}; its rows are left out")
    return attempts, problems


@dataclass(frozen=True)
class Rows:
    """The steps or the evaluations of one run, ordered by step, without rows that a later attempt repeated."""

    table: pa.Table
    lost_seconds: float = 0.0  # spent on rows that a later attempt repeated
    problems: list[str] = field(default_factory=list)


def read_rows(run_dir: Path, kind: str) -> Rows:
    """The rows of `kind` ("steps" or "evals"), from the merged file if the run is complete, else from the parts."""
    import pyarrow as pa

    schema = arrow_schema(kind)
    complete = (run_dir / "run.json").exists()
    readable, problems = read_attempts(run_dir)
    paths = [run_dir / f"{kind}.parquet"] if complete else sorted(run_dir.glob(f"{kind}-*.parquet"))
    tables = []
    for path in paths:
        number = path.stem.split("-")[1] if not complete else ""
        if not complete and not (number.isdigit() and int(number) in readable):
            problems.append(f"{path} belongs to no readable attempt; left out")
            continue
        try:
            table = read_parquet(path)
        except (OSError, pa.ArrowException) as error:
            if not complete and (run_dir / "run.json").exists():  # the run finished meanwhile, and removed the parts
                return read_rows(run_dir, kind)
            problems.append(f"{path} is unreadable ({first_line(error)}); left out: {REMEDY}")
            continue
        if kind == "evals":
            table = schema1.upgrade_evals(table)
        if table.schema.equals(schema):
            tables.append(table)
            if complete and not table.num_rows:
                problems.append(f"{path} has no rows, and its run is complete: {REMEDY}")
        else:
            problems.append(f"{path} has columns {table.schema.names}, not {schema.names}; left out")
    table = pa.concat_tables(tables) if tables else schema.empty_table()
    if complete:
        return Rows(table, problems=problems)
    kept, lost_seconds = _without_repeats(table, {n: attempt["first_step"] for n, attempt in readable.items()})
    return Rows(kept, lost_seconds, problems)


def last_gradient_norm(run_dir: Path) -> float | None:
    """The gradient norm of the last step of a complete run; None where its steps are unreadable or there are none."""
    import pyarrow as pa

    try:
        steps = read_parquet(run_dir / "steps.parquet", columns=["step", "gradient_norm"])
    except (OSError, ValueError, pa.ArrowException):
        return None  # `read_rows` names the file
    return last_of(steps)


def last_of(steps: pa.Table) -> float | None:
    """The gradient norm of the last of the steps; None where there is none, or where it is not finite."""
    norms = dict(zip(steps["step"].to_pylist(), steps["gradient_norm"].to_pylist(), strict=True))
    norm = norms[max(norms)] if norms else None
    return norm if norm is not None and math.isfinite(norm) else None


def _without_repeats(table: pa.Table, first_steps: Mapping[int, int]) -> tuple[pa.Table, float]:
    """The table without rows that a later attempt repeated, and the seconds that these rows had taken."""
    import numpy as np

    attempt, step = table["attempt"].to_numpy(), table["step"].to_numpy()
    keep = np.ones(len(step), dtype=bool)
    for number, first_step in first_steps.items():
        keep &= (attempt >= number) | (step < first_step)
    order = np.lexsort((attempt, step))
    order = order[keep[order]]
    # Two attempts that both start at step 1 may both have evaluated at step 0; keep the rows of the later attempt.
    last_row_of_step = np.searchsorted(step[order], step[order], side="right") - 1
    order = order[attempt[order] == attempt[order][last_row_of_step]]
    seconds = table["seconds"].to_numpy()
    return table.take(order), float(np.nansum(seconds) - np.nansum(seconds[order]))
