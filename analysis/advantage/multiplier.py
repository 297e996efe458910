"""Compute multipliers with what must stand beside them: the answer of `dynconv table`.

m is the baseline compute that reaches the arm's loss, over the arm's compute, under a named FLOP convention. The
headline is the paired estimator (paired.py); a joint fit with profile likelihood cross-checks it. A trend of m
with compute makes m at the largest compute the headline, by a law in which m changes too; the interval covers m at the
largest compute in any case (changing.py). Coverage and sizes of tests: analysis/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.advantage.changing import band, reported
from analysis.advantage.constancy import ROUNDING, SIGNIFICANCE, seed_noise_of
from analysis.advantage.joint import Interval, aicc, joint_interval, wild_cluster_interval
from analysis.advantage.paired import (
    EXPONENTS,
    Local,
    changing_multipliers,
    local_multipliers,
    ratio,
    seed_noise,
    trend,
)
from analysis.advantage.pairs import Pairs, curve, pair, usable
from analysis.advantage.shifted import shifted_multipliers
from analysis.advantage.verdict import judge
from analysis.laws.solver import Floats
from analysis.logs.schema import CONVENTIONS
from analysis.logs.selection import Excluded, choose_baseline, choose_convention

if TYPE_CHECKING:
    import pandas as pd

EXTRAPOLATED = 10.0  # m(C) is drawn no further than this times the largest compute
FEW_SIZES = 5  # below, the checks over sizes are warned about
FLOOR_SHIFTS = (0.0, 0.5, 0.9, 1.0, 1.1)  # E times these, for the sensitivity to the floor
ASSUMED_FLOORS = (0.0, 1.6)  # nats a token, where two sizes cannot identify E: none, and near published ones


@dataclass(frozen=True)
class Answer:
    """A multiplier and its 95% interval; the interval is None where one size gives none."""

    m: float
    ci: Interval | None
    status: str = "ok"


@dataclass(frozen=True)
class At:
    """m at a compute, and its 95% interval."""

    compute: float
    m: float
    ci: Interval


@dataclass(frozen=True)
class Multiplier:
    """One arm against the baseline. Multipliers are ratios of compute; intervals are 95%."""

    arm: str
    baseline: str
    m: float
    ci: Interval | None
    method: str
    constant_m_p: float | None  # None below three sizes
    m_at_cmax: float  # by the law of a changing m alone, on its line of local ln m at the largest compute
    m_at_cmax_ci: Interval | None
    loso: Interval | None  # range of m with each size left out
    convention: str
    n_sizes: int
    n_seeds: int  # paired seeds at the size with fewest
    status: str  # "ok", or what a reader must know, "not resolved" first
    excluded: tuple[Excluded, ...]
    conventions: dict[str, Answer]  # the same under the other conventions
    joint: Answer | None  # the cross-check
    aicc: dict[str, float] | None  # of "shared", "free exponent", "free E"; lower is better
    wild_cluster: Interval | None
    floor_sensitivity: tuple[dict[str, Any], ...]  # with E moved: E, m, and m under the other conventions
    noise_floor: float | None  # the m below which seed noise hides it; None without repeated seeds
    wall_clock: Answer | None
    gpu_cost: Answer | None
    irreducible_loss: float
    exponent: float
    local: tuple[dict[str, Any], ...]  # by size: size, compute and loss of both, m
    curve: tuple[At, ...]  # m against compute, over the sizes and up to EXTRAPOLATED times the largest
    constancy: str | None = None  # "shown", "not shown" or "rejected"; None below three sizes
    change: Interval | None = None  # m at the largest compute over the mean m: 90% interval, the verdict's ground
    correlation_p: float | None = None  # of the test that errors are independent over sizes; None where it is blind


def multipliers(
    runs: pd.DataFrame,
    *,
    baseline: str | None = None,
    convention: str | None = None,
    floors: Sequence[float] = (),
    resamples: int = 999,
    seed: int = 0,
) -> tuple[list[Multiplier], list[str]]:
    """Every arm against the baseline, and a line for each arm that has no answer.

    `floors` states E in nats a token instead of fitting it: the first for the headline, all for the sensitivity; a
    table of points may state them in a column stated_E. With E stated, an arm with one size gets its local m, by the
    baseline's exponent, without an interval. Raises ValueError where no arm has an answer.
    """
    rows, excluded = usable(runs)
    baseline = choose_baseline(runs, baseline)
    convention = choose_convention(runs, convention)
    floors = tuple(floors) or _stated_floors(rows)
    found: list[Multiplier] = []
    refused = []
    arms = [arm for arm in dict.fromkeys(runs["arm"]) if arm != baseline]
    if not arms:
        raise ValueError(f"the table holds the baseline {baseline!r} alone; add the runs of another arm")
    for arm in arms:
        try:
            pairs = pair(rows, arm, baseline, convention, excluded)
            others = {
                name: pair(rows, arm, baseline, name)
                for name, column in CONVENTIONS.items()
                if name != convention and column in rows and (rows[column] > 0).all()
            }
            if floors and len(pairs.sizes) == 1:
                found.append(_single(pairs, others, rows, floors))
            else:
                found.append(compare(pairs, others, floors=floors, resamples=resamples, seed=seed))
        except ValueError as error:
            refused.append(f"{arm}: {error}")
    if not found:
        raise ValueError("; ".join(refused))
    return found, refused


def compare(
    pairs: Pairs,
    others: dict[str, Pairs] | None = None,
    *,
    floors: Sequence[float] = (),
    resamples: int = 999,
    seed: int = 0,
) -> Multiplier:
    """One arm against the baseline, with every check. Raises ValueError on fewer than two paired sizes."""
    sizes = len(pairs.sizes)
    if sizes < 2:
        raise ValueError(
            f"{sizes or 'no'} paired size{'' if sizes == 1 else 's'} with {pairs.baseline}; an interval needs at least "
            "two (five are advised), so train both arms at more sizes with the same seeds"
        )
    stated = bool(floors)
    least = float(min(pairs.y0.min(), pairs.y1.min()))
    if not floors and sizes == 2:
        floors = [floor for floor in ASSUMED_FLOORS if floor < least]
    floor = floors[0] if floors else None
    _require_below(floors, least)
    seeds = seed_noise_of(pairs.differences)
    verdict = judge(pairs.c0, pairs.c1, pairs.y0, pairs.y1, floor=floor, seeds=seeds, resamples=resamples, seed=seed)
    local, changing, p = verdict.local, verdict.changing, verdict.constant_m_p
    at_top = Answer(ratio(local.ln_m[0, -1]), None)
    if sizes >= 3:
        at_top = _answer(*trend(changing, pairs.c0[-1]).estimate())
    varies = p is not None and p < SIGNIFICANCE
    shown = changing if varies else local
    headline = _reported(local, p)
    noise_floor = _noise_floor(pairs, local)
    conventions = {name: _reported(_local(other, floor), p) for name, other in (others or {}).items()}
    return Multiplier(
        arm=pairs.arm,
        baseline=pairs.baseline,
        m=headline.m,
        ci=headline.ci,
        method="paired, at the largest compute" if varies else "paired",
        constant_m_p=p,
        m_at_cmax=at_top.m,
        m_at_cmax_ci=at_top.ci,
        loso=_leave_one_out(pairs, floor if stated else None, float(local.law.E[0]), varies),
        convention=pairs.convention,
        n_sizes=sizes,
        n_seeds=min(pairs.seeds),
        status="; ".join(
            (
                *_remarks(pairs, local, headline, noise_floor, p, stated, conventions),
                *verdict.remarks(),
            )
        )
        or "ok",
        excluded=pairs.excluded,
        conventions=conventions,
        joint=_joint(pairs) if sizes >= 3 else None,
        aicc=aicc(pairs),
        wild_cluster=wild_cluster_interval(local) if sizes >= 3 else None,
        floor_sensitivity=_floor_sensitivity(pairs, others or {}, shown, floors, varies),
        noise_floor=noise_floor,
        wall_clock=_timed(local, pairs.rate_ratio, p),
        gpu_cost=_timed(local, pairs.gpu_rate_ratio, p),
        irreducible_loss=float(shown.law.E[0]),
        exponent=float(shown.law.g[0]),
        local=tuple(_local_rows(pairs, shown)),
        curve=tuple(_curve(pairs, local)),
        constancy=verdict.constancy,
        change=verdict.change,
        correlation_p=verdict.correlation_p,
    )


def _stated_floors(rows: pd.DataFrame) -> tuple[float, ...]:
    """The irreducible losses that a table of points states in its column stated_E, separated by spaces."""
    if "stated_E" not in rows or rows["stated_E"].isna().all():
        return ()
    texts = rows["stated_E"].dropna().astype(str).unique()
    try:
        (text,) = texts
        return tuple(map(float, text.split()))
    except ValueError:
        raise ValueError(f"column stated_E must hold the same numbers in every row; got {', '.join(texts)}") from None


def _require_below(floors: Sequence[float], least: float) -> None:
    wrong = [floor for floor in floors if not 0 <= floor < least]
    if wrong:
        raise ValueError(f"the irreducible loss must be at least 0 and below every loss ({least:g}); got {wrong[0]:g}")


def _single(pairs: Pairs, others: dict[str, Pairs], rows: pd.DataFrame, floors: Sequence[float]) -> Multiplier:
    """The local m of an arm with one size, by the exponent of the baseline's curve at a stated E."""

    curves = {each.convention: curve(rows, each.baseline, each.convention) for each in (pairs, *others.values())}
    if len(curves[pairs.convention][0]) < 2:
        raise ValueError(f"1 paired size, and {pairs.baseline} has no second one to give the exponent; add sizes")
    _require_below(floors, float(min(pairs.y1[0], curves[pairs.convention][1].min())))

    def at(pairs: Pairs, floor: float) -> tuple[float, float]:
        compute, loss = curves[pairs.convention]
        g = -np.polyfit(np.log(compute), np.log(loss - floor), 1)[0]
        if g <= 0:
            raise ValueError(f"1 paired size, and the loss of {pairs.baseline} does not fall with compute; add sizes")
        share = (pairs.y0[0] - pairs.y1[0]) / (pairs.y0[0] - floor)
        return float(np.exp(-np.log1p(-share) / g) * pairs.c0[0] / pairs.c1[0]), float(g)

    m, g = at(pairs, floors[0])
    return Multiplier(
        arm=pairs.arm,
        baseline=pairs.baseline,
        m=m,
        ci=None,
        method="local, by the baseline's exponent at a stated E",
        constant_m_p=None,
        m_at_cmax=m,
        m_at_cmax_ci=None,
        loso=None,
        convention=pairs.convention,
        n_sizes=1,
        n_seeds=pairs.seeds[0],
        status="not resolved: one size gives no interval",
        excluded=pairs.excluded,
        conventions={name: Answer(at(other, floors[0])[0], None) for name, other in others.items()},
        joint=None,
        aicc=None,
        wild_cluster=None,
        floor_sensitivity=tuple(
            {
                "E": floor,
                "m": at(pairs, floor)[0],
                "conventions": {name: at(other, floor)[0] for name, other in others.items()},
            }
            for floor in floors
        ),
        noise_floor=None,
        wall_clock=None,
        gpu_cost=None,
        irreducible_loss=floors[0],
        exponent=g,
        local=(),
        curve=(),
    )


def _local(pairs: Pairs, floor: float | None) -> Local:
    return local_multipliers(pairs.c0, pairs.c1, pairs.y0[None], pairs.y1[None], floor)


def _reported(local: Local, p: float | None, rates: Floats | float = 1.0) -> Answer:
    """The headline, local m being multiplied by `rates` [S]; p is None below three sizes."""
    at_rates = _at_rates(local, rates)
    if p is None:
        return _answer(at_rates.mean, *at_rates.interval())
    return _answer(*reported(at_rates, np.array([p]), _at_rates(changing_multipliers(local), rates)))


def _at_rates(local: Local, rates: Floats | float) -> Local:
    ln_m = local.ln_m + np.log(rates)
    mean = (local.weight * ln_m).sum(axis=1)
    spread = (local.weight * (ln_m - mean[:, None]) ** 2).sum(axis=1)
    return replace(local, ln_m=ln_m, mean=mean, error=np.sqrt(spread / (ln_m.shape[1] - 1)))


def _answer(ln_m: Floats, low: Floats, high: Floats) -> Answer:
    return Answer(ratio(ln_m[0]), (ratio(low[0]), ratio(high[0])))


def _joint(pairs: Pairs) -> Answer | None:
    found = joint_interval(pairs)
    return found and Answer(*found)


def _curve(pairs: Pairs, local: Local) -> Iterator[At]:
    """m(C) by the laws in which it changes, from three sizes on: beyond the data a constant m would be taken for
    granted. Below three nothing says how it changes; the constant's is drawn and ends with the sizes."""
    if len(pairs.sizes) < 3:
        for compute in np.geomspace(pairs.c0[0], pairs.c0[-1], 40):
            answer = _reported(local, None)
            assert answer.ci is not None
            yield At(float(compute), answer.m, answer.ci)
        return
    changing, shifted = changing_multipliers(local), shifted_multipliers(local)
    for compute in np.geomspace(pairs.c0[0], EXTRAPOLATED * pairs.c0[-1], 40):
        ln_m, low, high = band(changing, shifted, float(compute))
        yield At(float(compute), ratio(ln_m[0]), (ratio(low[0]), ratio(high[0])))


def _remarks(
    pairs: Pairs,
    local: Local,
    headline: Answer,
    noise_floor: float | None,
    p: float | None,
    stated: bool,
    conventions: dict[str, Answer],
) -> Iterator[str]:
    """What a reader must know before the number, the gravest first."""
    assert headline.ci is not None
    low, high = headline.ci
    exponent = float(local.law.g[0])
    if not EXPONENTS[0] * (1 + ROUNDING) < exponent < EXPONENTS[1] * (1 - ROUNDING):
        yield f"not resolved: the exponent is at its bound ({exponent:g}), the losses do not fall by a power of compute"
    elif low <= 1 <= high:
        yield "not resolved: the interval holds 1"
    elif noise_floor is not None and abs(math.log(headline.m)) < math.log(noise_floor):
        yield f"not resolved: smaller than the seed noise ({noise_floor:.3f}x)"
    elif len(pairs.sizes) == 2:
        yield "not resolved: two sizes cannot identify the irreducible loss"
    if len(pairs.sizes) == 2 and not stated:
        yield "E = 0 assumed: state it with --hold E=VALUE"
    if abs(math.log(headline.m)) > math.log(EXTRAPOLATED):
        yield f"extrapolated: more than {EXTRAPOLATED:.0f}x apart"
    if p is not None and p < SIGNIFICANCE:
        yield f"not constant: m changes with compute (p = {p:.3f}), so this is m at the largest"
    if 2 < len(pairs.sizes) < FEW_SIZES:
        yield f"{len(pairs.sizes)} sizes: few for the wild cluster interval, and to see m change with compute"
    for name, other in conventions.items():
        if not low <= other.m <= high:
            yield f"depends on the FLOP convention: {other.m:.3f}x under {name}"


def _headline(local: Local, varies: bool, top: float) -> float:
    """m as the headline gives it: the constant, or that at compute `top` where it varies."""
    return ratio((trend(changing_multipliers(local), top).at if varies else local.mean)[0])


def _leave_one_out(pairs: Pairs, stated: float | None, fitted: float, varies: bool) -> Interval | None:
    """The range of the headline's m with each size left out; E is fitted anew while three sizes remain. None with
    fewer than two sizes left, or three where m varies."""
    sizes = len(pairs.sizes)
    if sizes < (4 if varies else 3):
        return None
    floor = fitted if stated is None and sizes == 3 else stated
    values = []
    for out in range(sizes):
        keep = np.arange(sizes) != out
        part = (pairs.c0[keep], pairs.c1[keep], pairs.y0[None, keep], pairs.y1[None, keep])
        values.append(_headline(local_multipliers(*part, floor), varies, pairs.c0[-1]))
    return min(values), max(values)


def _floor_sensitivity(
    pairs: Pairs, others: dict[str, Pairs], local: Local, stated: Sequence[float], varies: bool
) -> tuple[dict[str, Any], ...]:
    """m at the stated irreducible losses, else with the fitted one moved; those at or above a loss are left out."""
    floors = stated or dict.fromkeys(shift * float(local.law.E[0]) for shift in FLOOR_SHIFTS)
    least = min(pairs.y0.min(), pairs.y1.min())
    possible = [floor for floor in floors if floor < 0.999 * least]

    def m(pairs: Pairs, floor: float) -> float:
        return _headline(_local(pairs, floor), varies, pairs.c0[-1])

    return tuple(
        {
            "E": floor,
            "m": m(pairs, floor),
            "conventions": {name: m(other, floor) for name, other in others.items()},
        }
        for floor in possible
    )


def _noise_floor(pairs: Pairs, local: Local) -> float | None:
    """The smallest m above 1 that the spread over repeated seeds alone would let through at 95%."""
    dof = sum(seeds - 1 for seeds in pairs.seeds)
    if dof < 1:
        return None
    variance = sum(((d - d.mean()) ** 2).sum() for d in pairs.differences) / dof
    return ratio(seed_noise(local, np.array([variance]), np.array(pairs.seeds), dof)[0])


def _timed(local: Local, rate_ratio: Floats, p: float | None) -> Answer | None:
    """m in measured seconds: local m times the arm's FLOPs a second over the baseline's; None where not measured."""
    return None if np.isnan(rate_ratio).any() else _reported(local, p, rate_ratio)


def _local_rows(pairs: Pairs, local: Local) -> Iterator[dict[str, Any]]:
    columns = (pairs.sizes, pairs.c0, pairs.c1, pairs.y0, pairs.y1, [ratio(value) for value in local.ln_m[0]])
    names = ("size", "compute_baseline", "compute", "loss_baseline", "loss", "m")
    for row in zip(*columns, strict=True):
        yield dict(zip(names, [row[0], *map(float, row[1:])], strict=True))
