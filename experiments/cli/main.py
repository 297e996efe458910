"""`dynconv VERB`: parse the command line, call the verb, and turn an error into one line and an exit code.

Exit codes: 0 done; 1 the work failed; 2 the request was wrong. Only results go to standard output.
"""

import argparse
import contextlib
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from analysis.errors import WorkFailed
from experiments.cli import bench, claims, data, laws, models, pages, plan, runs, status, trackers


def main(arguments: Sequence[str] | None = None) -> int:
    top = parser()
    args, unknown = top.parse_known_args(arguments)
    if unknown:  # argparse would not say of which verb
        top.exit(
            2, f"dynconv {args.verb}: no such argument: {' '.join(unknown)}; `dynconv {args.verb} --help` lists all\n"
        )
    try:
        exit_code: int = args.run(args)
        if sys.stdout is not None:  # as where the shell closed it: `dynconv plan ... >&-`
            sys.stdout.flush()
        return exit_code
    except (ValueError, WorkFailed) as error:
        if args.debug:
            raise
        print(f"dynconv {args.verb}: {error}", file=sys.stderr)
        return 1 if isinstance(error, WorkFailed) else 2
    except KeyboardInterrupt:
        remedy = "; submitting again goes on where this stopped" if args.verb == "submit" else ""
        print(f"dynconv {args.verb}: interrupted{remedy}", file=sys.stderr)
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
    """Close standard output if it cannot be written: the interpreter would report the error again when it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            sys.stdout.close()


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all of ours, without argparse's lines of usage. Its verbs inherit that."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` lists all\n")


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs. Each sets a default `run(args) -> exit code`."""
    top = _Parser(
        prog="dynconv",
        description="Compute-matched scaling experiments on dynamic short convolutions (arXiv 2606.03825).",
        epilog="STORE is the folder that `submit` fills. The verbs that read one also take a frozen store, a "
        "table of points or a tracker's export, and several of them.",
    )
    subparsers = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    plan.register(subparsers)
    runs.register(subparsers)
    status.register(subparsers)
    trackers.register(subparsers)
    laws.register(subparsers)
    claims.register(subparsers)
    pages.register(subparsers)
    bench.register(subparsers)
    data.register(subparsers)
    models.register(subparsers)
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for verb in subparsers.choices.values():  # Also accept --debug after the verb; SUPPRESS keeps a --debug before it.
        verb.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return top


if __name__ == "__main__":
    sys.exit(main())
