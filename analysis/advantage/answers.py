"""The records that `dynconv table` reports for each arm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from analysis.advantage.budgets import OfBudget
from analysis.advantage.joint import Interval
from analysis.laws.rates import Tuned
from analysis.logs.learning import Unlearned
from analysis.logs.selection import Excluded


@dataclass(frozen=True)
class Answer:
    """A multiplier and its 95% interval, which is None if there is only one size."""

    m: float
    ci: Interval | None
    status: str = "ok"


@dataclass(frozen=True)
class Clock(Answer):
    """The multiplier in measured seconds. It has its own test of constancy, since throughput may change with size."""

    constant_m_p: float | None = None
    m_at_cmax: float | None = None
    m_at_cmax_ci: Interval | None = None
    source: str = ""  # where the seconds were measured
    family_ci: Interval | None = None  # as in Multiplier
    interval_at: Callable[[float], Interval] | None = field(
        default=None, repr=False, compare=False, metadata={"json": False}
    )


@dataclass(frozen=True)
class At:
    """m at one compute (FLOPs), and its 95% interval."""

    compute: float
    m: float
    ci: Interval


@dataclass(frozen=True)
class AskedAt(At):
    """m at a compute that the user asked for. Outside the trained range it is an extrapolation."""

    times_largest: float  # the compute over the largest one that was trained; above 1 it is extrapolated
    times_smallest: float  # the compute over the smallest one that was trained; below 1 it is extrapolated


@dataclass(frozen=True, kw_only=True)
class Multiplier:
    """One arm against the baseline. Multipliers are ratios of compute; intervals are 95%."""

    arm: str
    baseline: str
    m: float
    ci: Interval | None
    family_ci: Interval | None = None  # simultaneous over all arms at 95% (family.py); equals `ci` for a single arm
    family: int = 1  # how many arms have an interval
    # The interval that misses m with a given probability; None without an interval.
    interval_at: Callable[[float], Interval] | None = field(
        default=None, repr=False, compare=False, metadata={"json": False}
    )
    method: str
    constant_m_p: float | None = None  # p-value of the test that m is constant; None below three sizes
    m_at_cmax: float  # at the largest compute, read off the line of local ln m under the law in which m changes
    m_at_cmax_ci: Interval | None = None
    loso: Interval | None = None  # range of m with each size left out
    convention: str
    n_sizes: int
    n_seeds: int  # paired seeds at the size with fewest
    status: str  # "ok", or warnings, of which "not resolved" comes first
    excluded: tuple[Excluded, ...]
    conventions: dict[str, Answer] = field(default_factory=dict)  # m under the other FLOP conventions
    joint: Answer | None = None  # by the joint fit of both arms, as a cross-check
    aicc: dict[str, float] | None = None  # by model: "shared", "free exponent", "free E"; lower is better
    wild_cluster: Interval | None = None  # by the wild cluster bootstrap, as a cross-check
    # for several E: E, m, and m under the other conventions
    irreducible_loss_sensitivity: tuple[dict[str, Any], ...] = ()
    noise_floor: float | None = None  # the smallest m that stands out from seed noise; None without repeated seeds
    wall_clock: Clock | None = None  # m in seconds
    gpu_cost: Clock | None = None  # m in GPU seconds
    no_clock: str | None = None  # why wall_clock is None
    irreducible_loss: float  # E, nats a token
    exponent: float  # g
    local: tuple[dict[str, Any], ...] = ()  # by size: size, paired seeds, compute and loss of both, m
    curve: tuple[At, ...] = ()  # m against compute, over the sizes and up to EXTRAPOLATED times the largest
    asked: tuple[AskedAt, ...] = ()  # m at the computes that the user asked for, perhaps far beyond the largest
    budgets: tuple[OfBudget, ...] = ()  # m at each budget, if sizes have several
    same_budget_p: float | None = None  # p-value of the test that m is the same at every budget
    rates: tuple[Tuned, ...] = ()  # how both arms were tuned at each size, if runs differ in their learning rate
    constancy: str | None = None  # "shown", "not shown" or "rejected"; None below three sizes
    change: Interval | None = None  # 90% interval of m at the largest compute over the mean m; decides `constancy`
    correlation_p: float | None = None  # p-value of the test that errors are independent over sizes; None if untestable
    did_not_learn: tuple[Unlearned, ...] = ()  # runs of the arm and of the baseline that did not learn
    notes: tuple[str, ...] = ()  # information on how rows were selected; problems are in `status`
