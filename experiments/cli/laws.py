"""The verbs that fit laws: fit, isoflop."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from experiments.cli.arguments import Subparsers, add_reading_verb, load_store, table_format_argument, warn

if TYPE_CHECKING:
    from analysis.logs.selection import Excluded


def register(subparsers: Subparsers) -> None:
    """Add the verbs; each parser has a default `run(args) -> exit code`."""
    _add_fit(subparsers)
    _add_isoflop(subparsers)


def _add_fit(subparsers: Subparsers) -> None:
    parser = add_reading_verb(
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
    _add_law_arguments(parser)
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamples for intervals; 0 for none")
    parser.add_argument("--starts", type=int, default=4500, metavar="N")
    table_format_argument(parser)


def _add_law_arguments(parser: argparse.ArgumentParser) -> None:
    """How a law is fitted, for the verbs that fit one."""
    parser.add_argument("--loss", choices=("huber", "lsq"), default="huber", help="Huber on log loss, or least squares")
    parser.add_argument("--delta", type=float, default=1e-3, help="of Huber (default 1e-3)")
    parser.add_argument(
        "--per-arm", default="A,B", help="parameters that each arm has to itself (default A,B; '' for none)"
    )
    parser.add_argument(
        "--hold", default="", metavar="NAME=VALUE,...", help="parameters that are given, not fitted: E=1.6,alpha=.094"
    )
    parser.add_argument("--baseline", help="the arm that others are compared with (default: the sweep's)")
    parser.add_argument("--convention", help="of FLOPs, for form c: exact, given, 6ND or '6N_nonemb D'")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")


def _held(text: str) -> dict[str, float]:
    held = {}
    for item in text.split(",") if text else []:
        name, equals, value = item.partition("=")
        try:
            held[name.strip()] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"--hold takes NAME=VALUE,... as in E=1.6,alpha=.094; got {item!r}")
    return held


def _add_isoflop(subparsers: Subparsers) -> None:
    parser = add_reading_verb(
        subparsers,
        "isoflop",
        _isoflop,
        "find the best size at each compute budget, and how it grows with compute",
        "points.csv",
        "points.csv --convention 6ND --json",
    )
    parser.add_argument("--convention", help="of FLOPs: exact, given, 6ND or '6N_nonemb D'")
    table_format_argument(parser)


def _fit(args: argparse.Namespace) -> int:
    from functools import partial

    from tqdm import tqdm

    from analysis.laws.adequacy import with_lack_of_fit
    from analysis.laws.intervals import bootstrap, profile
    from analysis.laws.powerlaw import fit
    from analysis.pages.drawing import fit_points
    from analysis.pages.tables import fit_table

    if args.starts < 1 or args.bootstrap < 0:
        raise ValueError(f"--starts must be at least 1, --bootstrap 0; got {args.starts}, {args.bootstrap}")
    points, excluded = fit_points(load_store(args), args.form, args.baseline, args.convention)
    warn_excluded(excluded)
    law = fit(points, args.form, starts=args.starts, **_law_options(args))
    if args.bootstrap and len(points.loss) > len(law.theta) - len(law.hold):
        law = bootstrap(law, args.bootstrap, args.seed)
        law = profile(law, seed=args.seed, each=partial(tqdm, desc="profiles", leave=False, delay=1))
    print(fit_table(with_lack_of_fit(law), args.format, excluded))
    return 0


def _law_options(args: argparse.Namespace) -> dict[str, Any]:
    """Of `_add_law_arguments`, as keywords of `fit`."""
    if args.loss == "huber" and not 0 < args.delta < math.inf:
        raise ValueError(f"--delta must be positive; got {args.delta}")
    return {
        "delta": None if args.loss == "lsq" else args.delta,
        "per_arm": [name for name in args.per_arm.split(",") if name],
        "hold": _held(args.hold),
    }


def _isoflop(args: argparse.Namespace) -> int:
    from dataclasses import astuple, fields

    from analysis.laws.isoflop import optima_of, usable_runs
    from analysis.pages.tables import to_json, value_table

    runs, excluded = usable_runs(load_store(args).runs)
    warn_excluded(excluded)
    optima, laws = optima_of(runs, args.convention)
    if args.format == "json":
        print(to_json({"convention": laws[0].convention, "optima": optima, "laws": laws, "excluded": excluded}))
        return 0
    tables = [
        value_table([item.name for item in fields(rows[0])], [astuple(row) for row in rows], args.format)
        for rows in (optima, laws)
    ]
    if args.format == "md":
        tables.append(f"FLOPs counted as {laws[0].convention}")
    print("\n\n".join(tables))
    return 0


def warn_excluded(excluded: list[Excluded]) -> None:
    warn(*(f"{item.run_id} is left out ({item.reason})" for item in excluded))
