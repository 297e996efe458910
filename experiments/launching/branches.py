"""When a branch of a warm-up-stable-decay trunk may start, and whether its trunk can still become complete."""

from pathlib import Path

from analysis.logs import reader
from experiments.design.config import RunConfig
from experiments.launching.jobs import job_of


def ready(run: RunConfig, store: Path) -> bool:
    """Whether the run may start: it has no trunk, or its trunk is complete."""
    return run.trunk is None or reader.status(store / run.trunk) == "complete"


def hopeless(run: RunConfig, store: Path) -> bool:
    """Whether the run's trunk failed or was cancelled, so that the run cannot start before `dynconv retry`."""
    return run.trunk is not None and reader.status(store / run.trunk) in ("failed", "cancelled")


def trunk_failure(store: Path, trunk: str | None) -> str | None:
    """A message if a run's trunk failed or was cancelled, else None."""
    where = reader.status(store / trunk) if trunk else ""
    return f"its trunk {trunk} {where}; retry that" if where in ("failed", "cancelled") else None


def dependency(run: RunConfig, store: Path) -> str | None:
    """The id of the Slurm job of the run's trunk, which must succeed before the run may start; None if there is none
    to wait for. Raises ValueError if the trunk is not complete and has no job on Slurm."""
    if run.trunk is None or ready(run, store):
        return None
    job = job_of(store / run.trunk)
    if job is None or job["executor"] != "slurm" or job["job_id"] is None:
        raise ValueError(f"{run.run_id} waits for its trunk {run.trunk}, which has no job here; submit the whole sweep")
    return str(job["job_id"])
