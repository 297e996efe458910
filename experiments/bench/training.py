"""`dynconv bench train`: how fast this machine trains each arm at each size, by the trainer that runs use.

Arms take their steps in turn, round after round, on random tokens. A step is one micro-batch of a run, or several, and
one update of the optimizer; `batch` counts sequences of a micro-batch on each GPU. With --device cpu, `gpus` counts
processes. Tokens a second are of all GPUs, from the median over rounds of the median step. MFU is model FLOPs a second
(every matrix product with the LM head, causal attention as half, the convolutions; backward twice the forward) over the
card's dense bf16 peak, and missing where the peak is not known.
Slowdown, what an arm adds to a step, what an optimizer adds, and the efficiency of several GPUs compare rounds in
pairs, with 95% intervals (Student's, of logarithms for ratios; none below three rounds). Rows are kept in
results/measured/<card>/training.parquet: `dynconv table STORE --throughput` makes multipliers in seconds from it, and
`dynconv plot` draws it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.errors import WorkFailed
from experiments import source
from experiments.bench.kernels import check_target
from experiments.bench.trials import Request, Trial, trials
from experiments.terminal import align, warn

if TYPE_CHECKING:
    from experiments.bench.stepping import Outcome

Row = dict[str, Any]
PARTS = ("mixer", "ffn", "convolutions", "head")


def run(args: argparse.Namespace) -> int:
    """`dynconv bench train`. Returns the exit status. Raises KeyboardInterrupt after an interrupted size was kept."""
    from experiments.bench.throughput import merge, rows_of

    request = _request(args)
    where, output, peak = _place(args)
    rows: list[Row] = []
    for size in request.sizes:
        chosen, outcomes = _measured(request, size, args)
        found = rows_of(chosen, outcomes, peak, where)
        merge(found, output)  # after each size, so that they are kept if a later one fails
        kernels = [[asdict(kernel) for kernel in outcome.kernels] for outcome in outcomes]
        shown = [row | ({"kernels": own} if args.profile else {}) for row, own in zip(found, kernels, strict=True)]
        if args.format == "text":
            print("" if rows else f"{where['device']}, {where['versions']}", render(shown), sep="\n", flush=True)
        rows += shown
        if len(outcomes[0].seconds) < args.rounds:
            raise KeyboardInterrupt
    if args.format == "json":
        print(json.dumps(rows, indent=1, allow_nan=False))
    warn(f"{output} has these rows")
    if args.figure:
        from analysis.pages.style import save
        from analysis.pages.throughput_figures import throughput_panels
        from experiments.bench.throughput import table

        save(throughput_panels(table(rows)), args.figure)
    return 0


def _request(args: argparse.Namespace) -> Request:
    """What to measure. Raises ValueError, before anything is measured, for illegal options and sizes."""
    request = Request(
        sizes=tuple(dict.fromkeys(args.sizes)),
        arms=tuple(args.arms),
        optimizers=tuple(dict.fromkeys(args.optimizer)),
        sweep=args.sweep,
        batch=args.batch,
        micro_batches=args.micro_batches,
        sequence=args.sequence,
        gpus=args.gpus,
        parallel=args.parallel or "ddp",
        recompute=args.recompute,
        fused=tuple(word == "on" for word in dict.fromkeys(args.fused)),
    )
    if args.parallel and args.gpus == 1:
        raise ValueError(f"--parallel {args.parallel} is for several GPUs; got --gpus 1; give --gpus 2 or leave it out")
    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1; got {args.rounds}")
    for name, value in (("--seconds", args.seconds), ("--peak", args.peak)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be above zero and finite; got {value}")
    for size in request.sizes:
        trials(request, size, micro_batch_tokens=1)
    return request


def _place(args: argparse.Namespace) -> tuple[dict[str, str | None], Path, float | None]:
    """(device, versions and commit; the file for the rows; the device's peak in FLOP/s, None if it is not known).

    Also resolves `args.device` = "auto". Raises ValueError if the device is missing or a file cannot be written.
    """
    import torch

    from experiments.bench.throughput import PEAKS, earlier, machine

    seen = torch.cuda.device_count() if args.device != "cpu" else 0
    if args.device == "auto":
        args.device = "cuda" if seen else "cpu"
        if args.gpus > 1 and not seen:
            raise ValueError(f"--gpus {args.gpus}: torch sees no GPU here; --device cpu has processes instead")
    if args.device == "cpu" and len(set(args.fused)) > 1:
        raise ValueError("--fused off on compares kernels of a GPU; got a CPU, which has none of them; leave it out")
    if args.device == "cuda" and not seen:
        raise ValueError("--device cuda: torch sees no GPU here; leave it out to measure the CPU")
    if args.device == "cuda" and seen < args.gpus:
        raise ValueError(f"--gpus {args.gpus}: torch sees {seen} GPUs here; ask for at most as many")
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    others = {torch.cuda.get_device_name(number) for number in range(args.gpus)} if args.device == "cuda" else {device}
    if len(others) > 1:
        raise ValueError(f"--gpus {args.gpus} are of several kinds ({', '.join(sorted(others))}); choose equal ones")
    output = args.output or Path("results/measured") / machine(device) / "training.parquet"
    check_target("-o", output, (".parquet",))
    earlier(output)  # Fail now if the rows of this file could not be kept.
    check_target("--figure", args.figure, (".svg", ".pdf", ".png"))
    packages = [f"torch {torch.__version__}"]
    for package in importlib.metadata.packages_distributions().get("triton", []):
        packages.append(f"triton {importlib.metadata.version(package)}")
    where = {"device": device, "versions": ", ".join(packages), "commit": source.commit("+changes")}
    return where, output, PEAKS.get(device) if args.peak is None else args.peak * 1e12


def _measured(request: Request, size: str, args: argparse.Namespace) -> tuple[list[Trial], list[Outcome]]:
    """(trials, outcomes) of a size. A batch that does not fit into memory is halved until it does.

    Raises WorkFailed if no batch fits, and ValueError, which names a batch that fits, if the user's batch does not.
    """
    import torch

    from experiments.bench.stepping import DoesNotFit, Settings, measure
    from experiments.training.memory import gpu_memory
    from experiments.training.trainer import MICRO_BATCH_TOKENS

    batch, wanted = None, ""
    while True:
        chosen = trials(request, size, MICRO_BATCH_TOKENS, batch)
        dry = bool(wanted and request.batch)  # The user's batch does not fit: only look for one that does.
        rounds = 0 if dry else args.rounds
        try:
            outcomes = measure(
                Settings(tuple(chosen), args.device, rounds, args.seconds, args.profile and not dry, progress=True)
            )
        except DoesNotFit as problem:
            name = str(problem)
        else:
            break
        tried, length = chosen[0].batch, chosen[0].run.train.sequence_length
        room = f" in {gpu_memory(torch.device('cuda', 0))}" if args.device == "cuda" else ""
        wanted = wanted or f"{name}: a batch of {tried} sequences of {length} tokens does not fit{room}"
        group = max(trial.run.model.sequence_group for trial in chosen)  # sequences that read one another
        batch = tried // 2 // group * group
        if not batch:
            raise WorkFailed(f"{wanted}, nor does any smaller one; give a shorter --sequence, or a smaller size")
    if wanted and request.batch:
        raise ValueError(f"{wanted}; {batch} fit: --batch {batch}")
    if wanted:
        warn(f"{wanted}; {batch} fit and are measured")
    return chosen, outcomes


def render(rows: Sequence[Row]) -> str:
    """The rows of one size as text: a line for each trial, and the kernels of each if they were recorded."""
    first = rows[0]
    several = [name for name in ("optimizer", "fused", "gpus") if len({row[name] for row in rows}) > 1]
    scaled = any(row["efficiency"] is not None for row in rows)
    cpu = first["device"] == "cpu"
    names = ["processes" if name == "gpus" and cpu else name for name in several]
    headings = ["arm", *names, "ms a step", "95%", "adds ms", "95%", "k tokens/s", "MFU", "GiB", "slowdown", "95%"]
    headings += ["efficiency", "95%"] * scaled + ["mixer", "ffn", "conv", "head"]  # shares of the model FLOPs
    lines = []
    for row in rows:
        flops = sum(row[f"flops_{part}"] for part in PARTS)
        shown = row | {"fused": "on" if row["fused"] else "off"}
        cells = [row["arm"], *(str(shown[name]) for name in several), f"{row['step_ms']:.4g}"]
        cells += [*_estimate(row, "added_ms", "+.3g"), f"{row['tokens_per_second'] / 1e3:.4g}"]
        cells += ["" if row["mfu"] is None else f"{row['mfu']:.1%}"]
        cells += ["" if row["memory_gib"] is None else f"{row['memory_gib']:.1f}", *_estimate(row, "slowdown", ".3f")]
        cells += _estimate(row, "efficiency", ".3f") * scaled
        lines.append(cells + [f"{row[f'flops_{part}'] / flops:.1%}" for part in PARTS])
    headings.remove("95%")
    batches = f"{first['micro_batches']} micro-batches of " if first["micro_batches"] > 1 else "batch "
    shape = f"{batches}{first['batch']} {'in each process' if cpu else 'on each GPU'}, sequences of {first['sequence']}"
    shape += f", vocabulary {first['vocabulary']}"
    if first["recompute"] != "none":
        shape += f", activations computed again ({first['recompute']})"
    if not any(row["fused"] for row in rows):
        shape += ", convolutions not fused with their neighbours"
    shape += "; the last columns are shares of the model FLOPs"
    text = f"\n{first['size']}: {first['rounds']} rounds, {shape}\n{align(headings, lines)}\n"
    for row in rows:
        if row["optimizer_ms"] is not None:
            value, interval = _estimate(row, "optimizer_ms", "+.3g")
            against = f"{row['optimizer']} against {first['optimizer']}, {row['arm']}{_where(row)}"
            text += f"{against}: {value} ms {interval}\n"
    return text + "".join(_kernels(row) for row in rows if row.get("kernels"))


def _estimate(row: Row, name: str, form: str) -> list[str]:
    """The value of a comparison and its interval as two cells, which are empty if they are missing."""
    value, low, high = (row[name + end] for end in ("", "_low", "_high"))
    value = "" if value is None else f"{value:{form}}"
    return [value, "" if low is None else f"[{low:{form}}, {high:{form}}]"]


def _where(row: Row) -> str:
    """In words, the number of GPUs of a row, or of processes on a CPU, if it is above 1."""
    if row["gpus"] == 1:
        return ""
    return f" in {row['gpus']} processes" if row["device"] == "cpu" else f" on {row['gpus']} GPUs"


def _kernels(row: Row) -> str:
    """A table of the most expensive kernels of a row."""
    title = f"\n{row['arm']} {row['optimizer']}" + " not fused" * (not row["fused"]) + _where(row)
    lines = [
        [kernel["name"][:90], f"{kernel['milliseconds']:.3g}", f"{kernel['share']:.1%}"] for kernel in row["kernels"]
    ]
    return f"{title}\n{align(['kernel', 'ms a step', 'share'], lines)}\n"
