"""The plan of a sweep: a row for every run with its size and cost, computed from its configuration alone."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from experiments.design.config import TEXT, TRUNK, RunConfig
from experiments.design.forecast import Rate
from experiments.terminal import align, short, span

HEADINGS = ("N_nonemb", "D", "steps", "epochs", "FLOPs", "devices", "forecast")


def rows(
    runs: Sequence[RunConfig],
    gpus: Mapping[str, int],  # size -> number of GPUs of a run
    rates: Mapping[str, Rate] | None = None,  # by run id
) -> list[dict[str, Any]]:
    """One dictionary for each run, as `--format json` prints it.

    `hours` is the forecast duration of a run with its evaluations, and `forecast_from` says what the forecast is based
    on. Both are None if the speed is not known. `teraflops_per_second` is the speed of one device.
    """
    result = []
    for run in runs:
        rate, devices = (rates or {}).get(run.run_id), gpus[run.size]
        per_token = run.counts.flops_exact / run.counts.tokens
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
                "gpus": devices,
                "tokens_per_second": rate and rate.tokens_per_second,
                "teraflops_per_second": rate and rate.tokens_per_second * per_token / devices / 1e12,
                "hours": rate and rate.hours(run),
                "forecast_from": rate and rate.source,
            }
        )
    return result


def render(plan: Sequence[dict[str, Any]]) -> str:
    """The rows as a table for a terminal, with totals. Each axis of the sweep is a column."""
    axes = list(dict.fromkeys(axis for row in plan for axis in row["vary"]))
    branching = any(row["trunk"] for row in plan)
    tasks = any(row["task"] != TEXT for row in plan)
    # A token uses only a part of N if there are experts, or if the embedding is not tied to the LM head.
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
    total = sum(row["flops_own"] for row in plan)  # A branch does not repeat the steps of its trunk.
    summary = f"{len(plan)} runs, {total:.3e} FLOPs; {_forecast(plan)}; nothing was submitted"
    return f"{align(headings, cells)}\n\n{summary}"


def _branch(row: Mapping[str, Any]) -> str:
    """For a branch the hash of its trunk's id, for a trunk "trunk", else ""."""
    if row["trunk"]:
        return str(row["trunk"]).rpartition("-")[2]
    return TRUNK if row["budget"] == TRUNK else ""


def _forecast(plan: Sequence[dict[str, Any]]) -> str:
    """In words, the sum of the device-hours and what it is based on, or how to get a forecast."""
    lacking = sum(row["hours"] is None for row in plan)
    if lacking:
        which = "" if lacking == len(plan) else f" of {lacking} of {len(plan)} runs"
        return (
            f"no forecast, since the speed{which} is not known: measure it by --calibrate, or give --throughput, or a "
            "--profile with teraflops_per_second"
        )
    hours = sum(row["gpus"] * row["hours"] for row in plan)
    counts = Counter(row["forecast_from"] for row in plan)
    whence = [f"{source} ({count} runs)" if len(counts) > 1 else source for source, count in counts.most_common()]
    return f"forecast {span(hours)} of one device, by {' and '.join(whence)}"
