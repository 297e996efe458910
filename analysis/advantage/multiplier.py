"""Compute multipliers with all their checks, as `dynconv table` reports them.

m is the baseline compute that reaches the arm's loss, over the arm's compute, under a named FLOP convention. The
headline is the paired estimate (paired.py); a joint fit with profile likelihood cross-checks it. If m has a significant
trend in compute, the headline is m at the largest compute, by a law in which m changes. The interval is for m at the
largest compute in either case (changing.py). Coverage of intervals and levels of tests: analysis/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from analysis.advantage.answers import Answer, Clock, Multiplier
from analysis.advantage.budgets import OfBudget, by_budget
from analysis.advantage.checks import (
    EXTRAPOLATED,
    answer_of,
    asked_at,
    at_other_irreducible_losses,
    by_joint_fit,
    curve,
    headline_answer,
    leave_one_out,
    local_of,
    local_rows,
    noise_floor,
)
from analysis.advantage.comparable import Ready, every_arm
from analysis.advantage.constancy import ROUNDING, SIGNIFICANCE
from analysis.advantage.family import at_once
from analysis.advantage.joint import Interval, aicc, wild_cluster_interval
from analysis.advantage.mixtures import mixtures
from analysis.advantage.paired import EXPONENTS, Local, ratio, trend
from analysis.advantage.pairs import Pairs, pair, usable
from analysis.advantage.single import require_below, single_size
from analysis.advantage.unequal import far_apart
from analysis.advantage.unequal import remark as unequal_remark
from analysis.advantage.unresolved import refusal, with_unlearned
from analysis.advantage.verdict import Verdict, judge
from analysis.errors import Refusal
from analysis.laws.rate_rule import beside_the_rule, rule_of
from analysis.laws.rates import rate_column, remarks
from analysis.laws.solver import Floats
from analysis.logs.learning import uncounted, unlearned
from analysis.logs.selection import choose_baseline, choose_convention, conventions_in

if TYPE_CHECKING:
    import pandas as pd

FEW_SIZES = 5  # with fewer, the status warns that the checks over sizes are weak
# E in nats a token, assumed for two sizes, which cannot identify it: 0, and as published
ASSUMED_IRREDUCIBLE_LOSSES = (0.0, 1.6)


def multipliers(
    runs: pd.DataFrame,
    *,
    baseline: str | None = None,
    convention: str | None = None,
    irreducible_losses: Sequence[float] = (),
    throughput: pd.DataFrame | None = None,
    at: Sequence[float] = (),
    resamples: int = 999,
    seed: int = 0,
) -> tuple[list[Multiplier], list[str]]:
    """(every arm's multiplier against the baseline, lines that say which arms have none and why).

    `irreducible_losses` are stated values of E (nats a token), used instead of fitting it: the first for the headline,
    all of them for the sensitivity. A table of points may state them in a column stated_E. With E stated, an arm with a
    single size gets its local m, by the exponent of the baseline, without an interval. The wall-clock multiplier uses
    measured `throughput` (`logs.throughput.read_throughput`) if given, else the runs' own clocks. `at` are computes in
    FLOPs at which m is given as well, even if they are far from the runs'. Raises Refusal if no arm has a multiplier.
    """
    rows, excluded = usable(runs)
    baseline = choose_baseline(runs, baseline)
    convention = choose_convention(runs, convention)
    irreducible_losses = tuple(irreducible_losses) or _stated_irreducible_losses(rows)
    found: list[Multiplier] = []
    refused: dict[str, list[str]] = {}  # by the reason
    arms = [arm for arm in dict.fromkeys(runs["arm"]) if arm != baseline]
    if not arms:
        raise Refusal(f"the table holds the baseline {baseline!r} alone; add the runs of another arm")
    ready = every_arm(runs, rows, arms, baseline, convention)
    rule = rule_of(item for each in ready.values() if isinstance(each, Ready) for item in each.tuned)
    for arm, prepared in ready.items():
        two = runs[runs["arm"].isin([baseline, arm])]
        failures = unlearned(two)
        try:
            if isinstance(prepared, Refusal):
                raise prepared
            both, tuned, lines = prepared.rows, beside_the_rule(prepared.tuned, rule), list(prepared.lines)
            if tuned:
                failures = unlearned(two, both, rate_column(both))
                lines += uncounted(two, failures)
            pairs = pair(both, arm, baseline, convention, excluded, throughput)
            others = {name: pair(both, arm, baseline, name) for name in conventions_in(both) if name != convention}
            if irreducible_losses and len(pairs.sizes) == 1:
                answer = single_size(pairs, others, both, irreducible_losses)
            else:
                answer = compare(
                    pairs, others, irreducible_losses=irreducible_losses, at=at, resamples=resamples, seed=seed
                )
            answer = _with_warnings(replace(answer, notes=tuple(lines), rates=tuple(tuned)), remarks(tuned))
            answer = _with_warnings(answer, mixtures(both, arm, baseline))
            found.append(with_unlearned(answer, failures))
        except Refusal as error:
            refused.setdefault(refusal(error, (arm, baseline), failures), []).append(arm)
    lines = [f"{', '.join(arms)}: {reason}" for reason, arms in refused.items()]
    if not found:
        raise Refusal("; ".join(lines))
    return at_once(found), lines


def _with_warnings(item: Multiplier, warnings: Iterable[str]) -> Multiplier:
    """The multiplier with warnings at the end of its status."""
    every = [remark for remark in (item.status, *warnings) if remark != "ok"]
    return replace(item, status="; ".join(every) or "ok")


def compare(
    pairs: Pairs,
    others: dict[str, Pairs] | None = None,
    *,
    irreducible_losses: Sequence[float] = (),
    at: Sequence[float] = (),
    resamples: int = 999,
    seed: int = 0,
) -> Multiplier:
    """One arm against the baseline, with every check. Raises Refusal on fewer than two paired sizes."""
    if len(pairs.sizes) < 2:
        raise Refusal(
            f"{len(pairs.sizes)} paired size with {pairs.baseline}; an interval needs at least two (five are advised), "
            "so train both arms at more sizes with the same seeds"
        )
    stated = bool(irreducible_losses)
    if (curves := far_apart(pairs, stated)) is not None:
        return curves
    held = _irreducible_losses(pairs, irreducible_losses)
    found = _estimate(pairs, held[0] if held else None, resamples, seed)
    local = found.local
    shown = found.changing if found.varies else local

    law = float(local.law.E[0]), float(local.law.g[0])
    variance = dict(zip(pairs.sizes, local.variance[0] / local.variance[0].max(), strict=True))
    of_budgets, budget_p = by_budget(pairs.cells, *law, variance)

    def interval_at(level: float) -> Interval:
        ci = found.interval_at(level)
        if budget_p is None or budget_p >= SIGNIFICANCE:
            return ci
        return _over_budgets(ci, by_budget(pairs.cells, *law, variance, level)[0])

    headline = replace(found.headline, ci=interval_at(SIGNIFICANCE))
    conventions = {name: found.under(other, held) for name, other in (others or {}).items()}
    least_m = noise_floor(local)
    status = (
        *_remarks(pairs, local, headline, least_m, found.p, stated, conventions),
        *_budget_remarks(of_budgets, budget_p),
        *found.verdict.remarks(),
    )
    item = Multiplier(
        arm=pairs.arm,
        baseline=pairs.baseline,
        m=headline.m,
        ci=headline.ci,
        interval_at=interval_at,
        method="paired, at the largest compute" if found.varies else "paired",
        constant_m_p=found.p,
        m_at_cmax=found.at_top.m,
        m_at_cmax_ci=found.at_top.ci,
        convention=pairs.convention,
        n_sizes=len(pairs.sizes),
        n_seeds=min(pairs.seeds),
        status="; ".join(status) or "ok",
        excluded=pairs.excluded,
        conventions=conventions,
        noise_floor=least_m,
        no_clock=pairs.rates.reason,
        irreducible_loss=float(shown.law.E[0]),
        exponent=float(shown.law.g[0]),
        local=tuple(local_rows(pairs, shown)),
        asked=tuple(asked_at(local, at)),
        constancy=found.verdict.constancy,
        change=found.verdict.change,
        correlation_p=found.verdict.correlation_p,
        budgets=of_budgets,
        same_budget_p=budget_p,
    )
    item = _with_clocks(item, pairs, held, resamples, seed)
    return _with_checks(item, pairs, others or {}, found, held, stated)


def _irreducible_losses(pairs: Pairs, stated: Sequence[float]) -> Sequence[float]:
    """The stated irreducible losses; if none are stated, those assumed for two sizes, which cannot identify it; else
    none. Raises Refusal if one is not below every loss."""
    least = float(min(pairs.y0.min(), pairs.y1.min()))
    if not stated and len(pairs.sizes) == 2:
        stated = [E for E in ASSUMED_IRREDUCIBLE_LOSSES if least > E]
    require_below(stated, least)
    return stated


def _with_clocks(item: Multiplier, pairs: Pairs, held: Sequence[float], resamples: int, seed: int) -> Multiplier:
    """The multiplier with m in measured seconds."""
    E = held[0] if held else None
    wall, gpu = (_clock(pairs, rates, E, resamples, seed) for rates in (pairs.rates.wall, pairs.rates.gpu))
    return replace(item, wall_clock=wall, gpu_cost=gpu)


def _with_checks(
    item: Multiplier, pairs: Pairs, others: dict[str, Pairs], found: _Estimate, held: Sequence[float], stated: bool
) -> Multiplier:
    """The multiplier with its checks: m by other estimators, with sizes left out, at other E, and against compute."""
    several = len(pairs.sizes) >= 3
    shown = found.changing if found.varies else found.local
    return replace(
        item,
        loso=leave_one_out(pairs, held[0] if stated else None, found.local, found.varies),
        joint=by_joint_fit(pairs) if several else None,
        aicc=aicc(pairs),
        wild_cluster=wild_cluster_interval(found.local) if several else None,
        irreducible_loss_sensitivity=at_other_irreducible_losses(pairs, others, shown, held, found.varies),
        curve=tuple(curve(pairs, found.local)),
    )


@dataclass(frozen=True)
class _Estimate:
    """The headline estimate, with the tests of its assumptions."""

    verdict: Verdict
    at_top: Answer  # m at the largest compute
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
        """Whether the test rejects that m is constant."""
        return self.p is not None and self.p < SIGNIFICANCE

    def interval_at(self, level: float) -> Interval:
        """The headline's interval, which misses with probability `level`."""
        ci = headline_answer(self.local, self.p, level).ci
        assert ci is not None
        return ci

    def under(self, other: Pairs, held: Sequence[float]) -> Answer:
        """The headline under another FLOP convention, with the same test of constancy."""
        return headline_answer(local_of(other, held[0] if held else None), self.p)


def _estimate(pairs: Pairs, irreducible_loss: float | None, resamples: int, seed: int) -> _Estimate:
    """The headline estimate of pairs at two sizes or more; `irreducible_loss` is a stated E, or None to fit it."""
    verdict = judge(
        pairs.c0,
        pairs.c1,
        pairs.y0,
        pairs.y1,
        irreducible_loss=irreducible_loss,
        noise=pairs.noise,
        resamples=resamples,
        seed=seed,
    )
    at_top = Answer(ratio(verdict.local.ln_m[0, -1]), None)
    if len(pairs.sizes) >= 3:
        at_top = answer_of(*trend(verdict.changing, pairs.c0[-1]).estimate())
    return _Estimate(verdict, at_top, headline_answer(verdict.local, verdict.constant_m_p))


def _clock(pairs: Pairs, rates: Floats, irreducible_loss: float | None, resamples: int, seed: int) -> Clock | None:
    """m in measured seconds; None if a rate is not known. `rates` [S] are the arm's FLOP/s over the baseline's.
    Dividing the arm's compute by them expresses it in the baseline's seconds: an arm half as fast then costs twice its
    compute.

    The whole estimate is repeated, with its test of constancy: if rates change with size, m in seconds changes even if
    m in compute is constant.
    """
    if np.isnan(rates).any():
        return None
    found = _estimate(replace(pairs, c1=pairs.c1 / rates), irreducible_loss, resamples, seed)
    ci = found.interval_at(SIGNIFICANCE)
    remarks = ["not resolved: the interval holds 1"] if ci[0] <= 1 <= ci[1] else []
    if found.varies:
        remarks.append(f"not constant: m changes with compute (p = {found.p:.3f}), so this is m at the largest")
    status = "; ".join(remarks) or "ok"
    at_top = found.at_top
    return Clock(
        m=found.headline.m,
        ci=ci,
        interval_at=found.interval_at,
        status=status,
        constant_m_p=found.p,
        m_at_cmax=at_top.m,
        m_at_cmax_ci=at_top.ci,
        source=pairs.rates.source,
    )


def _stated_irreducible_losses(rows: pd.DataFrame) -> tuple[float, ...]:
    """The irreducible losses in the column stated_E of a table of points, in which they are separated by spaces.

    Raises Refusal if rows differ, or hold something else than numbers.
    """
    if "stated_E" not in rows or rows["stated_E"].isna().all():
        return ()
    texts = rows["stated_E"].dropna().astype(str).unique()
    try:
        (text,) = texts
        return tuple(map(float, text.split()))
    except ValueError:
        raise Refusal(f"column stated_E must hold the same numbers in every row; got {', '.join(texts)}") from None


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


def _over_budgets(ci: Interval, budgets: Sequence[OfBudget]) -> Interval:
    """The interval extended to include the interval of every budget, for an m that depends on it."""
    ends = [ci, *(item.ci for item in budgets)]
    return min(low for low, _ in ends), max(high for _, high in ends)


def _budget_remarks(budgets: Sequence[OfBudget], p: float | None) -> Iterator[str]:
    """A warning if m depends on the budget."""
    if p is not None and p < SIGNIFICANCE:
        at = ", ".join(f"{item.m:.3f} at {item.budget}" for item in budgets)
        yield f"m depends on the budget (p = {p:.3f}): {at}"
