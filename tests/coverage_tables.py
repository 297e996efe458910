"""How often the intervals of m cover and the tests reject, by simulation: the tables of analysis/README.md.

`python tests/coverage_tables.py` prints them with 500 designs a cell (about five minutes on one core);
test_constancy.py asserts a small sample. The noise is that of planning.World: seeds .002, each arm at a size .002,
shared by the arms of a size .005 nats; E = 1.7, reducible loss 1.3 half-way, exponent .15, m = 1.33 half-way, over 100x
of compute.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from analysis.advantage.changing import band, reported
from analysis.advantage.constancy import constancy_p, correlation_p, shown_constant
from analysis.advantage.paired import Local, changing_multipliers, local_multipliers
from analysis.advantage.planning import World, in_order
from analysis.advantage.seeds import NoiseBySize, by_power
from analysis.advantage.shifted import shifted_multipliers
from analysis.laws.solver import Floats

DESIGNS = ((4, 1), (5, 2), (6, 3))  # sizes, seeds
SHIFTS = (0.0, -0.01, -0.02, -0.03)  # of the arm's irreducible loss
RISES = (0.0, 0.01, 0.02)  # of the arm's exponent
M, TOP, SPAN = 1.33, 1e21, 100.0
REACH = 10.0  # times the largest compute
RESAMPLES = 199


@dataclass(frozen=True)
class Sweeps:
    """K simulated designs, and the truth."""

    compute: Floats  # [S]
    y0: Floats  # [K, S]
    y1: Floats  # [K, S]
    noise: NoiseBySize | None  # what the repeated seeds show
    ln_m: float  # at the largest compute
    beyond: float  # ln m at REACH times it

    def local(self) -> Local:
        return local_multipliers(self.compute, self.compute, self.y0, self.y1, noise=self.noise)

    def p(self, noise: NoiseBySize | None) -> Floats:
        return constancy_p(self.compute, self.compute, self.y0, self.y1, RESAMPLES, 0, until=0.05, noise=noise)


def sweeps(
    count: int,
    sizes: int,
    seeds: int,
    shift: float = 0.0,
    rise: float = 0.0,
    *,
    m: float = M,
    correlation: float = 0.0,
    random_seed: int = 0,
) -> Sweeps:
    """The arm's irreducible loss lies `shift` above the baseline's, its exponent is larger by `rise`."""
    random, world, shape = np.random.default_rng(random_seed), World(), (count, sizes)
    compute = np.geomspace(TOP / SPAN, TOP, sizes)
    middle, E, g, a = math.sqrt(TOP * TOP / SPAN), world.irreducible_loss, world.exponent, world.reducible_loss

    def of_arm(c: Floats) -> Floats:
        loss: Floats = E + shift + a * m**-g * (c / middle) ** -(g + rise)
        return loss

    def true_ln_m(c: float) -> float:
        return math.log(middle / c * ((float(of_arm(np.array(c))) - E) / a) ** (-1 / g))

    shared = world.shared_noise * in_order(random.standard_normal(shape), correlation)
    losses, runs = [], []
    for law in (E + a * (compute / middle) ** -g, of_arm(compute)):
        own = world.arm_noise * in_order(random.standard_normal(shape), correlation)
        runs.append(world.seed_noise * random.standard_normal((*shape, seeds)))
        losses.append(law + shared + own + runs[-1].mean(axis=2))
    noise = None
    if seeds > 1:
        differences = runs[0] - runs[1]
        squares = ((differences - differences.mean(axis=2, keepdims=True)) ** 2).sum(axis=2)
        noise = by_power(compute, squares, np.full(sizes, float(seeds)), np.full(sizes, seeds - 1.0))
    return Sweeps(compute, losses[0], losses[1], noise, true_ln_m(TOP), true_ln_m(REACH * TOP))


def share(low: Floats, high: Floats, truth: float) -> float:
    return float(((low < truth) & (truth < high)).mean())


@dataclass(frozen=True)
class Cell:
    """What designs of one kind are told."""

    coverage: float  # of m at the largest compute by the headline's interval
    half_width: float  # median, of ln m
    ratio: float  # of it to the median half-width of the interval of a constant m
    varying: float  # how often constancy is rejected
    shown: float  # how often it is shown
    silent: float  # how often the status is silent on constancy and the interval misses
    beyond: float  # coverage at REACH times the largest compute
    beyond_half_width: float


def cell(designs: Sweeps) -> Cell:
    local = designs.local()
    changing, shifted = changing_multipliers(local), shifted_multipliers(local)
    p = designs.p(designs.noise)
    _, low, high = reported(local, p, changing)
    _, band_low, band_high = band(changing, shifted, REACH * TOP)
    constant_low, constant_high = local.interval()
    shown = shown_constant(changing) & (p >= 0.05)
    missed = ~((low < designs.ln_m) & (designs.ln_m < high))
    return Cell(
        coverage=share(low, high, designs.ln_m),
        half_width=float(np.median(high - low) / 2),
        ratio=float(np.median(high - low) / np.median(constant_high - constant_low)),
        varying=float((p < 0.05).mean()),
        shown=float(shown.mean()),
        silent=float((shown & missed).mean()),
        beyond=share(band_low, band_high, designs.beyond),
        beyond_half_width=float(np.median(band_high - band_low) / 2),
    )


def grid(count: int) -> Iterator[str]:
    yield (
        "| sizes x seeds | dE | exponent | covers m(Cmax) | half-width | rejected | shown | shown and missed | "
        "covers at 10x | half-width |"
    )
    yield "|" + "---|" * 10
    for sizes, seeds in DESIGNS:
        for shift in SHIFTS:
            for rise in RISES:
                found = cell(sweeps(count, sizes, seeds, shift, rise))
                yield (
                    f"| {sizes} x {seeds} | {shift:g} | +{rise:g} | {found.coverage:.3f} | {found.half_width:.3f} | "
                    f"{found.varying:.2f} | {found.shown:.2f} | {found.silent:.3f} | {found.beyond:.3f} | "
                    f"{found.beyond_half_width:.3f} |"
                )


def frontier(count: int) -> Iterator[str]:
    """Coverage, the least over the grid, against width where m is constant, by the odds of a changing m."""
    yield "| odds of a changing m | " + " | ".join(f"{sizes} x {seeds}" for sizes, seeds in DESIGNS) + " |"
    yield "|" + "---|" * (1 + len(DESIGNS))
    prepared = []
    for sizes, seeds in DESIGNS:
        kinds = [sweeps(count, sizes, seeds, shift) for shift in SHIFTS]  # a larger exponent is always seen
        locals_ = [kind.local() for kind in kinds]
        prepared.append(
            [(kind, local, changing_multipliers(local)) for kind, local in zip(kinds, locals_, strict=True)]
        )
    unasked = np.ones(count)  # p: it moves no interval
    for odds in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0):
        texts = []
        for kinds in prepared:
            ends = [reported(local, unasked, changing, odds)[1:] for _, local, changing in kinds]
            low, high = kinds[0][1].interval()
            ratio = np.median(ends[0][1] - ends[0][0]) / np.median(high - low)
            least = min(share(*end, kind.ln_m) for end, (kind, *_) in zip(ends, kinds, strict=True))
            texts.append(f"{least:.3f} at {ratio:.2f}x")
        yield f"| {odds:g} | " + " | ".join(texts) + " |"


def power_of_constancy(count: int) -> Iterator[str]:
    yield "| sizes x seeds | dE | rejected by the sizes' spread | with the seeds' noise |"
    yield "|---|---|---|---|"
    for sizes, seeds in ((4, 2), *DESIGNS[1:]):
        for shift in SHIFTS:
            designs = sweeps(count, sizes, seeds, shift)
            without, with_seeds = ((designs.p(noise) < 0.05).mean() for noise in (None, designs.noise))
            yield f"| {sizes} x {seeds} | {shift:g} | {without:.3f} | {with_seeds:.3f} |"


def equivalence(count: int) -> Iterator[str]:
    """How often m counts as shown constant where it truly is, and where it ends 5% above its mean over the sizes."""
    yield "| sizes x seeds | constant | ends 2.5% away | ends 5% away |"
    yield "|---|---|---|---|"
    for sizes, seeds in (*DESIGNS, (8, 3)):
        texts = []
        for away in (0.0, math.log(1.025), math.log(1.05)):
            quiet = sweeps(1, sizes, seeds).local()
            middle = float((quiet.weight[0] * np.log(quiet.c0 / TOP)).sum())
            rise = World().exponent * away / -middle
            changing = changing_multipliers(sweeps(count, sizes, seeds, 0, rise).local())
            texts.append(f"{shown_constant(changing).mean():.3f}")
        yield f"| {sizes} x {seeds} | " + " | ".join(texts) + " |"


def correlated(count: int) -> Iterator[str]:
    """An m that is constant; the interval by the law that knows it, the reported one, and how often it is said."""
    yield "| sizes x seeds | correlation | of a constant m | reported | said |"
    yield "|---|---|---|---|---|"
    for sizes, seeds in ((5, 2), (6, 3), (8, 2), (12, 1)):
        for correlation in (0.0, 0.5, 0.9):
            designs = sweeps(count, sizes, seeds, correlation=correlation)
            local = designs.local()
            changing = changing_multipliers(local)
            _, *ends = reported(local, np.ones(count), changing)
            shares = (share(*each, designs.ln_m) for each in (local.interval(), ends))
            said = (correlation_p(changing) < 0.05).mean()
            yield f"| {sizes} x {seeds} | {correlation:g} | " + " | ".join(map("{:.3f}".format, (*shares, said))) + " |"


if __name__ == "__main__":
    asked = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    for table in (frontier, grid, power_of_constancy, equivalence, correlated):
        print(f"\n{table.__name__}, {asked} designs a cell")
        for line in table(asked):
            print(line, flush=True)
