"""`dynconv VERB`: parse, dispatch, and turn errors into one line and an exit code.

0 done; 1 the work failed; 2 the request was wrong. Results go to standard output, all else to standard error.
"""

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis import verbs as analysis_verbs
from analysis.errors import WorkFailed
from experiments import bench, strict
from experiments.config import RunConfig

if TYPE_CHECKING:
    from experiments.profile import Profile

STORES = Path("results/runs")
WATCH_SECONDS = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except (ValueError, WorkFailed) as error:
        if args.debug:
            raise
        print(f"dynconv {args.verb}: {error}", file=sys.stderr)
        return 1 if isinstance(error, WorkFailed) else 2
    except KeyboardInterrupt:
        print(f"dynconv {args.verb}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `dynconv plan ... | head`
        _close_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        if args.debug:
            raise
        reason = error.strerror or str(error)
        print(f"dynconv {args.verb}: {f'{error.filename}: ' if error.filename else ''}{reason}", file=sys.stderr)
        _close_output()
        return 1


def _close_output() -> None:
    """Where standard output takes no more, close it, or the interpreter complains once more at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            sys.stdout.close()


def parser() -> argparse.ArgumentParser:
    """All verbs, each with `run(args) -> int`."""
    top = argparse.ArgumentParser(
        prog="dynconv",
        description="Compute-matched scaling experiments on dynamic short convolutions (arXiv 2606.03825).",
        epilog="STORE is the folder that `submit` fills. The verbs that read one also take a frozen store, or a CSV "
        "or parquet table of points.",
    )
    subparsers = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_plan(subparsers)
    _add_submit(subparsers)
    _add_status(subparsers)
    _add_cancel(subparsers)
    _add_retry(subparsers)
    analysis_verbs.register(subparsers, _planned)
    bench.register(subparsers)
    _add_data(subparsers)
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for verb in subparsers.choices.values():  # after the verb as well: there it must not reset what came before
        verb.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return top


Subparsers = argparse._SubParsersAction  # argparse has no public name for it


def _add(
    subparsers: Subparsers, verb: str, run: Callable[..., int], text: str, *examples: str
) -> argparse.ArgumentParser:
    result: argparse.ArgumentParser = subparsers.add_parser(
        verb,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog="examples:\n" + "\n".join(f"  dynconv {verb} {example}" for example in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.set_defaults(run=run)
    return result


def _sweep_argument(verb: argparse.ArgumentParser, nargs: str | None = None) -> None:
    text = "a sweep file, e.g. experiments/sweeps/demo.toml"
    verb.add_argument("sweep", type=Path, metavar="SWEEP", nargs=nargs, help=text)


def _store_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--store", type=Path, metavar="DIR", help=f"where the runs are (default {STORES}/<sweep name>)")


def _profile_argument(verb: argparse.ArgumentParser) -> None:
    text = "where runs execute, e.g. slurm/profiles/local.toml (default: this machine, one run for each GPU or core)"
    verb.add_argument("--profile", type=Path, metavar="FILE", help=text)


def _profile(args: argparse.Namespace) -> "Profile":
    from experiments.profile import Profile, load_profile

    return Profile("local") if args.profile is None else load_profile(args.profile)


def _format_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--format", choices=("text", "json"), default="text", help="json for scripts (default text)")
    verb.add_argument("--json", dest="format", action="store_const", const="json", help="the same as --format json")


def _runs(args: argparse.Namespace) -> tuple[list[RunConfig], Path]:
    """The sweep's runs and the store they live in."""
    from experiments.sweep import load_sweep

    runs = load_sweep(args.sweep)
    return runs, args.store or STORES / runs[0].sweep


def _chosen(args: argparse.Namespace, runs: list[RunConfig]) -> list[RunConfig]:
    """The runs named on the command line; all of the sweep where none is."""
    ids = [run.run_id for run in runs]
    for run_id in args.run_ids:
        strict.choose(run_id, ids, "the sweep has no such run")
    return [run for run in runs if not args.run_ids or run.run_id in args.run_ids]


def _add_plan(subparsers: Subparsers) -> None:
    verb = _add(
        subparsers,
        "plan",
        _plan,
        "list every run of a sweep with its size, tokens, FLOPs and forecast hours; submits nothing",
        "experiments/sweeps/demo.toml",
        "experiments/sweeps/paper-scaling.toml --profile slurm/profiles/example-gpu.toml",
        "experiments/sweeps/demo.toml --format json",
    )
    _sweep_argument(verb)
    _profile_argument(verb)
    _format_argument(verb)


def _plan(args: argparse.Namespace) -> int:
    from experiments import plan
    from experiments.sweep import load_sweep

    rows = plan.rows(load_sweep(args.sweep), _profile(args))
    print(json.dumps(rows, indent=1) if args.format == "json" else plan.render(rows))
    return 0


def _planned(sweep: Path) -> list[dict[str, Any]]:
    """The runs of a sweep file as `plan --format json` prints them, for the verbs that know no sweeps."""
    from experiments import plan
    from experiments.profile import Profile
    from experiments.sweep import load_sweep

    return plan.rows(load_sweep(sweep), Profile("local"))


def _add_submit(subparsers: Subparsers) -> None:
    verb = _add(
        subparsers,
        "submit",
        _submit,
        "build the data if it is missing and submit the runs of a sweep that are not done or under way",
        "experiments/sweeps/demo.toml",
        "experiments/sweeps/paper-scaling.toml --profile slurm/profiles/my-cluster.toml",
        "experiments/sweeps/demo.toml --profile slurm/profiles/one-node.toml --wait",
    )
    _sweep_argument(verb)
    _profile_argument(verb)
    _store_argument(verb)
    verb.add_argument("--wait", action="store_true", help="stay until the runs have ended (local runs: always)")


def _submit(args: argparse.Namespace) -> int:
    runs, store = _runs(args)
    return _launch(args, runs, store, "submit")


def _add_retry(subparsers: Subparsers) -> None:
    verb = _add(
        subparsers,
        "retry",
        _retry,
        "submit failed, cancelled and lost runs again, from their last checkpoint",
        "experiments/sweeps/demo.toml",
        "experiments/sweeps/demo.toml transformer-25k-s0-dc2578b9ae --profile slurm/profiles/my-cluster.toml",
    )
    _sweep_argument(verb)
    verb.add_argument("run_ids", nargs="*", metavar="RUN_ID", help="these runs only (default: all of the sweep)")
    _profile_argument(verb)
    _store_argument(verb)
    verb.add_argument("--wait", action="store_true", help="stay until the runs have ended (local runs: always)")


def _retry(args: argparse.Namespace) -> int:
    runs, store = _runs(args)
    return _launch(args, _chosen(args, runs), store, "retry")


def _launch(args: argparse.Namespace, runs: list[RunConfig], store: Path, verb: str) -> int:
    """Submit or retry, then say what happened: a line for each run that did not get to its end.

    Whoever waits wants the runs complete: one that had failed before, or cannot be read, counts as well.
    """
    from experiments import launch
    from experiments.data.spec import default_cache

    launcher = {"submit": launch.submit, "retry": launch.retry}[verb]
    profile = _profile(args)
    outcome = launcher(runs, profile, store, cache=default_cache(), wait=args.wait)
    for state in outcome.unsuccessful:
        log = f"; log: {state.log}" if state.log else ""
        print(f"{state.run_id} {state.state}: {state.cause or 'no cause known'}{log}", file=sys.stderr)
    waited = args.wait or profile.executor != "slurm"
    return 1 if outcome.unsuccessful or (waited and {"failed", "unreadable"} & outcome.skipped.keys()) else 0


def _add_status(subparsers: Subparsers) -> None:
    verb = _add(
        subparsers,
        "status",
        _status,
        "show where each run stands",
        "experiments/sweeps/demo.toml --watch",
        "--store results/runs/demo --format json",
        f"            (every store in {STORES})",
    )
    _sweep_argument(verb, nargs="?")
    _store_argument(verb)
    verb.add_argument("--watch", action="store_true", help="refresh until no run is queued or running")
    _format_argument(verb)


def _status(args: argparse.Namespace) -> int:
    from experiments import states

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


def _stores(args: argparse.Namespace) -> list[tuple[Path, list[str]]]:
    """(store, run ids) to report on: a sweep's runs, or all runs of one store, or of all stores."""
    from experiments import states

    if args.sweep is not None:
        runs, store = _runs(args)
        return [(store, [run.run_id for run in runs])]
    if args.store is not None:
        return [(args.store, states.find(args.store))]
    stores = sorted(path for path in STORES.glob("*") if path.is_dir())
    if not stores:
        raise ValueError(f"no store in {STORES}; name a sweep file or --store, or submit a sweep first")
    return [(store, states.find(store)) for store in stores]


def _add_cancel(subparsers: Subparsers) -> None:
    verb = _add(
        subparsers,
        "cancel",
        _cancel,
        "cancel the runs of a sweep that have not ended; retry takes them up again",
        "experiments/sweeps/demo.toml",
        "experiments/sweeps/demo.toml transformer-25k-s0-dc2578b9ae",
    )
    _sweep_argument(verb)
    verb.add_argument("run_ids", nargs="*", metavar="RUN_ID", help="these runs only (default: all of the sweep)")
    _store_argument(verb)


def _cancel(args: argparse.Namespace) -> int:
    from experiments import launch

    runs, store = _runs(args)
    cancelled = launch.cancel(store, [run.run_id for run in _chosen(args, runs)])
    print(f"{store}: {len(cancelled)} runs cancelled", file=sys.stderr)
    return 0


def _add_data(subparsers: Subparsers) -> None:
    verb = _add(
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
    _format_argument(verb)


def _data(args: argparse.Namespace) -> int:
    from experiments.data.build import build
    from experiments.data.dataset import Dataset
    from experiments.data.inspect import inspect, to_dict
    from experiments.data.spec import default_cache
    from experiments.sweep import load_sweep

    path = args.what
    if args.action == "build":
        path = build(load_sweep(args.what)[0].data, default_cache())
    if args.verify:
        Dataset.open(path).verify(progress=True)
        print(f"{path}: every file has its checksum", file=sys.stderr)
    print(json.dumps(to_dict(path), indent=1) if args.format == "json" else inspect(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
