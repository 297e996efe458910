"""Reads a live store, a frozen one, or a CSV or Parquet table of points into one table of runs.

Each row is a run. Columns and units are those of `schema.RUN_COLUMNS`, then one column for each declared [vary] axis
and each fact of the runs. Missing values remain missing (NA), never zero. Files that cannot be read are named in
`problems` and left out, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.errors import first_line
from analysis.logs import schema1
from analysis.logs.agreement import without_foreign_rows
from analysis.logs.columns import format_columns
from analysis.logs.files import read_parquet, write_parquet
from analysis.logs.learning import with_outcome
from analysis.logs.points import read_points, run_types
from analysis.logs.reader import read_rows
from analysis.logs.record import read_run, run_table, schema_of
from analysis.logs.schema import COLUMNS, LATER_COLUMNS, OF_LEARNING, RUN_COLUMNS
from analysis.logs.selection import some

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


OLDER = "was frozen by an older version and does not say which runs did not learn; freeze the live store again"


@dataclass
class Store:
    """A store of runs. `runs` is read at once, from small files; steps and evaluations are read on request."""

    path: Path
    runs: pd.DataFrame  # RUN_COLUMNS, axes, facts; of points also flops_given: C as the table gives it
    problems: list[str]
    run_dirs: list[Path] = field(default_factory=list)  # of a live store
    columns: Mapping[str, str] = field(default_factory=dict)  # of a table of points: what --columns said
    where: str | None = None  # the condition that `runs` were chosen by
    absent: tuple[str, ...] = ()  # LATER_COLUMNS that a frozen store has not, so that `runs` has them without a value

    @property
    def paths(self) -> list[Path]:
        """Where the runs were read from: one path, but for stores that were merged."""
        return [self.path]

    @property
    def name(self) -> str:
        """The store in a title."""
        return " + ".join(path.name for path in self.paths)

    @property
    def arguments(self) -> list[str]:
        """How a command line names these runs: the store's paths, --columns where a table's columns were named, and
        --where."""
        return [*map(str, self.paths), *format_columns(self.columns), *self._condition]

    def never_recorded(self) -> tuple[str, ...]:
        """Columns of `runs` that are empty because the stores were frozen before they existed. Raises ValueError where
        that is so of some of several stores."""
        return self.absent

    def without_steps(self) -> list[Path]:
        """Where runs were read from that keeps no steps: a store that was frozen without them, a table of points."""
        return [] if self.run_dirs or (self.path / "steps.parquet").is_file() else [self.path]

    @property
    def _condition(self) -> list[str]:
        return [] if self.where is None else ["--where", self.where]

    def steps(self) -> pd.DataFrame:
        """run_id and the columns of `schema.STEP_COLUMNS`, by run and step."""
        return self.rows("steps").to_pandas()

    def evals(self) -> pd.DataFrame:
        """run_id and the columns of `schema.EVAL_COLUMNS`, by run and step, a row for each metric."""
        return self.rows("evals").to_pandas()

    def loss_curves(self) -> pd.DataFrame:
        """run_id, step, tokens, loss: the held-out loss of each run on its own task, at every evaluation."""
        evals = self.evals().merge(self.runs[["run_id", "task"]], on=["run_id", "task"])
        losses = evals[evals["metric"] == "loss"].rename(columns={"value": "loss"})
        return losses[["run_id", "step", "tokens", "loss"]]

    def rows(self, kind: str) -> pa.Table:
        """The steps or the evals, as Arrow: a thousand runs have ten million steps, which pandas would copy. Those that
        do not end as the results of their run say are left out, and named in `problems`."""
        table, foreign = without_foreign_rows(self.runs, kind, self._rows(kind))
        self.problems += [line for line in foreign if line not in self.problems]
        return table

    def _rows(self, kind: str) -> pa.Table:
        import pyarrow as pa
        from tqdm import tqdm

        frozen = self.path / f"{kind}.parquet"
        if frozen.exists():
            table = _whole(frozen, read_parquet)
            return schema1.upgrade_evals(table) if kind == "evals" else table
        types = [(name, pa.type_for_alias(dtype)) for name, dtype in COLUMNS[kind].items()]
        tables = [pa.schema([("run_id", pa.string()), *types]).empty_table()]
        for run_dir in tqdm(self.run_dirs, desc=kind, delay=2, leave=False):
            found = read_rows(run_dir, kind)
            self.problems += [problem for problem in found.problems if problem not in self.problems]
            tables.append(found.table.add_column(0, "run_id", pa.repeat(run_dir.name, found.table.num_rows)))
        return pa.concat_tables(tables)


def load(path: Path, columns: Mapping[str, str] | None = None) -> Store:
    """Read a live store, a frozen one or a table of points.

    `columns` maps N, D, C, N_nonemb or one of our names to the table's name for it, where that is not a usual one.
    Raises ValueError if there is nothing to read or a necessary file is damaged.
    """
    if (path / "points.csv").is_file():
        path = path / "points.csv"
    if path.is_file():
        runs, notes = read_points(path, columns or {})
        return Store(path, runs, notes, columns=dict(columns or {}))
    if columns and path.is_dir():
        raise ValueError(f"--columns renames the columns of a table in a file; {path} is a directory")
    if not path.is_dir():
        raise ValueError(f"no store at {path}; give a store's directory or a table of points")
    if (path / "config.json").is_file():
        raise ValueError(f"{path} is one run; give its store, {path.parent} (`dynconv status {path}` shows the run)")
    if (path / "runs.parquet").is_file():
        runs, absent = _read_frozen(path / "runs.parquet")
        problems = [f"{path / 'runs.parquet'} {OLDER}"] if absent else []
        if hidden := sum(1 for _ in path.glob("*/config.json")):
            problems.append(f"{path} is read from its runs.parquet alone: move that away to read its {hidden} folders")
        return Store(path, runs, problems, absent=absent)
    return _read_live(path)


def freeze(store: Store, out: Path, steps: bool = False) -> list[Path]:
    """Write runs.parquet and evals.parquet, and steps.parquet on request, into `out`; returns their paths.

    Raises ValueError where `out` is a run's folder, holds live runs or a table of points, would lose frozen runs or
    their outcomes, or would keep the steps of an earlier freeze, and where `steps` are wanted and not there."""
    import pyarrow as pa

    _refuse_live(out)
    if not steps and (out / "steps.parquet").exists():
        raise ValueError(
            f"{out} has steps.parquet of an earlier freeze; freeze with --steps, remove it, or give another -o"
        )
    if steps and (without := store.without_steps()):
        raise ValueError(f"{without[0]} keeps no steps of its runs; freeze the live store, or leave --steps out")
    _refuse_loss(store, out / "runs.parquet")
    out.mkdir(parents=True, exist_ok=True)
    # A column without a value would say that all runs learned, where it is not known.
    runs = store.runs.drop(columns=list(store.never_recorded()))
    tables = {kind: store.rows(kind) for kind in (("evals", "steps") if steps else ("evals",))}
    tables["runs"] = pa.Table.from_pandas(runs, preserve_index=False)
    for name, table in tables.items():
        write_parquet(out / f"{name}.parquet", table)
    return [out / f"{name}.parquet" for name in sorted(tables)]


def _refuse_loss(store: Store, frozen: Path) -> None:
    """Raises ValueError where a run of an earlier freeze would go missing or lose its outcome."""
    if not frozen.exists():
        return
    try:
        there = read_parquet(frozen).to_pandas()
    except (OSError, ValueError):
        return  # it is damaged, and is to be frozen again
    if not {"run_id", "status"} <= set(there.columns):
        raise ValueError(f"{frozen} is no table of frozen runs, and would be overwritten; give another -o")
    missing = there.loc[~there["run_id"].isin(store.runs["run_id"]), "run_id"]
    ended = [set(runs.loc[with_outcome(runs), "run_id"]) for runs in (there, store.runs)]
    cut = sorted(ended[0] - ended[1] - set(missing))
    lost = [f"{len(missing)} runs that are not among these ({some(missing)})"] if len(missing) else []
    lost += [f"the outcome of {len(cut)} runs that have none here ({some(cut)})"] if cut else []
    if lost:
        raise ValueError(
            f"{frozen.parent} holds {' and '.join(lost)}, which would be lost; give {frozen.parent} among the stores, "
            f"too, or give another -o, or remove {frozen.name} there"
        )


def _refuse_live(out: Path) -> None:
    """Raises ValueError where a freeze would overwrite a run's own logs, hide live runs, or be hidden itself."""
    if (out / "config.json").exists() and schema_of(out) is not None:
        raise ValueError(f"{out} is the folder of a run, whose own logs would be overwritten; give another -o")
    if live := sorted(run_dir.name for run_dir in _run_dirs(out)):
        raise ValueError(
            f"{out} is a live store that holds {len(live)} runs, as {live[0]}, which runs.parquet would hide; give "
            "another -o"
        )
    if (out / "points.csv").exists():
        raise ValueError(f"{out} has a points.csv, which is read in place of runs.parquet; give another -o")


def _read_live(path: Path) -> Store:
    problems: list[str] = []
    found = list(_read_runs(path, problems))
    if not found:
        refuse_folder_of_stores(path)
        raise ValueError(
            f"{path} holds no run and no runs.parquet"
            + "".join(f"; {problem}" for problem in problems[:3])
            + "; give the directory that `dynconv submit` or `dynconv freeze` wrote"
        )
    return Store(path, run_table([row for _, row in found]), problems, [run_dir for run_dir, _ in found])


def _read_runs(path: Path, problems: list[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    for run_dir in sorted(path.iterdir()):
        if run_dir.name.startswith(".") or not run_dir.is_dir():
            continue
        if not (run_dir / "config.json").exists() and _is_store(run_dir):
            problems.append(f"{run_dir} is a store of its own; {run_dir.name} is left out")
            continue
        try:
            yield run_dir, read_run(run_dir)
        except ValueError as error:
            problems.append(f"{error}; {run_dir.name} is left out")


def refuse_folder_of_stores(folder: Path) -> None:
    """Raises ValueError for a folder that is no store, but holds some."""
    if stores := sorted(each.name for each in folder.iterdir() if not each.name.startswith(".") and _is_store(each)):
        raise ValueError(f"{folder} is no store, but holds some ({some(stores)}); give one of them")


def _is_store(folder: Path) -> bool:
    """Whether a folder holds runs, a frozen table of them or a table of points."""
    return any((folder / name).is_file() for name in ("runs.parquet", "points.csv")) or any(_run_dirs(folder))


def _run_dirs(folder: Path) -> Iterator[Path]:
    """The folders of runs in a folder. Exported models, which have a config.json of another form, are none."""
    for path in folder.glob("*/config.json"):
        if not path.parent.name.startswith(".") and schema_of(path.parent) is not None:
            yield path.parent


def _read_frozen(path: Path) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """A frozen run table, and which of the columns that say what did not learn an older version froze it without."""
    runs = _whole(path, lambda frozen: read_parquet(frozen).to_pandas())
    if schema1.is_frozen(runs):
        runs = schema1.upgrade_frozen(runs)
    missing = [name for name in RUN_COLUMNS if name not in runs.columns]
    if needed := [name for name in missing if name not in LATER_COLUMNS]:
        raise ValueError(f"{path} lacks the columns {', '.join(needed)}; freeze the store again")
    if len(again := runs.loc[runs["run_id"].duplicated(), "run_id"]):
        raise ValueError(f"{path} has {some(again)} more than once, and a store has each run once; freeze it again")
    return run_types(runs), tuple(name for name in missing if name in OF_LEARNING)


def _whole(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except (OSError, ValueError) as error:  # Arrow's errors are ValueErrors
        raise ValueError(f"{path} is unreadable ({first_line(error)}); freeze the store again") from None
