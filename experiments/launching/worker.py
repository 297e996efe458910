"""What a job on Slurm executes: the run with its index in the array.

Slurm may start a job before sbatch has answered, or although sbatch answered with an error. So all that the job needs
is written before sbatch is called, and the job writes its id into job.json itself.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

REQUEUE = 75  # exit status of a process that wants its job to be queued again (EX_TEMPFAIL of sysexits.h)


def main() -> None:
    """Execute one run of the submission whose folder is the only argument; SLURM_ARRAY_TASK_ID tells which."""
    job = _Job(Path(sys.argv[1]))
    signal.signal(signal.SIGTERM, job.leave)  # before the imports, which can take minutes on a busy file system
    job.execute()


class _Job:
    """One process of one job."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._run_dir: Path | None = None

    def leave(self, _signum: int, _frame: FrameType | None) -> None:
        """Handle TERM, which Slurm sends before a preemption and before the time limit: ask for a requeue, and end.

        `Run` replaces this handler, and calls it once the state is saved. This process only writes a file, and the
        batch script asks Slurm, since a container may have no scontrol. Only rank 0 ends; Slurm then ends the others.
        """
        if int(os.environ["SLURM_PROCID"]) != 0:
            return
        cancelled = self._run_dir is not None and (self._run_dir / "cancelled").exists()
        if not cancelled:
            requeue_file(self._folder, os.environ["SLURM_JOB_ID"]).touch()
        print("ends as it was told to" + ("" if cancelled else "; it asks to be queued again"), flush=True)
        sys.exit(REQUEUE)

    def execute(self) -> None:
        """Train the run if it is still this job's. Ends the process with exit status 1 if the run fails."""
        from experiments.launching.jobs import adopt
        from experiments.launching.submissions import read_submission
        from experiments.training.job import this_place
        from experiments.training.run import Run, RunFailed

        run_ids = read_submission(self._folder)["runs"]
        self._run_dir = self._folder.parent.parent / run_ids[int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))]
        place = this_place()
        if not adopt(self._run_dir, self._folder.name, place.job, note=place.rank == 0):
            print(f"{self._run_dir.name} is not this job's any more: it was removed, or submitted again", flush=True)
            return
        print(f"job {place.job}: {self._run_dir.name}", flush=True)
        try:
            Run(self._run_dir)()
        except RunFailed as error:
            print(error, file=sys.stderr, flush=True)
            sys.exit(1)


def requeue_file(folder: Path, job_id: str) -> Path:
    """The file by which a job asks its batch script for a requeue. `job_id` is the single job's, not the array's."""
    return folder / f"requeue-{job_id}"


if __name__ == "__main__":
    main()
