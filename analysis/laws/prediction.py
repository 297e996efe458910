"""Predictions of a law for new runs: a loss, or the best size, with intervals; and a back-test of such predictions.

There are two intervals: of the law (from its bootstrap), and of a single run, which adds the spread of the runs about
the law. Neither covers the risk that the law does not hold beyond the runs it was fitted to; the back-test checks that
on the largest of the existing runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analysis.errors import Refusal
from analysis.laws.intervals import ENOUGH, LEVEL, Interval, bootstrap, error_levels
from analysis.laws.powerlaw import FORMS, Fit, Model, Points, fit, is_singular
from analysis.laws.solver import Floats

FEWEST_KEPT = 4  # sizes that a back-test keeps for its fit, at least
CUTS = 3  # fits of a back-test, each of which leaves out more sizes
FEW = 12  # up to this many sizes, 1, 2 and 3 are left out in turn; with more, tenths of them


@dataclass(frozen=True)
class Prediction:
    """The loss of one arm at one C, or N and D (raw units)."""

    arm: str
    x: dict[str, float]
    loss: float | None  # None where the law does not determine it
    law_ci: Interval | None  # 95% interval of the law at x; None without resamples
    ci: Interval | None  # 95% interval of the loss of a single run at x
    extrapolation: str | None  # how far x is outside the range of the arm's runs; None inside


@dataclass(frozen=True)
class BestSize:
    """N* and D* of one arm at a compute C = 6 N D (arXiv 2203.15556, eq. 4), and the loss there; None where the law
    does not determine them."""

    arm: str
    C: float
    N: float | None
    N_ci: Interval | None
    D: float | None
    D_ci: Interval | None
    loss: float | None
    loss_ci: Interval | None  # 95%, of the law there
    extrapolation: str | None


@dataclass(frozen=True)
class BackTest:
    """How well the runs of the largest sizes are predicted by the law fitted to the other sizes."""

    left_out: int  # sizes
    arm: str
    runs: int
    beyond: float  # the largest compute left out over the largest kept
    error: float  # mean of predicted less measured loss, nats a token
    rms_error: float
    inside: int  # how many runs lie inside their 95% interval


def predict(law: Fit, x: Mapping[str, Floats], seed: int = 0) -> list[Prediction]:
    """Every arm's loss at each of x: "C", or "N" and "D" [n]. A law whose points lie on a line of ln D on ln N
    determines no loss beside that line, and one whose parameters its points do not determine none at all."""
    count = len(next(iter(x.values())))
    line = law.line() if law.form == "nd" else None
    singular = law.form == "c" and is_singular(law.certificate)
    found = []
    for arm in dict.fromkeys(law.points.arm):
        of_law, of_run = _bands(law, x, arm, seed)
        loss = law.predict(x, arm)
        unknown = np.full(count, singular) if line is None else line.misses(x, arm)
        for i in range(count):
            at = {name: float(values[i]) for name, values in x.items()}
            outside = _outside(law.points, arm, at)
            known = Prediction(arm, at, float(loss[i]), _pair(of_law, i), _pair(of_run, i), outside)
            found.append(Prediction(arm, at, None, None, None, outside) if unknown[i] else known)
    return found


def best_sizes(law: Fit, compute: Iterable[float]) -> list[BestSize]:
    """Every arm's N*, D* at each compute (FLOPs, as 6 N D), by a law of form nd."""
    assert law.form == "nd"
    found = []
    for arm in dict.fromkeys(law.points.arm):
        for C in compute:
            if not law.separates(("N", "D"), (arm,)):
                found.append(BestSize(arm, C, None, None, None, None, None, None, None))
                continue
            draws = [_best(replace(law, values=draw), arm, C) for draw in law.draws or ()]
            ends: list[Interval | None] = [_ends(np.array(column)) for column in zip(*draws, strict=True)]
            ends = ends or [None] * 3
            N, D, loss = _best(law, arm, C)
            outside = _outside(law.points, arm, {"N": N, "D": D})
            found.append(BestSize(arm, C, N, ends[0], D, ends[1], loss, ends[2], outside))
    return found


def back_test(points: Points, form: str, resamples: int, seed: int, options: Mapping[str, Any]) -> list[BackTest]:
    """Leave out the largest one, two and three sizes (with more than FEW sizes: one, two and three tenths of them) and
    predict their runs from the others. Empty with too few sizes. `options` are keywords of `fit`."""
    scale = math.prod((points.x[variable] for _, _, variable in FORMS[form]), start=np.ones(1))
    names, cluster = np.unique(points.cluster, return_inverse=True)
    order = np.argsort(np.bincount(cluster, scale) / np.bincount(cluster), kind="stable")
    rank = np.argsort(order)[cluster]
    step = 1 if len(names) <= FEW else len(names) // 10
    found = []
    for left_out in (step * cut for cut in range(1, CUTS + 1)):
        kept = rank < len(names) - left_out
        if len(names) - left_out < FEWEST_KEPT:
            break
        try:
            law = fit(_part(points, kept), form, **options)
        except Refusal:  # too few different N or D are left
            break
        law = bootstrap(law, resamples, seed)
        for arm in dict.fromkeys(law.points.arm):
            rows = np.flatnonzero(~kept & (np.array(points.arm) == arm))
            if len(rows) == 0:
                continue
            x = {name: values[rows] for name, values in points.x.items()}
            error = law.predict(x, arm) - points.loss[rows]
            _, of_run = _bands(law, x, arm, seed)
            low, high = of_run or (np.full(len(rows), np.nan),) * 2
            inside = int(((low <= points.loss[rows]) & (points.loss[rows] <= high)).sum())
            beyond = float(scale[rows].max() / scale[kept].max())
            rms = float(np.sqrt((error**2).mean()))
            found.append(BackTest(left_out, arm, len(rows), beyond, float(error.mean()), rms, inside))
    return found


def _part(points: Points, kept: Any) -> Points:
    rows = np.flatnonzero(kept)
    return Points(
        points.loss[rows],
        {name: values[rows] for name, values in points.x.items()},
        tuple(points.arm[i] for i in rows),
        tuple(points.cluster[i] for i in rows),
        points.baseline,
    )


def _bands(
    law: Fit, x: Mapping[str, Floats], arm: str, seed: int
) -> tuple[tuple[Floats, Floats], tuple[Floats, Floats]] | tuple[None, None]:
    """Intervals of the law and of a single run at x, each as two ends [n]; None without resamples. A run's deviation
    from the law is drawn from the residuals if there are at least ENOUGH clusters. Otherwise it is a sum of normal
    numbers, one for each level of the errors, whose standard deviations are drawn as well."""
    if law.draws is None:
        return None, None
    random = np.random.default_rng(seed)
    model = Model(law.points, law.form, law.loss.delta, law.per_arm, law.hold)
    residual = model.log_y - model.problem.predict(law.theta[None])[0]
    curves = np.array([replace(law, values=draw).predict(x, arm) for draw in law.draws])
    if len(set(law.points.cluster)) >= ENOUGH:
        departure = random.choice(residual, curves.shape) * math.sqrt(len(residual) / (len(residual) - model.free))
    else:
        departure = np.zeros(curves.shape)
        for level in error_levels(law, model, residual):
            spread = level.spread * np.sqrt(level.dof / random.chisquare(level.dof, (len(curves), 1)))
            departure += spread * random.standard_normal(curves.shape)
    quantiles = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    of_law, of_run = (np.quantile(values, quantiles, axis=0) for values in (curves, curves * np.exp(departure)))
    return (of_law[0], of_law[1]), (of_run[0], of_run[1])


def _best(law: Fit, arm: str, C: float) -> tuple[float, float, float]:
    """N*, D* and the loss there. Computed in logs, since the amplitudes of a resample may overflow a float."""
    A, alpha, B, beta = (law.parameter(name, arm) for name in ("A", "alpha", "B", "beta"))
    log_n = (math.log(alpha * A / (beta * B)) + beta * math.log(C / 6)) / (alpha + beta)
    N, D = np.exp([log_n]), np.exp([math.log(C / 6) - log_n])
    return float(N[0]), float(D[0]), float(law.predict({"N": N, "D": D}, arm)[0])


def _outside(points: Points, arm: str, x: Mapping[str, float]) -> str | None:
    mine = np.array(points.arm) == arm
    notes = []
    for name, value in x.items():
        low, high = points.x[name][mine].min(), points.x[name][mine].max()
        if value > high:
            notes.append(f"{value / high:.3g}x above the largest {name}")
        elif value < low:
            notes.append(f"{low / value:.3g}x below the smallest {name}")
    return "; ".join(notes) or None


def _ends(values: Floats) -> Interval:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _pair(band: tuple[Floats, Floats] | None, i: int) -> Interval | None:
    return None if band is None else (float(band[0][i]), float(band[1][i]))
