"""What `dynconv table` answers of one arm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from analysis.advantage.budgets import OfBudget
from analysis.advantage.joint import Interval
from analysis.advantage.rates import Tuned
from analysis.logs.selection import Excluded


@dataclass(frozen=True)
class Answer:
    """A multiplier and its 95% interval; the interval is None where one size gives none."""

    m: float
    ci: Interval | None
    status: str = "ok"


@dataclass(frozen=True)
class Clock(Answer):
    """The same in measured seconds, with its own test that it is constant: throughput may change with size."""

    constant_m_p: float | None = None
    m_at_cmax: float | None = None
    m_at_cmax_ci: Interval | None = None
    source: str = ""  # of the seconds


@dataclass(frozen=True)
class At:
    """m at a compute, and its 95% interval."""

    compute: float
    m: float
    ci: Interval


@dataclass(frozen=True, kw_only=True)
class Multiplier:
    """One arm against the baseline. Multipliers are ratios of compute; intervals are 95%."""

    arm: str
    baseline: str
    m: float
    ci: Interval | None
    family_ci: Interval | None = None  # of which all arms' hold at once with 95%; `ci` where there is one arm
    family: int = 1  # arms with an interval
    method: str
    constant_m_p: float | None = None  # None below three sizes
    m_at_cmax: float  # by the law of a changing m alone, on its line of local ln m at the largest compute
    m_at_cmax_ci: Interval | None = None
    loso: Interval | None = None  # range of m with each size left out
    convention: str
    n_sizes: int
    n_seeds: int  # paired seeds at the size with fewest
    status: str  # "ok", or what a reader must know, "not resolved" first
    excluded: tuple[Excluded, ...]
    conventions: dict[str, Answer] = field(default_factory=dict)  # the same under the other conventions
    joint: Answer | None = None  # the cross-check
    aicc: dict[str, float] | None = None  # of "shared", "free exponent", "free E"; lower is better
    wild_cluster: Interval | None = None
    floor_sensitivity: tuple[dict[str, Any], ...] = ()  # with E moved: E, m, and m under the other conventions
    noise_floor: float | None = None  # the m below which seed noise hides it; None without repeated seeds
    wall_clock: Clock | None = None
    gpu_cost: Clock | None = None
    no_clock: str | None = None  # why wall_clock is None
    irreducible_loss: float
    exponent: float
    local: tuple[dict[str, Any], ...] = ()  # by size: size, compute and loss of both, m
    curve: tuple[At, ...] = ()  # m against compute, over the sizes and up to EXTRAPOLATED times the largest
    budgets: tuple[OfBudget, ...] = ()  # m at each budget, where sizes have several
    same_budget_p: float | None = None  # of the test that m is the same at every budget
    rates: tuple[Tuned, ...] = ()  # of both arms by size, where runs differ in their learning rate
    constancy: str | None = None  # "shown", "not shown" or "rejected"; None below three sizes
    change: Interval | None = None  # m at the largest compute over the mean m: 90% interval, the verdict's ground
    correlation_p: float | None = None  # of the test that errors are independent over sizes; None where it is blind
    notes: tuple[str, ...] = ()  # how the rows were taken, which is no fault of the answer
