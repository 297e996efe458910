"""The hardware and versions that a run was trained on, from its attempts. A value is given only if all agree on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

PROVENANCE = ("device", "gpus", "sharing", "dtype", "torch")
# what determines the speed of a step
HARDWARE_AND_VERSIONS = ("device", "gpus", "parallel", "dtype", "torch", "triton")


def summarize(attempts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """PROVENANCE, each None where the attempts differ, and `clock`: whether the run's train seconds may be compared.

    `clock` is "alone" (one kind of device, count and version, shared with no other run), "shared" (always with as many
    other runs), "mixed" (attempts of different kinds, or shared with others part of the time) or "unknown". Attempts
    that took no step have no part in the train seconds, so they count only where no attempt took one.
    """
    trained = [attempt for attempt in attempts if attempt.get("step") is not None] or attempts
    found: dict[str, Any] = {key: _only([attempt.get(key) for attempt in trained]) for key in PROVENANCE}
    return found | {"clock": _clock(trained)}


def count_attempts(attempts: Iterable[Mapping[str, Any]]) -> int:
    """How many attempts count against the most that are allowed: not those that were interrupted before a step."""
    return sum(not (attempt.get("preempted") and attempt.get("step") is None) for attempt in attempts)


def last_interruption(attempts: Mapping[int, Mapping[str, Any]]) -> str | None:
    """Why the last attempt ended before the run did; None where it did not say."""
    cause = attempts[max(attempts)].get("interrupted") if attempts else None
    return None if cause is None else str(cause)


def _clock(attempts: Sequence[Mapping[str, Any]]) -> str:
    for key in HARDWARE_AND_VERSIONS:
        if len({attempt[key] for attempt in attempts if attempt.get(key) is not None}) > 1:
            return "mixed"
    sharing = [attempt.get("sharing") for attempt in attempts]
    if None in sharing or not sharing or any(attempt.get("device") is None for attempt in attempts):
        return "unknown"
    alone = [runs == 1 for runs in sharing]
    if any(attempt.get("sharing_changed") for attempt in attempts):
        return "mixed"
    return "alone" if all(alone) else "mixed" if any(alone) else "shared"


def _only(values: Sequence[Any]) -> Any:
    """The one value, or None where there are several."""
    return values[0] if values and all(value == values[0] for value in values) else None
