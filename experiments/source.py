"""The source code that runs: where it lies, which git commit it is, and a hash of what of it decides an outcome."""

import ast
import hashlib
import os
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGES = ("analysis", "dynconv", "experiments")
COMMIT = "commit.txt"  # in a copy of the code that is not in git any more, which commit it was
# The modules that decide what a run on given data learns: two runs that are compared must have the same versions.
# Data are compared by their own hash, whatever built them; what is planned, launched, logged or drawn is none of these.
# tests/test_source.py holds the list to what a trainer imports.
DECIDING = (
    "dynconv",
    "experiments/draws.py",
    "experiments/parts",
    "experiments/models",
    "experiments/tasks",
    "experiments/data/batches.py",
    "experiments/data/dataset.py",
    "experiments/data/packing.py",
    "experiments/data/text.py",
    "experiments/design/model.py",
    "experiments/design/schedules.py",
    "experiments/design/train.py",
    "experiments/training",
)
# Of these folders, what only begins, records and ends a run.
NOT_DECIDING = tuple(
    f"experiments/training/{name}.py"
    for name in (
        "compile_cache",
        "folder",
        "job",
        "memory",
        "presence",
        "provenance",
        "record",
        "rendezvous",
        "run",
        "stopping",
    )
)


def root() -> Path:
    """The folder that holds the three packages."""
    return Path(__file__).resolve().parents[1]


@cache
def code_sha256() -> str:
    """The hash of the deciding modules of the code that this process runs."""
    return _sha256_of_all(module_hashes(root()))


def module_hashes(folder: Path) -> dict[str, str]:
    """Name -> hash of each deciding module of the code in `folder`. Comments, docstrings and layout do not count."""
    found = {}
    for place in DECIDING:
        path = folder / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            name = file.relative_to(folder).as_posix()
            if name not in NOT_DECIDING and file.exists():
                tree = "".join(_written(ast.parse(file.read_bytes())))
                found[name] = hashlib.sha256(tree.encode()).hexdigest()
    return found


def differing(folder: Path, sha256: str) -> list[str] | None:
    """The deciding modules in which the code in `folder` differs from this process's; None if its hash is another."""
    theirs, ours = module_hashes(folder), module_hashes(root())
    if _sha256_of_all(theirs) != sha256:
        return None
    return sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))


def _sha256_of_all(hashes: dict[str, str]) -> str:
    return hashlib.sha256("".join(f"{name} {own}\n" for name, own in sorted(hashes.items())).encode()).hexdigest()


def _written(node: ast.AST) -> Iterator[str]:
    """A tree as text: kinds of nodes, and their fields that hold something, so that versions of Python agree."""
    yield f"({type(node).__name__}"
    for name, value in ast.iter_fields(node):
        held = value if isinstance(value, list) else [] if value is None else [value]
        if not held or name in ("ctx", "kind", "type_comment"):
            continue
        yield f" {name}="
        for each in held[1:] if name == "body" and _is_docstring(held[0]) else held:
            if isinstance(each, ast.AST):
                yield from _written(each)
            else:
                yield repr(each)
    yield ")"


def _is_docstring(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def recorded_commit() -> str | None:
    """The commit that a copy of the code was taken from, if this process runs such a copy."""
    path = root() / COMMIT
    return path.read_text().strip() if path.exists() else None


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
