"""The verbs that fit laws: fit, predict, isoflop."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiments.cli.arguments import (
    TABLE_FORMATS,
    Subparsers,
    add_reading_verb,
    baseline_argument,
    convention_argument,
    format_argument,
    load_store,
    positive_numbers,
    where_argument,
)
from experiments.terminal import warn

if TYPE_CHECKING:
    from analysis.advantage.answers import Multiplier
    from analysis.logs.selection import Excluded


FEWEST_RESAMPLES = 100  # of fewer, the ends of a 95% interval are those of two or three resamples


def register(subparsers: Subparsers) -> None:
    """Add the verbs of this file."""
    _add_fit(subparsers)
    _add_predict(subparsers)
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
        "points.csv --hold E=1.6,alpha=.094",
        "optima.csv --form optima",
        "experts.csv --form bilinear --factor experts",
    )
    parser.add_argument(
        "--form",
        choices=("c", "nd", "optima", "bilinear"),
        default="c",
        help="E + A C^-alpha; E + A N^-alpha + B D^-beta; of a table of optima N*, D* = G C^a; "
        "or ln L = a ln N + b ln E + c ln N ln E + d, where E is --factor",
    )
    parser.add_argument("--factor", metavar="COLUMN", help="of form bilinear: a column such as the number of experts")
    where_argument(parser)
    _add_law_arguments(parser)
    parser.add_argument(
        "--bootstrap", type=int, default=1000, metavar="N", help="resamples for intervals, or 0 (default 1000)"
    )
    text = "points from which the fit starts, on a grid of exponents (default 4500)"
    parser.add_argument("--starts", type=int, default=4500, metavar="N", help=text)
    format_argument(parser, TABLE_FORMATS)


def _add_predict(subparsers: Subparsers) -> None:
    parser = add_reading_verb(
        subparsers,
        "predict",
        _predict,
        "predict a loss, or the best size, by a law with its band, and test the law on the largest sizes",
        "results/runs/demo --C 1e15,1e16",
        "points.csv --N 1e9 --D 2e10",
        "points.csv --form nd --C 1e21",
    )
    parser.add_argument("--C", metavar="FLOPS,...", help="loss at this compute; with --form nd, N*, D* and loss there")
    parser.add_argument("--N", metavar="PARAMETERS,...", help="with --D: loss at this size, by form nd")
    parser.add_argument("--D", metavar="TOKENS,...", help="with --N: one for each N, or one for all")
    parser.add_argument("--form", choices=("c", "nd"), help="default c with --C, nd with --N and --D")
    where_argument(parser)
    _add_law_arguments(parser)
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamples for bands (default 1000)")
    format_argument(parser, TABLE_FORMATS)


def _add_law_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that say how a law is fitted."""
    parser.add_argument("--loss", choices=("huber", "lsq"), default="huber", help="Huber on log loss, or least squares")
    parser.add_argument(
        "--delta",
        type=float,
        default=1e-3,
        help="of the Huber loss: residuals of log loss beyond it count linearly (default 1e-3)",
    )
    parser.add_argument(
        "--per-arm", default="A,B", help="parameters that are fitted for each arm by itself (default A,B; '' for none)"
    )
    parser.add_argument(
        "--hold",
        default="",
        metavar="NAME=VALUE,...",
        help="parameters to hold at given values instead of fitting them: E=1.6,alpha=.094",
    )
    baseline_argument(parser)
    convention_argument(parser, "how FLOPs are counted, for form c")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap's random numbers (default 0)")


def _held(text: str) -> dict[str, float]:
    """The values in NAME=VALUE,... by name. Raises ValueError if the text has another form."""
    held = {}
    for item in text.split(",") if text else []:
        name, equals, value = item.partition("=")
        if name.strip() in held:
            raise ValueError(f"--hold gives {name.strip()} two values; got {text!r}")
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
        "points.csv --baseline transformer",
    )
    convention_argument(parser)
    where_argument(parser)
    baseline_argument(parser, "compare each arm with this one, each at its own best sizes")
    format_argument(parser, TABLE_FORMATS)


def _fit(args: argparse.Namespace) -> int:
    from functools import partial

    from tqdm import tqdm

    from analysis.laws.adequacy import with_lack_of_fit
    from analysis.laws.intervals import bootstrap, profile
    from analysis.laws.powerlaw import fit
    from analysis.pages.drawing import fit_points
    from analysis.pages.law_tables import fit_table

    if args.starts < 1:
        raise ValueError(f"--starts must be at least 1; got {args.starts}")
    if args.bootstrap != 0 and args.bootstrap < FEWEST_RESAMPLES:
        raise ValueError(
            f"--bootstrap must be 0, or at least {FEWEST_RESAMPLES} for an interval of 95%; got {args.bootstrap}"
        )
    if args.form in ("optima", "bilinear"):
        return _fit_linear(args)
    points, excluded, told = fit_points(load_store(args), args.form, args.baseline, args.convention)
    _warn_excluded(excluded)
    warn(*told)
    law = fit(points, args.form, starts=args.starts, **_law_options(args))
    if args.bootstrap and len(points.loss) > len(law.theta) - len(law.hold):
        law = bootstrap(law, args.bootstrap, args.seed)
        law = profile(law, seed=args.seed, each=partial(tqdm, desc="profiles", leave=False, delay=1))
    print(fit_table(with_lack_of_fit(law), args.format, excluded, told))
    return 0


def _fit_linear(args: argparse.Namespace) -> int:
    from analysis.laws.linear import fit_bilinear, fit_optima
    from analysis.pages.law_tables import linear_table

    options = _law_options(args)
    if options["hold"]:
        raise ValueError("--hold is for forms c and nd")
    if (args.factor is None) == (args.form == "bilinear"):
        raise ValueError("--form bilinear and --factor COLUMN go together; give both or none")
    runs = load_store(args).runs
    if args.form == "optima":
        found = fit_optima(runs, args.convention, delta=options["delta"], resamples=args.bootstrap, seed=args.seed)
    else:
        found = fit_bilinear(runs, args.factor, delta=options["delta"], resamples=args.bootstrap, seed=args.seed)
    warn(*dict.fromkeys(note for law in found for note in law.notes))
    print(linear_table(found, args.format))
    return 0


def _predict(args: argparse.Namespace) -> int:
    import numpy as np

    from analysis.laws.adequacy import with_lack_of_fit
    from analysis.laws.intervals import bootstrap
    from analysis.laws.powerlaw import fit
    from analysis.laws.prediction import FEWEST_KEPT, back_test, best_sizes, predict
    from analysis.pages.drawing import fit_points
    from analysis.pages.law_tables import prediction_tables

    at = {name: positive_numbers(name, getattr(args, name)) for name in ("C", "N", "D") if getattr(args, name)}
    form = args.form or ("c" if "C" in at else "nd")
    if set(at) not in ({"C"}, {"N", "D"}) or (form == "c" and "C" not in at):
        raise ValueError(f"give --C, or --N and --D (form nd); got {', '.join(f'--{name}' for name in at) or 'none'}")
    if args.bootstrap < FEWEST_RESAMPLES:
        raise ValueError(f"--bootstrap must be at least {FEWEST_RESAMPLES} for a band; got {args.bootstrap}")
    points, excluded, told = fit_points(load_store(args), form, args.baseline, args.convention)
    _warn_excluded(excluded)
    warn(*told)
    options = _law_options(args)
    law = with_lack_of_fit(bootstrap(fit(points, form, **options), args.bootstrap, args.seed))
    if "N" in at:
        count = max(map(len, at.values()))
        if any(len(values) not in (1, count) for values in at.values()):
            raise ValueError(f"--N and --D need one value each, or as many; got {len(at['N'])} and {len(at['D'])}")
        at = {name: values * (count // len(values)) for name, values in at.items()}
    found: Sequence[object] = (
        best_sizes(law, at["C"])
        if form == "nd" and "C" in at
        else predict(law, {name: np.array(values) for name, values in at.items()}, args.seed)
    )
    tested = back_test(points, form, args.bootstrap, args.seed, options)
    if not tested:
        warn(f"no back-test: too few sizes to fit without the largest; at least {FEWEST_KEPT + 1} are wanted")
    print(prediction_tables(law, found, tested, args.format, excluded, told))
    return 0


def _law_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `_add_law_arguments`, as keyword arguments of `fit`."""
    if args.loss == "huber" and not 0 < args.delta < math.inf:
        raise ValueError(f"--delta must be positive; got {args.delta}")
    return {
        "delta": None if args.loss == "lsq" else args.delta,
        "per_arm": [name for name in args.per_arm.split(",") if name],
        "hold": _held(args.hold),
    }


def _isoflop(args: argparse.Namespace) -> int:
    from dataclasses import astuple, fields

    from analysis.advantage.frontiers import frontier_multipliers
    from analysis.advantage.unresolved import with_unlearned
    from analysis.laws.isoflop import optima_of, usable_runs
    from analysis.laws.rates import rate_column
    from analysis.logs.learning import unlearned
    from analysis.logs.selection import choose_baseline
    from analysis.pages.tables import multiplier_table, to_json, value_table

    everything = load_store(args).runs
    runs, excluded, told = usable_runs(everything, args.convention)
    failures = unlearned(everything, runs, rate_column(runs))
    _warn_excluded(excluded)
    warn(*told)
    optima, laws = optima_of(runs, args.convention, failures)
    found: list[Multiplier] = []
    if args.baseline is not None or (runs["arm"].nunique() > 1 and runs["baseline"].nunique() == 1):
        baseline = choose_baseline(runs, args.baseline)
        found, refused = frontier_multipliers(optima, baseline, laws[0].convention)
        found = [with_unlearned(item, failures) for item in found]
        warn(*(f"no multiplier for {line}" for line in refused))
    if args.format == "json":
        answer = {"convention": laws[0].convention, "optima": optima, "laws": laws, "multipliers": found}
        print(to_json(answer | {"notes": told, "excluded": excluded}))
        return 0
    tables = [
        value_table([item.name for item in fields(rows[0])], [astuple(row) for row in rows], args.format)
        for rows in (optima, laws)
    ]
    if found and args.format == "md":
        tables.append("at each arm's own best sizes, by budget instead of by size:\n\n" + multiplier_table(found, "md"))
    if args.format == "md":
        tables.append(f"FLOPs counted as {laws[0].convention}")
    print("\n\n".join(tables))
    return 0


def _warn_excluded(excluded: list[Excluded]) -> None:
    """One line a reason, with the first of the runs."""
    from analysis.logs.selection import some

    for reason in dict.fromkeys(item.reason for item in excluded):
        names = [item.run_id for item in excluded if item.reason == reason]
        warn(f"{some(names)} {'is' if len(names) == 1 else 'are'} left out ({reason})")
