"""The verbs that make claims of logs: fit, table, power, isoflop."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.cli.arguments import (
    Subparsers,
    add_reading_verb,
    load_store,
    table_format_argument,
    warn,
)
from experiments.cli.runs import planned

if TYPE_CHECKING:
    import pandas as pd

    from analysis.advantage.measured import Assumption
    from analysis.advantage.planning import World


def register(subparsers: Subparsers) -> None:
    """Add the verbs; each parser has a default `run(args) -> exit code`."""
    _add_fit(subparsers)
    _add_table(subparsers)
    _add_power(subparsers)
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
    table_format_argument(parser)


def _add_table(subparsers: Subparsers) -> None:
    parser = add_reading_verb(
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
        "--hold",
        action="append",
        default=[],
        metavar="E=VALUE",
        help="hold the irreducible loss instead of fitting it, in m, its interval and the test that it is constant; "
        "more of them show what m depends on",
    )
    parser.add_argument("--where", metavar="CONDITION", help="of the runs to use, on the run table's columns")
    parser.add_argument("--by", metavar="COLUMN,...", help="sum the runs up by arm, size ... instead of comparing arms")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrapped tests")
    table_format_argument(parser)


def _add_power(subparsers: Subparsers) -> None:
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
    measured = "(default: what DESIGN's finished runs show, else {})"
    for name, text, value in (
        ("--seed-noise", "sd of a run's loss, nats", 0.002),
        ("--arm-noise", "sd of an arm at a size", 0.002),
        ("--shared-noise", "sd of a size, shared by the arms", 0.005),
        ("--exponent", "of the law", 0.15),
        ("--reducible", "loss above E mid-way, nats", 1.3),
    ):
        parser.add_argument(name, type=float, help=f"{text} {measured.format(value)}")
    parser.add_argument(
        "--correlation",
        type=float,
        help="of arm and shared noise from one size to the next (default 0: independent)",
    )
    parser.add_argument("--gpu-flops", type=float, help="sustained FLOPs a second, for GPU hours (default: DESIGN's)")
    parser.add_argument("--simulations", type=int, default=1000, metavar="N")
    parser.set_defaults(run=_power)
    table_format_argument(parser)


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

    from analysis.laws.intervals import bootstrap, profile
    from analysis.laws.powerlaw import fit
    from analysis.pages.drawing import fit_points
    from analysis.pages.tables import fit_table

    if args.loss == "huber" and not 0 < args.delta < math.inf:
        raise ValueError(f"--delta must be positive; got {args.delta}")
    if args.starts < 1 or args.bootstrap < 0:
        raise ValueError(f"--starts must be at least 1, --bootstrap 0; got {args.starts}, {args.bootstrap}")
    points, excluded = fit_points(load_store(args), args.form, args.baseline, args.convention)
    warn(*(f"{item.run_id} is left out ({item.reason})" for item in excluded))
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
    from analysis.advantage.multiplier import multipliers
    from analysis.pages.query import chosen, grouped
    from analysis.pages.tables import multiplier_table, value_table

    runs = chosen(load_store(args).runs, args.where)
    if args.by is not None:
        print(value_table(*grouped(runs, args.by.split(",")), args.format))
        return 0
    found, refused = multipliers(
        runs,
        baseline=args.baseline,
        convention=args.convention,
        floors=_held_losses(args.hold),
        seed=args.seed,
    )
    warn(*(f"no answer for {line}" for line in refused))
    print(multiplier_table(found, args.format))
    return 0


def _held_losses(holds: list[str]) -> list[float]:
    """The irreducible losses of --hold E=VALUE, in the order given."""
    values = []
    for item in (item for hold in holds for item in hold.split(",")):
        name, equals, value = (part.strip() for part in item.partition("="))
        if name != "E" or not equals:
            raise ValueError(f"--hold of table takes E=VALUE, the irreducible loss in nats a token; got {item!r}")
        try:
            values.append(float(value))
        except ValueError:
            raise ValueError(f"--hold E= takes a number; got {value!r}") from None
    return values


def _power(args: argparse.Namespace) -> int:
    from dataclasses import astuple, fields

    from tqdm import tqdm

    from analysis.advantage.planning import POWER, Prospect, cheapest, ladder_of, prospects
    from analysis.pages.tables import value_table

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
    if args.correlation is not None and not -1 < args.correlation < 1:
        raise ValueError(f"--correlation must be between -1 and 1; got {args.correlation:g}")
    design = _design(args)
    ladder = ladder_of(design, args.baseline, args.gpu_flops)
    world, assumptions = _world(args, design)
    total = max(len(ladder.sizes) - 2, 0) * len(seeds)
    found = list(tqdm(prospects(ladder, args.m, seeds, world, args.simulations), total=total, leave=False, delay=1))
    print(value_table([item.name for item in fields(Prospect)], [astuple(row) for row in found], args.format))
    lines = [f"{item.name.replace('_', ' ')} {item.value:.3g} ({item.source})" for item in assumptions]
    if args.format == "md":
        print("\nsimulated with " + ";\n  ".join(lines))
    else:
        warn(*(f"simulated with {line}" for line in lines))
    best = cheapest(found)
    if args.format == "md" and best:
        cost = "" if math.isnan(best.gpu_hours) else f", {best.gpu_hours:.3g} GPU hours"
        print(f"\ncheapest with {POWER:.0%} power: {best.sizes} sizes x {best.seeds} seeds{cost}")
    elif args.format == "md":
        print(f"\nnone of these resolves {args.m:g} with {POWER:.0%} power")
    return 0


def _world(args: argparse.Namespace, design: pd.DataFrame) -> tuple[World, list[Assumption]]:
    """What is simulated, and the source of each number: an option, else the design's finished runs, else assumed."""
    from dataclasses import replace

    from analysis.advantage.measured import Assumption, measured
    from analysis.advantage.planning import World

    world, assumptions = World(), [Assumption(name, value, "assumed") for name, value in vars(World()).items()]
    if "loss" in design and design["loss"].notna().any():
        world, assumptions = measured(design, args.baseline)
    names = {"reducible": "reducible_loss"}
    asked = {
        names.get(name, name): getattr(args, name)
        for name in ("seed_noise", "arm_noise", "shared_noise", "exponent", "reducible", "correlation")
        if getattr(args, name) is not None
    }
    told = [
        replace(item, value=asked[item.name], source="asked") if item.name in asked else item for item in assumptions
    ]
    return replace(world, **asked), told


def _design(args: argparse.Namespace) -> pd.DataFrame:
    import pandas as pd

    from analysis.advantage.planning import read_plan
    from analysis.logs.store import load

    read = {".toml": planned, ".json": read_plan}.get(args.design.suffix)
    return pd.DataFrame.from_records(read(args.design)) if read else load(args.design).runs


def _isoflop(args: argparse.Namespace) -> int:
    from dataclasses import astuple, fields

    from analysis.laws.isoflop import isoflop
    from analysis.pages.tables import to_json, value_table

    optima, laws = isoflop(load_store(args).runs, args.convention)
    if args.format == "json":
        print(to_json({"optima": optima, "laws": laws}))
        return 0
    tables = [
        value_table([item.name for item in fields(rows[0])], [astuple(row) for row in rows], args.format)
        for rows in (optima, laws)
    ]
    print("\n\n".join(tables))
    return 0
