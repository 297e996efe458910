"""The code that a store's runs execute: a copy of the three packages, so that edits after `submit` reach no job."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

PACKAGES = ("analysis", "dynconv", "experiments")


def take(store: Path) -> Path:
    """STORE/.code/<hash of its content>, a folder for PYTHONPATH. It appears whole or not at all."""
    files = _files()
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(f"{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    target = store / ".code" / digest.hexdigest()[:16]
    if target.exists():
        return target
    target.parent.mkdir(exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=".", dir=target.parent))
    try:
        for name, path in files.items():
            (working / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, working / name)
        working.chmod(0o755)
        try:
            working.replace(target)
        except OSError:  # another submit was faster
            if not target.exists():
                raise
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return target


def commit(snapshot: Path) -> str:
    """What a log calls this code: the git commit, with the snapshot's hash where the files differ from it."""
    top, head = _git("rev-parse", "--show-toplevel"), _git("rev-parse", "HEAD")
    if top is None or head is None or Path(top).resolve() != _root():  # an installed copy, perhaps in some repository
        return f"snapshot-{snapshot.name}"
    changed = _git("status", "--porcelain", "--", *PACKAGES)
    return head if changed == "" else f"{head}-dirty-{snapshot.name}"


def _root() -> Path:
    return Path(__file__).resolve().parents[2]


def _files() -> dict[str, Path]:
    """Name -> path of every module, in the order of the names."""
    root = _root()
    paths = (path for package in PACKAGES for path in (root / package).rglob("*.py"))
    return {path.relative_to(root).as_posix(): path for path in sorted(paths)}


def _git(*arguments: str) -> str | None:
    """Standard output, or None where git or the repository is missing."""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", "-C", str(_root()), *arguments], capture_output=True, text=True, env=environment, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
