"""The verb that builds a dataset or shows what one holds: data."""

import argparse
import json
import sys
from pathlib import Path

from experiments.cli.arguments import Subparsers, add_verb, format_argument


def register(subparsers: Subparsers) -> None:
    """Add the verb of this file."""
    verb = add_verb(
        subparsers,
        "data",
        _data,
        "build the data of a sweep without submitting it, or show what a dataset holds",
        "build experiments/sweeps/demo.toml",
        "inspect ~/.cache/dynconv/data/python-512-0123456789abcdef --format json",
        "inspect ~/.cache/dynconv/data/python-512-0123456789abcdef --verify",
    )
    verb.add_argument("action", choices=("build", "inspect"))
    verb.add_argument("what", type=Path, metavar="SWEEP|DIR", help="build: a sweep file; inspect: a dataset's folder")
    verb.add_argument("--verify", action="store_true", help="read every file and compare it with its checksum")
    format_argument(verb)


def _data(args: argparse.Namespace) -> int:
    from experiments.data.build import build
    from experiments.data.dataset import Dataset
    from experiments.data.inspect import inspect, to_dict
    from experiments.design.data import default_cache
    from experiments.design.sweep import load_sweep

    path = args.what
    if args.action == "build":
        spec = load_sweep(args.what)[0].data
        if spec is None:
            raise ValueError(f"{args.what} trains on generated tasks, for which no data is built; submit it")
        path = build(spec, default_cache())
    if args.verify:
        Dataset.open(path).verify(progress=True)
        print(f"{path}: every file has its checksum", file=sys.stderr)
    print(json.dumps(to_dict(path), indent=1) if args.format == "json" else inspect(path))
    return 0
