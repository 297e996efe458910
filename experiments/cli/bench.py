"""The verb that times the convolutions on this GPU: bench."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.bench import kernels
from experiments.cli.arguments import Subparsers


def register(subparsers: Subparsers) -> None:
    """Add the verb of this file."""
    example = (
        "examples:\n"
        "  dynconv bench kernels --quick                          # only the shape of the paper's timings\n"
        "  dynconv bench kernels -o kernels.parquet               # every shape; `dynconv plot` draws the file\n"
        "  dynconv bench kernels --quick --no-compiled --json     # our kernels and installed packages, as JSON\n"
        "  dynconv bench kernels --against mypackage.ops:lowrank_convolution"
    )
    layout = argparse.RawDescriptionHelpFormatter
    group = subparsers.add_parser(
        "bench",
        help="time the convolutions on this GPU",
        description=kernels.__doc__,
        epilog=example,
        formatter_class=layout,
    )
    what = group.add_subparsers(dest="what", required=True, metavar="WHAT")
    parser = what.add_parser(
        "kernels",
        help="time every convolution at the shapes of the paper and others, beside the time of its memory traffic",
        description=kernels.__doc__,
        epilog=example,
        formatter_class=layout,
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
    parser.add_argument(
        "--format", choices=("text", "csv", "json"), default="text", help="how to print the rows (default text)"
    )
    parser.add_argument("--json", dest="format", action="store_const", const="json", help="the same as --format json")
    parser.add_argument(
        "-o", dest="output", type=Path, metavar="FILE", help="write the rows to a .parquet or .csv file"
    )
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help="draw the times as bars to a .svg, .pdf or .png file"
    )
    parser.set_defaults(run=kernels.run)
