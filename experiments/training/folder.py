"""A run's directory in the hands of one job: the logs of two jobs that train the same run would be interleaved."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from analysis.logs.files import read_json
from analysis.logs.ownership import FolderHeld, Hold, held
from experiments.training.job import Place

# How long a job waits for another that still has the directory: that one stops when it sees that job.json no longer
# names it, at its next step or, if it evaluates, at its next batch.
PATIENCE_SECONDS = 300.0
CHECK_SECONDS = 1.0  # between two looks at whether the directory is still this job's


class FolderTaken(RuntimeError):
    """The run's directory was removed, or is another job's: nothing more is written there."""


class RunFolder:
    """The directory of a run, as one process of a job has it. Rank 0 holds it for all."""

    def __init__(self, run_dir: Path, place: Place) -> None:
        self._run_dir, self._place = run_dir, place
        self._hold: Hold | None = None
        self._checked_at = 0.0

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Own the directory until the context ends. Raises FolderTaken, and leaves it alone, if another job has it."""
        self.require()
        with contextlib.ExitStack() as stack:
            if self._place.rank == 0:
                noted = (self._run_dir / "job.json").exists()  # then the other job knows that it has to stop
                patience = PATIENCE_SECONDS if noted else 0.0
                try:
                    self._hold = stack.enter_context(held(self._run_dir, patience=patience, waiting=self._tell))
                except FolderHeld:
                    raise FolderTaken(
                        f"{self._run_dir.name}: another process has this run; wait for it to end"
                    ) from None
                self.require()  # it may have taken long
            yield

    def _tell(self) -> None:
        print(f"{self._run_dir.name}: waiting for another job, which still has it", file=sys.stderr, flush=True)

    def require(self) -> None:
        """Raises FolderTaken if the directory is no longer this job's."""
        if self._hold is not None and self._hold.lost():
            raise FolderTaken(
                f"{self._run_dir} was removed while this run trained, and another job may have it now; this one stops "
                "and leaves it alone"
            )
        if (other := other_job(self._run_dir, self._place)) is not None:
            raise FolderTaken(f"{self._run_dir} was given to job {other}; this one stops and leaves it to that")

    def taken(self) -> bool:
        """Whether the directory is no longer this job's."""
        with contextlib.suppress(FolderTaken):
            self.require()
            return False
        return True

    def look_again(self) -> bool:
        """Whether this is rank 0 and CHECK_SECONDS have passed since this was last so."""
        if self._place.rank > 0 or time.monotonic() - self._checked_at < CHECK_SECONDS:
            return False
        self._checked_at = time.monotonic()
        return True


def other_job(run_dir: Path, place: Place) -> str | None:
    """The id of the job that the run was given to, where job.json names another than this one.

    None as well where job.json is missing, unreadable or without an id: a job may begin before it is noted.
    """
    try:
        named = read_json(run_dir / "job.json").get("job_id")
    except ValueError:
        return None
    return None if named in (None, place.job, str(os.getpid())) else str(named)
