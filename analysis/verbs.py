"""The command line's verbs that read logs. Start-up is light: each verb imports its own.

Results go to standard output; problems with the data, which do not stop the work, to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from analysis.store import Store

Subparsers = argparse._SubParsersAction  # argparse has no public name for it
LEGEND = (
    "STORE is a live store, a frozen one (dynconv freeze), or a .csv or .parquet of points with columns arm, size, "
)
LEGEND += "seed, N, D, C, loss (others by --columns)."


def register(subparsers: Subparsers, planned: Callable[[Path], list[dict[str, Any]]]) -> None:
    """Add the verbs; each parser has a default `run(args) -> exit code`. `planned` gives a sweep file's runs."""
    _add_fit(subparsers)
    _add_table(subparsers)
    _add_plot(subparsers)
    _add_freeze(subparsers)
    _add_query(subparsers)
    _add_power(subparsers, planned)
    _add_isoflop(subparsers)
    _add_report(subparsers)


def _add(
    subparsers: Subparsers, verb: str, run: Callable[[argparse.Namespace], int], help_text: str, *examples: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        verb,
        help=help_text,
        description=f"{help_text[0].upper()}{help_text[1:]}. {LEGEND}",
        epilog="examples:\n" + "\n".join(f"  dynconv {verb} {example}" for example in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("store", type=Path, metavar="STORE")
    parser.add_argument("--columns", metavar="NAME=COLUMN,...", help="names of the columns of a table of points")
    parser.set_defaults(run=run)
    return parser


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("md", "csv", "latex", "json"), default="md")
    parser.add_argument("--json", action="store_const", const="json", dest="format", help="the same as --format json")


def _add_fit(subparsers: Subparsers) -> None:
    parser = _add(
        subparsers,
        "fit",
        _fit,
        "fit power laws with an irreducible loss, with certificates",
        "results/runs/demo",
        "points.csv --form nd --json",
        "points.csv --columns C=train_flops,loss=final --loss lsq",
    )
    parser.add_argument(
        "--form", choices=("c", "nd"), default="c", help="E + A C^-alpha, or E + A N^-alpha + B D^-beta"
    )
    parser.add_argument("--loss", choices=("huber", "lsq"), default="huber", help="Huber on log loss, or least squares")
    parser.add_argument("--delta", type=float, default=1e-3, help="of Huber (default 1e-3)")
    parser.add_argument(
        "--per-arm", default="A,B", help="parameters that each arm has to itself (default A,B; '' for none)"
    )
    parser.add_argument("--baseline", help="the arm that others are compared with (default: the sweep's)")
    parser.add_argument("--convention", help="of FLOPs, for form c: exact, given, 6ND or '6N_nonemb D'")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamples for intervals; 0 for none")
    parser.add_argument("--starts", type=int, default=4500, metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    _add_format(parser)


def _add_table(subparsers: Subparsers) -> None:
    parser = _add(
        subparsers,
        "table",
        _table,
        "tabulate the compute advantage of each arm, with intervals",
        "results/runs/demo",
        "points.csv --baseline transformer --format json",
        """results/runs/demo --where 'size != "25k"'""",
        "results/runs/demo --by arm,size",
    )
    parser.add_argument("--baseline", help="the arm that others are compared with (default: the sweep's)")
    parser.add_argument("--convention", help="of FLOPs: exact, given, 6ND or '6N_nonemb D'")
    parser.add_argument(
        "--floor",
        type=float,
        action="append",
        default=[],
        metavar="E",
        help="state the irreducible loss instead of fitting it; more of them show what m depends on",
    )
    parser.add_argument("--where", metavar="CONDITION", help="of the runs to use, on the run table's columns")
    parser.add_argument("--by", metavar="COLUMN,...", help="sum the runs up by arm, size ... instead of comparing arms")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrapped tests")
    _add_format(parser)


def _add_plot(subparsers: Subparsers) -> None:
    parser = _add(
        subparsers,
        "plot",
        _plot,
        "draw what a store or a table of kernel times has the data for",
        "results/runs/demo -o figures",
        "results/measured/h200/kernels.parquet -o figures --type png",
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--baseline", help="the arm that others are compared with (default: the sweep's)")
    parser.add_argument("--convention", help="of FLOPs: exact, given, 6ND or '6N_nonemb D'")
    parser.add_argument("--type", choices=("svg", "png", "pdf"), default="svg")


def _add_freeze(subparsers: Subparsers) -> None:
    parser = _add(
        subparsers,
        "freeze",
        _freeze,
        "write a store's runs.parquet and evals.parquet, for committing and sharing",
        "results/runs/demo -o results/measured/laptop/demo",
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", action="store_true", help="steps.parquet as well")


def _add_query(subparsers: Subparsers) -> None:
    parser = _add(
        subparsers,
        "query",
        _query,
        "run SQL over the views runs, steps, evals and multipliers (DuckDB)",
        """results/runs/demo "select arm, size, avg(loss) from runs group by all order by all" """,
        """results/runs/demo "select * from multipliers" --format csv""",
    )
    parser.add_argument("sql", metavar="SQL")
    _add_format(parser)


def _add_power(subparsers: Subparsers, planned: Callable[[Path], list[dict[str, Any]]]) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "power",
        help="simulate which advantage a design's sizes and seeds could resolve",
        description="Simulate which advantage a design's sizes and seeds could resolve, and at which cost, with the "
        "estimator, the tests and the intervals that `dynconv table` reports. DESIGN is a sweep file, a plan "
        "(dynconv plan SWEEP --profile P --format json; P for the hours), a store, or a table of points: its sizes "
        "and their compute count.",
        epilog="examples:\n"
        "  dynconv power experiments/sweeps/paper-scaling.toml --m 1.05 --gpu-flops 4e14\n"
        "  dynconv power plan.json --m 1.05\n"
        "  dynconv power results/runs/demo --m 1.1 --seeds 1,3 --seed-noise 0.004 --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("design", type=Path, metavar="DESIGN")
    parser.add_argument("--m", type=float, default=1.05, help="the multiplier to resolve (default 1.05)")
    parser.add_argument("--seeds", default="1,2,3", help="numbers of seeds to try (default 1,2,3)")
    parser.add_argument("--baseline", help="the arm whose ladder it is (default: the sweep's)")
    parser.add_argument("--seed-noise", type=float, default=0.002, help="sd of a run's loss, nats (default 0.002)")
    parser.add_argument("--arm-noise", type=float, default=0.002, help="sd of an arm at a size (default 0.002)")
    parser.add_argument("--shared-noise", type=float, default=0.005, help="sd shared by the arms (default 0.005)")
    parser.add_argument("--exponent", type=float, default=0.15, help="of the law (default 0.15)")
    parser.add_argument("--reducible", type=float, default=1.3, help="loss above E mid-way, nats (default 1.3)")
    parser.add_argument("--gpu-flops", type=float, help="sustained FLOPs a second, for GPU hours (default: DESIGN's)")
    parser.add_argument("--simulations", type=int, default=1000, metavar="N")
    parser.set_defaults(run=_power, planned=planned)
    _add_format(parser)


def _add_isoflop(subparsers: Subparsers) -> None:
    parser = _add(
        subparsers,
        "isoflop",
        _isoflop,
        "find the best size at each compute budget, and how it grows with compute",
        "points.csv",
        "points.csv --convention 6ND --json",
    )
    parser.add_argument("--convention", help="of FLOPs: exact, given, 6ND or '6N_nonemb D'")
    _add_format(parser)


def _add_report(subparsers: Subparsers) -> None:
    parser = _add(
        subparsers,
        "report",
        _report,
        "write one self-contained HTML page: answers, figures, and where every number comes from",
        "results/runs/demo -o report.html",
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--baseline", help="the arm that others are compared with (default: the sweep's)")
    parser.add_argument("--convention", help="of FLOPs: exact, given, 6ND or '6N_nonemb D'")


def _load(args: argparse.Namespace) -> Store:
    from analysis.store import load

    columns = {}
    for item in args.columns.split(",") if args.columns else []:
        ours, equals, theirs = item.partition("=")
        if not (ours and equals and theirs):
            raise ValueError(f"--columns takes NAME=COLUMN,...; got {item!r}")
        if ours.strip() in columns:
            raise ValueError(f"--columns names two columns for {ours.strip()}; give one")
        columns[ours.strip()] = theirs.strip()
    store = load(args.store, columns)
    _warn(*store.problems)
    return store


@contextlib.contextmanager
def _reading(args: argparse.Namespace) -> Iterator[Store]:
    """The store, for verbs that go on to read its steps or evaluations: what is torn in these is told at the end."""
    store = _load(args)
    known = len(store.problems)
    yield store
    _warn(*store.problems[known:])


def _folder(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; give a directory")
    return path


def _warn(*lines: str) -> None:
    for line in lines:
        print(f"dynconv: {line}", file=sys.stderr)


def _fit(args: argparse.Namespace) -> int:
    from functools import partial

    from tqdm import tqdm

    from analysis.drawing import fit_points
    from analysis.intervals import bootstrap, profile
    from analysis.powerlaw import fit
    from analysis.tables import fit_table

    if args.loss == "huber" and not 0 < args.delta < math.inf:
        raise ValueError(f"--delta must be positive; got {args.delta}")
    if args.starts < 1 or args.bootstrap < 0:
        raise ValueError(f"--starts must be at least 1, --bootstrap 0; got {args.starts}, {args.bootstrap}")
    points, excluded = fit_points(_load(args), args.form, args.baseline, args.convention)
    _warn(*(f"{item.run_id} is left out ({item.reason})" for item in excluded))
    law = fit(
        points,
        args.form,
        delta=None if args.loss == "lsq" else args.delta,
        per_arm=[name for name in args.per_arm.split(",") if name],
        starts=args.starts,
    )
    if args.bootstrap and len(points.loss) > len(law.theta):
        law = bootstrap(law, args.bootstrap, args.seed)
        law = profile(law, seed=args.seed, each=partial(tqdm, desc="profiles", leave=False, delay=1))
    print(fit_table(law, args.format, excluded))
    return 0


def _table(args: argparse.Namespace) -> int:
    from analysis.multiplier import multipliers
    from analysis.query import chosen, grouped
    from analysis.tables import multiplier_table, value_table

    runs = chosen(_load(args).runs, args.where)
    if args.by is not None:
        print(value_table(*grouped(runs, args.by.split(",")), args.format))
        return 0
    found, refused = multipliers(
        runs,
        baseline=args.baseline,
        convention=args.convention,
        floors=args.floor,
        seed=args.seed,
    )
    _warn(*(f"no answer for {line}" for line in refused))
    print(multiplier_table(found, args.format))
    return 0


def _plot(args: argparse.Namespace) -> int:
    from analysis.drawing import answers, draw
    from analysis.figures import kernel_bars
    from analysis.store import read_kernels
    from analysis.style import save

    _folder(args.out)
    kernels = read_kernels(args.store)
    if kernels is not None:
        drawn = {"kernels": kernel_bars(kernels)}
    else:
        with _reading(args) as store:
            found = answers(store, args.baseline, args.convention)
            _warn(*found.notes)
            drawn = draw(store, found)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        path = args.out / f"{name}.{args.type}"
        save(figure, path)
        print(path)
    return 0


def _query(args: argparse.Namespace) -> int:
    from analysis.query import sql
    from analysis.tables import value_table

    with _reading(args) as store:
        print(value_table(*sql(store, args.sql), args.format))
    return 0


def _power(args: argparse.Namespace) -> int:
    from dataclasses import astuple, fields

    from tqdm import tqdm

    from analysis.planning import POWER, Prospect, World, cheapest, ladder_of, prospects
    from analysis.tables import value_table

    try:
        seeds = [int(text) for text in args.seeds.split(",")]
    except ValueError:
        raise ValueError(f"--seeds takes whole numbers, 1,2,3; got {args.seeds!r}") from None
    if min(seeds) < 1 or args.simulations < 100:
        raise ValueError(f"--seeds must be at least 1 and --simulations 100; got {args.seeds}, {args.simulations}")
    for name in ("seed_noise", "arm_noise", "shared_noise", "exponent", "reducible", "gpu_flops"):
        value, positive = getattr(args, name), not name.endswith("noise")
        if value is not None and not (0 <= value < math.inf and (value or not positive)):
            wanted = "positive" if positive else "at least 0"
            raise ValueError(f"--{name.replace('_', '-')} must be {wanted}; got {value:g}")
    world = World(
        reducible_loss=args.reducible,
        exponent=args.exponent,
        seed_noise=args.seed_noise,
        arm_noise=args.arm_noise,
        shared_noise=args.shared_noise,
    )
    ladder = ladder_of(_design(args), args.baseline, args.gpu_flops)
    total = max(len(ladder.sizes) - 2, 0) * len(seeds)
    found = list(tqdm(prospects(ladder, args.m, seeds, world, args.simulations), total=total, leave=False, delay=1))
    print(value_table([item.name for item in fields(Prospect)], [astuple(row) for row in found], args.format))
    best = cheapest(found)
    if args.format == "md" and best:
        cost = "" if math.isnan(best.gpu_hours) else f", {best.gpu_hours:.3g} GPU hours"
        print(f"\ncheapest with {POWER:.0%} power: {best.sizes} sizes x {best.seeds} seeds{cost}")
    elif args.format == "md":
        print(f"\nnone of these resolves {args.m:g} with {POWER:.0%} power")
    return 0


def _design(args: argparse.Namespace) -> pd.DataFrame:
    import pandas as pd

    from analysis.planning import read_plan
    from analysis.store import load

    read = {".toml": args.planned, ".json": read_plan}.get(args.design.suffix)
    return pd.DataFrame.from_records(read(args.design)) if read else load(args.design).runs


def _isoflop(args: argparse.Namespace) -> int:
    from dataclasses import astuple, fields

    from analysis.isoflop import isoflop
    from analysis.tables import to_json, value_table

    optima, laws = isoflop(_load(args).runs, args.convention)
    if args.format == "json":
        print(to_json({"optima": optima, "laws": laws}))
        return 0
    tables = [
        value_table([item.name for item in fields(rows[0])], [astuple(row) for row in rows], args.format)
        for rows in (optima, laws)
    ]
    print("\n\n".join(tables))
    return 0


def _report(args: argparse.Namespace) -> int:
    from analysis.report import report
    from analysis.runlog import write_atomically

    if not args.out.parent.is_dir() or args.out.is_dir():
        got = "is a folder" if args.out.is_dir() else "is in no folder"
        raise ValueError(f"{args.out} {got}; give a file in a folder that exists")
    with _reading(args) as store:
        page = report(store, args.baseline, args.convention)
    write_atomically(args.out, lambda temporary: temporary.write_text(page))
    print(args.out)
    return 0


def _freeze(args: argparse.Namespace) -> int:
    from analysis.store import freeze

    with _reading(args) as store:
        written = freeze(store, _folder(args.out), args.steps)
    print(*written, sep="\n")
    return 0
