"""A run's record, STORE/<run_id>/config.json: `submit` writes it once, and the run reads it whenever it starts."""

import os
import shutil
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.logs.files import read_json, write_atomically, write_json
from analysis.logs.record import check_unedited, sealed
from analysis.logs.schema import SCHEMA
from experiments import source
from experiments.design import strict
from experiments.design.config import TEXT, TRUNK, Execution, RunConfig
from experiments.design.data import text_sha256
from experiments.design.identity import differences, to_dict

if TYPE_CHECKING:
    from experiments.data.dataset import Dataset

TOKENIZER = "tokenizer.json"
TOKENIZERS = ".tokenizers"  # folder of a store with one copy of each tokenizer, which its runs share
_COPY_LOCK = threading.Lock()  # `submit` writes several records at a time.
CELL_KEYS = ("arm", "size", "budget", "seed")  # with task and [vary], these have one configuration in a store
NAME_KEYS = ("run_id", "sweep", "arm", "size", "budget", "seed", "baseline", "trunk", "branch_step")


def write_record(
    run: RunConfig,
    store: Path,
    dataset: "Dataset | None",  # None: the task is generated
    execution: Execution,
    *,
    code_commit: str | None,
    submitted_at: float,  # unix seconds
    forecast_gpu_hours: float | None = None,  # None: the speed of the devices is not known
) -> Path:
    """Write config.json with everything that a run needs, and for text its tokenizer. Returns the run's directory."""
    record = {
        "schema": SCHEMA,
        **{key: getattr(run, key) for key in NAME_KEYS},
        "task": run.task_name,
        "vocabulary": run.model.vocabulary,
        **asdict(run.counts),
        "tokens_own": run.own_tokens,
        "facts": run.facts(),
        "vary": dict(run.vary),
        "config": to_dict(run),
        "execution": asdict(execution),
        "data_dir": None if dataset is None else str(dataset.path),
        "data_sha256": data_sha256(run, dataset),
        "tokenizer_sha256": None if dataset is None else dataset.tokenizer_sha256,
        "code_commit": code_commit,
        "code_sha256": source.code_sha256(),
        "submitted_at": submitted_at,
        "forecast_gpu_hours": forecast_gpu_hours,
    }
    if run.packed:
        assert dataset is not None, "only text has documents"
        record["within_documents"] = _within_documents(dataset, run.train.sequence_length)
    run_dir = store / run.run_id
    run_dir.mkdir(parents=True, exist_ok=True)
    if dataset is not None:
        _add_tokenizer(dataset, run_dir)
    write_json(run_dir / "config.json", sealed(record))
    return run_dir


def _add_tokenizer(dataset: "Dataset", run_dir: Path) -> None:
    """Link the store's copy of the tokenizer into the run's directory, or copy it if the file system has no hard links.

    Copies would be slow: a sweep may have thousands of runs that share a tokenizer of megabytes.
    """
    shared = run_dir.parent / TOKENIZERS / f"{dataset.tokenizer_sha256}.json"
    with _COPY_LOCK:
        if not shared.exists():
            shared.parent.mkdir(exist_ok=True)
            write_atomically(shared, lambda temporary: shutil.copyfile(dataset.path / TOKENIZER, temporary))
    target = run_dir / TOKENIZER
    target.unlink(missing_ok=True)
    try:
        os.link(shared, target)
    except OSError:
        write_atomically(target, lambda temporary: shutil.copyfile(shared, temporary))


def _within_documents(dataset: "Dataset", sequence_length: int) -> dict[str, float]:
    from experiments.data.packing import share_within_documents

    return share_within_documents(dataset, sequence_length)._asdict()


def read_record(run_dir: Path) -> tuple[dict[str, Any], RunConfig, Execution]:
    """(record as stored, run, execution) of a run. Raises ValueError if the record was edited after the submission."""
    path = run_dir / "config.json"
    record = read_json(path)
    run = strict.parse(record["config"], RunConfig, f"{path}: config")
    if not run.run_id == record["run_id"] == run_dir.name:
        raise ValueError(
            f"{path} describes run {run.run_id}; wanted {run_dir.name}, as its folder is named; "
            "it was edited after it was submitted: restore it, or remove the folder and submit the sweep again"
        )
    check_unedited(path, record)
    return record, run, recorded_execution(record, path)


def recorded_execution(record: Mapping[str, Any], path: Path) -> Execution:
    """How the run of this record is executed. Old records have no key `fused`, and their runs were not fused."""
    return strict.parse({"fused": False, **record["execution"]}, Execution, f"{path}: execution")


def data_sha256(run: RunConfig, dataset: "Dataset | None") -> str:
    """The content hash of a run's data: of its dataset, or of its generator and the generator's settings."""
    if dataset is not None:
        return text_sha256(dataset.sha256, run.packed)
    assert run.task is not None, "a run has a dataset or a generated task"
    return run.task.sha256


def check_store(runs: Iterable[RunConfig], store: Path, data_sha256: str, tokenizer_sha256: str | None = None) -> None:
    """Raises ValueError if the store holds runs that cannot be compared with the new ones, which share one task.

    These are runs of the same task on other data, and runs of the same arm, size, budget, seed, task and point of
    [vary] that have another configuration.
    """
    runs = list(runs)
    tasks = {run.task_name for run in runs}
    new = [run for run in runs if run.budget != TRUNK]  # Trunks are left out, since no table shows them.
    cells = {
        _cell({name: getattr(run, name) for name in (*CELL_KEYS, "vary")} | {"task": run.task_name}): run for run in new
    }
    for path in sorted(store.glob("*/config.json")):
        try:
            record = read_json(path)
            other = cells.get(_cell(record))
            its_id, its_data, its_config = record["run_id"], str(record["data_sha256"]), record["config"]
            its_task, its_tokenizer = record.get("task", TEXT), str(record.get("tokenizer_sha256"))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # This file is not a run's record; `status` reports it.
        if its_task in tasks and its_data != data_sha256:
            tokenizers = ""
            if tokenizer_sha256 is not None and its_tokenizer != tokenizer_sha256:
                tokenizers = f" (tokenizer {its_tokenizer[:12]} there, {tokenizer_sha256[:12]} now)"
            raise ValueError(
                f"{path.parent.name} in {store} was submitted with data {its_data[:12]}; the data is now "
                f"{data_sha256[:12]}{tokenizers}; restore it, or submit to another store: runs on different data "
                "cannot be compared"
            )
        if other is not None and other.run_id != its_id:
            changed = differences(its_config, to_dict(other))
            what = "; ".join(f"{key}: {old} there, {new} now" for key, (old, new) in list(changed.items())[:4])
            raise ValueError(
                f"{store} holds {its_id}, another configuration of {other.arm} {other.size} seed "
                f"{other.seed} at {other.budget} ({what}); make what differs an axis in [vary], or submit to "
                "another store"
            )


def submitted_otherwise(runs: Iterable[RunConfig], store: Path) -> list[str]:
    """Warnings about runs in the store whose record differs from the sweep in settings that a run's id leaves out.

    A run's id leaves out the place of its text, the baseline, the name of its budget, the axes of [vary] and when to
    evaluate. A complete run stays as it was submitted. `check_store` compares the content of text, but is only called
    when there is a run to submit.
    """
    found: dict[str, list[str]] = {}  # key of a setting -> how each run that differs in it was submitted
    for run in runs:
        try:
            its, now = read_json(store / run.run_id / "config.json")["config"], to_dict(run)
            changed = {key: (its.get(key), now[key]) for key in ("baseline", "budget", "vary")}
            changed["train.evaluate_every"] = (its["train"].get("evaluate_every"), now["train"]["evaluate_every"])
            if not (store / run.run_id / "run.json").exists():
                changed = {}  # Submitting an incomplete run again rewrites its record.
            text = ("source", "validation_source", "pretokenized", "tokenizer") if run.data is not None else ()
            changed |= {f"data.{key}": (its["data"].get(key), now["data"][key]) for key in text}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not submitted yet, or not a run's record, which `status` reports
        for key, (old, new) in changed.items():
            if old != new:
                found.setdefault(key, []).append(f"{key} = {old!r}, which is {new!r} in the sweep now")
    what_then = {
        True: "their text is compared with it only when a run is submitted; if it is other text, use another --store",
        False: "they stay as they were submitted; for runs of their own, use another --store",
    }
    return [
        f"{len(unlike)} runs in {store} were submitted with {unlike[0]}{' (and others)' * (len(set(unlike)) > 1)}: "
        + what_then[key.startswith("data.")]
        for key, unlike in found.items()
    ]


def _cell(record: dict[str, Any]) -> tuple[Any, ...]:
    """The values that may have only one configuration in a store: task, CELL_KEYS and the point of [vary]."""
    return (record.get("task", TEXT), *(record[name] for name in CELL_KEYS), *sorted(record["vary"].items()))
