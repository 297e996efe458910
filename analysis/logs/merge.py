"""Reads several stores as one, for a study that was trained on several machines or is in several tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.logs.columns import format_columns, loss_unit
from analysis.logs.learning import with_outcome
from analysis.logs.points import run_types
from analysis.logs.schema import LATER_COLUMNS
from analysis.logs.selection import some
from analysis.logs.store import Store, load

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

NULLABLE = {"int64": "Int64", "bool": "boolean", "str": "string"}  # pandas' types that cannot hold a missing cell


@dataclass
class MergedStore(Store):
    """Several stores read as one, each run once."""

    parts: list[Store] = field(default_factory=list)
    owners: list[set[str]] = field(default_factory=list)  # for each part, the ids of the runs that are read from it

    @property
    def paths(self) -> list[Path]:
        return [part.path for part in self.parts]

    @property
    def arguments(self) -> list[str]:
        columns = next((part.columns for part in self.parts if part.columns), {})
        return [*(str(part.path) for part in self.parts), *format_columns(columns), *self._condition]

    def never_recorded(self) -> tuple[str, ...]:
        found = {part.absent: part.path for part in self.parts}
        if len(found) > 1:
            older, newer = max(found, key=len), min(found, key=len)
            has = f"has only no {', '.join(newer)}" if newer else "does"
            raise ValueError(
                f"{found[older]} does not say which of its runs did not learn, and {found[newer]} {has}; freeze them "
                "one by one"
            )
        return next(iter(found))

    def without_steps(self) -> list[Path]:
        return [path for part in self.parts for path in part.without_steps()]

    def rows(self, kind: str) -> pa.Table:
        import pyarrow as pa
        import pyarrow.compute as pc

        tables = []
        for part, owned in zip(self.parts, self.owners, strict=True):
            known = len(part.problems)
            table = part.rows(kind)
            self.problems += part.problems[known:]
            tables.append(table.filter(pc.is_in(table["run_id"], pa.array(sorted(owned), pa.string()))))
        return pa.concat_tables(tables, promote_options="default")


def load_all(paths: Sequence[Path], columns: Mapping[str, str] | None = None) -> Store:
    """Read one store, or several as one: live or frozen ones and tables of points, in any mixture.

    Runs are merged by run_id: a run that is equal in two stores counts once, and one that differs is refused by name.
    A run that was cut short in one store, as at the end of a session on a borrowed machine, and has an outcome in
    another counts as in the other; that is among the `problems`.
    In a table of points without ids, the name of the file becomes part of each row's id. `columns` applies to every
    table of points. Raises ValueError where there is nothing to read, or where stores contradict each other.
    """
    if len(paths) == 1:
        return load(paths[0], columns)
    repeated = next((path for i, path in enumerate(paths) if path.resolve() in [p.resolve() for p in paths[:i]]), None)
    if repeated is not None:
        raise ValueError(f"{repeated} is given twice; give each store once")
    parts = [load(path, columns if path.is_file() or _points_file(path) else None) for path in paths]
    if columns and not any(part.columns for part in parts):
        raise ValueError("--columns renames the columns of a table in a file; all of these are directories")
    units = {loss_unit(part.runs): part.path for part in parts}
    if len(units) > 1:
        listed = ", ".join(f"{unit} in {path}" for unit, path in units.items())
        raise ValueError(f"the losses are in several units ({listed}) and cannot be compared; give stores of one unit")
    for part in parts:
        part.runs = _named_rows(part)
    runs, owners, notes = _union(parts)
    problems = [*notes, *(problem for part in parts for problem in part.problems)]
    run_dirs = [run_dir for part in parts for run_dir in part.run_dirs]
    return MergedStore(paths[0], runs, problems, run_dirs, parts=parts, owners=owners)


def _points_file(path: Path) -> bool:
    return (path / "points.csv").is_file()


def _named_rows(part: Store) -> pd.DataFrame:
    """The runs, with the path of the file added to the ids of rows without one of their own ("row 3")."""
    nameless = part.runs["run_id"].map(lambda name: bool(re.fullmatch(r"row \d+", name)))
    return part.runs.assign(run_id=part.runs["run_id"].mask(nameless, f"{part.path} " + part.runs["run_id"]))


def _union(parts: Sequence[Store]) -> tuple[pd.DataFrame, list[set[str]], list[str]]:
    """The runs of all parts, each once; for each part, the ids of the runs that are read from it; and which runs were
    cut short in one part and have an outcome in another."""
    import pandas as pd

    owner_of, ended = dict[str, int](), [set(part.runs.loc[with_outcome(part.runs), "run_id"]) for part in parts]
    cut = dict[tuple[int, int], list[str]]()  # (the part that has the outcome, the part that does not) -> runs
    for number, part in enumerate(parts):
        for run_id in sorted(set(part.runs["run_id"])):
            other = owner_of.setdefault(run_id, number)
            by_outcome = sorted((other, number), key=lambda each: run_id not in ended[each])
            if run_id in ended[other] and run_id in ended[number]:
                _refuse_differing(run_id, parts[other], part)
            elif run_id in ended[by_outcome[0]]:
                owner_of[run_id] = by_outcome[0]
                cut.setdefault((by_outcome[0], by_outcome[1]), []).append(run_id)
    owners = [{run_id for run_id, owner in owner_of.items() if owner == number} for number in range(len(parts))]
    frames = [part.runs[part.runs["run_id"].isin(owned)] for part, owned in zip(parts, owners, strict=True)]
    names = list(dict.fromkeys(name for frame in frames for name in frame))
    missing = [frame["run_id"].mask(frame["run_id"].notna()) for frame in frames]
    merged = {
        name: _joined([frame.get(name, absent) for frame, absent in zip(frames, missing, strict=True)])
        for name in names
    }
    notes = [
        f"cut short in {parts[less].path}, these count as in {parts[more].path}: {some(ids)}"
        for (more, less), ids in cut.items()
    ]
    return run_types(pd.DataFrame(merged)), owners, notes


def _refuse_differing(run_id: str, one: Store, other: Store) -> None:
    rows = [store.runs[store.runs["run_id"] == run_id].iloc[0] for store in (one, other)]
    shared = [name for name in rows[0].index if name in rows[1].index]
    known = rows[0].notna() & rows[1].notna().reindex(rows[0].index, fill_value=False)
    shared = [name for name in shared if name not in LATER_COLUMNS or known[name]]
    different = [name for name in shared if not _equal(rows[0][name], rows[1][name])]
    if different:
        name = different[0]
        raise ValueError(
            f"run {run_id} is in {one.path} and in {other.path} and differs in {', '.join(different[:3])} "
            f"({name} is {rows[0][name]} and {rows[1][name]}); leave one of them out, or give them ids of their own"
        )


def _equal(one: object, other: object) -> bool:
    import pandas as pd

    missing = [bool(pd.isna(value)) for value in (one, other)]
    return all(missing) or (not any(missing) and bool(one == other))


def _joined(columns: Sequence[pd.Series]) -> pd.Series:
    """Several columns concatenated: of their common type, else as numbers where all are numeric, else as text."""
    import pandas as pd

    cells = [cell for column in columns for cell in column.astype(object).where(column.notna(), None)]
    present = [column for column in columns if column.notna().any()] or [columns[0]]
    types = {NULLABLE.get(str(column.dtype), str(column.dtype)) for column in present}
    if len(types) == 1:
        return pd.Series(cells, dtype=next(iter(types)))
    if types <= {"Int64", "Float64", "float64", "int32", "float32"}:
        return pd.Series(cells, dtype="float64")
    return pd.Series([None if cell is None else str(cell) for cell in cells], dtype="string")
