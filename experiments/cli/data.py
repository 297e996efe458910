"""The verb that fetches text, builds a dataset or shows what one holds: data."""

import argparse
import json
import sys
from pathlib import Path

from experiments.cli.arguments import Subparsers, add_verb, format_argument, require_folder


def register(subparsers: Subparsers) -> None:
    """Add the verb of this file."""
    verb = add_verb(
        subparsers,
        "data",
        _data,
        "fetch a corpus of public text, build the data of a sweep without submitting it, or show what a dataset holds",
        "fetch python -o corpora/python",
        "build experiments/sweeps/demo.toml",
        "build experiments/sweeps/paper-scaling.toml --profile slurm/profiles/my-cluster.toml",
        "inspect ~/.cache/dynconv/data/python-512-0123456789abcdef --format json",
        "inspect ~/.cache/dynconv/data/python-512-0123456789abcdef --verify",
    )
    verb.add_argument("action", choices=("fetch", "build", "inspect"), help="what to do with it")
    verb.add_argument(
        "what",
        metavar="LIST|SWEEP|DIR",
        help="fetch: python, english, or a list of your own (.toml); build: a sweep file; inspect: a dataset's folder",
    )
    verb.add_argument("-o", "--output", type=Path, metavar="DIR", help="fetch: the new folder for the text")
    text = "build: by jobs of the Slurm of this profile (default: on this machine)"
    verb.add_argument("--profile", type=Path, metavar="FILE", help=text)
    verb.add_argument("--wait", action="store_true", help="build by Slurm: stay until the jobs have ended")
    verb.add_argument("--verify", action="store_true", help="read every file and compare it with its checksum")
    format_argument(verb)


def _data(args: argparse.Namespace) -> int:
    from experiments.data.dataset import Dataset
    from experiments.data.inspect import inspect, to_dict

    if (args.action == "fetch") != (args.output is not None):
        raise ValueError("fetch, and nothing else, needs the folder for the text, -o DIR; add or remove it")
    if args.action == "fetch":
        return _fetch(args)
    if args.action != "build" and (args.profile or args.wait):
        raise ValueError("--profile and --wait are for building data; remove them")
    built = _build(args) if args.action == "build" else Path(args.what)
    if built is None:
        return 0  # jobs build it
    path = built
    if args.verify:
        Dataset.open(path).verify()
        print(f"{path}: every file has its checksum", file=sys.stderr)
    print(json.dumps(to_dict(path), indent=1) if args.format == "json" else inspect(path))
    return 0


def _build(args: argparse.Namespace) -> Path | None:
    from experiments.design.data import default_cache
    from experiments.design.sweep import load_sweep

    path = Path(args.what)
    spec = load_sweep(path)[0].data
    if spec is None:
        raise ValueError(f"{path} trains on generated tasks, for which no data is built; submit it")
    if args.profile is None:
        from experiments.data.build import build

        return build(spec, default_cache())
    from experiments.launching import data_jobs
    from experiments.launching.profile import load_profile

    return data_jobs.build(spec, load_profile(args.profile), default_cache(), wait=args.wait)


def _fetch(args: argparse.Namespace) -> int:
    from experiments.data.fetch import fetch

    if args.verify or args.format == "json":
        raise ValueError("fetch takes neither --verify nor --format: it checks all it fetches; remove them")
    print(fetch(args.what, require_folder(args.output)))
    return 0
