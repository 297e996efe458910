"""The verb that fetches text, builds a dataset or shows what one holds: data."""

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
        "fetch a corpus of public text, build the data of a sweep without submitting it, or show what a dataset holds",
        "fetch python -o corpora/python",
        "build experiments/sweeps/demo.toml",
        "inspect ~/.cache/dynconv/data/python-512-0123456789abcdef --format json",
        "inspect ~/.cache/dynconv/data/python-512-0123456789abcdef --verify",
    )
    verb.add_argument("action", choices=("fetch", "build", "inspect"))
    verb.add_argument(
        "what",
        metavar="LIST|SWEEP|DIR",
        help="fetch: python, english, or a list of your own (.toml); build: a sweep file; inspect: a dataset's folder",
    )
    verb.add_argument("-o", "--output", type=Path, metavar="DIR", help="fetch: the new folder for the text")
    verb.add_argument("--verify", action="store_true", help="read every file and compare it with its checksum")
    format_argument(verb)


def _data(args: argparse.Namespace) -> int:
    from experiments.data.build import build
    from experiments.data.dataset import Dataset
    from experiments.data.inspect import inspect, to_dict
    from experiments.design.data import default_cache
    from experiments.design.sweep import load_sweep

    if (args.action == "fetch") != (args.output is not None):
        raise ValueError("fetch, and nothing else, needs the folder for the text, -o DIR; add or remove it")
    if args.action == "fetch":
        return _fetch(args)
    path = Path(args.what)
    if args.action == "build":
        spec = load_sweep(path)[0].data
        if spec is None:
            raise ValueError(f"{path} trains on generated tasks, for which no data is built; submit it")
        path = build(spec, default_cache())
    if args.verify:
        Dataset.open(path).verify(progress=True)
        print(f"{path}: every file has its checksum", file=sys.stderr)
    print(json.dumps(to_dict(path), indent=1) if args.format == "json" else inspect(path))
    return 0


def _fetch(args: argparse.Namespace) -> int:
    from experiments.data.fetch import fetch

    if args.verify or args.format == "json":
        raise ValueError("fetch takes neither --verify nor --format: it checks all it fetches; remove them")
    print(fetch(args.what, args.output))
    return 0
