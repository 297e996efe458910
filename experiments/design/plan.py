"""What a sweep will cost: a row for every run, computed from its configuration before anything runs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from experiments.design.config import TEXT, TRUNK, RunConfig
from experiments.terminal import align, short, span

HEADINGS = ("N_nonemb", "D", "steps", "epochs", "FLOPs", "devices", "forecast")


@dataclass(frozen=True)
class Hardware:
    """The hardware that a profile gives to each run of one size."""

    gpus: int = 1
    teraflops_per_second: float | None = None  # sustained rate of one GPU; None: not known, so there is no forecast


def gpu_hours(run: RunConfig, teraflops_per_second: float | None) -> float | None:
    """The training time of a run on one device of this sustained rate; None where the rate is not known."""
    return None if teraflops_per_second is None else run.own_flops / (teraflops_per_second * 1e12) / 3600


def rows(
    runs: Sequence[RunConfig], hardware: Mapping[str, Hardware], measured: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """One dictionary for each run, as `--format json` prints it.

    `hardware` gives the hardware of each size, and `measured` rates by run id, which count before those of the
    hardware. `hours` is the forecast of the training time: exact FLOPs over the sustained rate of the run's GPUs, or
    None if the rate is not known.
    """
    result = []
    for run in runs:
        machine = hardware[run.size]
        rate = (measured or {}).get(run.run_id, machine.teraflops_per_second)
        result.append(
            {
                "run_id": run.run_id,
                "arm": run.arm,
                "baseline": run.baseline,
                "size": run.size,
                "budget": run.budget,
                "task": run.task_name,
                "seed": run.seed,
                "trunk": run.trunk,
                "vary": dict(run.vary),
                **asdict(run.counts),
                "flops_own": run.own_flops,
                "steps": run.train.steps,
                "epochs": run.epochs,
                "learning_rate": run.train.learning_rate,
                "batch_tokens": run.train.batch_sequences * run.train.sequence_length,
                "gpus": machine.gpus,
                "teraflops_per_second": rate,
                "hours": None if (hours := gpu_hours(run, rate)) is None else hours / machine.gpus,
            }
        )
    return result


def render(plan: Sequence[dict[str, Any]]) -> str:
    """The rows as a table to be read in a terminal, with totals. Each axis of the sweep is a column."""
    axes = list(dict.fromkeys(axis for row in plan for axis in row["vary"]))
    branching = any(row["trunk"] for row in plan)
    tasks = any(row["task"] != TEXT for row in plan)
    # Only with experts, or with an input embedding that the LM head does not share, does a token use a part of N.
    active = any(row["parameters_active"] != row["parameters"] for row in plan)
    added = (*(["task"] if tasks else []), *axes, *(["branch of"] if branching else []))
    headings = ("run", *added, "N", *(["N_active"] if active else []), *HEADINGS)
    cells = [
        (
            row["run_id"],
            *([row["task"]] if tasks else []),
            *(f"{row['vary'][axis]:g}" if axis in row["vary"] else "" for axis in axes),
            *([_branch(row)] if branching else []),
            short(row["parameters"]),
            *([short(row["parameters_active"])] if active else []),
            short(row["parameters_nonembedding"]),
            short(row["tokens"]),
            str(row["steps"]),
            "" if row["epochs"] is None else f"{row['epochs']:.2f}",
            f"{row['flops_exact']:.3e}",
            str(row["gpus"]),
            "" if row["hours"] is None else span(row["hours"]),
        )
        for row in plan
    ]
    total = sum(row["flops_own"] for row in plan)  # a branch does not repeat the steps of its trunk
    summary = f"{len(plan)} runs, {total:.3e} FLOPs; {_forecast(plan)}; nothing was submitted"
    return f"{align(headings, cells)}\n\n{summary}"


def _branch(row: Mapping[str, Any]) -> str:
    """The hash of the trunk from whose state a branch starts; of a trunk, that it is one; else nothing."""
    if row["trunk"]:
        return str(row["trunk"]).rpartition("-")[2]
    return TRUNK if row["budget"] == TRUNK else ""


def _forecast(plan: Sequence[dict[str, Any]]) -> str:
    lacking = sum(row["hours"] is None for row in plan)
    if lacking == len(plan):
        return "for a forecast give --profile with teraflops_per_second, or --throughput"
    if lacking:
        measure = "measure it by `dynconv bench train`"
        return f"no forecast: the speed of {lacking} of {len(plan)} runs is not known; {measure}"
    hours = sum(row["gpus"] * row["hours"] for row in plan)
    rates = [row["teraflops_per_second"] for row in plan]
    low, high = min(rates), max(rates)
    rate = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return f"forecast {span(hours)} of one device at {rate} TFLOP/s"
