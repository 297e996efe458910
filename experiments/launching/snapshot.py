"""The code that a store's runs execute: a copy of the three packages, so that later edits do not reach queued jobs."""

import hashlib
import shutil
import tempfile
from pathlib import Path

from experiments import source


def take(store: Path) -> Path:
    """Copy the code to STORE/.code/<hash of its content>, unless it is there. Returns that folder, for PYTHONPATH.

    The folder appears whole or not at all.
    """
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
        (working / source.COMMIT).write_text(commit(target))
        working.chmod(0o755)
        try:
            working.replace(target)
        except OSError:  # Another `submit` was faster.
            if not target.exists():
                raise
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return target


def commit(snapshot: Path) -> str:
    """The name of this code in logs: the git commit, with the snapshot's hash added if the files differ from it."""
    return source.commit(f"-dirty-{snapshot.name}") or f"snapshot-{snapshot.name}"


def _files() -> dict[str, Path]:
    """Relative name -> path of every module, sorted."""
    root = source.root()
    paths = (path for package in source.PACKAGES for path in (root / package).rglob("*.py"))
    return {path.relative_to(root).as_posix(): path for path in sorted(paths)}
