"""Reads one row of the run table from the JSON files of a run, and builds the table from such rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.logs import schema1
from analysis.logs.files import read_json
from analysis.logs.learning import mark_branches, why_failed, why_not
from analysis.logs.reader import REMEDY, last_gradient_norm, read_attempts, status
from analysis.logs.schema import (
    AXIS_PREFIX,
    CLOCKS,
    IDENTITY,
    RECORDED,
    RUN_COLUMNS,
    SCHEMA,
    axis_columns,
    fact_columns,
    type_of,
)

if TYPE_CHECKING:
    import pandas as pd

CHECKSUM = "record_sha256"
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "Int64": (int,),
    "float64": (int, float),
    "boolean": (bool,),
}


def record_sha256(record: Mapping[str, Any]) -> str:
    """The hash of everything in a config.json or run.json but the hash itself."""
    content = {key: value for key, value in record.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its hash, by which `check_unedited` knows it again."""
    return {**record, CHECKSUM: record_sha256(record)}


def check_unedited(path: Path, record: Mapping[str, Any]) -> None:
    """Raises ValueError where a config.json or run.json is not what we wrote. Those of older versions have no hash."""
    if CHECKSUM in record and record[CHECKSUM] != record_sha256(record):
        raise ValueError(
            f"{path} was edited or damaged after its run was submitted, as its {CHECKSUM} tells; what was trained is "
            "not what it says: restore it, or remove the folder and submit the sweep again"
        )


def schema_of(run_dir: Path) -> int | None:
    """The schema version that a run was submitted with; None where config.json is unreadable or states none."""
    try:
        found = read_json(run_dir / "config.json").get("schema")
    except ValueError:
        return None
    return found if isinstance(found, int) else None


def read_run(run_dir: Path) -> dict[str, Any]:
    """One row of the run table, from config.json and run.json alone. Raises ValueError where they do not have the
    schema of a run."""
    path = run_dir / "config.json"
    record = _read(path)
    config = _current(path, record)
    check_unedited(path, record)
    if config["run_id"] != run_dir.name:
        raise ValueError(f"{path} belongs to run {config['run_id']}")
    row = {key: config.get(key) for key in RECORDED}
    row |= {"vocabulary": vocabulary(config), "status": status(run_dir), "did_not_learn": None}
    if row["status"] == "failed":
        row["did_not_learn"] = why_failed(_read(run_dir / "failure.json"))
    if row["status"] == "complete":
        row |= _results(run_dir, record) | {"vocabulary": row["vocabulary"]}
    for key, value in row.items():
        _check(run_dir, key, value, _TYPES[RUN_COLUMNS[key]], RUN_COLUMNS[key])
    if row["status"] == "complete":
        known: dict[str, Any] = {name: row.get(name) for name in ("loss", "task", "vocabulary", "gradient_norm")}
        row["did_not_learn"] = why_not(**known)
    return row | _described(run_dir, config)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object of a run. Raises ValueError with what to do about a file that is missing or damaged."""
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; {REMEDY}") from None


def vocabulary(config: Mapping[str, Any]) -> int | None:
    """The vocabulary in config.json. Older records have it in the model's configuration alone."""
    if "vocabulary" in config:
        stated: int | None = config["vocabulary"]
        return stated
    whole = config.get("config")
    model = whole.get("model") if isinstance(whole, dict) else None
    found = model.get("vocabulary") if isinstance(model, dict) else None
    return found if isinstance(found, int) else None


def _current(path: Path, record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record with the keys of the current schema. Raises ValueError where keys are missing."""
    config = schema1.upgrade_record(record) if record.get("schema") == schema1.SCHEMA else record
    missing = [key for key in (*IDENTITY, "facts", "vary") if key not in config]
    if missing or config.get("schema") not in (schema1.SCHEMA, SCHEMA):
        raise ValueError(f"{path} is not of schema {SCHEMA} (lacks {', '.join(missing) or 'schema'})")
    return config


def _results(run_dir: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that run.json adds. Raises ValueError where it does not repeat the record in config.json."""
    path = run_dir / "run.json"
    run = _read(path)
    _check_repeated(run_dir, record, run)
    check_unedited(path, run)
    if record["schema"] == schema1.SCHEMA:
        several = run.get("attempts") != 1
        run |= schema1.provenance(run, list(read_attempts(run_dir)[0].values()) if several else [])
    clocks = run.get("seconds", {})
    if not isinstance(clocks, dict):
        raise ValueError(f"{path} has seconds {clocks!r}, not a clock each")
    row = {f"{clock}_seconds": seconds for clock, seconds in clocks.items() if clock in CLOCKS}
    if "gradient_norm" not in run:  # run.json did not always repeat it from the steps
        run["gradient_norm"] = last_gradient_norm(run_dir)
    return row | {key: value for key, value in run.items() if key in RUN_COLUMNS}


def _check_repeated(run_dir: Path, config: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raises ValueError where run.json repeats the record otherwise than config.json has it: one was edited."""
    for key in (*IDENTITY, "facts", "vary", "data_sha256", "tokenizer_sha256"):
        if key in config and key in run and config[key] != run[key]:
            raise ValueError(
                f"{run_dir}: config.json has {key} = {config[key]!r}, and run.json {run[key]!r}; one of the two was "
                "edited after the run was submitted: restore it"
            )


def _described(run_dir: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that differ from run to run: the facts in the record, and its [vary] axes with their prefix."""
    columns: dict[str, Any] = {}
    for kind in ("vary", "facts"):
        if not isinstance(config[kind], dict):
            raise ValueError(f"{run_dir} has {kind} = {config[kind]!r}, not a table of names and values")
        for name, value in config[kind].items():
            column = AXIS_PREFIX + name if kind == "vary" else name
            if kind == "facts" and not fact_columns([name]):
                raise ValueError(f"{run_dir} has a fact {name!r}; wanted PART.NAME, such as conv.width")
            _check(run_dir, column, value, (str, bool, int, float), "string, number or boolean")
            columns[column] = value
    return columns


def _check(run_dir: Path, key: str, value: Any, types: tuple[type, ...], name: str) -> None:
    if value is not None and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
        raise ValueError(f"{run_dir} has {key} = {value!r}, not a {name}")


def run_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows as a table: RUN_COLUMNS, then the [vary] axes, then the facts, in the order in which the rows name them."""
    import pandas as pd

    mark_branches(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    described = {name: typed([row.get(name) for row in rows]) for name in (*axis_columns(names), *fact_columns(names))}
    known = [{name: row.get(name) for name in RUN_COLUMNS} for row in rows]
    table = pd.DataFrame.from_records(known, columns=list(RUN_COLUMNS)).astype(RUN_COLUMNS)
    return pd.concat([table, pd.DataFrame(described, index=table.index)], axis=1)


def typed(values: Iterable[Any]) -> pd.Series:
    """Values of one fact or axis as a column of their common type (`type_of`); None is missing."""
    import pandas as pd

    values = list(values)
    dtype = type_of(values)
    if dtype == "string":  # may also be a mixture of types
        values = [None if value is None else str(value) for value in values]
    return pd.Series(values, dtype="object").astype(dtype)
