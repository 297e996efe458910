"""Reading stores: live, frozen, and tables of points; what cannot be read is named and left out."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from planted import ABOUT, write_config, write_run

from analysis.logs.files import read_parquet, write_parquet
from analysis.logs.merge import load_all
from analysis.logs.record import sealed
from analysis.logs.schema import OF_LEARNING, RUN_COLUMNS, fact_columns
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
    facts = {"conv.kind": "string", "attention.qk_norm": "boolean", "attention.kv_heads": "Int64"}
    assert store.runs.dtypes.astype(str).to_dict() == RUN_COLUMNS | facts
    complete, failed = store.runs.iloc[0], store.runs.iloc[1]
    assert (complete["loss"], complete["gpus"], complete["train_seconds"]) == (3.0, 0, pytest.approx(0.04))
    assert failed[["loss", "steps", "device", "train_seconds"]].isna().all()
    assert failed["tokens"] == 20_000_000
    assert store.steps().groupby("run_id").size().to_dict() == {"transformer-1M-0": 4, "transformer-1M-1": 1}
    assert store.evals()[["run_id", "step", "task", "metric", "value"]].values.tolist() == [
        ["transformer-1M-0", 4, "text", "loss", 3.0],
        ["transformer-1M-0", 4, "text", "bits_per_byte", 1.0],
    ]
    assert store.loss_curves().values.tolist() == [["transformer-1M-0", 4, 20_000_000, 3.0]]


def test_a_frozen_store_reads_as_the_live_one_did(tmp_path: Path) -> None:
    live = load(mixed_store(tmp_path / "live"))
    freeze(live, tmp_path / "frozen", steps=True)
    frozen = load(tmp_path / "frozen")
    pd.testing.assert_frame_equal(frozen.runs, live.runs)
    pd.testing.assert_frame_equal(frozen.steps(), live.steps())
    pd.testing.assert_frame_equal(frozen.evals(), live.evals())
    write_run(write_config(tmp_path / "other", seed=8), 3.0)
    with pytest.raises(ValueError, match=r"frozen holds 4 runs that are not among these \(transformer-1M-0, "):
        freeze(load(tmp_path / "other"), tmp_path / "frozen", steps=True)
    write_config(tmp_path / "frozen", seed=9)
    (problem,) = load(tmp_path / "frozen").problems
    assert problem.endswith("is read from its runs.parquet alone: move that away to read its 1 folders")
    twice = pd.concat([live.runs, live.runs.iloc[:1].assign(loss=2.0)])
    twice.to_parquet(tmp_path / "frozen" / "runs.parquet", index=False)
    with pytest.raises(ValueError, match=r"runs\.parquet has transformer-1M-0 more than once, .*; freeze it again"):
        load(tmp_path / "frozen")
    (tmp_path / "frozen" / "runs.parquet").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"runs\.parquet is unreadable .*; freeze the store again"):
        load(tmp_path / "frozen")


def test_a_freeze_loses_no_run_and_no_outcome_of_an_earlier_one(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(write_config(tmp_path / "live", seed=seed), 3.0 + seed)
    frozen, live = tmp_path / "frozen", load(tmp_path / "live")
    freeze(live, frozen)
    before = {path: path.read_bytes() for path in frozen.iterdir()}
    shutil.rmtree(tmp_path / "live" / "transformer-1M-2")
    (tmp_path / "live" / "transformer-1M-1" / "run.json").unlink()
    said = (
        r"frozen holds 1 runs that are not among these \(transformer-1M-2\) and the outcome of 1 runs that have none "
        r"here \(transformer-1M-1\), which would be lost; give .*frozen among the stores, too, or give another -o"
    )
    with pytest.raises(ValueError, match=said):
        freeze(load(tmp_path / "live"), frozen)
    assert {path: path.read_bytes() for path in frozen.iterdir()} == before
    write_run(write_config(tmp_path / "live", seed=3), 6.0)
    freeze(load_all([tmp_path / "live", frozen]), frozen)
    assert load(frozen).runs.set_index("run_id")["loss"].to_dict() == {f"transformer-1M-{s}": 3.0 + s for s in range(4)}
    assert load(frozen).evals()["run_id"].nunique() == 4
    pd.DataFrame({"arm": ["a"]}).to_parquet(frozen / "runs.parquet")
    with pytest.raises(ValueError, match="is no table of frozen runs, and would be overwritten; give another -o"):
        freeze(live, frozen)


def test_steps_are_not_frozen_from_where_there_are_none(tmp_path: Path) -> None:
    write_run(write_config(tmp_path / "live"), 3.0)
    write_run(write_config(tmp_path / "more", seed=1), 3.0)
    freeze(load(tmp_path / "live"), tmp_path / "frozen")
    (tmp_path / "points.csv").write_text("arm,size,C,loss\na,s,1e9,3.0\n")
    for paths in (["frozen"], ["more", "frozen"], ["points.csv"]):
        said = rf"{paths[-1]} keeps no steps of its runs; freeze the live store, or leave --steps out"
        with pytest.raises(ValueError, match=said):
            freeze(load_all([tmp_path / path for path in paths]), tmp_path / "again", steps=True)
    assert not (tmp_path / "again").exists()
    freeze(load_all([tmp_path / "live", tmp_path / "more"]), tmp_path / "frozen", steps=True)
    freeze(load(tmp_path / "frozen"), tmp_path / "again", steps=True)
    assert load(tmp_path / "again").steps()["run_id"].nunique() == 2


def test_logs_of_other_runs_are_named_and_give_no_number(tmp_path: Path) -> None:
    """A file that was copied from another run's folder, or edited, reads as the run's own."""
    for seed in range(3):
        write_run(write_config(tmp_path / "live", seed=seed), 3.0 + seed, gradient_norm=1.0 + seed)
    live = load(tmp_path / "live")
    whole = {kind: live.rows(kind) for kind in ("steps", "evals")}
    freeze(live, tmp_path / "frozen", steps=True)
    assert live.problems == []
    for kind, table in whole.items():
        shutil.copy(*(tmp_path / "live" / f"transformer-1M-{seed}" / f"{kind}.parquet" for seed in (0, 1)))
        at = [place for place, run_id in enumerate(table["run_id"].to_pylist()) if run_id.endswith("-0")]
        copied = table.take(at).set_column(0, "run_id", pa.array(["transformer-1M-1"] * len(at)))
        others = table.filter(pc.not_equal(table["run_id"], "transformer-1M-1"))
        write_parquet(tmp_path / "frozen" / f"{kind}.parquet", pa.concat_tables([copied, others]))
    for store in (load(tmp_path / "live"), load(tmp_path / "frozen")):
        assert set(store.steps()["run_id"]) == set(store.evals()["run_id"]) == {"transformer-1M-0", "transformer-1M-2"}
        of_steps, of_evals = store.problems
        assert of_steps.startswith("the steps of transformer-1M-1 are left out: they end at another gradient_norm than")
        assert of_evals.startswith("the evals of transformer-1M-1 are left out: they end at another loss than run.json")
        assert "(3, and 4), so they were edited, or are of another run" in of_evals


def test_a_finished_run_without_evaluations_is_named(tmp_path: Path) -> None:
    run_dir = write_config(tmp_path)
    write_run(run_dir, 3.0)
    write_parquet(run_dir / "evals.parquet", read_parquet(run_dir / "evals.parquet").slice(0, 0))
    store = load(tmp_path)
    assert store.evals().empty
    (problem,) = store.problems
    assert problem.startswith(f"{run_dir / 'evals.parquet'} has no rows, and its run is complete: copy it again, or")


def test_a_changed_bit_is_named_and_gives_no_number(tmp_path: Path) -> None:
    live = load(mixed_store(tmp_path / "live"))
    freeze(live, tmp_path / "frozen")
    for path in (tmp_path / "live" / "transformer-1M-0" / "evals.parquet", tmp_path / "frozen" / "evals.parquet"):
        content = bytearray(path.read_bytes())
        content[content.index(struct.pack("<2d", 3.0, 1.0)) + 6] ^= 1  # the loss, which would read as 2.5 or so
        path.write_bytes(content)
    assert live.evals().empty
    (problem,) = [problem for problem in live.problems if "evals.parquet is unreadable" in problem]
    assert problem.endswith("left out: copy it again, or remove the run's folder and submit the sweep again")
    with pytest.raises(ValueError, match=r"evals\.parquet is unreadable .*; freeze the store again"):
        load(tmp_path / "frozen").evals()


def test_facts_and_axes_are_columns_that_the_record_brings(tmp_path: Path) -> None:
    """Typed by their values over all runs; a column of no meaning to the analysis is carried all the same."""
    records: list[tuple[dict[str, object], dict[str, object]]] = [
        ({"toy.depth": 3, "toy.gated": True, "train.learning_rate": 1}, {"learning_rate_factor": 1}),
        ({"toy.depth": 4, "toy.name": "b", "train.learning_rate": 0.5}, {"learning_rate_factor": 0.5}),
        ({"toy.mixed": "4"}, {}),
        ({"toy.mixed": 4, "toy.nothing": None}, {"tokens_per_parameter": 20}),
    ]
    for seed, (facts, vary) in enumerate(records):
        write_run(write_config(tmp_path / "live", seed=seed, facts=facts, vary=vary), 3.0)
    live = load(tmp_path / "live")
    assert live.problems == []
    described = live.runs[[name for name in live.runs if name not in RUN_COLUMNS]]
    assert described.dtypes.astype(str).to_dict() == {
        "vary.learning_rate_factor": "float64",
        "vary.tokens_per_parameter": "Int64",
        "toy.depth": "Int64",
        "toy.gated": "boolean",
        "train.learning_rate": "float64",
        "toy.name": "string",
        "toy.mixed": "string",
        "toy.nothing": "string",
    }
    assert fact_columns(live.runs) == [name for name in described if not name.startswith("vary.")]
    rows = described.astype("object").where(described.notna(), None).values.tolist()
    assert rows == [
        [1.0, None, 3, True, 1.0, None, None, None],
        [0.5, None, 4, None, 0.5, "b", None, None],
        [None, None, None, None, None, None, "4", None],
        [None, 20, None, None, None, None, "4", None],
    ]
    freeze(live, tmp_path / "frozen")
    pd.testing.assert_frame_equal(load(tmp_path / "frozen").runs, live.runs)


def test_a_frozen_store_that_lacks_a_column_is_refused(tmp_path: Path) -> None:
    live = load(mixed_store(tmp_path / "live"))
    freeze(live, tmp_path / "frozen")
    live.runs.drop(columns="loss").to_parquet(tmp_path / "frozen" / "runs.parquet")
    with pytest.raises(ValueError, match="lacks the columns loss; freeze the store again"):
        load(tmp_path / "frozen")


@pytest.mark.parametrize(
    ("lacking", "said"), [([], "does"), (["gradient_norm"], "has only no gradient_norm")], ids=["none", "one"]
)
def test_stores_of_several_versions_are_not_frozen_together(tmp_path: Path, lacking: list[str], said: str) -> None:
    live = load(mixed_store(tmp_path / "live"))
    for name, columns in (("old", list(OF_LEARNING)), ("new", lacking)):
        freeze(live, tmp_path / name)
        live.runs.drop(columns=columns).to_parquet(tmp_path / name / "runs.parquet")
    words = f"old does not say which of its runs did not learn, and .*new {said}; freeze them one by one"
    with pytest.raises(ValueError, match=words):
        freeze(load_all([tmp_path / "old", tmp_path / "new"]), tmp_path / "both")


def test_a_store_is_not_frozen_into_itself(tmp_path: Path) -> None:
    live = load(mixed_store(tmp_path))
    with pytest.raises(ValueError, match="is a live store that holds"):
        freeze(live, tmp_path / "transformer-1M-0" / "..")


def test_a_store_is_not_frozen_into_a_live_one_of_other_runs(tmp_path: Path) -> None:
    """It would be read as the frozen one from then on, by every verb."""
    for store, seed in (("mine", 0), ("demo", 1), ("demo", 2)):
        write_run(write_config(tmp_path / store, seed=seed), 3.0)
    said = r"demo is a live store that holds 2 runs, as transformer-1M-1, which runs.parquet would hide; give"
    with pytest.raises(ValueError, match=said):
        freeze(load(tmp_path / "mine"), tmp_path / "demo")
    write_run(write_config(tmp_path / "mine", seed=1), 3.0)  # one of the two
    with pytest.raises(ValueError, match=said):
        freeze(load(tmp_path / "mine"), tmp_path / "demo")
    frozen = tmp_path / "frozen"
    freeze(load(tmp_path / "demo"), frozen)
    with pytest.raises(ValueError, match=said):  # a frozen copy of its own runs, which would hide later ones
        freeze(load(frozen), tmp_path / "demo")
    assert sorted(load(tmp_path / "demo").runs["seed"]) == [1, 2]
    (tmp_path / "shared" / "hf").mkdir(parents=True)
    (tmp_path / "shared" / "hf" / "config.json").write_text('{"model_type": "llama"}')  # an exported model
    freeze(load(tmp_path / "mine"), tmp_path / "shared")


def test_a_store_is_not_frozen_over_a_run_or_beside_points(tmp_path: Path) -> None:
    write_run(write_config(tmp_path / "demo", seed=0), 3.0)
    before = {path: path.read_bytes() for path in (tmp_path / "demo").rglob("*") if path.is_file()}
    (folder,) = {path.parent for path in before if path.name == "config.json"}
    with pytest.raises(ValueError, match="is the folder of a run, whose own logs would be overwritten; give another"):
        freeze(load(tmp_path / "demo"), folder, steps=True)
    assert {path: path.read_bytes() for path in before} == before
    (tmp_path / "points").mkdir()
    (tmp_path / "points" / "points.csv").write_text("N,C,loss\n1,1,1\n")
    with pytest.raises(ValueError, match=r"has a points\.csv, which is read in place of runs\.parquet; give another"):
        freeze(load(tmp_path / "demo"), tmp_path / "points")


def test_a_folder_of_stores_is_no_store(tmp_path: Path) -> None:
    """The advice for a run without its record, to remove the folder, would delete a good store."""
    write_run(write_config(tmp_path / "demo", seed=0), 3.0)
    freeze(load(tmp_path / "demo"), tmp_path / "frozen")
    for paths in ([tmp_path], [tmp_path, tmp_path / "demo"]):
        with pytest.raises(ValueError, match=r"is no store, but holds some \(demo, frozen\); give one of them$"):
            load_all(paths)
    write_run(write_config(tmp_path, seed=1), 3.0)
    store = load(tmp_path)
    assert list(store.runs["run_id"]) == ["transformer-1M-1"]
    of_its_own = [f"{tmp_path / name} is a store of its own; {name} is left out" for name in ("demo", "frozen")]
    assert store.problems == of_its_own


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
    path.write_text(
        "arm,N,N_active,D,lr,conv.width,conv.residual,vary.k,budget\na,9,5,2,0.1,4,True,1,x\nb,9,5,2,1,,,2.5,\n"
    )
    runs = load(path).runs
    assert runs["flops_6nactive_d"].tolist() == [60.0, 60.0]
    assert runs["budget"].tolist() == ["x", pd.NA]
    assert runs[["train.learning_rate", "conv.width", "conv.residual", "vary.k"]].dtypes.astype(str).tolist() == [
        *("float64", "Int64", "boolean", "float64"),
    ]
    assert runs["conv.width"].tolist() == [4, pd.NA]
    path.write_text("arm,C,loss,W\ndense,1e15,3.5,4\n")
    assert load(path, {"conv.width": "W"}).runs["conv.width"].tolist() == [4]
    path.write_text("arm,C,loss,convention\ndense,1e15,3.5,6ND\n")
    load(path).runs[["arm", "loss"]].to_parquet(tmp_path / "points.parquet")
    assert load(tmp_path / "points.parquet").runs.iloc[0]["loss"] == 3.5


@pytest.mark.parametrize(
    ("name", "text", "columns", "message"),
    [
        ("points.csv", "", {}, "is empty; copy it again, or export it again"),
        ("points.csv", "arm,C,loss\n", {}, "no rows"),
        ("points.csv", "arm,C,loss\na,1,much\n", {}, "column loss must hold numbers"),
        ("points.csv", "arm,C,loss\na,1,2\n", {"C": "flop"}, "no column 'flop'; it has arm, C, loss"),
        ("points.csv", "arm,C,loss\na,1,2\n", {"Q": "C"}, "no column 'Q' is known"),
        ("points.csv", "arm,C,loss,N\na,1,2,3\n", {"loss": "N", "C": "N"}, "gives column 'N' two names"),
        ("points.csv", "arm,C,loss,convention\na,1,2,guess\n", {}, "no FLOP convention 'guess'"),
        ("points.parquet", "not parquet", {}, r"unreadable .*; copy it again, or export it again"),
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"facts": {"width": 4}}, "has a fact 'width'; wanted PART.NAME, such as conv.width"),
        ({"facts": {"conv.sites": ["q"]}}, r"has conv.sites = \['q'\], not a string, number or boolean"),
        ({"vary": ["rate"]}, r"has vary = \['rate'\], not a table"),
        ({"budget": 20}, "has budget = 20, not a string"),
        ({"seed": True}, "has seed = True, not a Int64"),
        ({"facts": None}, "has facts = None, not a table"),
    ],
)
def test_a_foreign_record_is_named_and_left_out(tmp_path: Path, change: dict[str, object], message: str) -> None:
    write_config(tmp_path, seed=0)
    path = write_config(tmp_path, seed=1) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    store = load(tmp_path)
    assert list(store.runs["run_id"]) == ["transformer-1M-0"]
    (problem,) = store.problems
    assert re.search(message, problem)


def test_a_result_that_was_edited_is_named_and_left_out(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(write_config(tmp_path, seed=seed), 3.0)
    path = tmp_path / "transformer-1M-1" / "run.json"
    path.write_text(path.read_text().replace('"loss": 3.0', '"loss": 2.0'))
    store = load(tmp_path)
    assert list(store.runs["run_id"]) == ["transformer-1M-0"]
    (problem,) = store.problems
    assert problem.startswith(f"{path} was edited or damaged")


@pytest.mark.parametrize("complete", [False, True])
def test_a_record_that_was_edited_is_named_and_left_out(tmp_path: Path, complete: bool) -> None:
    """By its own checksum; where an older version wrote none, a complete run's by what run.json repeats of it."""
    for seed in range(3):
        run_dir = write_config(tmp_path, seed=seed)
        path = run_dir / "config.json"
        record = json.loads(path.read_text())
        path.write_text(json.dumps(sealed(record)))
        if complete:
            write_run(run_dir, 3.0)
    assert load(tmp_path).problems == []
    for seed, edit in ((1, {"facts": {"conv.kind": "static"}}), (2, {"config": {"train": {"learning_rate": 1.0}}})):
        path = tmp_path / f"transformer-1M-{seed}" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    store = load(tmp_path)
    assert list(store.runs["run_id"]) == ["transformer-1M-0"]
    for seed, problem in zip((1, 2), store.problems, strict=True):
        assert f"transformer-1M-{seed}/config.json was edited or damaged after its run was submitted" in problem
        assert problem.endswith(f"transformer-1M-{seed} is left out")
    for path in tmp_path.glob("*/config.json"):
        path.write_text(
            json.dumps({key: value for key, value in json.loads(path.read_text()).items() if "sha" not in key})
        )
    store = load(tmp_path)
    named = ["config.json has facts = {'conv.kind': 'static'}, and run.json " in each for each in store.problems]
    assert named == ([True] if complete else [])  # run 2 says of itself what it said before


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
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | change)))
    store = load(tmp_path)
    assert list(store.runs["run_id"]) == ["transformer-1M-0"]
    (problem,) = store.problems
    assert message in problem
    assert problem.endswith("transformer-1M-1 is left out")
