"""The verbs that compare arms: table, power."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.cli.arguments import (
    TABLE_FORMATS,
    Subparsers,
    add_reading_verb,
    add_verb,
    baseline_argument,
    columns_argument,
    convention_argument,
    format_argument,
    load_store,
    positive_numbers,
    published_argument,
    reading_store,
    where_argument,
)
from experiments.cli.plan import planned
from experiments.terminal import warn

if TYPE_CHECKING:
    import pandas as pd

    from analysis.advantage.measured import Assumption
    from analysis.advantage.planning import Ladder, World
    from analysis.logs.store import Store


def register(subparsers: Subparsers) -> None:
    """Add the verbs of this file."""
    _add_table(subparsers)
    _add_power(subparsers)


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
        "results/runs/demo --throughput train.parquet",
        "results/runs/mini-scaling --at 3.35e19,1.146e21      # extrapolated, and told so",
        "results/runs/mini-mqar --metric accuracy",
        "results/runs/mini-ablation-width --published",
        "results/runs/mini-scaling --rates experiments/sweeps/mini-scaling.toml",
    )
    baseline_argument(parser)
    convention_argument(parser)
    parser.add_argument(
        "--hold",
        action="append",
        default=[],
        metavar="E=VALUE",
        help="hold the irreducible loss at a value instead of fitting it, in m, its interval and the test that m is "
        "constant; repeat it to see how m depends on it",
    )
    parser.add_argument(
        "--throughput",
        type=Path,
        metavar="FILE",
        help="a .csv or .parquet of measured throughput, with columns size, arm, tokens_per_second: for the wall clock",
    )
    parser.add_argument(
        "--at",
        metavar="C,...",
        help="tell m at these computes in FLOPs, too, each with how far beyond those that were trained, at most "
        "a million times",
    )
    where_argument(parser)
    parser.add_argument(
        "--by", metavar="COLUMN,...", help="summarise the runs by arm, size ... instead of comparing arms"
    )
    parser.add_argument(
        "--metric",
        metavar="[TASK/]METRIC",
        help="compare arms on this metric of the evaluations instead, as accuracy or lambada/perplexity: differences "
        "of means, paired by size and seed",
    )
    published_argument(
        parser,
        "put the paper's ablations beside the runs that have the same facts instead: what each change makes of the log "
        "perplexity there, and of the loss here",
    )
    parser.add_argument(
        "--rates",
        type=Path,
        metavar="SWEEP",
        help="print learning rates for the sizes at which this sweep file trains a single one, by the rule of the "
        "sizes where several were tried: lines for its [vary_by_arm]",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers of bootstrapped tests (default 0)")
    format_argument(parser, TABLE_FORMATS)


def _add_power(subparsers: Subparsers) -> None:
    parser = add_verb(
        subparsers,
        "power",
        _power,
        "simulate which advantage a design's sizes and seeds could resolve as `table` reports it, and at which cost",
        "experiments/sweeps/paper-scaling.toml --m 1.05 --gpu-flops 4e14",
        "plan.json --m 1.05",
        "results/runs/demo --m 1.1 --seeds 1,3 --seed-noise 0.004 --json",
        "experiments/sweeps/demo.toml --seeds own --seed-noise 25k=.02,45k=.01,70k=.01,110k=.005",
        """STORE --where 'arm in ["static-qkv", "lowrank-qkv"]' --baseline static-qkv --seeds own""",
    )
    parser.add_argument(
        "stores",
        type=Path,
        metavar="DESIGN",
        nargs="+",
        help="a sweep file; a plan (dynconv plan SWEEP --profile P --json; P for the hours); or stores and tables of "
        "points, whose sizes and compute count",
    )
    columns_argument(parser)
    where_argument(parser)
    parser.add_argument("--m", type=float, default=1.05, help="the multiplier to resolve (default 1.05)")
    parser.add_argument(
        "--seeds", default="1,2,3", help="numbers of seeds to try, and `own` for those of each size (default 1,2,3)"
    )
    baseline_argument(parser, "the arm whose sizes and compute make the design")
    default = "(default: what DESIGN's finished runs show, else {})"
    parser.add_argument(
        "--seed-noise",
        metavar="SD|SIZE=SD,...",
        help="standard deviation between seeds, nats; or of each size, 1M=0.01,3M=0.004 (default: what DESIGN's "
        "finished runs show, else 0.002)",
    )
    for name, text, value in (
        (
            "--arm-noise",
            "standard deviation of an arm at a size around its law, nats; one learning rate is simulated, so add in "
            "quadrature what rates that are not the best cost: 1.4 b s^2, for b nats a squared e-fold and rates that "
            "are off the best by s (standard deviation of ln rate)",
            0.002,
        ),
        ("--shared-noise", "standard deviation of a size that all arms share, nats", 0.005),
        ("--exponent", "exponent of the law", 0.15),
        ("--reducible", "loss above the irreducible loss at the middle compute of all sizes, nats", 1.3),
    ):
        parser.add_argument(name, type=float, help=f"{text} {default.format(value)}")
    parser.add_argument(
        "--correlation",
        type=float,
        help="correlation of the arm and shared noise of neighbouring sizes (default 0: independent)",
    )
    parser.add_argument(
        "--gpu-flops", type=float, help="sustained FLOPs per second of a GPU, for GPU hours (default: those of DESIGN)"
    )
    text = "simulated experiments of each number of sizes and seeds (default 1000)"
    parser.add_argument("--simulations", type=int, default=1000, metavar="N", help=text)
    format_argument(parser, TABLE_FORMATS)


def _table(args: argparse.Namespace) -> int:
    from analysis.advantage.multiplier import multipliers
    from analysis.logs.throughput import read_throughput
    from analysis.pages.query import cautions, grouped, not_counted
    from analysis.pages.tables import multiplier_table, value_table

    with reading_store(args) as store:
        runs = store.runs
        _refuse_several_answers(args)
        if args.metric is not None:
            return _compare_metric(args, store)
        if args.published is not None:
            return _beside_published(args, store)
    if args.rates is not None:
        return _rates_of_a_sweep(args, runs)
    if args.by is not None:
        by = args.by.split(",")
        print(value_table(*grouped(runs, by), args.format))
        warn(*not_counted(runs), *cautions(runs, by))
        return 0
    at = _asked(args, runs)
    found, refused = multipliers(
        runs,
        baseline=args.baseline,
        convention=args.convention,
        irreducible_losses=_held_losses(args.hold),
        throughput=read_throughput(args.throughput) if args.throughput else None,
        at=at,
        seed=args.seed,
    )
    warn(*(f"no answer for {line}" for line in refused))
    if at and (few := [item.arm for item in found if not item.asked]):
        warn(f"no m at another compute for {', '.join(few)}: three paired sizes of equal compute show how it changes")
    print(multiplier_table(found, args.format))
    return 0


def _asked(args: argparse.Namespace, runs: pd.DataFrame) -> list[float]:
    """The computes of --at, each once. Raises ValueError for what is none, and for one far beyond all runs."""
    from analysis.advantage.checks import require_in_reach
    from analysis.logs.schema import CONVENTIONS
    from analysis.logs.selection import choose_convention

    if args.at is None:
        return []
    at = list(dict.fromkeys(positive_numbers("at", args.at)))
    column = CONVENTIONS[choose_convention(runs, args.convention)]
    require_in_reach(at, runs.loc[runs["status"] == "complete", column].to_numpy(float))
    return at


def _refuse_several_answers(args: argparse.Namespace) -> None:
    """Raises ValueError where options ask for several tables at once."""
    tables = [f"--{name}" for name in ("metric", "published", "by", "rates") if getattr(args, name) is not None]
    settings = [f"--{name}" for name in ("hold", "throughput", "at") if getattr(args, name) not in (None, [])]
    if len(tables) > 1 or (tables and settings):
        given = " and ".join([*tables, *settings][:2])
        raise ValueError(
            f"{given} do not go together: each of --metric, --published, --by and --rates is a table of its own"
        )


def _rates_of_a_sweep(args: argparse.Namespace, runs: pd.DataFrame) -> int:
    """Print the factors of the ladder's learning rate that the rule of the tuned sizes gives to the sizes at which the
    sweep trains one, as TOML, or as a table in the other formats."""
    from analysis.advantage.comparable import Ready, every_arm
    from analysis.advantage.pairs import usable
    from analysis.advantage.planning import plan_table
    from analysis.laws.rate_rule import factor_rule, require_same_recipe, single_factors
    from analysis.laws.rates import FACTOR, RATE, rate_column
    from analysis.logs.schema import CONVENTIONS
    from analysis.logs.selection import choose_baseline, choose_convention
    from analysis.pages.rate_lines import held_at, rate_lines
    from analysis.pages.tables import value_table

    rows, _ = usable(runs)
    if rate_column(rows) is None:
        raise ValueError(f"the table has no learning rates; --rates wants a column {RATE} or {FACTOR}")
    baseline, convention = choose_baseline(runs, args.baseline), choose_convention(runs, args.convention)
    arms = [arm for arm in dict.fromkeys(runs["arm"]) if arm != baseline]
    ready = every_arm(runs, rows, arms, baseline, convention)
    warn(*(f"without {arm}: {each}" for arm, each in ready.items() if not isinstance(each, Ready)))
    tuned = [item for each in ready.values() if isinstance(each, Ready) for item in each.tuned]
    rule, plan = factor_rule(tuned), plan_table(planned(args.rates))
    require_same_recipe(rows, plan_table(planned(args.rates, list(dict.fromkeys(rows["size"].dropna())))))
    if CONVENTIONS[convention] not in plan:
        raise ValueError(f"a sweep has no compute by {convention!r}; choose another with --convention")
    plan["factor"] = plan.get(FACTOR)
    found = single_factors(rule, plan, CONVENTIONS[convention])
    if without := [arm for arm in dict.fromkeys(plan["arm"]) if arm not in rule.levels]:
        warn(f"no rates for {', '.join(without)}: no best rate between worse ones was found at any size")
    if args.format == "md":
        print(rate_lines(rule, tuned, found))
    else:
        factors = [(item.arm, item.size, item.factor) for item in found]
        print(value_table(["arm", "size", "learning_rate_factor"], factors, args.format))
        warn(*(f"{item.arm} at {item.size} is {held}" for item in found if (held := held_at(item))))
    return 0


def _beside_published(args: argparse.Namespace, store: Store) -> int:
    from analysis.advantage.published import beside_published, read_published
    from analysis.pages.metric_tables import published_table

    print(published_table(beside_published(store.runs, read_published(args.published)), args.format))
    return 0


def _compare_metric(args: argparse.Namespace, store: Store) -> int:
    from analysis.advantage.outcomes import compare_metric
    from analysis.logs.metrics import final_metrics, values_of
    from analysis.pages.metric_tables import outcome_table

    values, everything = values_of(store, args.metric), final_metrics(store)
    found = compare_metric(store.runs, values, everything, baseline=args.baseline, convention=args.convention)
    print(outcome_table(found, args.format))
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

    from analysis.advantage.measured import seed_noise_by_size
    from analysis.advantage.planning import POWER, Prospect, cheapest, ladder_of, prospects, unpaired, whole_cost
    from analysis.pages.tables import value_table

    seeds, noise = _seeds(args), _seed_noise(args)
    _check_world(args)
    design = _design(args)
    ladder = ladder_of(design, args.baseline, args.gpu_flops)
    warn(*filter(None, [unpaired(design)]))
    source = "asked"
    if not noise and args.seed_noise is None and _has_losses(design):
        noise, source = seed_noise_by_size(design, ladder, args.baseline)
    ladder = _with_noise(ladder, noise)
    world, assumptions = _world(args, design)
    total = max(len(ladder.sizes) - 2, 0) * len(seeds)
    arms = max(design["arm"].nunique() - 1, 1) if "arm" in design else 1
    simulated = prospects(ladder, args.m, seeds, world, args.simulations, arms=arms)
    found = list(tqdm(simulated, total=total, leave=False, delay=1))
    print(value_table([item.name for item in fields(Prospect)], [astuple(row) for row in found], args.format))
    lines = [f"the interval of all {arms} arms at once, by which an arm is resolved"] if arms > 1 else []
    if noise:
        at = ", ".join(f"{value:.3g} at {size}" for size, value in noise.items())
        lines.append(f"seed noise {at} ({source})")
        assumptions = [item for item in assumptions if item.name != "seed_noise"]
    lines += [f"{item.name.replace('_', ' ')} {item.value:.3g} ({item.source})" for item in assumptions]
    if args.format == "md":
        print("\nsimulated with " + ";\n  ".join(lines))
    else:
        warn(*(f"simulated with {line}" for line in lines))
    if cost := whole_cost(design):
        warn(cost) if args.format != "md" else print(f"\n{cost}")
    best = cheapest(found)
    if args.format == "md" and best:
        cost = "" if math.isnan(best.gpu_hours) else f", {best.gpu_hours:.3g} GPU hours"
        print(f"\ncheapest with {POWER:.0%} power: {best.sizes} sizes x {best.seeds} seeds{cost}")
    elif args.format == "md":
        print(f"\nnone of these resolves {args.m:g} with {POWER:.0%} power")
    return 0


def _seeds(args: argparse.Namespace) -> list[int | None]:
    """The numbers of seeds to try; None stands for those of each size. Raises ValueError for what is no such number."""
    try:
        seeds = [None if text.strip() == "own" else int(text) for text in args.seeds.split(",")]
    except ValueError:
        raise ValueError(f"--seeds takes whole numbers, 1,2,3, and own; got {args.seeds!r}") from None
    if any(count is not None and count < 1 for count in seeds) or args.simulations < 100:
        raise ValueError(f"--seeds must be at least 1 and --simulations 100; got {args.seeds}, {args.simulations}")
    return seeds


def _check_world(args: argparse.Namespace) -> None:
    """Raises ValueError for settings of the simulation that are out of range."""
    for name in ("arm_noise", "shared_noise", "exponent", "reducible", "gpu_flops"):
        value = getattr(args, name)
        may_be_zero = name.endswith("noise")
        if value is None or 0 < value < math.inf or (value == 0 and may_be_zero):
            continue
        wanted = "at least 0" if may_be_zero else "positive"
        raise ValueError(f"--{name.replace('_', '-')} must be {wanted}; got {value:g}")
    if args.correlation is not None and not -1 < args.correlation < 1:
        raise ValueError(f"--correlation must be between -1 and 1; got {args.correlation:g}")


def _seed_noise(args: argparse.Namespace) -> dict[str, float]:
    """The noise of each size that --seed-noise gives; for one number nothing, and args.seed_noise becomes it."""
    text, args.seed_noise = args.seed_noise, None
    if text is None:
        return {}
    found = dict[str, float]()
    for item in text.split(","):
        size, _, value = item.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf or (not size and "," in text) or size.strip() in found:
            raise ValueError(f"--seed-noise must be at least 0, as 0.004 or 1M=0.01,3M=0.004; got {text}")
        found[size.strip()] = number
    args.seed_noise = found.pop("", None)
    return found


def _has_losses(design: pd.DataFrame) -> bool:
    return "loss" in design and bool(design["loss"].notna().any())


def _with_noise(ladder: Ladder, noise: dict[str, float]) -> Ladder:
    """The design with a noise of each size's own. Raises ValueError unless it is given for exactly its sizes."""
    from dataclasses import replace

    if noise and set(noise) != set(ladder.sizes):
        wanted = ",".join(f"{size}=SD" for size in ladder.sizes)
        raise ValueError(f"--seed-noise names {', '.join(noise)}; the design's sizes want {wanted}")
    return replace(ladder, seed_noise=tuple(noise[size] for size in ladder.sizes)) if noise else ladder


def _world(args: argparse.Namespace, design: pd.DataFrame) -> tuple[World, list[Assumption]]:
    """The settings of the simulation, with their sources: options, else finished runs of the design, else defaults."""
    from dataclasses import replace

    from analysis.advantage.measured import Assumption, measured
    from analysis.advantage.planning import World
    from analysis.logs.learning import unlearned

    world, assumptions = World(), [Assumption(name, value, "assumed") for name, value in vars(World()).items()]
    if _has_losses(design):
        warn(*(f"{each.remark}, and are not in these estimates" for each in unlearned(design).values()))
        world, assumptions = measured(design, args.baseline)
    names = {"reducible": "reducible_loss"}
    given = {
        names.get(name, name): getattr(args, name)
        for name in ("seed_noise", "arm_noise", "shared_noise", "exponent", "reducible", "correlation")
        if getattr(args, name) is not None
    }
    sources = [
        replace(item, value=given[item.name], source="asked") if item.name in given else item for item in assumptions
    ]
    return replace(world, **given), sources


def _design(args: argparse.Namespace) -> pd.DataFrame:
    """The runs of a sweep file, of a plan, or of stores and tables of points, as the suffix of the first path says;
    those that fulfil --where."""
    from analysis.advantage.planning import plan_table, read_plan
    from analysis.pages.query import chosen

    first, *others = args.stores
    if first.suffix not in (".toml", ".json"):
        return load_store(args).runs
    if others or args.columns:
        raise ValueError(f"{first} is a whole design; give it alone, without --columns")
    return chosen(plan_table(planned(first) if first.suffix == ".toml" else read_plan(first)), args.where)
