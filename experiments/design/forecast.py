"""Forecasts how long a sweep's runs take, from a measured speed or the speed that a profile states."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.design.config import RunConfig
from experiments.design.model import BACKWARD_OVER_FORWARD

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Rate:
    """The speed of a run, and how it is known."""

    tokens_per_second: float  # of training, on all GPUs of the run
    source: str  # in words: what it was measured by, or who states it
    measured: bool = True  # with this model on such a device; False: stated by the profile
    whole: bool = False  # whether the rate includes evaluations, checkpoints and losses by preemption
    start_seconds: float = 0.0  # start-up and compilation, if they were measured

    def hours(self, run: RunConfig) -> float:
        """The hours that a run occupies its devices, without the steps of its trunk.

        An evaluation is a forward pass alone, so a held-out token counts 1 / (1 + BACKWARD_OVER_FORWARD).
        """
        tokens = run.own_tokens + (0.0 if self.whole else evaluated_tokens(run) / (1 + BACKWARD_OVER_FORWARD))
        return (tokens / self.tokens_per_second + self.start_seconds) / 3600


def evaluated_tokens(run: RunConfig) -> int:
    """Held-out tokens that all evaluations of a run read, each in a forward pass alone."""
    every = run.train.evaluate_every
    before = run.train.tokens - run.own_tokens  # tokens of the trunk
    steps = run.train.steps - run.branch_step  # a bound on the evaluations, since at most one follows a step
    evaluations = min(-(-run.train.tokens // every) - before // every, steps)
    return evaluations * run.train.held_out_sequences * run.train.sequence_length


def stated_rate(run: RunConfig, gpus: int, teraflops_per_second: float) -> Rate:
    """The speed of a run if each device sustains `teraflops_per_second`, as the profile states."""
    per_token = run.counts.flops_exact / run.counts.tokens
    words = f"the profile's {teraflops_per_second:g} TFLOP/s a device"
    return Rate(gpus * teraflops_per_second * 1e12 / per_token, words, measured=False)


def measured_rates(
    runs: Sequence[RunConfig],
    gpus: Mapping[str, int],  # size -> number of GPUs of a run
    fused: Mapping[str, bool],  # size -> `Execution.fused`
    path: Path,  # a file that `dynconv bench train` wrote, or one with its columns
) -> tuple[dict[str, Rate], list[str]]:
    """(run id -> speed, names of the arms and sizes whose speed is not in the file).

    The speed is that of the run's arm, size, sequence length, vocabulary, optimizer, number of GPUs and `fused`, with
    the fastest batch. Raises ValueError if it was measured on several devices, versions or commits.
    """
    from analysis.logs.selection import some  # imported here because it imports numpy, which `plan` may not need
    from analysis.logs.throughput import ONE_KIND, read_throughput

    measured = read_throughput(path)
    rates: dict[str, Rate] = {}
    lacking: dict[str, None] = {}
    for run in runs:
        rows = _rows(measured, run, gpus[run.size], fused[run.size])
        for column, plural in ONE_KIND.items():
            if rows[column].nunique() > 1:
                values = some(sorted(rows[column].dropna().unique()))
                raise ValueError(
                    f"{path}: the throughput of {run.arm} at {run.size} is of several {plural} ({values}); "
                    "leave the rows of one in it"
                )
        if rows.empty:
            several = f" on {gpus[run.size]} GPUs" if gpus[run.size] > 1 else ""
            other = _rows(measured, run, gpus[run.size], not fused[run.size])
            only = "" if other.empty else f" ({'only not fused' if fused[run.size] else 'only fused'})"
            lacking[f"{run.arm} at {run.size}{several}{only}"] = None
            continue
        words = f"{path}, of sequences that are not packed" if run.packed else f"{path}"
        rates[run.run_id] = Rate(float(rows["tokens_per_second"].max()), words)
    return rates, list(lacking)


def _rows(measured: "pd.DataFrame", run: RunConfig, gpus: int, fused: bool) -> "pd.DataFrame":
    """The measurements that apply to this run. A missing value matches any run, but a missing number of GPUs is 1."""
    wanted = {
        "sequence": str(run.train.sequence_length),
        "vocabulary": str(run.model.vocabulary),
        "optimizer": run.train.optimizer.kind,
        "fused": str(fused),
    }
    rows = measured[(measured["size"] == run.size) & (measured["arm"] == run.arm)]
    for column, value in wanted.items():
        rows = rows[rows[column].isna() | (rows[column] == value)]
    return rows[rows["gpus"].fillna("1") == str(gpus)]
