"""Makes sure that one job at a time owns a run's directory: two jobs that train the same run would mix their logs."""

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

# How long a job waits for another that still owns the directory. The other stops once it sees that job.json no longer
# names it: at its next step or, during an evaluation, at its next batch.
PATIENCE_SECONDS = 300.0
CHECK_SECONDS = 1.0  # between two checks that the directory is still this job's


class FolderTaken(RuntimeError):
    """The run's directory was removed or now belongs to another job, so this job must write nothing more into it."""


class RunFolder:
    """The directory of a run, as seen by one process of a job. Rank 0 holds the lock on it for all processes."""

    def __init__(self, run_dir: Path, place: Place) -> None:
        self._run_dir, self._place = run_dir, place
        self._hold: Hold | None = None
        self._checked_at = 0.0

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Own the directory until the context ends. Raises FolderTaken, without writing, if another job owns it."""
        self.require()
        with contextlib.ExitStack() as stack:
            if self._place.rank == 0:
                # Only a job.json that names this job tells the other job to stop; without one, waiting is of no use.
                noted = (self._run_dir / "job.json").exists()
                patience = PATIENCE_SECONDS if noted else 0.0
                try:
                    self._hold = stack.enter_context(held(self._run_dir, patience=patience, waiting=self._tell))
                except FolderHeld:
                    raise FolderTaken(
                        f"{self._run_dir.name}: another process has this run; wait for it to end"
                    ) from None
                self.require()  # again, since the directory may have been given away during the wait
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

    def check_due(self) -> bool:
        """Whether this is rank 0 and CHECK_SECONDS have passed since this last returned True."""
        if self._place.rank > 0 or time.monotonic() - self._checked_at < CHECK_SECONDS:
            return False
        self._checked_at = time.monotonic()
        return True


def other_job(run_dir: Path, place: Place) -> str | None:
    """The id of the job that job.json names, if it is not this one; else None.

    Also None if job.json is missing, unreadable or without an id, since a job may start before job.json is written.
    """
    try:
        named = read_json(run_dir / "job.json").get("job_id")
    except ValueError:
        return None
    return None if named in (None, place.job, str(os.getpid())) else str(named)
