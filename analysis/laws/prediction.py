"""What a law says of runs not yet made: a loss, or the best size, with a band; and how well it did so before.

Two bands: of the law (its bootstrap), and of a run, to which the spread of the runs about the law is added. Neither
knows whether the law holds beyond the runs it was fitted to; the back-test asks that of the runs there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analysis.laws.intervals import ENOUGH, LEVEL, Interval, bootstrap, error_levels
from analysis.laws.powerlaw import FORMS, Fit, Model, Points, fit
from analysis.laws.solver import Floats

FEWEST_KEPT = 4  # sizes of a back-test's fit
CUTS = 3  # of a back-test
FEW = 12  # sizes up to which one after the other is left out; with more, tenths of them


@dataclass(frozen=True)
class Prediction:
    """The loss of one arm at one C, or N and D (raw units)."""

    arm: str
    x: dict[str, float]
    loss: float
    law_ci: Interval | None  # 95%, of the law there; None without resamples
    ci: Interval | None  # 95%, of a run there
    extrapolation: str | None  # how far outside the arm's runs, if it is


@dataclass(frozen=True)
class BestSize:
    """N* and D* of one arm at a compute C = 6 N D, by arXiv 2203.15556, eq. 4, and the loss there."""

    arm: str
    C: float
    N: float
    N_ci: Interval | None
    D: float
    D_ci: Interval | None
    loss: float
    loss_ci: Interval | None  # 95%, of the law there
    extrapolation: str | None


@dataclass(frozen=True)
class BackTest:
    """Runs of the largest sizes, predicted by the law of the others."""

    left_out: int  # sizes
    arm: str
    runs: int
    beyond: float  # the largest compute left out over the largest kept
    error: float  # mean of predicted less measured loss, nats a token
    rms_error: float
    inside: int  # runs inside their 95% band


def predict(law: Fit, x: Mapping[str, Floats], seed: int = 0) -> list[Prediction]:
    """Every arm's loss at each of x: "C", or "N" and "D" [n]."""
    count = len(next(iter(x.values())))
    return [
        Prediction(
            arm,
            {name: float(values[i]) for name, values in x.items()},
            float(law.predict(x, arm)[i]),
            _pair(of_law, i),
            _pair(of_run, i),
            _outside(law.points, arm, {name: float(values[i]) for name, values in x.items()}),
        )
        for arm in dict.fromkeys(law.points.arm)
        for of_law, of_run in [_bands(law, x, arm, seed)]
        for i in range(count)
    ]


def best_sizes(law: Fit, compute: Iterable[float]) -> list[BestSize]:
    """Every arm's N*, D* at each compute (FLOPs, as 6 N D), by a law of form nd."""
    assert law.form == "nd"
    found = []
    for arm in dict.fromkeys(law.points.arm):
        for C in compute:
            draws = [_best(replace(law, values=draw), arm, C) for draw in law.draws or ()]
            ends: list[Interval | None] = [_ends(np.array(column)) for column in zip(*draws, strict=True)]
            ends = ends or [None] * 3
            N, D, loss = _best(law, arm, C)
            outside = _outside(law.points, arm, {"N": N, "D": D})
            found.append(BestSize(arm, C, N, ends[0], D, ends[1], loss, ends[2], outside))
    return found


def back_test(points: Points, form: str, resamples: int, seed: int, options: Mapping[str, Any]) -> list[BackTest]:
    """Leave out the largest size, two, three (or tenths of many), and predict their runs; none with too few sizes.
    `options` are keywords of `fit`."""
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
        except ValueError:  # too few different N or D are left
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
    """Bands of the law and of a run at x. A run's departure from the law is drawn from the residuals where there are
    enough sizes, else from a normal for each level at which errors arise, whose spread is drawn, too."""
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
    """N*, D* and the loss there; logs, since a resample's amplitudes may be far off."""
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
