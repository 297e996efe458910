"""The hardware and versions that a run was trained on, from its attempts. A value is given only if all agree on it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

PROVENANCE = ("device", "gpus", "sharing", "dtype", "execution", "fused", "torch", "code_sha256")
SEVERAL = " + "  # between the commits of a run that was trained by several
STOPPED_PER_ATTEMPT = 10
SEVERAL_OF = {
    "device": "devices",
    "dtype": "precisions",
    "torch": "versions of torch",
    "code": "versions of the code",
    "execution": "ways of execution",
}  # what runs may be of, in the plural
# what determines the speed of a step
HARDWARE_AND_VERSIONS = ("device", "gpus", "parallel", "dtype", "execution", "fused", "torch", "triton", "code_sha256")


def summarize(attempts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """PROVENANCE, each None where the attempts differ, and `clock`: whether the run's train seconds may be compared.

    `clock` is "alone" (one kind of device, count and version, shared with no other run), "shared" (always with as many
    other runs), "mixed" (attempts of different kinds, or shared with others part of the time) or "unknown". Attempts
    that took no step have no part in the train seconds, so they count only where no attempt took one. Where they are of
    several commits, `code_commit` names all of them with their shares of the steps.
    """
    trained = [attempt for attempt in attempts if attempt.get("step") is not None] or attempts
    found: dict[str, Any] = {key: _only([attempt.get(key) for attempt in trained]) for key in PROVENANCE}
    return found | {"clock": _clock(trained)} | _commits(trained)


def with_trunk(
    attempts: Sequence[Mapping[str, Any]], trunk: Sequence[Mapping[str, Any]], branch_step: int
) -> dict[str, Any]:
    """What of `summarize` says by what the weights of a branch were trained, its trunk's steps up to the branch's
    included; the clock is "mixed", since the seconds of a branch do not include the trunk's."""
    shared = [
        {**attempt, "step": min(attempt["step"], branch_step)}
        for attempt in trunk
        if attempt.get("step") is not None and attempt["first_step"] <= branch_step
    ]
    found = summarize([*shared, *attempts])
    names = ("device", "dtype", "torch", "code_sha256", "code_commit")
    return {name: found[name] for name in names if name in found} | {"clock": "mixed"}


def _commits(attempts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The commits of attempts (in their order) with their shares of the steps, if there are several; else nothing."""
    steps: dict[str, int] = {}
    for attempt, following in itertools.zip_longest(attempts, attempts[1:]):
        commit, first, last = (attempt.get(key) for key in ("code_commit", "first_step", "step"))
        if commit is None or first is None or last is None:
            return {}
        kept = last if following is None else min(last, following["first_step"] - 1)  # what follows repeats the rest
        steps[commit] = steps.get(commit, 0) + max(0, kept - first + 1)
    total = sum(steps.values())
    if len(steps) < 2 or not total:
        return {}
    return {"code_commit": SEVERAL.join(f"{commit} ({count / total:.0%})" for commit, count in steps.items())}


def several(runs: pd.DataFrame) -> list[str]:
    """A line for each of SEVERAL_OF of which the finished runs are of several, with the numbers
    of runs. Losses and seconds of such runs are comparable only as far as `table` says."""
    done = runs[runs["status"].eq("complete").fillna(False)]
    found = []
    for kind, what in SEVERAL_OF.items():
        name = "code_sha256" if kind == "code" else kind
        if name not in done:
            continue
        counts = done[name].dropna().astype(str).value_counts(sort=False)
        if len(counts) > 1:
            listed = ", ".join(f"{value} ({count} runs)" for value, count in sorted(counts.items()))
            found.append(f"the runs are of several {what}: {short_commits(listed)}")
    return found


def short_commits(text: str) -> str:
    """The text with hashes cut to twelve digits."""
    return re.sub(r"[0-9a-f]{13,}", lambda found: found[0][:12], text)


def count_attempts(attempts: Iterable[Mapping[str, Any]]) -> int:
    """How many attempts count against the most that are allowed.

    An attempt that was told to stop before its first step counts as a tenth of one: that is seldom the run's fault,
    but a time limit too short for a step must not go on for ever.
    """
    stopped = [bool(attempt.get("preempted")) and attempt.get("step") is None for attempt in attempts]
    return stopped.count(False) + stopped.count(True) // STOPPED_PER_ATTEMPT


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
