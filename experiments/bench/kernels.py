"""`dynconv bench kernels`: time the convolutions on this GPU, and compare with the time of their memory traffic.

Each row is for one op, pass, shape and implementation. `us` is the median over replays of a CUDA graph, in microseconds
(with pass "host", the host time of one eager forward and backward pass). `bytes` is the least memory traffic: every
input is read once and every output is written once. `fraction` is `bytes` over `us`, relative to the copy bandwidth
that is measured on this device. The text table also shows the peak memory of a forward and backward pass without
inputs, output and gradients, as a multiple of the size of x.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.errors import WorkFailed, first_line
from analysis.logs.files import require_writable, write_atomically
from experiments import source
from experiments.bench.cases import Case, Provider, cases, providers
from experiments.terminal import align

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ["op", "pass", "B", "T", "D", "W", "R", "H", "dtype", "static", "us", "bytes", "fraction"]
COLUMNS += ["provider", "device", "versions", "commit"]
LARGEST_ERROR = 0.02  # relative RMS; correct results in bfloat16 differ by 0.005, and wrong ones by far more
_CALLS_PER_GRAPH, _REPLAYS, _HOST_CALLS, _HOST_WARM_UP = 10, 30, 50, 10


def measure(case: Case, provider: Provider) -> Iterator[tuple[str, float]]:
    """(pass, microseconds) of one implementation of a case's op."""
    import torch

    inputs, forward = provider.bind(case, case.inputs())
    dy = torch.randn_like(inputs["x"])

    def forward_and_backward() -> None:
        torch.autograd.grad(forward(), list(inputs.values()), dy)

    with torch.no_grad():
        yield "fwd", replay_time(forward)
    yield "fwd+bwd", replay_time(forward_and_backward)
    yield "host", host_time(forward_and_backward)


def transient_memory(case: Case, provider: Provider) -> float:
    """Peak memory of a forward and backward pass without inputs, output and gradients, over the size of x."""
    import torch

    inputs, forward = provider.bind(case, case.inputs())
    dy = torch.randn_like(inputs["x"])
    excess = 0
    for _ in range(2):  # Only the second pass counts: the first may compile, which allocates as well.
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        # Requested bytes are those before the allocator rounds up.
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        y = forward()
        gradients = torch.autograd.grad(y, list(inputs.values()), dy)
        peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
        excess = peak - before - sum(result.nbytes for result in (y, *gradients))
        del y, gradients
    return excess / inputs["x"].nbytes


def replay_time(work: Callable[[], object]) -> float:
    """Median microseconds of one call, from replays of a CUDA graph that holds several calls."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # Compile and allocate before the capture.
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS_PER_GRAPH):
            work()
    graph.replay()
    times = []
    for _ in range(_REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / _CALLS_PER_GRAPH)
    return statistics.median(times)


def host_time(work: Callable[[], object]) -> float:
    """Median microseconds until an eager call returns, on a GPU that is idle before the call."""
    import torch

    times = []
    for _ in range(_HOST_CALLS + _HOST_WARM_UP):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        times.append((time.perf_counter() - begin) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times[_HOST_WARM_UP:])


def copy_bandwidth() -> float:
    """Bytes per microsecond that a large elementwise kernel reads and writes.

    Not measured with copy_ in a CUDA graph: on an H200 that showed 2.8 TB/s, where this kernel reaches 4.25 TB/s.
    """
    import torch

    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(_REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        torch.neg(source, out=target)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return 2 * source.numel() * source.element_size() / statistics.median(times)


def table(chosen: list[Case], found: list[Provider], save: Callable[[pd.DataFrame], None]) -> pd.DataFrame:
    """One row for each case, provider and pass, with COLUMNS, and with `case` and `transient` for `render`.

    `save` is called with the rows so far after every case, so that they are kept if the process is killed.
    """
    import pandas as pd
    import torch
    import triton
    from tqdm import tqdm

    bandwidth = copy_bandwidth()
    where = {
        "device": torch.cuda.get_device_name(),
        "versions": f"torch {torch.__version__}, triton {triton.__version__}",
        "commit": source.commit("+changes"),
    }
    rows = []
    work = [(case, provider) for case in chosen for provider in found if case.op in provider.functions]
    bar = tqdm(work, desc="bench", file=sys.stderr)
    for case, provider in bar:
        bar.set_postfix_str(f"{case} {provider.name}")
        torch.compiler.reset()  # torch.compile stops compiling a function after 8 shapes.
        try:
            error = provider.error(case)
            if not error < LARGEST_ERROR:
                raise ValueError(
                    f"its output or a gradient differs from the reference by {error:.2g} (relative RMS); not timed"
                )
            measured, transient = list(measure(case, provider)), transient_memory(case, provider)
        except Exception as problem:  # Other packages may raise anything; continue with the rest.
            bar.write(f"{provider.name}, {case}: {first_line(problem)}", file=sys.stderr)
            continue
        for name, us in measured:
            count = case.bytes(backward=name != "fwd")
            shape = {key: value for key, value in asdict(case).items() if key != "segments"}
            row = shape | {"pass": name, "us": us, "provider": provider.name} | where
            row |= {"case": str(case), "transient": transient}
            rows.append(row | {"bytes": count, "fraction": None if name == "host" else count / us / bandwidth})
        frame = pd.DataFrame(rows)[[*COLUMNS, "case", "transient"]].astype({"R": "Int64", "H": "Int64"})
        save(frame[COLUMNS])
    if not rows:
        raise WorkFailed("nothing could be timed; the lines above say why")
    return frame


def render(rows: pd.DataFrame) -> str:
    """The rows as text: a table for each shape, with a line for each kernel and provider."""
    headings = ["kernel", "provider", "fwd us", "MB", "of copy", "fwd+bwd us", "MB", "of copy", "host us", "memory"]
    text = [f"{rows['device'].iloc[0]}, {rows['versions'].iloc[0]}"]
    for (b, t, d, w, dtype), same_shape in rows.groupby(["B", "T", "D", "W", "dtype"], sort=False):
        lines = []
        for (case, provider), part in same_shape.groupby(["case", "provider"], sort=False):
            passes = part.set_index("pass")
            cells = [case, provider]
            for name in ("fwd", "fwd+bwd"):
                us, count, fraction = passes.loc[name, ["us", "bytes", "fraction"]]
                cells += [f"{us:.1f}", f"{count / 1e6:.0f}", f"{fraction:.0%}"]
            lines.append([*cells, f"{passes.loc['host', 'us']:.0f}", f"{part['transient'].iloc[0]:.2f}"])
        text.append(f"\nB={b} T={t} D={d} W={w} {dtype}\n{align(headings, lines)}")
    return "\n".join(text)


def check_target(option: str, path: Path | None, kinds: tuple[str, ...]) -> None:
    """Make the folder of an output file. Raises ValueError, before any measurement, if it cannot be written."""
    if path is None:
        return
    if path.suffix not in kinds or path.is_dir():
        what = "a folder" if path.is_dir() else path
        raise ValueError(f"{option} wants a file {', '.join(kinds)}; got {what}; give it such a name")
    require_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)


def _save(rows: pd.DataFrame, path: Path | None) -> None:
    """Write the rows to a .parquet or .csv file, if one is wanted."""
    if path is not None:
        write = rows.to_parquet if path.suffix == ".parquet" else rows.to_csv
        write_atomically(path, lambda to: write(to, index=False))


def run(args: argparse.Namespace) -> int:
    """`dynconv bench kernels`. Returns the exit status."""
    import torch

    check_target("-o", args.output, (".parquet", ".csv"))
    check_target("--figure", args.figure, (".svg", ".pdf", ".png"))
    if not torch.cuda.is_available():
        raise ValueError("bench kernels times a GPU; torch sees no GPU here; run it where nvidia-smi shows one")
    found = providers(args.compiled, args.against)
    measured = table(cases(args.quick), found, lambda rows: _save(rows, args.output))
    rows = measured[COLUMNS]
    if args.format == "text":
        print(render(measured))
    elif args.format == "csv":
        print(rows.to_csv(index=False, float_format="%.4g"), end="")
    else:
        print(rows.to_json(orient="records", indent=1))
    if args.figure:
        from analysis.pages.kernel_figures import kernel_bars
        from analysis.pages.style import save

        save(kernel_bars(rows), args.figure)
    return 0
