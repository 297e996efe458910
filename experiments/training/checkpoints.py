"""Checkpoints of a run: written atomically, and loaded without executing pickled code (weights_only=True)."""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from analysis.logs.files import write_atomically

CHECKPOINTS_TO_KEEP = 2  # if the newest is unreadable, the run resumes from the one before it


def save(run_dir: Path, step: int, state: dict[str, Any]) -> None:
    """Write the checkpoint of `step`. Of the others, keep the CHECKPOINTS_TO_KEEP - 1 before it and delete the rest.

    Checkpoints of later steps exist if they were unreadable and the run resumed from an earlier one.
    """
    folder = run_dir / "checkpoint"
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:010d}.pt"
    write_atomically(path, lambda temporary: torch.save(state, temporary))
    earlier = [other for other in _newest_first(run_dir) if other.name < path.name]
    for other in folder.iterdir():
        if other not in (path, *earlier[: CHECKPOINTS_TO_KEEP - 1]):
            other.unlink(missing_ok=True)


def load_newest(run_dir: Path, run_id: str) -> dict[str, Any] | None:
    """The newest readable checkpoint of this run, or None if there is none.

    A checkpoint that cannot be read is named on standard error and skipped. Raises ValueError for one of another run.
    """
    for path in _newest_first(run_dir):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # The type that torch raises depends on what is damaged.
            print(f"{path} is unreadable ({type(error).__name__}); trying the checkpoint before it", file=sys.stderr)
            continue
        if not isinstance(state, dict) or state.get("run_id") != run_id:
            got = state.get("run_id") if isinstance(state, dict) else None
            raise ValueError(f"{path} is a checkpoint of run {got}; wanted {run_id}; move it away and retry")
        return state
    return None


def keep_branch_point(run_dir: Path, step: int, state: dict[str, Any]) -> None:
    """Write the state of a trunk after `step`. It is never deleted, because branches start from it."""
    folder = run_dir / "branch-points"
    folder.mkdir(exist_ok=True)
    write_atomically(folder / f"step-{step:010d}.pt", lambda temporary: torch.save(state, temporary))


def load_branch_point(trunk_dir: Path, step: int) -> dict[str, Any]:
    """The state of a trunk after `step`. Raises ValueError if the trunk has not reached it, or it is unreadable."""
    path = trunk_dir / "branch-points" / f"step-{step:010d}.pt"
    if not path.exists():
        raise ValueError(f"the trunk {trunk_dir.name} has kept no state after step {step}; retry when it has")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # The type that torch raises depends on what is damaged.
        raise ValueError(f"{path} is unreadable ({type(error).__name__}); train the trunk anew") from None
    assert isinstance(state, dict)
    return state


def remove(run_dir: Path) -> None:
    """Remove a finished run's checkpoints; its weights stay in model.pt."""
    shutil.rmtree(run_dir / "checkpoint", ignore_errors=True)


def _newest_first(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoint").glob("step-*.pt"), reverse=True)
