"""Coverage of the laws' 95% intervals, by simulation: `python tests/simulate_laws.py [isoflop|nd [COUNT]]` prints
the tables that analysis/README.md holds; the tests run small samples of it."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pandas as pd
from planted import ALPHA, BETA, A, B, E, best_size

from analysis.laws.intervals import bootstrap
from analysis.laws.isoflop import optima_of
from analysis.laws.powerlaw import Points, fit
from analysis.laws.solver import Floats

Shape = Callable[[Floats, Floats], Floats]  # loss of N [.., n] and C that broadcasts to it


def chinchilla(N: Floats, C: Floats) -> Floats:
    """L = E + A N^-alpha + B D^-beta, D = C / 6N, with the constants of arXiv 2203.15556, eq. 10."""
    return E + A * N**-ALPHA + B * (C / 6 / N) ** -BETA


def unstable(N: Floats, C: Floats) -> Floats:
    """The same with models that train badly, .03 nats higher, from 3.3 times the optimum on."""
    return chinchilla(N, C) + 0.03 * (np.log(N / best_sizes(C)) > 1.2)


def best_sizes(C: Floats) -> Floats:
    return np.vectorize(best_size)(C)


def centred(budgets: int, sizes: int, reach: float) -> tuple[Floats, Floats]:
    """N [budgets, sizes], to a factor `reach` on both sides of each budget's optimum, and C [budgets, 1]."""
    C = np.geomspace(1e18, 1e21, budgets)[:, None]
    return best_sizes(C) * np.geomspace(1 / reach, reach, sizes), C


def fixed(budgets: int, sizes: int) -> tuple[Floats, Floats]:
    """One ladder for every budget, from a third of the first optimum to three times the last."""
    C = np.geomspace(1e18, 1e21, budgets)[:, None]
    best = best_sizes(C)
    return np.tile(np.geomspace(best[0, 0] / 3, best[-1, 0] * 3, sizes), (budgets, 1)), C


DESIGNS = {
    "centred, 4 budgets of 7 sizes within 2x": centred(4, 7, 2.0),
    "centred, 4 budgets of 9 sizes within 13x": centred(4, 9, 13.0),
    "centred, 9 budgets of 7 sizes within 2x": centred(9, 7, 2.0),
    "centred, 9 budgets of 6 sizes within 4x": centred(9, 6, 4.0),
    "one ladder, 4 budgets of 12 sizes": fixed(4, 12),
    "one ladder, 9 budgets of 8 sizes": fixed(9, 8),
    "one ladder, 9 budgets of 12 sizes": fixed(9, 12),
}


def budgets_table(design: tuple[Floats, Floats], loss: Floats) -> pd.DataFrame:
    """A run table of one arm."""
    N, C = np.broadcast_arrays(*design)
    columns = {"parameters": N, "tokens": C / 6 / N, "flops_given": C, "loss": loss}
    return pd.DataFrame({name: value.ravel() for name, value in columns.items()}).assign(arm="all", status="complete")


def isoflop_coverage(
    design: tuple[Floats, Floats], noise: float, count: int, shape: Shape = chinchilla, scatter: float = 0.0
) -> dict[str, float]:
    """Share of `count` data sets whose interval of N*(C)'s exponent, and of the budgets whose interval of N*, hold the
    truth; the mean error of the exponent and its median half-width; the share of budgets that count. Each budget's
    optimum moves by `scatter` in ln N, normally.
    """
    truth, random = BETA / (ALPHA + BETA), np.random.default_rng(0)
    N, C = design
    hits, optimum_hits, halves, budgets, errors = 0, 0, [], 0, []
    for _ in range(count):
        moved = N * np.exp(scatter * random.standard_normal((len(N), 1)))
        optima, (law,) = optima_of(budgets_table(design, shape(moved, C) + noise * random.standard_normal(N.shape)))
        good = [item for item in optima if item.status == "ok"]
        budgets += len(good)
        optimum_hits += sum(item.ci[0] <= best_size(item.compute) <= item.ci[1] for item in good if item.ci)
        if law.ci is not None and law.N_exponent is not None:
            hits += law.ci[0] <= truth <= law.ci[1]
            halves.append((law.ci[1] - law.ci[0]) / 2)
            errors.append(law.N_exponent - truth)
    return {
        "exponent": hits / max(len(halves), 1),
        "bias": float(np.mean(errors)),
        "half-width": float(np.median(halves)),
        "N*": optimum_hits / max(budgets, 1),
        "budgets": budgets / count / len(N),
    }


def print_isoflop(count: int) -> None:
    print("| design | truth | noise | exponent | bias | half-width | N* | budgets that count |")
    print("|---|---|---|---|---|---|---|---|")
    cases = [(name, chinchilla, noise, 0.0) for name in DESIGNS for noise in (0.001, 0.003, 0.01)]
    cases += [(name, unstable, 0.001, 0.0) for name in list(DESIGNS) if "12 sizes" in name]
    cases += [(name, chinchilla, 0.002, 0.1) for name in DESIGNS]
    for name, shape, noise, scatter in cases:
        found = isoflop_coverage(DESIGNS[name], noise, count, shape, scatter)
        truth = shape.__name__ + (f", optima scatter by {scatter}" if scatter else "")
        optimum = "-" if scatter else f"{found['N*']:.3f}"
        cells = f"{found['exponent']:.3f} | {found['bias']:+.4f} | {found['half-width']:.4f} | {optimum}"
        print(f"| {name} | {truth} | {noise} | {cells} | {found['budgets']:.2f} |", flush=True)


def noise_of(spread: str, N: Floats, random: np.random.Generator) -> Floats:
    """Errors of log loss [n]."""
    normal = random.standard_normal(len(N))
    match spread:
        case "1% everywhere":
            return 0.01 * normal
        case "3% at the smallest N to .1% at the largest":
            return 0.03 * normal * (N / N.min()) ** (-np.log(30) / np.log(N.max() / N.min()))
        case ".1% to 3% at random":
            return np.exp(random.uniform(np.log(0.001), np.log(0.03), len(N))) * normal
    assert spread == ".4% of Student's t with 3"
    return 0.004 * np.sqrt(3 / random.chisquare(3, len(N))) * normal


SPREADS = (
    "1% everywhere",
    "3% at the smallest N to .1% at the largest",
    ".1% to 3% at random",
    ".4% of Student's t with 3",
)
CONSTANTS = {"E": E, "A": A, "alpha": ALPHA, "B": B, "beta": BETA}


def nd_coverage(spread: str, delta: float | None, count: int, resamples: int = 300) -> dict[str, float]:
    """Share of `count` grids of 48 (N, D) whose bootstrap intervals of form nd hold the truth, by parameter."""
    hits = dict.fromkeys(CONSTANTS, 0)
    N, D = np.repeat(np.geomspace(1e7, 1e10, 8), 6), np.tile(np.geomspace(1e9, 1e12, 6), 8)
    for seed in range(count):
        loss = (E + A * N**-ALPHA + B * D**-BETA) * np.exp(noise_of(spread, N, np.random.default_rng(seed)))
        points = Points(loss, {"N": N, "D": D}, ("all",) * 48, tuple(map(str, range(48))), "all")
        law = bootstrap(fit(points, "nd", delta=delta, starts=100, polished=8), resamples, seed)
        assert law.ci is not None
        for name, truth in CONSTANTS.items():
            hits[name] += law.ci[name][0] <= truth <= law.ci[name][1]
    return {name: hit / count for name, hit in hits.items()}


def print_nd(count: int) -> None:
    print("| noise | loss | E | A | alpha | B | beta |")
    print("|---|---|---|---|---|---|---|")
    for spread in SPREADS:
        for delta in (None, 1e-3):
            found = nd_coverage(spread, delta, count)
            cells = " | ".join(f"{value:.3f}" for value in found.values())
            print(f"| {spread} | {'least squares' if delta is None else 'Huber'} | {cells} |", flush=True)


PRINTERS = {"isoflop": print_isoflop, "nd": print_nd}

if __name__ == "__main__":
    chosen = sys.argv[1:2] or list(PRINTERS)
    for name in chosen:
        PRINTERS[name](int(sys.argv[2]) if len(sys.argv) > 2 else 500)
