"""What a sweep will cost, before anything runs: a row for every run, from its configuration alone."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from experiments import flops
from experiments.config import RunConfig
from experiments.sweep import epochs


def rows(runs: Sequence[RunConfig], flops_per_second: float) -> list[dict[str, Any]]:
    """One object a run, for `--format json`. `device_hours` is the forecast: exact FLOPs at a sustained rate."""
    result = []
    for run in runs:
        counts = flops.count(run.model, run.train.tokens, run.train.sequence_length)
        result.append(
            {
                "run_id": run.run_id,
                "arm": run.arm,
                "size": run.size,
                "seed": run.seed,
                **asdict(counts),
                "steps": run.train.steps,
                "epochs": epochs(run),
                "learning_rate": run.train.learning_rate,
                "batch_tokens": run.train.batch_sequences * run.train.sequence_length,
                "device_hours": counts.flops_exact / flops_per_second / 3600,
            }
        )
    return result


def render(rows: Sequence[dict[str, Any]], flops_per_second: float) -> str:
    """The rows as a table for people, sizes apart, with totals."""
    width = max(len(row["run_id"]) for row in rows)
    lines = [f"{'run':{width}} {'N':>8} {'N_nonemb':>8} {'D':>8} {'steps':>7} {'epochs':>6} {'FLOPs':>10} {'hours':>8}"]
    for previous, row in zip([None, *rows], rows, strict=False):
        if previous and previous["size"] != row["size"]:
            lines.append("")
        numbers = (short(row[key]) for key in ("parameters", "parameters_nonembedding", "tokens"))
        n, n_nonemb, d = numbers
        lines.append(
            f"{row['run_id']:{width}} {n:>8} {n_nonemb:>8} {d:>8} {row['steps']:>7} {row['epochs']:>6.2f} "
            f"{row['flops_exact']:>10.3e} {hours(row['device_hours']):>8}"
        )
    total = sum(row["flops_exact"] for row in rows)
    lines += [
        "",
        f"{len(rows)} runs, {total:.3e} FLOPs, {hours(total / flops_per_second / 3600)} device-hours "
        f"at {flops_per_second / 1e12:g} TFLOP/s a device",
    ]
    return "\n".join(lines)


def short(count: int) -> str:
    """1234567 -> 1.235M."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.4g}{unit}"
    return str(count)


def hours(value: float) -> str:
    """Three digits, whatever the scale."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
