"""Several stores as one: each run once, and stores that contradict each other refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from planted import ABOUT, write_config, write_run, write_sweep

from analysis.logs.columns import loss_unit
from analysis.logs.learning import DIVERGED
from analysis.logs.merge import load_all
from analysis.logs.record import sealed
from analysis.logs.store import Store, freeze, load
from analysis.logs.writer import RunLog
from experiments.cli.main import main


@pytest.fixture
def halves(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A sweep, and the same runs in two stores that share one run."""
    whole = write_sweep(tmp_path / "whole", {"dyn": 1.3}, sizes=3, seeds=2)
    parts = [tmp_path / "a", tmp_path / "b"]
    for number, run_dir in enumerate(sorted(whole.iterdir())):
        for place, part in enumerate(parts):
            if number == 0 or number % 2 == place:
                shutil.copytree(run_dir, part / run_dir.name)
    return whole, parts


def test_stores_are_read_as_one_with_each_run_once(halves: tuple[Path, list[Path]], tmp_path: Path) -> None:
    whole, parts = halves
    merged, one = load_all(parts), load(whole)

    def ordered(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.sort_values(["run_id", *(["step"] if "step" in frame else [])]).reset_index(drop=True)

    pd.testing.assert_frame_equal(ordered(merged.runs), ordered(one.runs))
    pd.testing.assert_frame_equal(ordered(merged.steps()), ordered(one.steps()))
    pd.testing.assert_frame_equal(ordered(merged.evals()), ordered(one.evals()))
    assert merged.arguments == [str(part) for part in parts]
    freeze(merged, tmp_path / "frozen", steps=True)
    pd.testing.assert_frame_equal(load(tmp_path / "frozen").runs, merged.runs)
    pd.testing.assert_frame_equal(ordered(load_all([tmp_path / "frozen", whole]).runs), ordered(one.runs))
    with pytest.raises(ValueError, match="is a live store that holds"):
        freeze(merged, parts[1])


def test_a_run_that_differs_between_stores_is_refused_by_name(halves: tuple[Path, list[Path]]) -> None:
    _, parts = halves
    run_dir = min(parts[1].iterdir())
    path = run_dir / "run.json"
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | {"loss": 9.0})))
    with pytest.raises(
        ValueError, match=rf"run {run_dir.name} is in .*a and in .*b and differs in loss \(loss is .* and 9.0\)"
    ):
        load_all(parts)
    with pytest.raises(ValueError, match="is given twice"):
        load_all([parts[0], parts[0]])


def _losses(store: Store) -> dict[str, float]:
    return dict(zip(store.runs["run_id"], store.runs["loss"], strict=True))


def test_a_run_that_was_cut_short_in_one_store_counts_as_in_the_other(
    halves: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """Sessions on a borrowed machine end when they end: a run cut at the end of one is trained in the next."""
    whole, parts = halves
    cut = min(parts[0].iterdir()).name
    (parts[0] / cut / "run.json").unlink()
    for part in parts:
        freeze(load(part), tmp_path / "frozen" / part.name)
    for stores in (parts, parts[::-1], sorted((tmp_path / "frozen").iterdir())):
        merged = load_all(stores)
        assert _losses(merged) == _losses(load(whole))
        less, more = sorted(stores, key=lambda store: store.name)
        assert merged.problems[0] == f"cut short in {less}, these count as in {more}: {cut}"
        assert len(merged.evals()) == len(load(whole).evals())
    (parts[1] / cut / "run.json").unlink()
    assert load_all(parts).runs.set_index("run_id")["status"][cut] == "unfinished"
    (parts[0] / cut / "run.json").write_text((whole / cut / "run.json").read_text())
    shutil.rmtree(parts[1] / cut)
    write_run(write_config(parts[1], arm="dyn", seed=7), 3.0)
    failed = write_config(parts[0], arm="dyn", seed=7)
    RunLog(failed, attempt=1, first_step=1, about=ABOUT).fail(1, f"{DIVERGED}: inf")
    with pytest.raises(ValueError, match=r"run dyn-1M-7 is in .*a and in .*b and differs in loss"):
        load_all(parts)


def test_tables_of_points_merge_with_stores_and_keep_their_rows_apart(tmp_path: Path) -> None:
    write_run(write_config(tmp_path / "live", seed=0), 3.0)
    (tmp_path / "p.csv").write_text("arm,size,N,D,loss,note\na,1M,1e6,2e7,3.5,x\n")
    (tmp_path / "q.csv").write_text("arm,size,N,D,loss,note\nb,1M,1e6,2e7.5,3.4,1\n".replace("2e7.5", "20000000.5"))
    store = load_all([tmp_path / "live", tmp_path / "p.csv", tmp_path / "q.csv"], {"arm": "arm"})
    assert store.runs["run_id"].tolist() == [
        "transformer-1M-0",
        f"{tmp_path / 'p.csv'} row 1",
        f"{tmp_path / 'q.csv'} row 1",
    ]
    assert store.runs["tokens"].tolist() == [2e7, 2e7, 20000000.5]
    assert store.runs["note"].tolist()[1:] == ["x", "1"]
    assert store.arguments[-2:] == ["--columns", "arm=arm"]
    assert loss_unit(store.runs) == "nats/token"
    (tmp_path / "q.csv").write_text("arm,size,N,D,loss,loss_unit\nb,1M,1e6,2e7,1,bits/byte\n")
    with pytest.raises(ValueError, match=r"several units \(nats/token in .*p.csv, bits/byte in .*q.csv\)"):
        load_all([tmp_path / "p.csv", tmp_path / "q.csv"])
    (tmp_path / "other").mkdir()
    write_run(write_config(tmp_path / "other", seed=1), 3.0)
    with pytest.raises(ValueError, match="all of these are directories"):
        load_all([tmp_path / "live", tmp_path / "other"], {"N": "n"})


def test_every_reading_verb_takes_several_stores(
    halves: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = halves

    def answers(verb: str, *more: str) -> list[Any]:
        found = []
        for stores in ([whole], parts):
            assert main([verb, *map(str, stores), *more, "--json"]) == 0
            found.append(json.loads(capsys.readouterr().out))
        return found

    one, merged = answers("table")
    assert merged == one
    one, merged = answers("query", "select count(*) as n, max(loss) as most from runs")
    assert merged == one
    one, merged = answers("fit", "--bootstrap", "0", "--starts", "50")
    assert merged["E"] == pytest.approx(one["E"], rel=1e-6)
    for verb, out in {"plot": "figures", "report": "report.html", "freeze": "frozen"}.items():
        assert main([verb, *map(str, parts), "-o", str(tmp_path / out)]) == 0
    assert main(["power", *map(str, parts), "--seeds", "1", "--simulations", "100", "--json"]) == 0
    assert main(["power", "experiments/sweeps/demo.toml", str(parts[0])]) == 2
    assert "is a whole design; give it alone" in capsys.readouterr().err


def test_freezing_stores_of_two_machines_tells_their_devices(
    halves: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = halves
    assert main(["freeze", str(whole), "-o", str(tmp_path / "one")]) == 0
    assert capsys.readouterr().err == "dynconv: froze 12 runs: 12 complete\n"
    shutil.rmtree(min(parts[1].iterdir()))  # the run that both have
    for run_dir in parts[1].iterdir():
        path = run_dir / "run.json"
        path.write_text(json.dumps(sealed(json.loads(path.read_text()) | {"device": "NVIDIA H200"})))
    assert main(["freeze", *map(str, parts), "-o", str(tmp_path / "both")]) == 0
    err = capsys.readouterr().err
    assert "the runs are of several devices: NVIDIA H200 (6 runs), cpu (6 runs); `dynconv table` names" in err
    assert set(load(tmp_path / "both").runs["device"]) == {"cpu", "NVIDIA H200"}
    (run_dir / "run.json").unlink()
    assert main(["freeze", *map(str, parts), "-o", str(tmp_path / "cut")]) == 0
    assert "dynconv: froze 12 runs: 11 complete, 1 unfinished\n" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["freeze", "plot"])
def test_an_empty_name_is_not_the_working_folder(
    verb: str,
    halves: tuple[Path, list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="2"):
        main([verb, str(halves[0]), "-o", ""])
    assert "argument -o/--output: got an empty name; name a folder, or . for this one" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
