"""Compares the current version of the code with the versions by which the store's runs were trained."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from analysis.logs.files import read_json
from analysis.logs.provenance import short_commits
from analysis.logs.reader import read_attempts
from analysis.logs.selection import some
from experiments import source
from experiments.design.config import RunConfig

CODE = "code"  # the value of --accept


class Code(NamedTuple):
    """A version of the code. Two versions are the same if the modules that decide the outcome of a run are."""

    sha256: str | None  # hash of these modules; None if an older version did not record it
    commit: str | None

    def same_as(self, other: "Code") -> bool:
        """Whether the deciding modules are the same; by the commits if one of the two did not record their hash."""
        if self.sha256 is not None and other.sha256 is not None:
            return self.sha256 == other.sha256
        return self.commit == other.commit

    def __str__(self) -> str:
        return short_commits(f"{self.commit or 'code of no known commit'} ({self.sha256 or 'modules not recorded'})")


def check_code(runs: Sequence[RunConfig], store: Path, accept: Sequence[str]) -> None:
    """Raises ValueError if one of these runs was begun by another version of the code, or if all of the store's runs
    were made by other versions.

    If `accept` has "code", says so on standard error instead. From then on the store has runs of this version, too, so
    that it is accepted without being asked again.
    """
    ours = Code(source.code_sha256(), source.commit("+changes"))
    if not runs:
        return
    todo = {run.run_id: run for run in runs}
    made = list(_made(store, todo))
    continued = todo.keys() | {run.trunk for run in runs}  # A branch continues from its trunk's state.
    last = dict(made)  # each run's last attempt: if that was by this code, the change was accepted before
    begun = [(run_id, code) for run_id, code in last.items() if run_id in continued and not code.same_as(ours)]
    others = [(run_id, code) for run_id, code in made if not code.same_as(ours)]
    if not begun and len(others) < len(made):  # The store already has runs of this version.
        others = []
    if not (begun or others):
        return
    run_ids = list(dict.fromkeys(run_id for run_id, _ in begun or others))
    theirs = (begun or others)[0][1]
    what = "were begun" if begun else "were made"
    who = f"{store}: {len(run_ids)} runs ({some(run_ids, 2)}) {what}"
    told = f"{who} by code {theirs}; this is {ours}{_where(store, theirs)}"
    if CODE in accept:
        print(f"{told}; goes on, as --accept code says", file=sys.stderr)
        return
    raise ValueError(
        f"{told}; go on with the code that they were made by, choose another store, or accept that they are of several "
        "versions with --accept code"
    )


def _made(store: Path, todo: Mapping[str, RunConfig]) -> Iterator[tuple[str, Code]]:
    """(run id, version) of every attempt in the store that took a step, and of submitted runs without one."""
    for path in sorted(store.glob("*/config.json")):
        run_dir = path.parent
        attempts = [each for each in read_attempts(run_dir)[0].values() if each.get("step") is not None]
        if not attempts and run_dir.name not in todo and (run_dir / "job.json").exists():
            try:
                attempts = [read_json(path)]
            except ValueError:
                continue  # `status` reports it.
        for attempt in attempts:
            code = Code(*(_text(attempt.get(key)) for key in ("code_sha256", "code_commit")))
            if code != (None, None):
                yield run_dir.name, code


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _where(store: Path, theirs: Code) -> str:
    """In words, which modules differ from the version `theirs`, if the store has a copy of its code."""
    found = None
    for folder in sorted((store / ".code").glob("*/")) if theirs.sha256 else ():
        found = found or source.differing(folder, str(theirs.sha256))
    return f"; of what decides an outcome {some(found) if found else 'some modules'} differ"
