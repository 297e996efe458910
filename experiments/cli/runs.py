"""The verbs that act on the runs of a sweep: plan, submit, cancel, retry."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.cli.arguments import (
    Subparsers,
    add_verb,
    format_argument,
    profile_argument,
    store_argument,
    sweep_argument,
    warn,
)
from experiments.cli.stores import default_store
from experiments.design import strict
from experiments.design.config import RunConfig

if TYPE_CHECKING:
    from experiments.launching.profile import Profile


def register(subparsers: Subparsers) -> None:
    """Add the verbs of this file."""
    _add_plan(subparsers)
    _add_submit(subparsers)
    _add_cancel(subparsers)
    _add_retry(subparsers)


def _add_plan(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "plan",
        _plan,
        "list every run of a sweep with its size, tokens, FLOPs and forecast hours; submits nothing",
        "experiments/sweeps/demo.toml",
        "experiments/sweeps/paper-scaling.toml --profile slurm/profiles/example-gpu.toml",
        "experiments/sweeps/paper-scaling.toml --throughput results/measured/h200/training.parquet",
        "experiments/sweeps/demo.toml --format json",
    )
    sweep_argument(verb)
    profile_argument(verb)
    text = "a file of `bench train`: forecast by measured tokens a second, where it has them"
    verb.add_argument("--throughput", type=Path, metavar="FILE", help=text)
    format_argument(verb)


def _plan(args: argparse.Namespace) -> int:
    from experiments.data.forecast import forecast
    from experiments.design import plan

    runs, _ = _runs(args)
    for spec in dict.fromkeys(run.data for run in runs if run.data is not None):
        if cost := forecast(spec):
            warn(f"{args.sweep}: {cost}")
    profile, measured = _profile(args), None
    if args.throughput is not None:
        from analysis.logs.selection import some
        from experiments.design.forecast import measured_rates

        gpus = {run.size: profile.job(run.size).gpus for run in runs}
        measured, lacking = measured_rates(runs, gpus, args.throughput)
        if lacking:
            warn(f"{args.throughput} has no throughput of {some(lacking)}")
    rows = _planned(runs, profile, measured)
    print(json.dumps(rows, indent=1) if args.format == "json" else plan.render(rows))
    return 0


def _planned(
    runs: list[RunConfig], profile: "Profile", measured: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    from experiments.design import plan

    jobs = {run.size: profile.job(run.size) for run in runs}
    hardware = {size: plan.Hardware(job.gpus, job.teraflops_per_second) for size, job in jobs.items()}
    return plan.rows(runs, hardware, measured)


def planned(sweep: Path) -> list[dict[str, Any]]:
    """The runs of a sweep file as `plan --format json` prints them without a profile, for `power`.

    Raises ValueError for a sweep on generated tasks.
    """
    from experiments.design.sweep import load_sweep
    from experiments.launching.profile import Profile

    runs = load_sweep(sweep)
    if runs[0].task is not None:
        raise ValueError(f"power simulates losses on text; {runs[0].sweep} trains on generated tasks; give another")
    return _planned(runs, Profile("local"))


def _add_submit(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "submit",
        _submit,
        "build the data if it is missing and submit the runs of a sweep that are not done or under way",
        "experiments/sweeps/demo.toml",
        "experiments/sweeps/paper-scaling.toml --profile slurm/profiles/my-cluster.toml",
        "experiments/sweeps/demo.toml --profile slurm/profiles/one-node.toml --wait",
    )
    sweep_argument(verb)
    profile_argument(verb)
    store_argument(verb)
    verb.add_argument("--wait", action="store_true", help="stay until the runs have ended (local runs: always)")


def _submit(args: argparse.Namespace) -> int:
    runs, store = _runs(args)
    return _launch(args, runs, store, "submit")


def _add_retry(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "retry",
        _retry,
        "submit failed, cancelled and lost runs again, from their last checkpoint",
        "experiments/sweeps/demo.toml",
        "experiments/sweeps/demo.toml transformer-25k-s0-dc2578b9ae --profile slurm/profiles/my-cluster.toml",
    )
    sweep_argument(verb)
    verb.add_argument("run_ids", nargs="*", metavar="RUN_ID", help="these runs only (default: all of the sweep)")
    profile_argument(verb)
    store_argument(verb)
    verb.add_argument("--wait", action="store_true", help="stay until the runs have ended (local runs: always)")


def _retry(args: argparse.Namespace) -> int:
    runs, store = _runs(args)
    return _launch(args, _chosen(args, runs), store, "retry")


def _launch(args: argparse.Namespace, runs: list[RunConfig], store: Path, verb: str) -> int:
    """Submit or retry runs, and name each that did not complete on standard error.

    The exit code is 1 if a run did not complete. If the command waits for the runs, this includes runs that were
    skipped because they had failed before or cannot be read.
    """
    from experiments.design.data import default_cache
    from experiments.launching import submit as launch

    launcher = {"submit": launch.submit, "retry": launch.retry}[verb]
    profile = _profile(args)
    outcome = launcher(runs, profile, store, cache=default_cache(), wait=args.wait)
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
        "experiments/sweeps/demo.toml transformer-25k-s0-dc2578b9ae",
    )
    sweep_argument(verb)
    verb.add_argument("run_ids", nargs="*", metavar="RUN_ID", help="these runs only (default: all of the sweep)")
    store_argument(verb)


def _cancel(args: argparse.Namespace) -> int:
    from experiments.launching import submit as launch

    runs, store = _runs(args)
    cancelled = launch.cancel(store, [run.run_id for run in _chosen(args, runs)])
    print(f"{store}: {len(cancelled)} runs cancelled", file=sys.stderr)
    return 0


def _profile(args: argparse.Namespace) -> "Profile":
    from experiments.launching.profile import Profile, load_profile

    return Profile("local") if args.profile is None else load_profile(args.profile)


def _runs(args: argparse.Namespace) -> tuple[list[RunConfig], Path]:
    """The runs of the sweep, and their store. `plan` and `submit` also print notes on settings that may be mistakes."""
    from experiments.design.sweep import load_sweep, notes, read_sweep

    runs = load_sweep(args.sweep)
    if args.verb in ("plan", "submit"):
        for note in notes(read_sweep(args.sweep)):
            warn(f"{args.sweep}: {note}")
    store: Path = getattr(args, "store", None) or default_store(args.sweep, runs, args.verb)
    return runs, store


def _chosen(args: argparse.Namespace, runs: list[RunConfig]) -> list[RunConfig]:
    """The runs that are named on the command line, or all of the sweep if none is."""
    ids = [run.run_id for run in runs]
    for run_id in args.run_ids:
        strict.choose(run_id, ids, "the sweep has no such run")
    return [run for run in runs if not args.run_ids or run.run_id in args.run_ids]
