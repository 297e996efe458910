"""Stores that schema 1 of the log wrote stay readable, live and frozen; nothing is submitted into one."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from planted import ABOUT, write_config

from analysis.logs.reader import read_rows
from analysis.logs.schema import RUN_COLUMNS, axis_columns, fact_columns
from analysis.logs.store import freeze, load
from analysis.logs.writer import RunLog

OLD_EVALS = {
    "attempt": pa.int64(),
    "step": pa.int64(),
    "tokens": pa.int64(),
    "loss": pa.float64(),
    "bits_per_byte": pa.float64(),
    "seconds": pa.float64(),
}
OLD_STEPS = {
    **{name: pa.int64() for name in ("attempt", "step", "tokens")},
    **{name: pa.float64() for name in ("loss", "gradient_norm", "learning_rate", "seconds")},
}
CONV = {"kind": "lowrank", "sites": ["q", "k", "v"], "width": 4, "rank": 16, "head_size": 16, "residual": True}
OLD_COLUMNS = [
    *("run_id", "sweep", "arm", "size", "seed", "baseline", "parameters", "parameters_nonembedding", "tokens"),
    *("flops_exact", "flops_6nd", "flops_6n_nonemb_d"),
    *("kind", "site", "width", "rank", "head_size", "residual", "static_filter", "qk_norm", "kv_heads"),
    *("loss", "bits_per_byte", "steps", "attempts", "queue_seconds", "startup_seconds", "compile_seconds"),
    *("train_seconds", "eval_seconds", "checkpoint_seconds", "lost_seconds", "tokens_per_second"),
    *("device", "gpus", "dtype", "torch", "code_commit", "data_sha256", "tokenizer_sha256", "status"),
]


def write_old_config(store: Path, arm: str = "transformer", **conv: object) -> Path:
    """A run directory as schema 1 froze it."""
    model = {"conv": CONV | {"static_filter": True} | conv, "qk_norm": False, "kv_heads": 3}
    run_dir = write_config(store, arm, config={"model": model})
    config = json.loads((run_dir / "config.json").read_text())
    added = ("budget", "task", "trunk", "parameters_active", "flops_6nactive_d", "facts", "vary")
    old = {key: value for key, value in config.items() if key not in added} | {"schema": 1}
    (run_dir / "config.json").write_text(json.dumps(old))
    return run_dir


def write_old_run(run_dir: Path, loss: float, devices: tuple[str, ...] = ("cpu",)) -> None:
    """A complete run as schema 1 logged it: the device in run.json is the last attempt's."""
    config = json.loads((run_dir / "config.json").read_text())
    rows = [[1, 2, 100, loss + 1, None, 0.5], [1, 4, 200, loss, loss / 2, 0.25]]
    old_table(OLD_EVALS, rows, run_dir / "evals.parquet")
    old_table(OLD_STEPS, [[1, step, 50 * step, 5.0, 1.0, 0.1, 0.2] for step in range(1, 5)], run_dir / "steps.parquet")
    for number, device in enumerate(devices, 1):
        attempt = {"attempt": number, "first_step": 1, "step": 4, "device": device, "gpus": 1, "dtype": "float32"}
        (run_dir / f"attempt-{number:04d}.json").write_text(json.dumps(attempt | {"torch": "2.13.0"}))
    kept = ("data_dir", "config", "execution", "submitted_at")
    run = {key: value for key, value in config.items() if key not in kept} | {"loss": loss, "bits_per_byte": loss / 2}
    run |= {"steps": 4, "attempts": len(devices), "seconds": {"train": 0.8, "eval": 0.75}}
    run |= {"device": devices[-1], "gpus": 1, "dtype": "float32", "torch": "2.13.0"}
    (run_dir / "run.json").write_text(json.dumps(run))


def old_table(types: dict[str, pa.DataType], rows: list[list[float | None]], path: Path) -> None:
    columns = [pa.array(values, kind) for values, kind in zip(zip(*rows, strict=True), types.values(), strict=True)]
    pq.write_table(pa.table(columns, names=list(types)), path)


def test_an_old_live_store_reads_as_a_new_one(tmp_path: Path) -> None:
    write_old_run(write_old_config(tmp_path, "lowrank-qkv"), 3.0)
    write_old_config(tmp_path, "static", kind="static", sites=["gate", "k"])
    write_old_config(tmp_path, "transformer", kind="none", sites=[])
    write_old_config(tmp_path, "wide", kind="headwise", sites=["up", "q", "k", "v", "o", "gate", "down"])
    store = load(tmp_path)
    assert store.problems == []
    runs = store.runs.set_index("arm")
    run = runs.loc["lowrank-qkv"]
    assert (run["loss"], run["task"], run["parameters_active"], run["flops_6nactive_d"]) == (3.0, "text", 10**6, 1.2e14)
    assert run[["budget", "trunk", "sharing"]].isna().all()
    assert (run["device"], run["gpus"], run["clock"]) == ("cpu", 1, "unknown")
    assert axis_columns(runs) == []
    facts = {
        arm: {name: value for name, value in row.items() if not pd.isna(value)}
        for arm, row in runs[fact_columns(runs)].iterrows()
    }
    every = {"attention.qk_norm": False, "attention.kv_heads": 3}
    width = {"conv.width": 4, "conv.residual": True}
    assert facts == {
        "lowrank-qkv": {
            "conv.kind": "lowrank",
            "conv.sites": "qkv",
            "conv.static_filter": True,
            "conv.rank": 16,
            **width,
            **every,
        },
        "static": {"conv.kind": "static", "conv.sites": "k+gate", **width, **every},
        "transformer": {"conv.kind": "none", **every},
        "wide": {
            "conv.kind": "headwise",
            "conv.sites": "all-linear",
            "conv.static_filter": True,
            "conv.head_size": 16,
            **width,
            **every,
        },
    }


def test_old_evaluations_read_as_a_row_a_metric(tmp_path: Path) -> None:
    run_dir = write_old_config(tmp_path / "live")
    write_old_run(run_dir, 3.0)
    store = load(tmp_path / "live")
    rows = store.evals().drop(columns="run_id").astype("object")
    assert rows.where(rows.notna(), None).values.tolist() == [
        [1, 2, 100, "text", "loss", 4.0, 0.5],
        [1, 4, 200, "text", "loss", 3.0, 0.25],
        [1, 4, 200, "text", "bits_per_byte", 1.5, None],
    ]
    assert store.loss_curves()["loss"].tolist() == [4.0, 3.0]
    assert len(store.steps()) == 4
    (run_dir / "evals.parquet").rename(run_dir / "evals-0001-00001.parquet")  # as a run that is not complete has them
    (run_dir / "run.json").unlink()
    assert read_rows(run_dir, "evals").table["value"].to_pylist() == [4.0, 3.0, 1.5]
    assert load(tmp_path / "live").runs["status"].tolist() == ["unfinished"]


def test_the_device_of_an_old_run_is_that_of_all_its_attempts(tmp_path: Path) -> None:
    write_old_run(write_old_config(tmp_path, "same"), 3.0, ("a", "a"))
    write_old_run(write_old_config(tmp_path, "other"), 3.0, ("a", "b"))
    runs = load(tmp_path).runs.set_index("arm")
    assert (runs.loc["same", "device"], runs.loc["same", "clock"]) == ("a", "unknown")
    assert (pd.isna(runs.loc["other", "device"]), runs.loc["other", "clock"]) == (True, "mixed")


@pytest.mark.parametrize("described", [True, False])
def test_an_old_frozen_store_reads_as_the_live_one(tmp_path: Path, described: bool) -> None:
    """The oldest ones did not describe their arms."""
    write_old_run(write_old_config(tmp_path / "live", "lowrank-qkv"), 3.0)
    write_old_config(tmp_path / "live", "transformer", kind="none", sites=[])
    live = load(tmp_path / "live")
    names = {name.rpartition(".")[2].replace("sites", "site"): name for name in fact_columns(live.runs)}
    old = live.runs.rename(columns={fact: name for name, fact in names.items()}).reindex(columns=OLD_COLUMNS)
    (tmp_path / "frozen").mkdir()
    kept = old if described else old.drop(columns=[*names, "head_size"])
    kept.to_parquet(tmp_path / "frozen" / "runs.parquet")
    evals = pq.read_table(tmp_path / "live" / "lowrank-qkv-1M-0" / "evals.parquet")
    evals = evals.add_column(0, "run_id", pa.array(["lowrank-qkv-1M-0"] * 2))
    pq.write_table(evals, tmp_path / "frozen" / "evals.parquet")
    frozen = load(tmp_path / "frozen")
    assert [problem.partition(" was frozen")[2] for problem in frozen.problems] == [
        " by an older version and does not say which runs did not learn; freeze the live store again"
    ]
    wanted = live.runs[[*RUN_COLUMNS, *(fact_columns(live.runs) if described else [])]].assign(
        gradient_norm=float("nan")
    )
    pd.testing.assert_frame_equal(frozen.runs, wanted, check_like=True)
    pd.testing.assert_frame_equal(frozen.evals(), live.evals())
    freeze(frozen, tmp_path / "again")
    pd.testing.assert_frame_equal(load(tmp_path / "again").runs, frozen.runs, check_like=True)


def test_a_new_log_is_not_written_into_an_old_run(tmp_path: Path) -> None:
    run_dir = write_old_config(tmp_path)
    with pytest.raises(ValueError, match=r"is not of schema 2 \(lacks .*\); submit the sweep into a new store"):
        RunLog(run_dir, attempt=1, first_step=1, about=ABOUT)
