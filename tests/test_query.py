"""SQL over a store, filters and groups."""

from __future__ import annotations

import json

import pytest
from planted import write_config, write_sweep

from analysis.query import chosen, grouped, sql
from analysis.store import Store, load
from experiments.cli import main


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = write_sweep(tmp_path_factory.mktemp("query") / "sweep", {"dyn": 1.33}, sizes=4, seeds=2)
    write_config(path, "dyn", "s9")
    return load(path)


def test_sql_sees_the_four_views(store: Store) -> None:
    columns, rows = sql(store, "select arm, count(*) as n, avg(loss) from runs group by arm order by arm")
    assert columns[:2] == ["arm", "n"]
    assert [row[:2] for row in rows] == [("dyn", 9), ("transformer", 8)]
    assert sql(store, "SELECT count(*), max(step) FROM steps")[1] == [(16 * 4, 4)]
    joined = "select count(*) from evals e join runs r using (run_id) where abs(e.loss - r.loss) < 1e-12"
    assert sql(store, joined)[1] == [(16,)]
    ((m, low, high),) = sql(store, "select m, ci_low, ci_high from multipliers where arm = 'dyn'")[1]
    assert low < m < high


def test_a_wrong_query_is_the_users_mistake(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="the views are runs, steps, evals, multipliers"):
        sql(store, "select nothing from runs")
    assert main(["query", str(store.path), "selec 1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_null_is_null_in_json_and_empty_in_csv(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    query = "select run_id, loss, gpus from runs where status = 'unfinished'"
    main(["query", str(store.path), query, "--json"])
    assert json.loads(capsys.readouterr().out) == [{"run_id": "dyn-s9-0", "loss": None, "gpus": None}]
    main(["query", str(store.path), query, "--format", "csv"])
    assert capsys.readouterr().out == "run_id,loss,gpus\ndyn-s9-0,,\n"


def test_filters_and_groups(store: Store) -> None:
    columns, rows = grouped(chosen(store.runs, 'size == "s1"'), ["arm", "size"])
    assert columns == ["arm", "size", "runs", "loss", "loss_sd", "tokens_per_second", "train_hours"]
    mine = store.runs[(store.runs["size"] == "s1") & (store.runs["arm"] == "dyn")]["loss"]
    dyn = next(row for row in rows if row[0] == "dyn")
    assert dyn[1:5] == ("s1", 2, pytest.approx(mine.mean()), pytest.approx(mine.std()))
    with pytest.raises(ValueError, match="leaves no row of 17"):
        chosen(store.runs, "loss > 99")
    with pytest.raises(ValueError, match="name 'los' is not defined"):
        chosen(store.runs, "los > 99")
    with pytest.raises(ValueError, match="no column 'site'"):
        grouped(store.runs, ["site"])
