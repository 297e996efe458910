"""Simulates when the runs of a sweep will have ended, if a given number of them runs at once."""

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A run that is still to be trained, or the rest of one."""

    run_id: str
    hours: float
    lane: str = ""  # Runs of one lane share its slots, as the jobs of an array do.
    after: str | None = None  # id of the run that must end before this one starts


def hours_until_done(
    pieces: Sequence[Piece],  # in the order in which they are started
    slots: int | None,  # slots of each lane; None: no limit
) -> float:
    """The hours until all runs have ended, without time spent waiting for a scheduler."""
    names = {piece.run_id for piece in pieces}
    waiting: dict[str, deque[Piece]] = {}
    for piece in pieces:
        waiting.setdefault(piece.lane, deque()).append(piece)
    free: dict[str, float] = dict.fromkeys(waiting, slots or math.inf)
    running: list[tuple[float, str, str]] = []  # a heap of (end, run id, lane)
    now = 0.0
    while any(waiting.values()) or running:
        for lane, queue in waiting.items():
            while free[lane] and (ready := next((piece for piece in queue if piece.after not in names), None)):
                queue.remove(ready)
                free[lane] -= 1
                heapq.heappush(running, (now + ready.hours, ready.run_id, lane))
        assert running, "a run waits for one that waits for it"
        now, done, lane = heapq.heappop(running)
        names.discard(done)
        free[lane] += 1
    return now
