"""Compute multipliers with all their checks, as `dynconv table` reports them.

m is the baseline compute that reaches the arm's loss, over the arm's compute, under a named FLOP convention. The
headline is the paired estimate (paired.py); a joint fit with profile likelihood cross-checks it. If m has a significant
trend in compute, the headline is m at the largest compute, by a law in which m changes. The interval is for m at the
largest compute in either case (changing.py). Coverage of intervals and levels of tests: analysis/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.advantage.answers import Answer, At, Clock, Multiplier
from analysis.advantage.budgets import OfBudget, by_budget, with_budgets
from analysis.advantage.changing import band, reported
from analysis.advantage.constancy import ROUNDING, SIGNIFICANCE, seed_noise_of
from analysis.advantage.family import at_once
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
from analysis.advantage.pairs import Pairs, pair, require_one_configuration, usable, with_axes
from analysis.advantage.shifted import shifted_multipliers
from analysis.advantage.single import require_below, single_size
from analysis.advantage.unequal import far_apart
from analysis.advantage.unequal import remark as unequal_remark
from analysis.advantage.unresolved import refusal, with_unlearned
from analysis.advantage.verdict import Verdict, judge
from analysis.laws.rates import Tuned, at_best_rates, notes, rate_column, remarks
from analysis.laws.solver import Floats
from analysis.logs.learning import unlearned
from analysis.logs.schema import CONVENTIONS
from analysis.logs.selection import choose_baseline, choose_convention, conventions_in

if TYPE_CHECKING:
    import pandas as pd

EXTRAPOLATED = 10.0  # m(C) is drawn up to this multiple of the largest compute
FEW_SIZES = 5  # with fewer, the status warns that the checks over sizes are weak
FLOOR_SHIFTS = (0.0, 0.5, 0.9, 1.0, 1.1)  # multiples of the fitted E at which m is recomputed, as a sensitivity check
ASSUMED_FLOORS = (0.0, 1.6)  # E in nats a token, assumed for two sizes, which cannot identify it: 0, and as published


def multipliers(
    runs: pd.DataFrame,
    *,
    baseline: str | None = None,
    convention: str | None = None,
    floors: Sequence[float] = (),
    throughput: pd.DataFrame | None = None,
    resamples: int = 999,
    seed: int = 0,
) -> tuple[list[Multiplier], list[str]]:
    """Every arm's multiplier against the baseline; and for each arm without one, a line that says why.

    `floors` are stated values of the irreducible loss E (nats a token), used instead of fitting it: the first for the
    headline, all of them for the sensitivity. A table of points may state them in a column stated_E. With E stated, an
    arm with a single size gets its local m, by the exponent of the baseline, without an interval. The wall-clock
    multiplier uses measured `throughput` (`logs.throughput.read_throughput`) if given, else the runs' own clocks.
    Raises ValueError where no arm has a multiplier.
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
        failures = unlearned(runs[runs["arm"].isin([baseline, arm])])
        try:
            _require_learned(rows, (arm, baseline))
            both, tuned, lines = comparable(rows[rows["arm"].isin([baseline, arm])], baseline, CONVENTIONS[convention])
            if tuned:
                failures = unlearned(runs[runs["arm"].isin([baseline, arm])], both, rate_column(both))
            pairs = pair(both, arm, baseline, convention, excluded, throughput)
            others = {name: pair(both, arm, baseline, name) for name in conventions_in(both) if name != convention}
            if floors and len(pairs.sizes) == 1:
                answer = single_size(pairs, others, both, floors)
            else:
                answer = compare(pairs, others, floors=floors, resamples=resamples, seed=seed)
            answer = _with_rates(replace(answer, notes=tuple(lines)), tuned)
            found.append(with_unlearned(answer, failures))
        except ValueError as error:
            refused.append(f"{arm}: {refusal(error, (arm, baseline), failures)}")
    if not found:
        raise ValueError("; ".join(refused))
    return at_once(found), refused


def _require_learned(rows: pd.DataFrame, arms: tuple[str, str]) -> None:
    """Raises ValueError where an arm has no run that finished and learned."""
    for arm in arms:
        if not rows["arm"].eq(arm).any():
            raise ValueError(f"no run of {arm} has finished and learned")


def comparable(rows: pd.DataFrame, baseline: str, column: str) -> tuple[pd.DataFrame, list[Tuned], list[str]]:
    """Prepare the runs of two arms (rows that `usable` returned) for pairing: add the budget that each is paired on,
    and keep the best learning rate of each arm. Also returns how the rates were tuned, and lines for the reader on how
    budgets were matched and which rates are best."""
    rows, how = with_budgets(rows, baseline, column)
    rows = with_axes(rows)
    require_one_configuration(rows)
    rows, tuned = at_best_rates(rows, rate_column(rows), column)
    lines = [f"budgets {how}: {', '.join(sorted(rows['_budget'].unique()))}"] if how else []
    return rows, tuned, lines + notes(tuned)


def _with_rates(item: Multiplier, tuned: Sequence[Tuned]) -> Multiplier:
    """The multiplier with the tuning of both arms' learning rates added, and any warnings about it in the status."""
    warnings = [remark for remark in (item.status, *remarks(tuned)) if remark != "ok"]
    return replace(item, rates=tuple(tuned), status="; ".join(warnings) or "ok")


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
            f"{sizes} paired size with {pairs.baseline}; an interval needs at least two (five are advised), so train "
            "both arms at more sizes with the same seeds"
        )
    stated = bool(floors)
    if (curves := far_apart(pairs, stated)) is not None:
        return curves
    least = float(min(pairs.y0.min(), pairs.y1.min()))
    if not floors and sizes == 2:
        floors = [floor for floor in ASSUMED_FLOORS if floor < least]
    floor = floors[0] if floors else None
    require_below(floors, least)
    found = _estimate(pairs, floor, resamples, seed)
    local, p, varies, headline = found.local, found.p, found.varies, found.headline
    shown = found.changing if varies else local
    of_budgets, budget_p = by_budget(pairs.cells, float(local.law.E[0]), float(local.law.g[0]))
    if budget_p is not None and budget_p < SIGNIFICANCE:
        headline = _over_budgets(headline, of_budgets)
    noise_floor = _noise_floor(pairs, local)
    conventions = {name: _reported(_local(other, floor), p) for name, other in (others or {}).items()}
    return Multiplier(
        arm=pairs.arm,
        baseline=pairs.baseline,
        m=headline.m,
        ci=headline.ci,
        method="paired, at the largest compute" if varies else "paired",
        constant_m_p=p,
        m_at_cmax=found.at_top.m,
        m_at_cmax_ci=found.at_top.ci,
        loso=_leave_one_out(pairs, floor if stated else None, float(local.law.E[0]), varies),
        convention=pairs.convention,
        n_sizes=sizes,
        n_seeds=min(pairs.seeds),
        status="; ".join(
            (
                *_remarks(pairs, local, headline, noise_floor, p, stated, conventions),
                *_budget_remarks(of_budgets, budget_p),
                *found.verdict.remarks(),
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
        wall_clock=_clock(pairs, pairs.rates.wall, floor, resamples, seed),
        gpu_cost=_clock(pairs, pairs.rates.gpu, floor, resamples, seed),
        no_clock=pairs.rates.reason,
        irreducible_loss=float(shown.law.E[0]),
        exponent=float(shown.law.g[0]),
        local=tuple(_local_rows(pairs, shown)),
        curve=tuple(_curve(pairs, local)),
        constancy=found.verdict.constancy,
        change=found.verdict.change,
        correlation_p=found.verdict.correlation_p,
        budgets=of_budgets,
        same_budget_p=budget_p,
    )


@dataclass(frozen=True)
class _Estimate:
    """The headline estimate, with the tests of its assumptions."""

    verdict: Verdict
    at_top: Answer  # at the largest compute
    headline: Answer

    @property
    def local(self) -> Local:
        """Local multipliers by the law of a constant m."""
        return self.verdict.local

    @property
    def changing(self) -> Local:
        """Local multipliers by the law in which m changes; below three sizes, those of the constant one."""
        return self.verdict.changing

    @property
    def p(self) -> float | None:
        """p-value of the test that m is constant; None below three sizes."""
        return self.verdict.constant_m_p

    @property
    def varies(self) -> bool:
        return self.p is not None and self.p < SIGNIFICANCE


def _estimate(pairs: Pairs, floor: float | None, resamples: int, seed: int) -> _Estimate:
    seeds = seed_noise_of(pairs.differences)
    verdict = judge(pairs.c0, pairs.c1, pairs.y0, pairs.y1, floor=floor, seeds=seeds, resamples=resamples, seed=seed)
    at_top = Answer(ratio(verdict.local.ln_m[0, -1]), None)
    if len(pairs.sizes) >= 3:
        at_top = _answer(*trend(verdict.changing, pairs.c0[-1]).estimate())
    return _Estimate(verdict, at_top, _reported(verdict.local, verdict.constant_m_p))


def _clock(pairs: Pairs, rates: Floats, floor: float | None, resamples: int, seed: int) -> Clock | None:
    """m in measured seconds; None where a rate is not known. `rates` [S] are the arm's FLOPs a second over the
    baseline's. Dividing the arm's compute by them expresses it in the baseline's seconds: an arm half as fast then
    costs twice its compute.

    The whole estimate is repeated, with its test of constancy: if rates change with size, m in seconds changes even
    where m in compute is constant.
    """
    if np.isnan(rates).any():
        return None
    found = _estimate(replace(pairs, c1=pairs.c1 / rates), floor, resamples, seed)
    ci = found.headline.ci
    assert ci is not None
    remarks = ["not resolved: the interval holds 1"] if ci[0] <= 1 <= ci[1] else []
    if found.varies:
        remarks.append(f"not constant: m changes with compute (p = {found.p:.3f}), so this is m at the largest")
    status = "; ".join(remarks) or "ok"
    return Clock(found.headline.m, ci, status, found.p, found.at_top.m, found.at_top.ci, pairs.rates.source)


def _stated_floors(rows: pd.DataFrame) -> tuple[float, ...]:
    """The irreducible losses that a table of points states in its column stated_E, where spaces separate them."""
    if "stated_E" not in rows or rows["stated_E"].isna().all():
        return ()
    texts = rows["stated_E"].dropna().astype(str).unique()
    try:
        (text,) = texts
        return tuple(map(float, text.split()))
    except ValueError:
        raise ValueError(f"column stated_E must hold the same numbers in every row; got {', '.join(texts)}") from None


def _local(pairs: Pairs, floor: float | None) -> Local:
    return local_multipliers(pairs.c0, pairs.c1, pairs.y0[None], pairs.y1[None], floor)


def _reported(local: Local, p: float | None) -> Answer:
    """The headline m and its interval, given the p-value of the test of constancy (None below three sizes)."""
    if p is None:
        return _answer(local.mean, *local.interval())
    return _answer(*reported(local, np.array([p]), changing_multipliers(local)))


def _answer(ln_m: Floats, low: Floats, high: Floats) -> Answer:
    return Answer(ratio(ln_m[0]), (ratio(low[0]), ratio(high[0])))


def _joint(pairs: Pairs) -> Answer | None:
    found = joint_interval(pairs)
    return found and Answer(*found)


def _curve(pairs: Pairs, local: Local) -> Iterator[At]:
    """m(C) with its 95% band. From three sizes on it is given by the laws in which m changes, since an extrapolation
    should not assume that m is constant. Two sizes cannot show a change, so the constant m is drawn, over the sizes
    only."""
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
    """Warnings about the headline, the gravest first."""
    assert headline.ci is not None
    low, high = headline.ci
    exponent = float(local.law.g[0])
    if not EXPONENTS[0] * (1 + ROUNDING) < exponent < EXPONENTS[1] * (1 - ROUNDING):
        yield f"not resolved: the exponent is at its bound ({exponent:g}): the losses do not fall by a power of compute"
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
    if unequal := unequal_remark(pairs):
        yield unequal
    for name, other in conventions.items():
        if not low <= other.m <= high:
            yield f"depends on the FLOP convention: {other.m:.3f}x under {name}"


def _over_budgets(headline: Answer, budgets: Sequence[OfBudget]) -> Answer:
    """The headline with its interval extended to include the interval of every budget, for an m that depends on it."""
    assert headline.ci is not None
    ends = [headline.ci, *(item.ci for item in budgets)]
    return replace(headline, ci=(min(low for low, _ in ends), max(high for _, high in ends)))


def _budget_remarks(budgets: Sequence[OfBudget], p: float | None) -> Iterator[str]:
    if p is not None and p < SIGNIFICANCE:
        at = ", ".join(f"{item.m:.3f} at {item.budget}" for item in budgets)
        yield f"m depends on the budget (p = {p:.3f}): {at}"


def _headline(local: Local, varies: bool, top: float) -> float:
    """m as in the headline: the constant one, or m at compute `top` where m varies."""
    return ratio((trend(changing_multipliers(local), top).at if varies else local.mean)[0])


def _leave_one_out(pairs: Pairs, stated: float | None, fitted: float, varies: bool) -> Interval | None:
    """The range of the headline's m with each size left out in turn. E is refitted as long as three sizes remain, else
    it is held at `fitted`. None if fewer than two sizes would remain, or fewer than three where m varies."""
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
    """m at each stated irreducible loss, or without any at multiples of the fitted one. Values that are not below every
    measured loss are left out."""
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
    """The smallest m above 1 that is significant at 95% against seed noise alone; None without repeated seeds."""
    dof = sum(len(group) - 1 for group in (*pairs.differences, *pairs.replicates))
    if dof < 1:
        return None
    squares = sum(((d - d.mean()) ** 2).sum() for d in pairs.differences)
    squares += 2 * sum(((y - y.mean()) ** 2).sum() for y in pairs.replicates)  # a difference has the noise of two runs
    variance = squares / dof
    return ratio(seed_noise(local, np.array([variance]), np.array(pairs.seeds), dof)[0])


def _local_rows(pairs: Pairs, local: Local) -> Iterator[dict[str, Any]]:
    columns = (pairs.sizes, pairs.c0, pairs.c1, pairs.y0, pairs.y1, [ratio(value) for value in local.ln_m[0]])
    names = ("size", "compute_baseline", "compute", "loss_baseline", "loss", "m")
    for row in zip(*columns, strict=True):
        yield dict(zip(names, [row[0], *map(float, row[1:])], strict=True))
