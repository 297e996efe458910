"""Computes the rows of `dynconv bench train` from the outcomes: throughput, utilisation, slowdowns with intervals.

The slowdown of an arm is its time per step over that of the first arm, with the same optimizer, number of GPUs and
`fused`. Arms are compared within each round, because clocks and temperature drift: the slowdown is the geometric mean
of the rounds' ratios, and its 95% interval is Student's t interval of the mean of their logarithms. The milliseconds
that an arm adds are the mean of the rounds' differences. Optimizers, and several GPUs with one, are compared likewise.
With fewer than SMALLEST_INTERVAL rounds there is no interval.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.errors import first_line
from analysis.logs.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd

    from experiments.bench.stepping import Outcome
    from experiments.bench.trials import Trial

# Dense bf16 FLOP/s by the driver's name of the device, from NVIDIA's data sheets of H100 SXM and H200 SXM.
PEAKS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
SMALLEST_INTERVAL = 3  # rounds
SETTING = (
    *("size", "arm", "optimizer", "batch", "micro_batches", "sequence", "vocabulary"),
    *("gpus", "parallel", "recompute", "fused", "device"),
)
COLUMNS = (
    *SETTING,
    "tokens_per_second",  # of all GPUs; from the median step
    "mfu",
    "memory_gib",  # peak of one GPU
    "against",  # the arm that this one is compared with
    *(
        f"{name}{end}"
        for name in ("slowdown", "added_ms", "optimizer_ms", "efficiency")
        for end in ("", "_low", "_high")
    ),
    "step_ms",
    "captured",
    "parameters",
    *(f"flops_{part}" for part in ("mixer", "ffn", "convolutions", "head")),  # of a step on all GPUs
    "rounds",
    "versions",
    "commit",
)
Estimate = tuple[float, float | None, float | None]  # (value, lower end, upper end of its 95% interval)


def ratio(mine: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """The geometric mean of the rounds' ratios mine / theirs, and its 95% interval."""
    estimate, low, high = _mean(np.log(np.array(mine) / np.array(theirs)))
    return float(np.exp(estimate)), _exponential(low), _exponential(high)


def difference(mine: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """The mean of the rounds' differences mine - theirs, and its 95% interval."""
    return _mean(np.array(mine) - np.array(theirs))


def _mean(values: np.ndarray) -> Estimate:
    """The mean and its 95% interval by Student's t distribution."""
    mean = float(values.mean())
    if len(values) < SMALLEST_INTERVAL:
        return mean, None, None
    from scipy.special import stdtrit

    half = float(stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / np.sqrt(len(values)))
    return mean, mean - half, mean + half


def _exponential(value: float | None) -> float | None:
    return None if value is None else float(np.exp(value))


def rows_of(
    trials: Sequence[Trial],  # of one size
    outcomes: Sequence[Outcome],
    peak: float | None,  # FLOP/s of one device; None: not known, so there is no MFU
    where: dict[str, Any],  # device, versions and commit
) -> list[dict[str, Any]]:
    """One row for each trial, with COLUMNS."""
    rows = []
    for trial, outcome in zip(trials, outcomes, strict=True):
        step, flops = statistics.median(outcome.seconds), trial.flops()
        row: dict[str, Any] = {
            "size": trial.run.size,
            "arm": trial.run.arm,
            "optimizer": trial.optimizer,
            "batch": trial.batch,
            "micro_batches": trial.micro_batches,
            "sequence": trial.run.train.sequence_length,
            "vocabulary": trial.run.model.vocabulary,
            "gpus": trial.gpus,
            "parallel": trial.parallel,
            "recompute": trial.recompute,
            "fused": trial.fused,
            "tokens_per_second": trial.tokens / step,
            "mfu": sum(flops.values()) / step / (peak * trial.gpus) if peak else None,
            "memory_gib": None if outcome.memory is None else outcome.memory / 2**30,
            "step_ms": 1e3 * step,
            "captured": outcome.captured,
            "parameters": trial.run.model.parameters(),
            "rounds": len(outcome.seconds),
            **{f"flops_{part}": count for part, count in flops.items()},
            **where,
        }
        rows.append(
            {name: (row | _comparisons(trials, outcomes, trial, outcome.seconds)).get(name) for name in COLUMNS}
        )
    return rows


def _comparisons(
    trials: Sequence[Trial], outcomes: Sequence[Outcome], trial: Trial, seconds: Sequence[float]
) -> dict[str, Any]:
    """The columns that compare a trial, whose steps took `seconds` in each round, with other trials."""

    def first(gpus: int, optimizer: str | None = None, arm: str | None = None) -> tuple[Trial, list[float]]:
        return next(
            (other, outcome.seconds)
            for other, outcome in zip(trials, outcomes, strict=True)
            if other.gpus == gpus
            and other.fused == trial.fused
            and optimizer in (None, other.optimizer)
            and arm in (None, other.run.arm)
        )

    reference, theirs = first(trial.gpus, optimizer=trial.optimizer)
    found: dict[str, Any] = {"against": reference.run.arm, "slowdown": 1.0, "added_ms": 0.0}
    if reference is not trial:
        found |= _named("slowdown", ratio(seconds, theirs)) | _named("added_ms", difference(seconds, theirs), 1e3)
    other, theirs = first(trial.gpus, arm=trial.run.arm)
    if other is not trial:
        found |= _named("optimizer_ms", difference(seconds, theirs), 1e3)
    if trial.gpus > 1:  # The batch grows with the GPUs, so with perfect scaling a step takes as long as on one.
        _, alone = first(1, optimizer=trial.optimizer, arm=trial.run.arm)
        found |= _named("efficiency", ratio(alone, seconds))
    return found


def _named(name: str, estimate: Estimate, unit: float = 1.0) -> dict[str, float | None]:
    """An estimate, multiplied by `unit`, as the columns NAME, NAME_low and NAME_high."""
    ends = ("", "_low", "_high")
    return {name + end: None if value is None else unit * value for end, value in zip(ends, estimate, strict=True)}


def machine(device: str) -> str:
    """A folder's name for a device: "NVIDIA H100 80GB HBM3" -> "h100"."""
    words = re.sub(r"[^a-z0-9]+", " ", device.lower()).split()
    kept = [word for word in words if word not in ("nvidia", "amd") and not re.fullmatch(r"\d+gb|hbm\d*\w?", word)]
    return "-".join(kept) or "device"


def earlier(path: Path) -> pd.DataFrame | None:
    """The rows that `merge` wrote into this file; None if there is no file. Raises ValueError for any other file."""
    import pandas as pd

    if not path.exists():
        return None
    try:
        old = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is unreadable ({first_line(error)}); move it away, or give -o another file") from None
    if "fused" not in old:  # The file was written before this setting existed.
        old["fused"] = False
    if missing := [name for name in SETTING if name not in old]:
        raise ValueError(f"{path} has no column {', '.join(missing)}; give -o another file")
    return old


def merge(rows: Sequence[dict[str, Any]], path: Path) -> pd.DataFrame:
    """Add rows to a file, replacing rows with the same SETTING. Returns the whole table.

    A file may therefore hold rows of several commits and versions, so compare these columns before comparing rows.
    Raises ValueError as `earlier` does.
    """
    import pandas as pd

    new = table(rows)
    if (old := earlier(path)) is not None:
        settings = [pd.MultiIndex.from_frame(frame[list(SETTING)]) for frame in (old, new)]
        kept = old[~settings[0].isin(settings[1])]
        new = pd.concat([kept, new], ignore_index=True) if len(kept) else new
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: new.to_parquet(temporary, index=False))
    return new


def table(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The rows as a table with a fixed type for each column, so that missing values do not change it."""
    import pandas as pd

    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    text = ("size", "arm", "optimizer", "parallel", "recompute", "device", "against", "versions", "commit")
    whole = ("batch", "micro_batches", "sequence", "vocabulary", "gpus", "parameters", "rounds")
    types = dict.fromkeys(COLUMNS, "float64") | dict.fromkeys(text, "string") | dict.fromkeys(whole, "int64")
    return frame.astype(types | {"captured": "bool", "fused": "bool"})
