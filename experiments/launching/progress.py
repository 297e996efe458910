"""The progress bar on standard error while runs train. It counts FLOPs, not runs, so that large runs weigh more."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tqdm import tqdm

from experiments.design.config import RunConfig
from experiments.launching import states
from experiments.terminal import FILE_SECONDS, QUIET_SECONDS

# A run writes its log every LOG_SECONDS, plus LOG_SHARE of the time that its attempt has taken so far.
LOG_SECONDS = 10.0
LOG_SHARE = 0.01


class Progress:
    """A context in which `update` draws how far the runs are."""

    def __init__(self, store: Path, runs: Sequence[RunConfig]) -> None:
        self._store = store
        self._weights = {run.run_id: run.own_flops for run in runs}

    def __enter__(self) -> Self:
        share, _ = self._share()
        self._bar = tqdm(
            total=100.0,
            initial=share,
            delay=QUIET_SECONDS,
            smoothing=0.0,  # Forecast from the mean speed so far, since the speeds of runs differ.
            mininterval=0.5 if sys.stderr.isatty() else FILE_SECONDS,
            bar_format="{percentage:3.0f}% |{bar:20}| {elapsed}, {remaining} to go; {desc}",
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.update()
        self._bar.close()

    def update(self) -> list[states.RunState]:
        """Read the runs' states and redraw."""
        share, here = self._share()
        counts = Counter(state.state for state in here)
        parts = [f"{counts[name]} {name}" for name in reversed(states.STATES) if counts[name]]
        self._bar.set_description_str(f"runs: {', '.join(parts)}", refresh=False)
        self._bar.update(share - self._bar.n)
        return here

    def _share(self) -> tuple[float, list[states.RunState]]:
        """(percent of the FLOPs that are done, states of the runs).

        A run that has ended counts as done even if it failed, but a stopped or lost run counts by its progress.
        """
        here = states.read(self._store, self._weights)
        open_ = {*states.SUBMITTABLE, *states.ACTIVE}
        done = sum(self._weights[s.run_id] * (_share_now(s) if s.state in open_ else 1.0) for s in here)
        return 100.0 * done / sum(self._weights.values()), here


def _share_now(state: states.RunState) -> float:
    """The share of a run that is done now, extrapolated from its log, which is some seconds old."""
    if state.state != "running" or not state.eta or state.last_logged is None:
        return state.progress
    since = min(time.time() - state.last_logged, LOG_SECONDS + LOG_SHARE * (state.elapsed or 0.0))
    return state.progress + (1.0 - state.progress) * min(1.0, max(0.0, since) / state.eta)
