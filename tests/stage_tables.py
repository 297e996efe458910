"""What the study's plan costs in what it can resolve: tables of analysis/README.md and results/measured/README.md.

Learning rates are chosen by the study's own first runs, and its sessions end with fewer seeds and sizes than all.
`python tests/stage_tables.py` prints both tables with 2,000 simulated sweeps a row (about two minutes on one core);
test_rates.py asserts a small sample. Sizes, noise and law are those of noise_tables.py.

Legend: K sweeps, n seeds, R learning rates; rates are ln of factors, 0 where the tried ones have their middle.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from noise_tables import STUDY, STUDY_NOISE, THE_STUDY

from analysis.advantage.changing import reported
from analysis.advantage.paired import changing_multipliers, local_multipliers
from analysis.advantage.planning import Simulated, World, middle
from analysis.advantage.seeds import by_power
from analysis.laws.rates import best_of, excess
from analysis.laws.solver import Floats, Indices

TUNED = (0, 1, 3)  # 1M, 3M and 11M, where several rates are tried
PILOT = 3  # the size whose first seed decides
ARMS = 6  # those that a slope in common is estimated from
STEP = math.log(2)  # between rates
TRIED = STEP * np.array([-1.0, 0.0, 1.0])
X = np.log(STUDY / STUDY[0])
BEST_LATER = {1: 3, 3: 1}  # seeds of 3M and of 11M that try all rates; later ones the best of these


@dataclass(frozen=True)
class Rates:
    """How the best rates lie, and how those of the study are chosen."""

    chosen: str = "runs"  # by the counted runs of PILOT; by a "pilot" there; "guessed"; or the best, "known"
    rule: str = "shared"  # of single rates: slope in ln C "shared" by the arms, each arm's "own", or "none"
    all_rates: Mapping[int, int] = field(default_factory=dict)  # seeds that try all rates, where not every one does
    more: tuple[int, ...] = ()  # sizes where the first seed also tries half and twice the rule's rate
    scatter: float = 0.2  # standard deviations of ln best rate: at a size, about the arm's line
    slope: float = 0.06  # of all arms' slope, for each e-fold of compute
    own_slope: float = 0.03  # of an arm's deviation from it
    level: float = 0.2  # of an arm's level from what was guessed
    bend: float = 0.02  # nats for each squared e-fold from the best rate


class Arm:
    """K simulations of one arm."""

    def __init__(self, m: float, rates: Rates, slope: Floats, random: np.random.Generator) -> None:
        count = len(slope)
        errors = random.standard_normal((count, 6))
        self.random, self.bend = random, rates.bend
        self.law = THE_STUDY.reducible(m) + THE_STUDY.irreducible_loss + THE_STUDY.scatter * errors
        slope = slope + rates.own_slope * random.standard_normal(count)
        level = rates.level * random.standard_normal(count)
        self.best = level[:, None] + slope[:, None] * X + rates.scatter * random.standard_normal((count, 6))

    def runs(self, size: int, at: Floats, seeds: int, rows: Indices | slice = slice(None)) -> Floats:
        """Losses [K, n, R] of runs at rates `at` [K, R]."""
        loss = self.law[rows, size, None] + self.bend * (at - self.best[rows, size, None]) ** 2
        return loss[:, None] + STUDY_NOISE[size] * self.random.standard_normal((len(loss), seeds, at.shape[1]))


def at_best(runs: Floats, x: Floats, noise: float, full: int) -> tuple[Floats, Floats, Floats]:
    """Of runs [K, n, R] at rates x [R]: ln best rate [K] by the first `full` seeds, with NaN where it is at the edge;
    the same at the edge, too; and losses [K, n] at the best rate as `table` has them, if later seeds train the best
    rate of the first alone."""
    first = runs[:, :full].mean(axis=1)
    ln_rate, _, inside = best_of(x, first)
    chosen = np.arange(len(x)) == first.argmin(axis=1)[:, None]
    runs = runs.copy()
    runs[:, full:][~np.broadcast_to(chosen[:, None], runs[:, full:].shape)] = np.nan
    number, mean = (~np.isnan(runs)).sum(axis=1), np.nanmean(runs, axis=1)
    loss = best_of(x, mean)[1] + [excess(x, y, noise / np.sqrt(n)) for y, n in zip(mean, number, strict=True)]
    at, rows = mean.argmin(axis=1), np.arange(len(mean))
    moved = runs[rows, :, at] + (loss - mean[rows, at])[:, None]
    return np.where(inside, ln_rate, np.nan), ln_rate, moved


def tune(arm: Arm, size: int, seeds: int, rates: Rates) -> tuple[Floats, Floats, Floats]:
    """As `at_best`, of an arm at a size where several rates are tried. At PILOT one more is tried where the first seed
    is best at the edge, or all are moved by what a pilot found."""
    count, full = len(arm.law), rates.all_rates.get(size, seeds)
    center = np.zeros(count)
    runs = arm.runs(size, np.tile(TRIED, (count, 1)), seeds)
    if size == PILOT and rates.chosen == "pilot":
        bracketed, edge, _ = at_best(runs[:, :1], TRIED, STUDY_NOISE[size], 1)
        center = STEP * np.round(edge / STEP)
        moved = at_best(arm.runs(size, center[:, None] + TRIED, seeds), TRIED, STUDY_NOISE[size], full)[2]
        return bracketed, edge, moved
    if size != PILOT or rates.chosen != "runs":
        return at_best(runs, TRIED, STUDY_NOISE[size], full)
    found = [np.full(count, np.nan), np.full(count, np.nan), np.full((count, seeds), np.nan)]
    edge = runs[:, 0].argmin(axis=1) - 1  # -1 and 1 where the lowest and the highest rate is best
    for side in (-1, 0, 1):
        rows = np.flatnonzero(edge == side)
        more = [2 * STEP * side] if side else []
        extra = arm.runs(size, np.full((len(rows), len(more)), 2 * STEP * side), seeds, rows)
        x = np.concatenate([TRIED, more])
        order = np.argsort(x)
        of_side = np.concatenate([runs[rows], extra], axis=2)[:, :, order]
        for whole, part in zip(found, at_best(of_side, x[order], STUDY_NOISE[size], full), strict=True):
            whole[rows] = part
    return found[0], found[1], found[2]


def rule(points: Sequence[tuple[Floats, Floats]], rates: Rates) -> tuple[Floats, Floats]:
    """Level at the middle of the tuned sizes and slope [K] of one arm's line of ln best rate on ln C. `points` has for
    each arm, that one first, the best rates [K, 3] at TUNED: those that are bracketed, and all."""
    x = X[list(TUNED)]
    slopes, levels = [], []
    for bracketed, every in points:
        few = (~np.isnan(bracketed)).sum(axis=1) < 2
        y = np.where(few[:, None], every, bracketed)
        weight = ~np.isnan(y)
        mean_x = (weight * x).sum(axis=1) / weight.sum(axis=1)
        away = weight * (x - mean_x[:, None])
        slopes.append((away * np.nan_to_num(y)).sum(axis=1) / (away * (x - mean_x[:, None])).sum(axis=1))
        levels.append((np.nanmean(y, axis=1), mean_x))
    slope = {"own": slopes[0], "shared": np.mean(slopes, axis=0), "none": 0 * slopes[0]}[rates.rule]
    return levels[0][0] - slope * levels[0][1], slope


def sweeps(seeds: Sequence[int], rates: Rates, count: int, random_seed: int = 0) -> tuple[list[Floats], list[Floats]]:
    """Losses [K, n] of baseline and arm at each size, NaN where no run is compared; sizes with 0 seeds are empty."""
    random = np.random.default_rng(random_seed)
    slope = rates.slope * random.standard_normal(count)
    arms = [Arm(m, rates, slope, random) for m in (1.0, THE_STUDY.m, *[1.0] * (ARMS - 2))]
    tuned = [{size: tune(arm, size, seeds[size], rates) for size in TUNED if seeds[size]} for arm in arms]
    tuned_sizes = list(tuned[0])
    found = []
    for number, arm in enumerate(arms[:2]):
        losses = [tuned[number][size][2] if size in tuned_sizes else np.zeros((count, 0)) for size in range(6)]
        others = [tuned[number], *(each for k, each in enumerate(tuned) if k != number)]
        if len(tuned_sizes) == len(TUNED):
            points = [(np.stack([t[s][0] for s in TUNED], 1), np.stack([t[s][1] for s in TUNED], 1)) for t in others]
            height, line = rule(points, rates)
            for size in set(range(6)) - set(TUNED):
                at = {"known": arm.best[:, size], "guessed": np.zeros(count)}.get(rates.chosen, height + line * X[size])
                if size in rates.more:
                    tried = arm.runs(size, at[:, None] + TRIED, seeds[size])
                    losses[size] = at_best(tried, TRIED, STUDY_NOISE[size], 1)[2]
                else:
                    losses[size] = arm.runs(size, at[:, None], seeds[size])[:, :, 0]
        found.append(losses)
    return found[0], found[1]


@dataclass(frozen=True)
class Shown:
    """What simulated sweeps are told of m: all of ln m but the shares."""

    bias: float
    sd: float
    half_width: float
    coverage: float
    excludes_1: float


def shown(seeds: Sequence[int], rates: Rates, count: int) -> Shown:
    baseline, mine = sweeps(seeds, rates, count)
    sizes = [size for size in range(6) if seeds[size]]
    shared = 0.005 * np.random.default_rng(1).standard_normal((count, 6))
    differences = [baseline[size] - mine[size] for size in sizes]
    paired = np.stack([(~np.isnan(each)).sum(axis=1) for each in differences], axis=1)
    squares = np.stack([np.nansum((d - np.nanmean(d, 1, keepdims=True)) ** 2, axis=1) for d in differences], axis=1)
    y0, y1 = (
        np.stack([np.nanmean(side[size] + 0 * d, axis=1) for d, size in zip(differences, sizes, strict=True)], axis=1)
        + shared[:, sizes]
        for side in (baseline, mine)
    )
    means, lows, highs = [], [], []
    for number in np.unique(paired, axis=0):  # the estimator takes one number of seeds for each size
        rows, c = (paired == number).all(axis=1), STUDY[sizes]
        noise = by_power(c, squares[rows], number.astype(float), number - 1.0)
        local = local_multipliers(c, c, y0[rows], y1[rows], noise=noise)
        _, low, high = reported(local, np.ones(rows.sum()), changing_multipliers(local))
        means, lows, highs = [*means, *local.mean], [*lows, *low], [*highs, *high]
    mean, low, high, truth = np.array(means), np.array(lows), np.array(highs), math.log(THE_STUDY.m)
    return Shown(
        bias=float(mean.mean() - truth),
        sd=float(mean.std()),
        half_width=float(np.median(high - low) / 2),
        coverage=float(((low < truth) & (truth < high)).mean()),
        excludes_1=float(((low > 0) | (high < 0)).mean()),
    )


ALL = (16, 8, 5, 3, 3, 3)
CHOICES = {
    "known": Rates("known"),
    "guessed from 1M and 3M": Rates("guessed"),
    "by a pilot at 11M, not counted; each arm's line": Rates("pilot", "own"),
    "by the counted runs; each arm's line": Rates("runs", "own"),
    "no slope": Rates("runs", "none"),
    "**one slope for all arms**": Rates("runs"),
    "**and later seeds of 3M and 11M at the best rate alone**": Rates("runs", all_rates=BEST_LATER),
    "the same, and those of 1M from the fifth on": Rates("runs", all_rates=BEST_LATER | {0: 4}),
    "without these, two more rates of the first seed at 16M": Rates("runs", all_rates=BEST_LATER, more=(4,)),
    "two more at 7M and 16M": Rates("runs", all_rates=BEST_LATER, more=(2, 4)),
}
STAGES = {
    "1": (16, 3, 0, 1, 0, 0),
    "2": (16, 3, 3, 1, 1, 1),
    "3": (16, 8, 3, 3, 2, 1),
    "4": (16, 8, 5, 3, 3, 2),
    "5": ALL,
}
CUTS = ((16, 8, 3, 3, 3, 2), (16, 3, 3, 3, 3, 2), (16, 8, 5, 2, 2, 1), (16, 8, 5, 1, 1, 1))


def choices(count: int) -> Iterator[str]:
    """By how learning rates are chosen, for a scatter of the best rates of .1 and of .2."""
    yield "| rates | bias of ln m | sd of ln m | half-width | covers | excludes 1 |"
    yield "|" + "---|" * 6
    for name, rates in CHOICES.items():
        a, b = (shown(ALL, replace(rates, scatter=scatter), count) for scatter in (0.1, 0.2))
        cells = [
            f"{a.bias:+.4f}, {b.bias:+.4f}",
            f"{a.sd:.4f}, {b.sd:.4f}",
            f"{a.half_width:.3f}, {b.half_width:.3f}",
            f"{a.coverage:.2f}, {b.coverage:.2f}",
            f"{a.excludes_1:.2f}, {b.excludes_1:.2f}",
        ]
        yield f"| {name} | " + " | ".join(cells) + " |"


def stages(count: int) -> Iterator[str]:
    """By what is trained: as `dynconv power` has it, with arms that scatter by 0, .001 and .002; and at .001 with rates
    chosen as in the study, whose best ones scatter by .1 and by .2."""
    yield "| session | seeds, 1M to 21M | half-width, % | power at m = 1.05 | rates chosen: half-width | excludes 1 |"
    yield "|" + "---|" * 6
    for name, seeds in [*STAGES.items(), *(("", each) for each in CUTS)]:
        sizes = [size for size in range(6) if seeds[size]]
        halves, powers = [], []
        for scatter in (0.0, 0.001, 0.002):
            reducible = 0.39 * (middle(STUDY[sizes]) / middle(STUDY)) ** -0.3
            world = World(1.2, reducible, 0.3, tuple(STUDY_NOISE[sizes]), scatter)
            asked = Simulated(STUDY[sizes], math.log(1.05), [seeds[size] for size in sizes], world, count, 0)
            _, low, high = reported(asked.local, np.ones(count), asked.changing)
            halves.append(f"{100 * math.expm1(float(np.median(high - low)) / 2):.1f}")
            powers.append(f"{asked.power():.2f}")
        found = [shown(seeds, Rates(scatter=scatter, all_rates=BEST_LATER), count) for scatter in (0.1, 0.2)]
        told = ", ".join(f"{100 * math.expm1(each.half_width):.1f}" for each in found)
        told += " | " + ", ".join(f"{each.excludes_1:.2f}" for each in found)
        text = " ".join(str(n) if n else "-" for n in seeds)
        yield f"| {name} | {text} | {', '.join(halves)} | {', '.join(powers)} | {told} |"


if __name__ == "__main__":
    asked_for = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    for table in (choices, stages):
        print(f"\n{table.__name__}, {asked_for} sweeps a row")
        for line in table(asked_for):
            print(line, flush=True)
