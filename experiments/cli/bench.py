"""The verb that times this GPU."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.bench import kernels
from experiments.cli.arguments import Subparsers


def register(subparsers: Subparsers) -> None:
    """Add the verb; its parser has a default `run(args) -> exit code`."""
    example = (
        "examples:\n"
        "  dynconv bench kernels --quick                          # the paper's shape, as a table\n"
        "  dynconv bench kernels -o kernels.parquet               # every shape, to keep; `dynconv plot` draws it\n"
        "  dynconv bench kernels --quick --no-compiled --json     # ours and installed peers, for scripts\n"
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
        help="every op at the shapes with a bar, beside its floor",
        description=kernels.__doc__,
        epilog=example,
        formatter_class=layout,
    )
    parser.add_argument("--quick", action="store_true", help="only the paper's shape")
    parser.add_argument(
        "--no-compiled", action="store_false", dest="compiled", help="leave out torch.compile of the reference (slow)"
    )
    parser.add_argument(
        "--against", action="append", default=[], metavar="MODULE:FUNCTION",
        help="time a function that takes our arguments; its name says static, headwise or lowrank",
    )  # fmt: skip
    parser.add_argument("--format", choices=("text", "csv", "json"), default="text", help="of the rows (default text)")
    parser.add_argument("--json", dest="format", action="store_const", const="json", help="the same as --format json")
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="write the rows as .parquet or .csv")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the bars as .svg, .pdf or .png")
    parser.set_defaults(run=kernels.run)
