"""Sustained rates of a sweep's runs from throughput that was measured, for the forecast of `plan`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.logs.selection import some
from analysis.logs.throughput import ONE_KIND, read_throughput
from experiments.design.config import RunConfig

if TYPE_CHECKING:
    import pandas as pd


def measured_rates(
    runs: Sequence[RunConfig],
    gpus: Mapping[str, int],  # of a run, by size
    path: Path,  # of a file that `dynconv bench train` wrote, or one with its columns
) -> tuple[dict[str, float], list[str]]:
    """Run id -> sustained TFLOP/s of one GPU, where throughput was measured; and the arms and sizes where it was not.

    A run's rate is that of its arm, size, sequence length, vocabulary, optimizer and number of GPUs, of the fastest
    batch. Raises ValueError where a rate was measured on several devices, versions or commits.
    """
    measured = read_throughput(path)
    rates: dict[str, float] = {}
    lacking: dict[str, None] = {}
    for run in runs:
        rows = _rows(measured, run, gpus[run.size])
        for column, plural in ONE_KIND.items():
            if rows[column].nunique() > 1:
                values = some(sorted(rows[column].dropna().unique()))
                raise ValueError(
                    f"{path}: the throughput of {run.arm} at {run.size} is of several {plural} ({values}); "
                    "leave the rows of one in it"
                )
        if rows.empty:
            several = f" on {gpus[run.size]} GPUs" if gpus[run.size] > 1 else ""
            lacking[f"{run.arm} at {run.size}{several}"] = None
            continue
        per_token = run.counts.flops_exact / run.counts.tokens
        rates[run.run_id] = float(rows["tokens_per_second"].max()) * per_token / gpus[run.size] / 1e12
    return rates, list(lacking)


def _rows(measured: "pd.DataFrame", run: RunConfig, gpus: int) -> "pd.DataFrame":
    """The measurements that are of this run's kind; what a row does not say may be anything, but for the GPUs: one."""
    wanted = {
        "sequence": str(run.train.sequence_length),
        "vocabulary": str(run.model.vocabulary),
        "optimizer": run.train.optimizer.kind,
    }
    rows = measured[(measured["size"] == run.size) & (measured["arm"] == run.arm)]
    for column, value in wanted.items():
        rows = rows[rows[column].isna() | (rows[column] == value)]
    return rows[rows["gpus"].fillna("1") == str(gpus)]
