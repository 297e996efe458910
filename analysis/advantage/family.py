"""Many arms against one baseline: simultaneous 95% intervals, which also decide whether an arm is resolved.

If no arm differs from the baseline, at least one plain 95% interval excludes 1 in 30% of simulated sweeps with 9 arms
and five sizes, and in 49% with 19 arms. So with A arms each interval is computed at level 1 - .05 / A (Bonferroni); the
error rate is then 3% to 6% for any number of arms and sizes (tests/test_family.py). Simulated critical values of the
largest t, which use that all arms share one baseline, would narrow the intervals by 2% to 3% only.

Each interval is made anew at its level. Stretching the 95% interval by the ratio of t quantiles is not enough, because
the interval averages two laws, and far out the law with the larger error decides: of 5 null arms at 6, 4 and 3 sizes,
some was resolved in 8%, 11% and 13% of sweeps, of 12 in 15%, 18% and 25%.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from analysis.advantage.answers import Clock, Multiplier
from analysis.advantage.joint import Interval

LEVEL = 0.05


def at_once(found: Sequence[Multiplier]) -> list[Multiplier]:
    """The arms with `family_ci` added, and to their clocks. Where it contains 1, the status begins "not resolved"."""
    arms = sum(item.ci is not None for item in found)
    return [item if item.ci is None else _of_arm(item, arms) for item in found]


def _of_arm(item: Multiplier, arms: int) -> Multiplier:
    """One of `arms` arms with its simultaneous intervals."""
    ci, status = _together(item, arms)
    wall, gpu = (_of_clock(clock, arms) for clock in (item.wall_clock, item.gpu_cost))
    return replace(item, family_ci=ci, family=arms, status=status, wall_clock=wall, gpu_cost=gpu)


def _of_clock(clock: Clock | None, arms: int) -> Clock | None:
    """The clock of one of `arms` arms with its simultaneous interval."""
    if clock is None:
        return None
    ci, status = _together(clock, arms)
    return replace(clock, family_ci=ci, status=status)


def _together(item: Multiplier | Clock, arms: int) -> tuple[Interval, str]:
    """(simultaneous interval of one of `arms` arms, status with "not resolved" added if it contains 1)."""
    ci = item.interval_at(LEVEL / arms) if item.interval_at and arms > 1 else item.ci
    assert ci is not None
    status = item.status
    if ci[0] <= 1 <= ci[1] and not status.startswith("not resolved"):
        remark = f"not resolved: the interval of all {arms} arms at once holds 1"
        status = remark if status == "ok" else f"{remark}; {status}"
    return ci, status
