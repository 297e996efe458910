"""Arguments and helpers that several verbs share."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.logs.files import require_writable
from experiments.terminal import warn

if TYPE_CHECKING:
    from analysis.logs.store import Store
    from experiments.launching.profile import Profile

STORES = Path("results/runs")
DEMO_RUN = "transformer-25k-s0-a0660ab020"  # one of `make demo`, for examples
PUBLISHED = Path("results/published")
CONVENTIONS = "exact, given, 6ND, '6N_nonemb D' or '6N_active D'"  # of counting FLOPs, for help
Subparsers = argparse._SubParsersAction  # argparse has no public name for it
TABLE_FORMATS = ("md", "csv", "latex", "json")
STORE_LEGEND = (
    "a live store, a frozen one (dynconv freeze), or a table of points (.csv, .tsv, .jsonl, .parquet) with "
    "columns arm, size, seed, N, D, C, loss (others by --columns). Several stores are read as one; a run in several of "
    "them counts once."
)


def add_verb(
    subparsers: Subparsers, verb: str, run: Callable[..., int], text: str, *examples: str
) -> argparse.ArgumentParser:
    """A verb with `text` as help and description, and `examples` of its arguments; `run(args)` gives the exit code."""
    result: argparse.ArgumentParser = subparsers.add_parser(
        verb,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog="examples:\n" + "\n".join(f"  dynconv {verb} {example}" for example in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.set_defaults(run=run)
    return result


def add_reading_verb(
    subparsers: Subparsers, verb: str, run: Callable[[argparse.Namespace], int], text: str, *examples: str
) -> argparse.ArgumentParser:
    """A verb that reads stores or tables of points."""
    result = add_verb(subparsers, verb, run, text, *examples)
    result.add_argument("stores", type=Path, metavar="STORE", nargs="+", help=STORE_LEGEND)
    columns_argument(result)
    return result


def columns_argument(verb: argparse.ArgumentParser) -> None:
    text = """names of the columns of a table of points: N=params,loss="val loss, final" (quote a name with a comma)"""
    verb.add_argument("--columns", metavar="NAME=COLUMN,...", action="append", default=[], help=text)


def where_argument(verb: argparse.ArgumentParser) -> None:
    text = "use only runs that fulfil this condition on columns of the run table, as in 'size != \"25k\"'"
    verb.add_argument("--where", metavar="CONDITION", help=text)


def part_argument(verb: argparse.ArgumentParser) -> None:
    text = "only the runs that fulfil this condition on arm, size, seed, N, D, C, `vary.AXIS`, as in 'seed == 0'"
    verb.add_argument("--where", metavar="CONDITION", help=text)


def published_argument(verb: argparse.ArgumentParser, text: str) -> None:
    text = f"{text} (from DIR/ablations.csv, default {PUBLISHED})"
    verb.add_argument("--published", type=Path, nargs="?", const=PUBLISHED, metavar="DIR", help=text)


def sweep_argument(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("sweep", type=Path, metavar="SWEEP", help="a sweep file, e.g. experiments/sweeps/demo.toml")


def store_argument(verb: argparse.ArgumentParser) -> None:
    text = f"where the runs are (default {STORES}/<sweep name> of the sweep's project, or $DYNCONV_STORES/<sweep name>)"
    verb.add_argument("--store", type=Path, metavar="DIR", help=text)


def profile_argument(verb: argparse.ArgumentParser) -> None:
    text = "where runs execute, e.g. slurm/profiles/local.toml (default: this machine, one run for each GPU or core)"
    verb.add_argument("--profile", type=Path, metavar="FILE", help=text)


def format_argument(verb: argparse.ArgumentParser, formats: tuple[str, ...] = ("text", "json")) -> None:
    """--format, by default the first of `formats`, and --json."""
    text = f"how the answer is printed; json is for scripts (default {formats[0]})"
    verb.add_argument("--format", choices=formats, default=formats[0], help=text)
    verb.add_argument("--json", dest="format", action="store_const", const="json", help="the same as --format json")


def baseline_argument(verb: argparse.ArgumentParser, text: str = "the arm that others are compared with") -> None:
    verb.add_argument("--baseline", metavar="ARM", help=f"{text} (default: the sweep's)")


def convention_argument(verb: argparse.ArgumentParser, text: str = "how FLOPs are counted") -> None:
    text = f"{text}: {CONVENTIONS} (default: the first of the first four that the table has)"
    verb.add_argument("--convention", help=text)


def positive_numbers(name: str, text: str) -> list[float]:
    """The comma-separated numbers that were given to --NAME. Raises ValueError unless all are positive."""
    try:
        values = [float(item) for item in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value < math.inf for value in values):
        raise ValueError(f"--{name} takes positive numbers, 1e9,2e9; got {text!r}")
    return values


def profile_of(args: argparse.Namespace) -> Profile:
    """The profile of the command line, or that of this machine."""
    from experiments.launching.profile import Profile, load_profile

    return Profile("local") if args.profile is None else load_profile(args.profile)


def folder_name(text: str) -> Path:
    """The path that was given to an option. An empty one, as of a shell's variable that is not set, would be the
    working folder."""
    if not text:
        raise argparse.ArgumentTypeError("got an empty name; name a folder, or . for this one")
    return Path(text)


def require_folder(path: Path) -> Path:
    """The path of a folder to write to, which may not exist yet. Raises ValueError if it cannot be one."""
    if path.is_file():
        raise ValueError(f"{path} is a file; give a directory")
    require_writable(path)
    return path


def load_store(args: argparse.Namespace) -> Store:
    """The stores of the command line as one, with the runs that fulfil --where; what could not be read is named on
    standard error."""
    from analysis.logs.columns import NATS, loss_unit, parse_columns
    from analysis.logs.merge import load_all
    from experiments.cli.stores import stores_of

    for path in args.stores:
        if not path.exists() and path.name and (named := stores_of(Path()) / path.name).is_dir():
            raise ValueError(f"no store at {path}; did you mean {named}?")
    store = load_all(args.stores, parse_columns(args.columns))
    warn(*store.problems)
    if (unit := loss_unit(store.runs)) != NATS:
        warn(f"losses are in {unit}, and so is all that is told of them and any E or noise that options state")
    if getattr(args, "where", None) is not None:
        from analysis.pages.query import chosen

        store.runs, store.where = chosen(store.runs, args.where, getattr(args, "convention", None)), args.where
    return store


@contextlib.contextmanager
def reading_store(args: argparse.Namespace) -> Iterator[Store]:
    """The same, for verbs that read steps or evaluations, too. What of them could not be read is named at the end."""
    store = load_store(args)
    already_named = len(store.problems)
    yield store
    warn(*store.problems[already_named:])
