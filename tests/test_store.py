"""Reading stores: live, frozen, and tables of points; what cannot be read is named and left out."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pandas as pd
import pytest
from planted import ABOUT, write_config, write_run

from analysis.logs.schema import ARM_FACTS, RUN_COLUMNS
from analysis.logs.store import freeze, load
from analysis.logs.writer import RunLog


def mixed_store(store: Path) -> Path:
    """A complete, a failed, a cancelled and a running run, beside what is no run."""
    write_run(write_config(store, seed=0), 3.0)
    failed = RunLog(write_config(store, seed=1), attempt=1, first_step=1, about=ABOUT)
    failed.step(1, 10, 9.0, 1.0, 1e-3, 0.1)
    failed.fail(2, "loss is nan")
    (write_config(store, seed=2) / "cancelled").touch()
    write_config(store, seed=3)
    (store / ".jobs").mkdir()
    (store / "notes.txt").write_text("not a run")
    (store / "foreign").mkdir()
    torn = write_config(store, seed=4) / "config.json"
    torn.write_text(torn.read_text()[:50])
    moved = write_config(store, seed=5)
    moved.rename(store / "moved")
    old = write_config(store, seed=6) / "config.json"
    old.write_text(json.dumps(json.loads(old.read_text()) | {"schema": 0}))
    return store


def test_a_live_store_names_what_it_leaves_out_and_keeps_missing_missing(tmp_path: Path) -> None:
    store = load(mixed_store(tmp_path))
    assert store.runs["status"].tolist() == ["complete", "failed", "cancelled", "unfinished"]
    assert [problem.rsplit("; ", 1)[1] for problem in store.problems] == [
        "foreign is left out",
        "moved is left out",
        "transformer-1M-4 is left out",
        "transformer-1M-6 is left out",
    ]
    assert store.runs.dtypes.astype(str).to_dict() == RUN_COLUMNS
    complete, failed = store.runs.iloc[0], store.runs.iloc[1]
    assert (complete["loss"], complete["gpus"], complete["train_seconds"]) == (3.0, 0, pytest.approx(0.04))
    assert failed[["loss", "steps", "device", "train_seconds"]].isna().all()
    assert failed["tokens"] == 20_000_000
    assert store.steps().groupby("run_id").size().to_dict() == {"transformer-1M-0": 4, "transformer-1M-1": 1}
    assert store.evals()[["run_id", "step", "loss"]].values.tolist() == [["transformer-1M-0", 4, 3.0]]


def test_a_frozen_store_reads_as_the_live_one_did(tmp_path: Path) -> None:
    live = load(mixed_store(tmp_path / "live"))
    freeze(live, tmp_path / "frozen", steps=True)
    frozen = load(tmp_path / "frozen")
    pd.testing.assert_frame_equal(frozen.runs, live.runs)
    pd.testing.assert_frame_equal(frozen.steps(), live.steps())
    pd.testing.assert_frame_equal(frozen.evals(), live.evals())
    (tmp_path / "frozen" / "runs.parquet").write_bytes(b"torn")
    with pytest.raises(ValueError, match="unreadable"):
        load(tmp_path / "frozen")


def test_how_an_arm_is_declared_is_read_from_the_frozen_configuration(tmp_path: Path) -> None:
    conv = {"width": 3, "rank": 4, "head_size": 8, "residual": True, "static_filter": False}
    arms: dict[str, dict[str, object]] = {
        "none": {"kind": "none", "sites": []},
        "static": {"kind": "static", "sites": ["v", "q"]},
        "headwise": {"kind": "headwise", "sites": ["gate", "k"]},
        "lowrank": {"kind": "lowrank", "sites": ["q", "k", "v", "o", "gate", "up", "down"]},
    }
    for arm, own in arms.items():
        model = {"conv": conv | own, "qk_norm": True, "kv_heads": 2}
        write_config(tmp_path, arm, config={"model": model})
    write_config(tmp_path, "without", config={"model": {}})
    rows = load(tmp_path).runs.set_index("arm")[list(ARM_FACTS)]
    found = {arm: {name: value for name, value in row.items() if not pd.isna(value)} for arm, row in rows.iterrows()}
    every = {"qk_norm": True, "kv_heads": 2}
    assert found == {
        "none": {"kind": "none", **every},
        "static": {"kind": "static", "site": "qv", "width": 3, "residual": True, **every},
        "headwise": {
            "kind": "headwise",
            "site": "k+gate",
            "width": 3,
            "head_size": 8,
            "residual": True,
            "static_filter": False,
            **every,
        },
        "lowrank": {
            "kind": "lowrank",
            "site": "all-linear",
            "width": 3,
            "rank": 4,
            "residual": True,
            "static_filter": False,
            **every,
        },
        "without": {},
    }


def test_a_store_frozen_before_the_arms_were_described_still_reads(tmp_path: Path) -> None:
    live = load(mixed_store(tmp_path / "live"))
    freeze(live, tmp_path / "frozen")
    path = tmp_path / "frozen" / "runs.parquet"
    live.runs.drop(columns=list(ARM_FACTS)).to_parquet(path)
    assert load(tmp_path / "frozen").runs["site"].isna().all()
    live.runs.drop(columns="loss").to_parquet(path)
    with pytest.raises(ValueError, match="lacks the columns loss; freeze the store again"):
        load(tmp_path / "frozen")


def test_a_store_is_not_frozen_into_itself(tmp_path: Path) -> None:
    live = load(mixed_store(tmp_path))
    with pytest.raises(ValueError, match="is the live store itself"):
        freeze(live, tmp_path / "transformer-1M-0" / "..")


def test_a_named_column_wins_over_one_that_has_its_name_already(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("arm,parameters,C,loss,final\na,6,1e15,9,3.5\n")
    row = load(tmp_path / "p.csv", {"loss": "final"}).runs.iloc[0]
    assert (row["loss"], row["parameters"]) == (3.5, 6)


def test_points_are_read_by_usual_names_or_as_told(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text("Model,N,D,loss\ndense,1e6,2e7,3.5\n")
    row = load(path).runs.iloc[0]
    assert (row["arm"], row["parameters"], row["tokens"], row["loss"]) == ("dense", 1e6, 2e7, 3.5)
    assert row["flops_6nd"] == 6 * 1e6 * 2e7
    assert (row["status"], row["run_id"]) == ("complete", "row 1")
    assert pd.isna(row["size"])
    path.write_text("kind,budget,final\ndense,1e15,3.5\n")
    row = load(path, {"arm": "kind", "C": "budget", "loss": "final"}).runs.iloc[0]
    assert (row["arm"], row["flops_given"], row["loss"]) == ("dense", 1e15, 3.5)
    path.write_text("arm,C,loss,convention\ndense,1e15,3.5,6ND\n")
    assert load(path).runs.iloc[0]["flops_6nd"] == 1e15
    load(path).runs[["arm", "loss"]].to_parquet(tmp_path / "points.parquet")
    assert load(tmp_path / "points.parquet").runs.iloc[0]["loss"] == 3.5


@pytest.mark.parametrize(
    ("name", "text", "columns", "message"),
    [
        ("points.csv", "", {}, "unreadable"),
        ("points.csv", "arm,C,loss\n", {}, "no rows"),
        ("points.csv", "arm,C,loss\na,1,much\n", {}, "column loss must hold numbers"),
        ("points.csv", "arm,C,loss,residual\na,1,2,much\n", {}, "column residual must hold true or false"),
        ("points.csv", "arm,C,loss\na,1,2\n", {"C": "flop"}, "no column 'flop'; it has arm, C, loss"),
        ("points.csv", "arm,C,loss\na,1,2\n", {"Q": "C"}, "no column 'Q' is known"),
        ("points.csv", "arm,C,loss,N\na,1,2,3\n", {"loss": "N", "C": "N"}, "gives column 'N' two names"),
        ("points.csv", "arm,C,loss,convention\na,1,2,guess\n", {}, "no FLOP convention 'guess'"),
        ("points.parquet", "not parquet", {}, "unreadable"),
        ("points.txt", "arm,C,loss\n", {}, r"no table that is read here \(\.csv, \.tsv"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, name: str, text: str, columns: dict[str, str], message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name, columns)


def test_directories_that_hold_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no store at"):
        load(tmp_path / "nothing")
    (tmp_path / "foreign").mkdir()
    with pytest.raises(ValueError, match=r"holds no run .*config.json is missing"):
        load(tmp_path)


def test_a_thousand_runs_of_ten_thousand_steps_load_within_two_seconds(tmp_path: Path) -> None:
    first = write_config(tmp_path, seed=0)
    write_run(first, 3.0, steps=10_000)
    config, run = (json.loads((first / name).read_text()) for name in ("config.json", "run.json"))
    for seed in range(1, 1000):
        run_dir = tmp_path / f"transformer-1M-{seed}"
        run_dir.mkdir()
        own = {"run_id": run_dir.name, "seed": seed}
        (run_dir / "config.json").write_text(json.dumps(config | own))
        (run_dir / "run.json").write_text(json.dumps(run | own))
        for name in ("steps.parquet", "evals.parquet"):
            os.link(first / name, run_dir / name)
    began = time.process_time()
    runs = load(tmp_path).runs
    seconds = time.process_time() - began
    assert len(runs) == 1000
    print(f"read in {seconds:.2f} s")
    assert seconds < 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 3.5}, "steps = 3.5, not a Int64"),
        ({"seconds": 3}, "has seconds 3, not a clock each"),
        ({"loss": "abc"}, "loss = 'abc', not a float64"),
        ({"device": 7}, "device = 7, not a string"),
    ],
)
def test_one_foreign_run_is_named_and_takes_nothing_from_the_others(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    for seed in range(2):
        write_run(write_config(tmp_path, seed=seed), 3.0)
    path = tmp_path / "transformer-1M-1" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    store = load(tmp_path)
    assert list(store.runs["run_id"]) == ["transformer-1M-0"]
    (problem,) = store.problems
    assert message in problem
    assert problem.endswith("transformer-1M-1 is left out")
