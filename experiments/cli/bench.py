"""The verb that times the convolutions on this GPU, and training: bench kernels, bench train."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.bench import kernels, training
from experiments.cli.arguments import Subparsers, format_argument


def register(subparsers: Subparsers) -> None:
    """Add the verb of this file."""
    group = subparsers.add_parser(
        "bench",
        help="time the convolutions on this GPU, or whole training steps",
        description="Time the convolutions on this GPU (bench kernels), or whole training steps (bench train).",
        epilog="examples:\n  dynconv bench kernels --quick\n  dynconv bench train 300M --arms transformer lowrank-qkv",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = group.add_subparsers(dest="what", required=True, metavar="WHAT")
    _add_kernels(what)
    _add_train(what)


def _add_kernels(what: Subparsers) -> None:
    example = (
        "examples:\n"
        "  dynconv bench kernels --quick                          # only the shape of the paper's timings\n"
        "  dynconv bench kernels -o kernels.parquet               # every shape; `dynconv plot` draws the file\n"
        "  dynconv bench kernels --quick --no-compiled --json     # our kernels and installed packages, as JSON\n"
        "  dynconv bench kernels --against mypackage.ops:lowrank_convolution"
    )
    parser = what.add_parser(
        "kernels",
        help="time every convolution at the shapes of the paper and others, beside the time of its memory traffic",
        description=kernels.__doc__,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="only the shape of the paper's timings")
    parser.add_argument(
        "--no-compiled",
        action="store_false",
        dest="compiled",
        help="do not time torch.compile of the reference, which is slow to compile",
    )
    parser.add_argument(
        "--against", action="append", default=[], metavar="MODULE:FUNCTION",
        help="also time this function, which takes our arguments and has static, headwise or lowrank in its name",
    )  # fmt: skip
    format_argument(parser, ("text", "csv", "json"))
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the rows to a .parquet or .csv file")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help="draw the times as bars to a .svg, .pdf or .png file"
    )
    parser.set_defaults(run=kernels.run)


def _add_train(what: Subparsers) -> None:
    example = (
        "examples:\n"
        "  dynconv bench train 1M 16M 300M                          # the paper's arms, beside the plain Transformer\n"
        "  dynconv bench train 300M --arms transformer lowrank-qkv --profile\n"
        "  dynconv bench train 300M --optimizer adamw muon          # what an optimizer costs, on equal terms\n"
        "  dynconv bench train 300M --gpus 2                        # and how two GPUs scale against one\n"
        "  dynconv bench train 1M --sweep my-sweep.toml             # with the arms of a sweep file\n"
        "  dynconv bench train 25k --device cpu --rounds 3 --seconds 0.2\n"
        "  dynconv table STORE --throughput results/measured/h200/training.parquet"
    )
    parser = what.add_parser(
        "train",
        help="time whole training steps by size and arm: tokens a second, MFU, memory, slowdowns with intervals",
        description=training.__doc__,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sizes", nargs="+", metavar="SIZE", help="sizes of a ladder, as 1M or 300M")
    parser.add_argument(
        "--arms", nargs="+", default=[], metavar="ARM",
        help="the first is what others are compared with (default: those of the sweep file, or of the paper)",
    )  # fmt: skip
    parser.add_argument("--sweep", type=Path, metavar="FILE", help="a sweep file for arms, ladder and vocabulary")
    parser.add_argument(
        "--optimizer", nargs="+", default=[], metavar="NAME", help="adamw, muon or both (default: the arm's own)"
    )
    parser.add_argument(
        "--batch", type=int, metavar="N",
        help="sequences of a micro-batch on each GPU (default: as in a run; if it does not fit, half as many)",
    )  # fmt: skip
    parser.add_argument(
        "--micro-batches", type=int, default=1, metavar="N",
        help="micro-batches of a step on each GPU, over which gradients are accumulated (default 1)",
    )  # fmt: skip
    parser.add_argument("--sequence", type=int, metavar="T", help="tokens of a sequence (default: the ladder's)")
    text = "also time N GPUs together, or N processes on the CPU (default 1)"
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help=text)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), help="how several GPUs train (default ddp)")
    parser.add_argument(
        "--recompute", choices=("none", "attention-kept", "block"), default="none",
        help="activations that the backward pass computes again, to save memory (default none)",
    )  # fmt: skip
    parser.add_argument(
        "--fused", nargs="+", choices=("off", "on"), default=["on"],
        help="whether convolutions and their neighbours are one kernel, where there is one (default on; also: off on)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each arm (default 5)")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="length of a turn (default 1)")
    parser.add_argument("--profile", action="store_true", help="name the most expensive kernels of each arm")
    parser.add_argument(
        "--peak",
        type=float,
        metavar="TFLOPS",
        help="dense bf16 peak of the card in TFLOP/s, for the MFU of one not known",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    format_argument(parser)
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE",
        help="a .parquet file for the rows, which replace those of the same settings (default: above)",
    )  # fmt: skip
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the rows to a .svg, .pdf or .png file")
    parser.set_defaults(run=training.run)
