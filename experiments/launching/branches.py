"""Branches of a warm-up-stable-decay trunk begin when it is complete, and say so when it cannot become complete."""

from pathlib import Path

from analysis.logs import reader
from experiments.design.config import RunConfig
from experiments.launching.jobs import job_of


def ready(run: RunConfig, store: Path) -> bool:
    """Whether the run has no trunk, or one that is complete."""
    return run.trunk is None or reader.status(store / run.trunk) == "complete"


def hopeless(run: RunConfig, store: Path) -> bool:
    """Whether the run's trunk has failed or was cancelled: only `dynconv retry` brings it to its end."""
    return run.trunk is not None and reader.status(store / run.trunk) in ("failed", "cancelled")


def trunk_failure(store: Path, trunk: str | None) -> str | None:
    """What became of the trunk that a submitted run waits for, where it failed or was cancelled."""
    where = reader.status(store / trunk) if trunk else ""
    return f"its trunk {trunk} {where}; retry that" if where in ("failed", "cancelled") else None


def dependency(run: RunConfig, store: Path) -> str | None:
    """The Slurm job that must end well before the run may begin. Raises ValueError where the trunk has none."""
    if run.trunk is None or ready(run, store):
        return None
    job = job_of(store / run.trunk)
    if job is None or job["executor"] != "slurm" or job["job_id"] is None:
        raise ValueError(f"{run.run_id} waits for its trunk {run.trunk}, which has no job here; submit the whole sweep")
    return str(job["job_id"])
