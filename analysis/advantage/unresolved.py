"""Comparisons in which some run did not learn are not resolved, whatever their interval says.

The estimate uses only the runs that learned. An arm that fails in one seed of three and is better in the other two is
not shown to be better, since whoever trains it may get a seed like the third.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from analysis.logs.learning import Unlearned

if TYPE_CHECKING:
    from analysis.advantage.answers import Multiplier

UNRESOLVED = "not resolved: "  # prefix of the status of a multiplier that is not shown to differ from 1


def with_unlearned(item: Multiplier, failures: Mapping[str, Unlearned]) -> Multiplier:
    """The multiplier with the runs of its arm and of the baseline that did not learn. They come first in its status and
    in the status of its clocks. `failures` are by arm."""
    found = tuple(failures[arm] for arm in (item.arm, item.baseline) if arm in failures)
    if not found:
        return item
    remarks = [each.remark for each in found]
    wall, gpu = item.wall_clock, item.gpu_cost
    return replace(
        item,
        status=_unresolved(item.status, remarks),
        wall_clock=wall and replace(wall, status=_unresolved(wall.status, remarks)),
        gpu_cost=gpu and replace(gpu, status=_unresolved(gpu.status, remarks)),
        did_not_learn=found,
    )


def _unresolved(status: str, remarks: list[str]) -> str:
    """The status with "not resolved" and these remarks in front."""
    others = [] if status == "ok" else [status.removeprefix(UNRESOLVED)]
    return UNRESOLVED + "; ".join([*remarks, *others])


def refusal(reason: object, arms: tuple[str, str], failures: Mapping[str, Unlearned]) -> str:
    """Why two arms cannot be compared, with the runs of both that did not learn."""
    return "; ".join([str(reason), *(failures[arm].remark for arm in arms if arm in failures)])
