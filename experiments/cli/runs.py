"""The verbs that act on the runs of a sweep: submit, status, logs, cancel, retry."""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

from experiments.cli.arguments import (
    STORES,
    Subparsers,
    add_verb,
    format_argument,
    profile_argument,
    profile_of,
    runs_of,
    store_argument,
    sweep_argument,
    warn,
)
from experiments.design import strict
from experiments.design.config import RunConfig

WATCH_SECONDS = 5.0
FOLLOW_SECONDS = 1.0


def register(subparsers: Subparsers) -> None:
    """Add the verbs of this file."""
    _add_submit(subparsers)
    _add_status(subparsers)
    _add_logs(subparsers)
    _add_cancel(subparsers)
    _add_retry(subparsers)


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
    runs, store = runs_of(args)
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
    runs, store = runs_of(args)
    return _launch(args, _chosen(args, runs), store, "retry")


def _launch(args: argparse.Namespace, runs: list[RunConfig], store: Path, verb: str) -> int:
    """Submit or retry runs, and name each that did not complete on standard error.

    The exit code is 1 if a run did not complete. If the command waits for the runs, this includes runs that were
    skipped because they had failed before or cannot be read.
    """
    from experiments.design.data import default_cache
    from experiments.launching import submit as launch

    launcher = {"submit": launch.submit, "retry": launch.retry}[verb]
    profile = profile_of(args)
    outcome = launcher(runs, profile, store, cache=default_cache(), wait=args.wait)
    for state in outcome.unsuccessful:
        log = f"; log: {state.log}" if state.log else ""
        print(f"{state.run_id} {state.state}: {state.cause or 'no cause known'}{log}", file=sys.stderr)
    waited = args.wait or profile.executor != "slurm"
    return 1 if outcome.unsuccessful or (waited and {"failed", "unreadable"} & outcome.skipped.keys()) else 0


def _add_status(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "status",
        _status,
        "show where each run stands",
        "experiments/sweeps/demo.toml --watch",
        "--store results/runs/demo --format json",
        f"            (every store in {STORES})",
    )
    sweep_argument(verb, nargs="?")
    store_argument(verb)
    verb.add_argument("--watch", action="store_true", help="refresh until no run is queued or running")
    format_argument(verb)


def _status(args: argparse.Namespace) -> int:
    from experiments.launching import states

    while True:
        rows = [state for store, run_ids in _stores(args) for state in states.read(store, run_ids)]
        if args.format == "json":
            text = json.dumps([dataclasses.asdict(state) for state in rows], indent=1)
        else:
            text = states.render(rows) if rows else "no runs here; `dynconv submit SWEEP` makes them"
        clear = "\x1b[H\x1b[2J" if args.watch and sys.stdout.isatty() else ""
        print(clear + text, flush=True)
        if not args.watch or not any(state.state in states.ACTIVE for state in rows):
            return 0
        time.sleep(WATCH_SECONDS)


def _add_logs(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "logs",
        _logs,
        "print what a run's job has written",
        "results/runs/demo/transformer-25k-s0-dc2578b9ae",
        "results/runs/demo/transformer-25k-s0-dc2578b9ae -f   # and what it writes from now on, until it ends",
    )
    verb.add_argument("run_dir", type=Path, metavar="RUN", help="the folder of a run, STORE/RUN_ID")
    verb.add_argument("-f", "--follow", action="store_true", help="go on until the run is not queued or running")


def _logs(args: argparse.Namespace) -> int:
    from experiments.launching import states

    run_dir = args.run_dir.absolute()
    if not (run_dir / "config.json").exists():
        raise ValueError(
            f"{args.run_dir} must be the folder of a run, STORE/RUN_ID; it has no config.json; name another"
        )
    place = 0
    while True:
        state = states.read(run_dir.parent, [run_dir.name])[0]
        log = Path(state.log) if state.log else None
        if log is not None and log.exists():
            with log.open(encoding="utf-8", errors="replace") as file:
                file.seek(place)
                print(file.read(), end="", flush=True)
                place = file.tell()
        if not args.follow or state.state not in states.ACTIVE:
            break
        time.sleep(FOLLOW_SECONDS)
    if place == 0:
        where = f"; its output goes to {log}" if log else ", as no job was given it"
        print(f"dynconv: {run_dir.name} is {state.state} and has written nothing yet{where}", file=sys.stderr)
    return 0


def _stores(args: argparse.Namespace) -> list[tuple[Path, list[str]]]:
    """The stores and run ids to report: the runs of a sweep, all runs of one store, or all runs of all stores."""
    from experiments.launching import states

    if args.sweep is not None:
        runs, store = runs_of(args)
        if not store.is_dir():
            warn(f"{store} is not there yet: `dynconv submit` makes it")
        return [(store, [run.run_id for run in runs])]
    if args.store is not None:
        return [(args.store, states.find(args.store))]
    stores = sorted(path for path in STORES.glob("*") if path.is_dir())
    if not stores:
        raise ValueError(f"no store in {STORES}; name a sweep file or --store, or submit a sweep first")
    return [(store, states.find(store)) for store in stores]


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

    runs, store = runs_of(args)
    cancelled = launch.cancel(store, [run.run_id for run in _chosen(args, runs)])
    print(f"{store}: {len(cancelled)} runs cancelled", file=sys.stderr)
    return 0


def _chosen(args: argparse.Namespace, runs: list[RunConfig]) -> list[RunConfig]:
    """The runs that are named on the command line, or all of the sweep if none is."""
    ids = [run.run_id for run in runs]
    for run_id in args.run_ids:
        strict.choose(run_id, ids, "the sweep has no such run")
    return [run for run in runs if not args.run_ids or run.run_id in args.run_ids]
