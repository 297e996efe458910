"""`dynconv bench kernels`: what the convolutions cost on this GPU, beside the fewest microseconds their bytes allow.

A row is one op, pass and shape: `us`, the median over replays of a CUDA graph (pass "host": host time of one eager
forward and backward); `bytes` that must move, every input read and every output written once; `fraction` of the
device's copy bandwidth, measured here, that these bytes in that time come to.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.errors import WorkFailed
from analysis.runlog import write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import Tensor

Subparsers = argparse._SubParsersAction  # argparse has no public name for it
OPS = ("static", "headwise", "lowrank")
COLUMNS = ["op", "pass", "B", "T", "D", "W", "R", "H", "dtype", "static", "us", "bytes", "fraction"]
COLUMNS += ["provider", "device", "versions", "commit"]
_CALLS_A_GRAPH, _REPLAYS, _HOST_CALLS = 10, 30, 50


@dataclass(frozen=True)
class Case:
    op: str
    B: int = 4
    T: int = 4096
    D: int = 2048
    W: int = 4
    R: int | None = None  # low-rank: rank
    H: int | None = None  # head-wise: heads
    dtype: str = "bfloat16"
    static: bool = False  # beside the dynamic filter
    segments: int = 1  # low-rank: Q, K and V in one launch are three

    def bytes(self, backward: bool) -> int:
        """What must move: forward, or forward and backward."""
        size = 4 if self.dtype == "float32" else 2
        tokens = self.B * self.T
        per_token = {"static": 0, "headwise": (self.H or 0) * self.W, "lowrank": (self.R or 0) * self.segments}
        x, made = tokens * self.D * size, tokens * per_token[self.op] * size
        parameters = ((self.R or 0) + (self.static or self.op == "static")) * self.W * self.D * 4
        if not backward:
            return 2 * x + made + parameters
        return 5 * x + 3 * made + 3 * parameters

    def inputs(self) -> dict[str, Tensor]:
        """Random inputs on the GPU, by argument; parameters in float32, as autocast leaves them."""
        import torch

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda")

        dtype = getattr(torch, self.dtype)
        made = {"x": normal(self.B, self.T, self.D).to(dtype)}
        if self.op == "static":
            made["weight"] = normal(self.W, self.D)
        if self.op == "headwise":
            assert self.H is not None
            made["weight"] = normal(self.B, self.T, self.H, self.W).to(dtype)
        if self.op == "lowrank":
            assert self.R is not None
            made["z"] = normal(self.B, self.T, self.R * self.segments).to(dtype)
            made["U"] = normal(self.R, self.W * self.D) / self.R**0.5
        if self.static:
            made["static_w"] = normal(self.W, self.D)
        return {name: value.requires_grad_() for name, value in made.items()}

    def options(self) -> dict[str, Any]:
        split = {} if self.segments == 1 else {"segments": (self.D // self.segments,) * self.segments}
        return {"residual": True} | split


def cases(quick: bool) -> list[Case]:
    """The shapes with a bar, and, unless quick, those that look for cliffs in T, D and dtype."""
    barred = [Case("lowrank", R=16), Case("lowrank", R=15, static=True), Case("lowrank", R=16, static=True)]
    barred += [Case("headwise", H=2048 // h, static=static) for h in (1, 4, 16) for static in (False, True)]
    barred += [Case("static"), Case("lowrank", D=3 * 2048, R=16, static=True, segments=3)]
    if quick:
        return barred
    shapes: list[dict[str, Any]] = [
        {"T": 1024},
        {"T": 32768},
        {"D": 768},
        {"D": 1024},
        {"D": 4096},
        {"T": 1024, "D": 768},
    ]
    shapes += [{"dtype": "float16"}]
    others = [Case("lowrank", R=16, static=True, **shape) for shape in shapes]
    others += [Case("static", **shape) for shape in shapes]
    for shape in shapes:
        others.append(Case("headwise", H=shape.get("D", 2048) // 16, **shape))
    return barred + others


def measure(case: Case, function: Callable[..., Tensor]) -> Iterator[tuple[str, float]]:
    """(pass, microseconds) of one implementation of a case's op."""
    import torch

    inputs, options = case.inputs(), case.options()
    dy = torch.randn_like(inputs["x"])

    def forward() -> Tensor:
        return function(**inputs, **options)

    def both() -> None:
        torch.autograd.grad(function(**inputs, **options), list(inputs.values()), dy)

    with torch.no_grad():
        yield "fwd", replay_time(forward)
    yield "fwd+bwd", replay_time(both)
    yield "host", host_time(both)


def replay_time(work: Callable[[], object]) -> float:
    """Median microseconds of one call, from replays of a CUDA graph of several."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile and allocate outside the capture
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS_A_GRAPH):
            work()
    graph.replay()
    times = []
    for _ in range(_REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / _CALLS_A_GRAPH)
    return statistics.median(times)


def host_time(work: Callable[[], object]) -> float:
    """Median microseconds until an eager call returns, the GPU being idle."""
    import torch

    times = []
    for _ in range(_HOST_CALLS + 10):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        times.append((time.perf_counter() - begin) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times[10:])


def copy_bandwidth() -> float:
    """Bytes a microsecond of a large copy on the device, reading and writing.

    By a kernel, timed eagerly: a copy_ replayed in a graph read 2.8 TB/s on an H200 that copies 4.25.
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


def providers(compiled: bool, against: list[str]) -> dict[str, dict[str, Callable[..., Any]]]:
    """Provider -> op -> its function, called with our arguments."""
    import torch

    import dynconv
    from dynconv.ops import reference

    ours: dict[str, Callable[..., Any]] = {
        "static": dynconv.static_convolution,
        "headwise": dynconv.headwise_dynamic_convolution,
        "lowrank": dynconv.lowrank_dynamic_convolution,
    }
    found: dict[str, dict[str, Callable[..., Any]]] = {"dynconv": ours}
    if compiled:

        @torch.compile(dynamic=False)
        def plain(x, weight=None, z=None, U=None, static_w=None, residual=False, segments=()):  # type: ignore[no-untyped-def]  # as ours
            static = weight if weight is not None and weight.dim() == 2 else static_w
            dynamic = U if U is not None else weight if weight is not None and weight.dim() == 4 else None
            return reference.convolve(x, z, dynamic, static, None, segments, residual)

        found["torch.compile"] = dict.fromkeys(OPS, plain)
    found |= {name: {"static": peer} for name, peer in _installed_peers()}
    for target in against:
        module, _, name = target.partition(":")
        op = next((op for op in OPS if op in name.replace("_", "")), None)
        if op is None:
            raise ValueError(f"--against wants module:function whose name says {', '.join(OPS)}; got {target}")
        found[target] = {op: getattr(importlib.import_module(module), name)}
    return found


def _installed_peers() -> Iterator[tuple[str, Callable[..., Any]]]:
    """The published static convolutions, where installed. They hold the taps oldest first, so ours are flipped."""
    if importlib.util.find_spec("causal_conv1d"):
        from causal_conv1d import causal_conv1d_fn  # type: ignore[import-not-found]  # not a dependency

        def channels_first(x: Tensor, weight: Tensor, residual: bool) -> Tensor:
            y: Tensor = causal_conv1d_fn(x.transpose(1, 2), weight.flip(0).t().to(x.dtype)).transpose(1, 2)
            return y + x if residual else y

        yield "causal-conv1d", channels_first
    if importlib.util.find_spec("fla"):
        from fla.modules.convolution import causal_conv1d  # type: ignore[import-not-found]  # not a dependency

        def channels_last(x: Tensor, weight: Tensor, residual: bool) -> Tensor:
            y: Tensor = causal_conv1d(x, weight.flip(0).t().contiguous(), residual=x if residual else None)[0]
            return y

        yield "flash-linear-attention", channels_last


def table(chosen: list[Case], found: dict[str, dict[str, Callable[..., Any]]]) -> pd.DataFrame:
    """One row a case, pass and provider."""
    import pandas as pd
    import torch
    import triton
    from tqdm import tqdm

    bandwidth = copy_bandwidth()
    where = {
        "device": torch.cuda.get_device_name(),
        "versions": f"torch {torch.__version__}, triton {triton.__version__}",
        "commit": _commit(),
    }
    rows = []
    work = [(case, provider) for provider, ops in found.items() for case in chosen if case.op in ops]
    for case, provider in tqdm(work, desc="bench", file=sys.stderr):
        try:
            measured = list(measure(case, found[provider][case.op]))
        except (RuntimeError, TypeError, ValueError) as error:
            print(f"{provider} {case.op}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        for name, us in measured:
            count = case.bytes(backward=name != "fwd")
            shape = {key: value for key, value in asdict(case).items() if key != "segments"}
            row = shape | {"pass": name, "us": us, "provider": provider} | where
            rows.append(row | {"bytes": count, "fraction": None if name == "host" else count / us / bandwidth})
    return pd.DataFrame(rows)[COLUMNS].astype({"R": "Int64", "H": "Int64"})


def _commit() -> str | None:
    command = ["git", "rev-parse", "--verify", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return found.stdout.strip() if found.returncode == 0 else None


def bars(rows: pd.DataFrame) -> Figure:
    """Forward and backward of every op at the paper's shape, and the floor: its bytes at the copy bandwidth."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from analysis.figures import BLACK, COLOURS, STYLE

    shown = rows[
        (rows["pass"] == "fwd+bwd") & (rows["T"] == 4096) & (rows["D"] == 2048) & (rows["dtype"] == "bfloat16")
    ]
    shown = shown.assign(label=[_label(row) for _, row in shown.iterrows()])
    labels, names = list(dict.fromkeys(shown["label"])), list(dict.fromkeys(shown["provider"]))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.8 + 0.34 * len(labels) * len(names)), layout="constrained")
        axes = figure.subplots()
        height = 0.8 / len(names)
        for index, name in enumerate(names):
            part = shown[shown["provider"] == name].set_index("label").reindex(labels)
            at = [place + (index - (len(names) - 1) / 2) * height for place in range(len(labels))]
            drawn = axes.barh(at, part["us"], height, color=COLOURS[index], label=name)
            axes.bar_label(drawn, [f"{us:.0f}" if us == us else "" for us in part["us"]], fontsize=7, padding=2)
        first = shown.drop_duplicates("label").set_index("label").reindex(labels)
        floor = first["us"] * first["fraction"]
        axes.vlines(
            floor, [p - 0.45 for p in range(len(labels))], [p + 0.45 for p in range(len(labels))],
            color=BLACK, lw=1.5, label="floor",
        )  # fmt: skip
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set_xlabel("forward and backward (µs)")
        axes.legend(frameon=False, fontsize=8)
    return figure


def _label(row: pd.Series[Any]) -> str:
    size = {
        "static": "",
        "headwise": f" h={row['D'] // row['H'] if row['op'] == 'headwise' else 0}",
        "lowrank": f" R={row['R']}",
    }
    return f"{row['op']}{size[row['op']]}{' + static' if row['static'] else ''}"


def _write(rows: pd.DataFrame, path: Path) -> None:
    writers = {".parquet": lambda to: rows.to_parquet(to, index=False), ".csv": lambda to: rows.to_csv(to, index=False)}
    if path.suffix not in writers:
        raise ValueError(f"-o wants a .parquet or .csv; got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, writers[path.suffix])


def run(args: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        raise WorkFailed("bench kernels times a GPU, and none is visible here")
    rows = table(cases(args.quick), providers(args.compiled, args.against))
    print(rows.drop(columns=["device", "versions", "commit"]).to_csv(index=False, float_format="%.4g"), end="")
    if args.output:
        _write(rows, args.output)
    if args.figure:
        from analysis import figures

        figures.save(bars(rows), args.figure)
    return 0


def register(subparsers: Subparsers) -> None:
    """Add the verb; its parser has a default `run(args) -> exit code`."""
    example = "examples:\n  dynconv bench kernels --against mypackage.ops:lowrank_convolution -o kernels.parquet"
    layout = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser(
        "bench", help="time the convolutions on this GPU", description=__doc__, epilog=example, formatter_class=layout
    )
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    kernels = what.add_parser(
        "kernels",
        help="every op at the shapes with a bar, beside its floor",
        description=__doc__,
        epilog=example,
        formatter_class=layout,
    )
    kernels.add_argument("--quick", action="store_true", help="only the paper's shape")
    kernels.add_argument(
        "--no-compiled", action="store_false", dest="compiled", help="leave out torch.compile of the reference (slow)"
    )
    kernels.add_argument(
        "--against", action="append", default=[], metavar="MODULE:FUNCTION",
        help="time a function that takes our arguments; its name says static, headwise or lowrank",
    )  # fmt: skip
    kernels.add_argument("-o", dest="output", type=Path, metavar="FILE", help="write the rows as .parquet or .csv")
    kernels.add_argument("--figure", type=Path, metavar="FILE", help="draw the bars as .svg, .pdf or .png")
    kernels.set_defaults(run=run)
