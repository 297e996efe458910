"""When the runs of a sweep will have ended, if so many run at once."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A run that is still to be trained, or the rest of one."""

    run_id: str
    hours: float
    lane: str = ""  # runs of a lane take slots from one another, as those of an array do
    after: str | None = None  # the run that must have ended before


def hours_until_done(
    pieces: Sequence[Piece],  # in the order in which they are started
    slots: int | None,  # of every lane; None: as many as there are runs
) -> float:
    """The hours until all have ended, without waiting for a scheduler."""
    waiting, names = list(pieces), {piece.run_id for piece in pieces}
    free: dict[str, float] = {piece.lane: slots or math.inf for piece in pieces}
    running: list[tuple[float, str, str]] = []  # a heap of (end, run id, lane)
    now = 0.0
    while waiting or running:
        for piece in list(waiting):
            if piece.after not in names and free[piece.lane]:
                waiting.remove(piece)
                free[piece.lane] -= 1
                heapq.heappush(running, (now + piece.hours, piece.run_id, piece.lane))
        if not running:
            raise ValueError(f"{waiting[0].run_id} waits for {waiting[0].after}, which waits for it")
        now, done, lane = heapq.heappop(running)
        names.discard(done)
        free[lane] += 1
    return now
