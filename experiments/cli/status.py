"""The verbs that look at runs: status, logs."""

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.cli.arguments import DEMO_RUN, STORES, Subparsers, add_verb, format_argument, store_argument
from experiments.cli.stores import default_store, stores_of
from experiments.design import strict
from experiments.terminal import warn

if TYPE_CHECKING:
    from experiments.launching.states import RunState

WATCH_SECONDS = 5.0
FOLLOW_SECONDS = 1.0
UNLIMITED = 10_000  # the width of what is no terminal


def register(subparsers: Subparsers) -> None:
    """Add the verbs of this file."""
    _add_status(subparsers)
    _add_logs(subparsers)


def _add_status(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "status",
        _status,
        "show where each run stands, and why",
        "experiments/sweeps/demo.toml --watch",
        "results/runs/demo --state failed,lost --size 25k",
        f"results/runs/demo/{DEMO_RUN}          # one run, with its attempts",
        "results/runs/demo --json",
        f"            (every store in {STORES})",
    )
    text = "a sweep file, a store, or the folder of one run (default: every store)"
    verb.add_argument("what", type=Path, metavar="SWEEP|STORE|RUN", nargs="?", help=text)
    store_argument(verb)
    for name, example in (("state", "failed,lost"), ("arm", "transformer"), ("size", "25k")):
        text = f"only runs of this {name}, or of several, as {example}" if name == "state" else f"the same, by {name}"
        verb.add_argument(f"--{name}", metavar="NAME,...", action="append", default=[], help=text)
    verb.add_argument("--all", action="store_true", help="a row for each run of a long list, too")
    verb.add_argument("--watch", action="store_true", help="refresh until no run is queued or running")
    format_argument(verb)


def _status(args: argparse.Namespace) -> int:
    from experiments.launching import overview, states

    run_dir = args.what if args.what is not None and (args.what / "config.json").is_file() else None
    while True:
        if run_dir is not None:
            rows = states.read(run_dir.absolute().parent, [run_dir.absolute().name])
            text = _one(run_dir.absolute().parent, rows[0], args.format)
        else:
            rows = _chosen(args, _rows(args))
            text = _list(rows, args)
        clear = "\x1b[H\x1b[2J" if args.watch and sys.stdout.isatty() else ""
        print(clear + text, flush=True)
        if not args.watch or not overview.unfinished(rows):
            return 0
        time.sleep(WATCH_SECONDS)


def _one(store: Path, state: "RunState", form: str) -> str:
    from experiments.launching import overview, states

    attempts = states.history(store, state)
    if form == "json":
        made = [dataclasses.asdict(attempt) for attempt in attempts]
        return json.dumps(dataclasses.asdict(state) | {"attempts_made": made}, indent=1)
    return overview.render_run(state, attempts, _width())


def _list(rows: "list[RunState]", args: argparse.Namespace) -> str:
    from experiments.launching import overview

    if args.format == "json":
        return json.dumps([dataclasses.asdict(state) for state in rows], indent=1)
    if not rows:
        filtered = args.state or args.arm or args.size
        return "no run is so" if filtered else "no runs here; `dynconv submit SWEEP` makes them"
    return overview.render(rows, _width(), every=args.all)


def _width() -> int:
    """The terminal's; what goes to a file or a pipe is not cut."""
    return shutil.get_terminal_size(fallback=(UNLIMITED, 0)).columns


def _rows(args: argparse.Namespace) -> "list[RunState]":
    """The runs of a sweep, all runs of one store, or all runs of all stores."""
    from experiments.design.sweep_file import near_sweep
    from experiments.launching import states

    store = args.store
    if args.what is not None and args.what.is_dir():
        if store is not None:
            raise ValueError(f"{args.what} and --store {store} both name a store; leave one out")
        store = args.what
    elif args.what is not None:
        if not args.what.exists():
            meant = near_sweep(args.what)
            remedy = f"did you mean {meant}?" if meant else "give a sweep file, a store, or the folder of a run"
            raise ValueError(f"{args.what} is not there; {remedy}")
        return _of_sweep(args.what, store)
    if store is not None:
        found = states.find(store)
        if not found:
            _refuse_other_folders(store)
        return states.read(store, found)
    folder = stores_of(Path())
    stores = sorted(path for path in folder.glob("*") if path.is_dir())
    if not stores:
        raise ValueError(f"no store in {folder}; name a sweep file or a store, or submit a sweep first")
    return [state for store in stores for state in states.read(store, states.find(store))]


def _refuse_other_folders(folder: Path) -> None:
    """Raises ValueError for a frozen store, and for a folder of stores."""
    from analysis.logs.store import refuse_folder_of_stores

    if (folder / "runs.parquet").exists():
        raise ValueError(f"{folder} is a frozen store, whose runs have no jobs; `dynconv table` and `query` read it")
    refuse_folder_of_stores(folder)


def _of_sweep(sweep: Path, store: Path | None) -> "list[RunState]":
    """Runs that were never submitted, too: what they are stands in the sweep file alone."""
    from experiments.design.sweep import load_sweep
    from experiments.launching import states

    runs = load_sweep(sweep)
    store = store or default_store(sweep, runs, "status")
    if not store.is_dir():
        warn(f"{store} is not there yet: `dynconv submit` makes it")
    found = states.read(store, [run.run_id for run in runs])
    return [
        state
        if state.arm is not None
        else dataclasses.replace(
            state, arm=run.arm, size=run.size, flops=float(run.own_flops), flops_left=float(run.own_flops)
        )
        for run, state in zip(runs, found, strict=True)
    ]


def _chosen(args: argparse.Namespace, rows: "list[RunState]") -> "list[RunState]":
    """The runs that --state, --arm and --size let pass, and of unreadable ones those whose arm and size are not known.
    Raises ValueError for a name that no run can have."""
    from experiments.launching.states import STATES

    wanted = {name: _names(getattr(args, name)) for name in ("state", "arm", "size")}
    for name, values in wanted.items():
        legal = STATES if name == "state" else sorted({value for row in rows if (value := getattr(row, name))})
        for value in values:
            strict.choose(value, legal, f"--{name}")
    return [
        row for row in rows if all(not names or getattr(row, key) in (None, *names) for key, names in wanted.items())
    ]


def _names(given: Iterable[str]) -> list[str]:
    return [name for each in given for name in each.split(",") if name]


def _add_logs(subparsers: Subparsers) -> None:
    verb = add_verb(
        subparsers,
        "logs",
        _logs,
        "print what a run's job has written",
        f"results/runs/demo/{DEMO_RUN}",
        f"results/runs/demo/{DEMO_RUN} -f   # and what it writes from now on, until it ends",
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
        warn(f"{run_dir.name} is {state.state} and has written nothing yet{where}")
    return 0
