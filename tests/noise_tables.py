"""What weights by the noise of each size buy, and what tuned learning rates cost: tables of analysis/README.md.

`python tests/noise_tables.py` prints them with 4,000 designs a row, of which the test of constancy sees 600 (about a
minute on one core); test_seeds.py and test_rates.py assert small samples. The study is that of
experiments/sweeps/mini-scaling.toml, with the noise that results/measured/README.md assumes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from analysis.advantage.changing import reported
from analysis.advantage.constancy import constancy_p, shown_constant
from analysis.advantage.paired import changing_multipliers, local_multipliers, seed_noise
from analysis.advantage.seeds import NoiseBySize, by_power
from analysis.laws.rates import best_of, excess
from analysis.laws.solver import Floats

STUDY = np.array([2.5e14, 1.7e15, 7.5e15, 1.7e16, 3.3e16, 5.9e16])  # FLOPs of its six sizes
STUDY_NOISE = np.array([0.010, 0.004, 0.003, 0.0025, 0.002, 0.002])
FALLING = np.array([0.02, 0.012, 0.006, 0.005, 0.004, 0.003])
FOR_CONSTANCY, RESAMPLES = 600, 199


@dataclass(frozen=True)
class Design:
    """What is trained, and the truth in nats a token; the law is in C over the sizes' geometric middle."""

    name: str
    compute: Floats  # [S]
    seeds: Sequence[int]  # of each size
    noise: Floats | float  # standard deviation between seeds, or of each size
    scatter: float | Sequence[float] = 0.002  # of each arm at a size
    m: float = 1.33
    shift: float = 0.0  # of the arm's irreducible loss
    irreducible_loss: float = 1.7
    reducible_loss: float = 1.3
    exponent: float = 0.15
    t: float | None = None  # degrees of freedom of the seeds' errors, scaled by `noise`; None for normal errors

    def reducible(self, m: float, shift: float = 0.0) -> Floats:
        x = self.compute / np.exp(np.log(self.compute).mean())
        loss: Floats = self.reducible_loss * (m * x) ** -self.exponent + shift
        return loss

    @property
    def ln_m(self) -> float:
        """At the largest compute."""
        left = self.reducible(self.m, self.shift)[-1] / self.reducible(1.0)[-1]
        return -math.log(left) / self.exponent


def evenly(name: str, sizes: int, seeds: int, noise: Floats | float = 0.002) -> Design:
    return Design(name, np.geomspace(1e19, 1e21, sizes), (seeds,) * sizes, noise)


THE_STUDY = Design("the study", STUDY, (16, 8, 5, 3, 3, 3), STUDY_NOISE, 0.001, 1.05, 0.0, 1.2, 0.39, 0.3)
FALL = Design(
    "6 sizes, 5 5 3 3 3 3 seeds, noise .02 to .003", STUDY, (5, 5, 3, 3, 3, 3), FALLING, 0.002, 1.33, 0, 1.2, 0.8
)
FEW = np.array([0.01, 0.006, 0.004, 0.003, 0.002])
ALONE = np.array([0.02, 0.01, 0.006, 0.003, 0.002])
RISING = np.array([0.002, 0.003, 0.004, 0.006, 0.008])
STEEP = np.array([0.02, 0.007, 0.002])
EQUAL = evenly("5 x 3, equal noise", 5, 3)
DESIGNS = (
    replace(THE_STUDY, name="the study, scatter 0", scatter=0.0),
    replace(THE_STUDY, name="the study, scatter .001"),
    replace(THE_STUDY, name="the study, scatter .002", scatter=0.002),
    replace(THE_STUDY, name="the study, twice the noise", noise=2 * STUDY_NOISE),
    replace(THE_STUDY, name="the study, 3 seeds of every size", seeds=(3,) * 6),
    replace(THE_STUDY, name="the study, scatter .004 to .001", scatter=(0.004, 0.003, 0.002, 0.0015, 0.001, 0.001)),
    FALL,
    replace(FALL, name="the same, t(2)", t=2.0),
    replace(FALL, name="the same, m = 2", m=2.0),
    evenly("5 x 3, noise .002 rising to .008", 5, 3, RISING),
    evenly("3 x 3, noise .006 to .002", 3, 3, np.array([0.006, 0.0035, 0.002])),
    evenly("3 x 3, noise .02 to .002", 3, 3, STEEP),
    replace(evenly("5 sizes, 5 2 2 1 1 seeds, noise .01 to .002", 5, 1, FEW), seeds=(5, 2, 2, 1, 1)),
    replace(evenly("5 sizes, 5 1 1 1 1 seeds, noise .01 to .002", 5, 1, FEW), seeds=(5, 1, 1, 1, 1)),
    replace(evenly("5 sizes, 10 1 1 1 1 seeds, noise .02 to .002", 5, 1, ALONE), seeds=(10, 1, 1, 1, 1)),
    replace(evenly("5 sizes, 5 1 1 1 1 seeds, equal noise", 5, 1, 0.004), seeds=(5, 1, 1, 1, 1)),
    EQUAL,
    replace(EQUAL, name="the same, t(2)", t=2.0),
    replace(EQUAL, name="the same, scatter 0", scatter=0.0),
    evenly("4 x 2, equal noise", 4, 2),
    evenly("3 x 3, equal noise", 3, 3),
    evenly("8 x 3, equal noise", 8, 3),
    evenly("5 x 1", 5, 1),
    replace(THE_STUDY, name="the study, dE = -.005", shift=-0.005),
    replace(FALL, name="6 sizes, noise .02 to .003, dE = -.01", shift=-0.01),
    replace(EQUAL, name="5 x 3, equal noise, dE = -.01", shift=-0.01),
)


def simulate(design: Design, count: int, random_seed: int = 0) -> tuple[Floats, Floats, NoiseBySize | None]:
    """Losses of both arms [K, S], seeds averaged, and what the seeds show of their noise."""
    random, seeds = np.random.default_rng(random_seed), np.array(design.seeds)
    shape = (count, len(seeds), int(seeds.max()))
    missing = np.where(np.arange(shape[2]) < seeds[:, None], 0.0, np.nan)
    noise = np.broadcast_to(design.noise, len(seeds))[:, None]
    shared = design.irreducible_loss + 0.005 * random.standard_normal(shape[:2])
    losses, runs = [], []
    for law in (design.reducible(1.0), design.reducible(design.m, design.shift)):
        errors = random.standard_normal(shape) if design.t is None else random.standard_t(design.t, shape)
        runs.append(noise * errors + missing)
        own = np.asarray(design.scatter) * random.standard_normal(shape[:2])
        losses.append(law + shared + own + np.nanmean(runs[-1], axis=2))
    difference = runs[0] - runs[1]
    squares = np.nansum((difference - np.nanmean(difference, axis=2, keepdims=True)) ** 2, axis=2)
    return losses[0], losses[1], by_power(design.compute, squares, seeds.astype(float), seeds - 1.0)


@dataclass(frozen=True)
class Row:
    """What designs of one kind are told, with one kind of weights."""

    spread: float  # of the mean ln m: half of the range of its middle 68%, since t(2) has no standard deviation
    constant: float  # coverage of m at the largest compute by the interval of a constant m
    half_width: float  # of the reported interval, median, of ln m
    coverage: float  # of it
    shown: float  # how often constancy is shown
    rejected: float  # how often it is rejected


def row(design: Design, losses: tuple[Floats, Floats], noise: NoiseBySize | None, constancy: int) -> Row:
    c, (y0, y1) = design.compute, losses
    local = local_multipliers(c, c, y0, y1, noise=noise)
    changing = changing_multipliers(local)
    _, low, high = reported(local, np.ones(len(y0)), changing)  # p moves no interval
    few = slice(constancy)
    p = constancy_p(
        c, c, y0[few], y1[few], RESAMPLES, 0, until=0.05, noise=noise and noise.of_rows(np.arange(constancy))
    )

    def share(low: Floats, high: Floats) -> float:
        return float(((low < design.ln_m) & (design.ln_m < high)).mean())

    return Row(
        spread=float(np.ptp(np.quantile(local.mean, [0.16, 0.84])) / 2),
        constant=share(*local.interval()),
        half_width=float(np.median(high - low) / 2),
        coverage=share(low, high),
        shown=float(shown_constant(changing).mean()),
        rejected=float((p < 0.05).mean()),
    )


def weights(count: int) -> Iterator[str]:
    """With weights for equal noise, and by the noise of each size."""
    yield "| design | spread of ln m | of a constant m: covers | reported: half-width | covers | shown | rejected |"
    yield "|" + "---|" * 7
    for design in DESIGNS:
        y0, y1, noise = simulate(design, count)
        equal, own = (row(design, (y0, y1), each, min(count, FOR_CONSTANCY)) for each in (None, noise))
        texts = [
            f"{getattr(equal, name):{digits}} **{getattr(own, name):{digits}}**"
            for name, digits in (
                ("spread", ".4f"),
                ("constant", ".3f"),
                ("half_width", ".4f"),
                ("coverage", ".3f"),
                ("shown", ".2f"),
                ("rejected", ".3f"),
            )
        ]
        yield f"| {design.name} | " + " | ".join(texts) + " |"


def falsely_shown(count: int) -> Iterator[str]:
    """How often m counts as shown constant within 5% where an arm's exponent makes it end 5% from its mean."""
    yield "| design | weights for equal noise | by the noise of each size |"
    yield "|---|---|---|"
    for design in (THE_STUDY, replace(THE_STUDY, name="the study, 3 seeds of every size", seeds=(3,) * 6), FALL, EQUAL):
        y0, y1, noise = simulate(design, count)
        found = []
        for each in (None, noise):
            local = local_multipliers(design.compute, design.compute, y0, y1, noise=each)
            away = np.log(design.compute[-1] / design.compute) @ local.weight.mean(axis=0)
            rise = design.exponent * math.log(1.05) / float(away)
            x = np.log(design.compute / np.exp(np.log(design.compute).mean()))
            law = design.reducible(design.m)
            tilted = y1 + law * (np.exp(-rise * x) - 1)
            local = local_multipliers(design.compute, design.compute, y0, tilted, noise=each)
            found.append(float(shown_constant(changing_multipliers(local)).mean()))
        yield f"| {design.name} | {found[0]:.3f} | {found[1]:.3f} |"


def floors(count: int) -> Iterator[str]:
    """How often seed noise alone exceeds the noise floor, without scatter and at m = 1."""
    yield "| design | exceeded |"
    yield "|---|---|"
    for design in (THE_STUDY, replace(THE_STUDY, name="the study, 3 seeds of every size", seeds=(3,) * 6), FALL, EQUAL):
        y0, y1, noise = simulate(replace(design, m=1.0, scatter=0.0), count)
        local = local_multipliers(design.compute, design.compute, y0, y1, noise=noise)
        least = seed_noise(local)
        assert least is not None
        yield f"| {design.name} | {float((np.abs(local.mean) > least).mean()):.3f} |"


@dataclass(frozen=True)
class Tuning:
    """How rates are chosen. A rate costs `bend` nats for each squared e-fold from the best one."""

    name: str
    tuned: tuple[int, ...] = (0, 1, 3)  # the sizes with several rates
    rates: tuple[int, int] = (3, 3)  # of the baseline and of the arm there, a factor of 2 apart
    off: float = 0.2  # standard deviation of ln (best rate) from the middle of those tried, at every size of every arm
    untuned: float = 0.2  # that of ln (best rate) from the only rate, at the other sizes
    bend: float = 0.03


def tune(
    design: Design, tuning: Tuning, count: int, corrected: bool, random_seed: int = 0
) -> tuple[Floats, Floats, NoiseBySize | None]:
    """As `simulate`, each arm at its best rate by `best_of`; with `excess` given back where `corrected`."""
    random, seeds = np.random.default_rng(random_seed + 1), np.array(design.seeds)
    sd = np.broadcast_to(design.noise, len(seeds)) / np.sqrt(seeds)
    *laws, _ = simulate(replace(design, noise=0.0), count, random_seed)
    found = []
    for y, rates in zip(laws, tuning.rates, strict=True):
        off = random.standard_normal(y.shape)
        losses = y + tuning.bend * (tuning.untuned * off) ** 2 + sd * random.standard_normal(y.shape)
        x = math.log(2) * (np.arange(rates) - (rates - 1) / 2)
        for size in tuning.tuned:
            at_rates = y[:, size, None] + tuning.bend * (x - tuning.off * off[:, size, None]) ** 2
            at_rates += sd[size] * random.standard_normal(at_rates.shape)
            losses[:, size] = best_of(x, at_rates)[1]
            if corrected:
                errors = np.full(rates, sd[size])
                losses[:, size] += [excess(x, each, errors, k) for k, each in enumerate(at_rates)]
        found.append(losses)
    dof = seeds - 1.0
    squares = 2 * seeds * sd**2 * 2 * random.standard_gamma(dof / 2, found[0].shape)
    return found[0], found[1], by_power(design.compute, squares, seeds.astype(float), dof)


EVERY = tuple(range(6))
TUNINGS = (
    Tuning("one rate, the best", (), untuned=0.0),
    Tuning("3 rates of both arms at every size", EVERY),
    Tuning("3 and 4 rates at every size", EVERY, (3, 4)),
    Tuning("3 and 9 rates at every size", EVERY, (3, 9)),
    Tuning("3 rates of both at 1M, 3M and 11M, the best at the others", untuned=0.0),
    Tuning("the same, at the others .1 off the best in ln rate", untuned=0.1),
    Tuning("the same, .2 off", untuned=0.2),
    Tuning("the same, .4 off", untuned=0.4),
    Tuning("the same, .2 off, .1 nats a squared e-fold", bend=0.1),
)


def tuned_rates(count: int) -> Iterator[str]:
    """The study at m = 1.05 with scatter .001, by how rates are chosen; without and with the correction for taking the
    least of several noisy losses."""
    yield "| rates | bias of ln m | sd of ln m | half-width | covers | excludes 1 |"
    yield "|" + "---|" * 6
    for tuning in TUNINGS:
        texts = []
        for corrected in (False, True):
            y0, y1, noise = tune(THE_STUDY, tuning, count, corrected)
            local = local_multipliers(STUDY, STUDY, y0, y1, noise=noise)
            _, low, high = reported(local, np.ones(count), changing_multipliers(local))
            truth = THE_STUDY.ln_m
            covered, resolved = ((low < truth) & (truth < high)).mean(), ((low > 0) | (high < 0)).mean()
            bias, half = local.mean.mean() - truth, np.median(high - low) / 2
            texts.append(
                (f"{bias:+.4f}", f"{local.mean.std():.4f}", f"{half:.4f}", f"{covered:.3f}", f"{resolved:.2f}")
            )
        yield f"| {tuning.name} | " + " | ".join(f"{a} **{b}**" for a, b in zip(*texts, strict=True)) + " |"


TABLES = (weights, falsely_shown, floors, tuned_rates)

if __name__ == "__main__":
    asked = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    for table in TABLES:
        rows = asked // 4 if table is tuned_rates else asked
        print(f"\n{table.__name__}, {rows} designs a row")
        for line in table(rows):
            print(line, flush=True)
