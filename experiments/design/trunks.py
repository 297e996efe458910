"""Warm-up-stable-decay: runs of several budgets that share most of their steps (arXiv 2404.06395).

Runs that differ only in their budget take the same steps until the smaller one begins to decay. A trunk takes these
steps once, at the peak rate, and saves its state wherever a branch begins. Each branch starts from that state and
decays. Bit for bit, it equals the run that would have been trained without a trunk, and it has the same id.
"""

from collections.abc import Sequence
from dataclasses import replace

from experiments.design.config import TRUNK, RunConfig
from experiments.design.recipe import BUDGET_AXIS
from experiments.design.schedules import Constant, WarmupStableDecay


def with_trunks(runs: Sequence[RunConfig]) -> list[RunConfig]:
    """The runs of one arm, size and seed, with a trunk before each group of runs that can share one.

    These are runs with the schedule warm-up-stable-decay and the same values on every axis except the budget.
    """
    grouped: dict[tuple[tuple[str, float], ...], list[RunConfig]] = {}
    for run in runs:
        axes = tuple((axis, value) for axis, value in run.vary.items() if axis != BUDGET_AXIS)
        grouped.setdefault(axes, []).append(run)
    result = []
    for axes, group in grouped.items():
        schedule = group[0].train.schedule
        if not isinstance(schedule, WarmupStableDecay):
            result += group
            continue
        warmup = min(run.train.warmup_steps for run in group)
        starts = _decay_starts(group, schedule, warmup)
        result += group if len(group) == 1 else _branches(group, starts, warmup, dict(axes))
    return result


def _decay_starts(runs: Sequence[RunConfig], schedule: WarmupStableDecay, warmup: int) -> list[int]:
    """The step after which each run begins to decay.

    Raises ValueError if that is before the end of the warm-up, when the rate would drop at once.
    """
    starts = [run.train.steps - schedule.decay_steps(run.train.steps) for run in runs]
    if min(starts) < warmup:
        raise ValueError(
            f"{runs[0].arm} {runs[0].size}: the smallest budget begins to decay after step {min(starts)}, and the "
            f"warm-up takes {warmup}; lower warmup_fraction or decay_fraction, or raise the smallest budget"
        )
    return starts


def _branches(
    runs: Sequence[RunConfig],
    starts: Sequence[int],  # the step after which each run begins to decay
    warmup: int,  # steps of the smallest budget's warm-up, which all runs share
    axes: dict[str, float],
) -> list[RunConfig]:
    """A trunk that ends where the last branch begins, and the branches."""
    sequences = max(starts) * runs[0].train.batch_sequences
    longest = max(runs, key=lambda run: run.train.tokens)
    train = replace(
        longest.train,
        tokens=sequences * longest.train.sequence_length,
        warmup_steps=warmup,
        schedule=Constant(),
        branch_steps=tuple(sorted(set(starts))),
    )
    trunk = replace(longest, budget=TRUNK, train=train, vary=axes)
    branches = [
        replace(run, train=replace(run.train, warmup_steps=warmup), trunk=trunk.run_id, branch_step=start)
        for run, start in zip(runs, starts, strict=True)
    ]
    return [trunk, *branches]
