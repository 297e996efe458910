"""The verbs that act on the runs of a sweep: submit, cancel, retry."""

import argparse
import sys

from experiments.cli.arguments import (
    DEMO_RUN,
    Subparsers,
    add_verb,
    part_argument,
    profile_argument,
    profile_of,
    store_argument,
    sweep_argument,
)
from experiments.cli.stores import runs_of
from experiments.design import strict
from experiments.design.config import RunConfig


def register(subparsers: Subparsers) -> None:
    """Add the verbs of this file."""
    _add_submit(subparsers)
    _add_cancel(subparsers)
    _add_retry(subparsers)


def _add_submit(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "submit",
        _launch,
        "build the data if it is missing and submit the runs of a sweep that are not done or under way",
        "experiments/sweeps/demo.toml",
        "experiments/sweeps/paper-scaling.toml --profile slurm/profiles/my-cluster.toml",
        "experiments/sweeps/demo.toml --profile slurm/profiles/one-node.toml --wait",
        """experiments/sweeps/mini-scaling.toml --where 'size == "1M" and seed < 2'     # the rest another time""",
    )
    sweep_argument(verb)
    part_argument(verb)
    _launch_arguments(verb)


def _add_retry(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "retry",
        _launch,
        "submit failed, cancelled and lost runs again, from their last checkpoint",
        "experiments/sweeps/demo.toml",
        f"experiments/sweeps/demo.toml {DEMO_RUN} --profile slurm/profiles/my-cluster.toml",
    )
    sweep_argument(verb)
    _run_ids_argument(verb)
    _launch_arguments(verb)


def _launch_arguments(verb: argparse.ArgumentParser) -> None:
    profile_argument(verb)
    store_argument(verb)
    verb.add_argument("--wait", action="store_true", help="stay until the runs have ended (local runs: always)")
    text = "go on in a store whose runs were made by another version of the modules that decide an outcome"
    verb.add_argument("--accept", action="append", choices=["code"], default=[], help=text)


def _run_ids_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run_ids", nargs="*", metavar="RUN_ID", help="these runs only (default: all of the sweep)")


def _launch(args: argparse.Namespace) -> int:
    """Submit or retry runs, and name each that did not complete on standard error.

    The exit code is 1 if a run did not complete. If the command waits for the runs, this includes runs that were
    skipped because they had failed before or cannot be read.
    """
    from experiments.design.data import default_cache
    from experiments.launching import submit as launch

    runs, store = runs_of(args)
    if args.verb == "retry":
        launcher, runs = launch.retry, _chosen(args, runs)
    else:
        launcher = launch.submit
    profile = profile_of(args)
    outcome = launcher(runs, profile, store, cache=default_cache(), wait=args.wait, accept=args.accept)
    for state in outcome.unsuccessful:
        log = f"; log: {state.log}" if state.log else ""
        print(f"{state.run_id} {state.state}: {state.cause or 'no cause known'}{log}", file=sys.stderr)
    waited = args.wait or profile.executor != "slurm"
    return 1 if outcome.unsuccessful or (waited and {"failed", "unreadable"} & outcome.skipped.keys()) else 0


def _add_cancel(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "cancel",
        _cancel,
        "cancel the runs of a sweep that have not ended; retry takes them up again",
        "experiments/sweeps/demo.toml",
        f"experiments/sweeps/demo.toml {DEMO_RUN}",
    )
    sweep_argument(verb)
    _run_ids_argument(verb)
    store_argument(verb)


def _cancel(args: argparse.Namespace) -> int:
    from experiments.launching.cancel import cancel

    runs, store = runs_of(args)
    cancelled = cancel(store, [run.run_id for run in _chosen(args, runs)])
    print(f"{store}: {len(cancelled)} runs cancelled", file=sys.stderr)
    return 0


def _chosen(args: argparse.Namespace, runs: list[RunConfig]) -> list[RunConfig]:
    """The runs that are named on the command line, or all of the sweep if none is."""
    ids = [run.run_id for run in runs]
    for run_id in args.run_ids:
        strict.choose(run_id, ids, "the sweep has no such run")
    return [run for run in runs if not args.run_ids or run.run_id in args.run_ids]
