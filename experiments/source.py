"""The source code that runs: where it lies, and which git commit it is."""

import functools
import hashlib
import os
import subprocess
from pathlib import Path

PACKAGES = ("analysis", "dynconv", "experiments")
# whose code a training step runs
_TRAINING = ("dynconv", *(f"experiments/{room}" for room in ("models", "parts", "tasks", "training")))


def root() -> Path:
    """The folder that holds the three packages."""
    return Path(__file__).resolve().parents[1]


@functools.cache
def training_code() -> str:
    """A hash of the code that a training step runs, committed or not: other code may have another speed."""
    digest = hashlib.sha256()
    for path in sorted(path for room in _TRAINING for path in (root() / room).rglob("*.py")):
        digest.update(f"{path.relative_to(root()).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def commit(changed: str) -> str | None:
    """The git commit of this code, with `changed` appended where the packages' files differ from it.

    None where the code is an installed copy, even inside some other repository, or git is missing.
    """
    top, head = _git("rev-parse", "--show-toplevel"), _git("rev-parse", "--verify", "HEAD")
    if top is None or head is None or Path(top).resolve() != root():
        return None
    return head if _git("status", "--porcelain", "--", *PACKAGES) == "" else head + changed


def _git(*arguments: str) -> str | None:
    """Standard output, or None where git or the repository is missing."""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", "-C", str(root()), *arguments], capture_output=True, text=True, env=environment, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
