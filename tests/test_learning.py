"""Runs that did not learn are named and counted, enter no fit, and keep their arm from being resolved."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted import ABOUT, E, best_size, write_config, write_points, write_run, write_sweep

from analysis.advantage.answers import Multiplier
from analysis.advantage.multiplier import multipliers
from analysis.laws.powerlaw import fit
from analysis.logs.files import read_json, write_json
from analysis.logs.learning import DIVERGED, unlearned, why_not
from analysis.logs.merge import load_all
from analysis.logs.record import sealed
from analysis.logs.selection import finished
from analysis.logs.store import Store, freeze, load
from analysis.logs.writer import RunLog
from analysis.pages.drawing import fit_points
from analysis.pages.query import grouped, sql
from analysis.pages.tables import multiplier_table
from experiments.cli.main import main
from experiments.training.trainer import NonFiniteLoss

VOCABULARY = 512
GUESS = math.log(VOCABULARY)


def fail(run_dir: Path, how: str) -> None:
    """Log the run anew, as one that did not learn."""
    config = read_json(run_dir / "config.json")
    for path in [*run_dir.glob("*.parquet"), *run_dir.glob("attempt-*.json"), run_dir / "run.json"]:
        path.unlink(missing_ok=True)
    if how == "diverged":
        log = RunLog(run_dir, attempt=1, first_step=1, about=ABOUT)
        log.step(1, 10, 9.0, 1.0, 1e-3, 0.1)
        log.fail(2, f"{DIVERGED}: loss nan, gradient norm nan, learning rate 0.001")
        return
    loss = {"zero gradient": 3.0, "guess": GUESS + 0.01}[how]
    write_run(run_dir, loss, tokens=config["tokens"], gradient_norm=0.0 if how == "zero gradient" else 1.0)


def planted(store: Path, how: str = "guess", runs: Iterable[str] = (), **sweep: int) -> Store:
    """Four sizes and three seeds of a baseline and of "dyn", whose m is 1.5; the named runs did not learn."""
    write_sweep(store, {"dyn": 1.5}, **({"sizes": 4, "seeds": 3} | sweep), noise=1e-4)
    for path in store.glob("*/config.json"):
        write_json(path, read_json(path) | {"vocabulary": VOCABULARY})
    for path in store.glob("*/run.json"):
        write_json(path, sealed(read_json(path) | {"vocabulary": VOCABULARY}))
    for name in runs:
        fail(store / name, how)
    return load(store)


def answer(store: Store) -> Multiplier:
    (found,), refused = multipliers(store.runs, resamples=99)
    assert refused == []
    return found


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ({"loss": 3.0}, None),
        ({"loss": GUESS - 0.01}, None),
        ({"loss": GUESS - 0.0005}, "not below that of a guess, ln 512 = 6.238"),
        ({"loss": GUESS + 2}, "not below that of a guess"),
        ({"loss": GUESS, "task": "mqar"}, None),  # where chance is a result
        ({"loss": GUESS, "vocabulary": None}, None),
        ({"loss": GUESS / math.log(2), "unit": math.log(2)}, "its loss of 6.238 nats is not below"),
        ({"loss": GUESS, "unit": math.log(2)}, None),
        ({"loss": 3.0, "gradient_norm": 0.0}, "its gradient is exactly zero"),
        ({"loss": 3.0, "gradient_norm": 1e-30}, None),
        ({"loss": 0.0, "gradient_norm": 0.0, "task": "mqar"}, None),  # solved
        ({"loss": None, "gradient_norm": None}, None),
    ],
)
def test_what_counts_as_not_learning(known: dict[str, object], reason: str | None) -> None:
    found = why_not(**({"task": "text", "vocabulary": VOCABULARY, "gradient_norm": 1.0} | known))  # type: ignore[arg-type]
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_the_trainer_raises_what_the_log_calls_divergence() -> None:
    assert NonFiniteLoss.__name__ == DIVERGED


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("zero gradient", "its gradient is exactly zero"),
        ("guess", "its loss of 6.248 nats is not below that of a guess, ln 512 = 6.238"),
        ("diverged", "it diverged at step 2"),
    ],
)
def test_one_seed_of_three_keeps_its_arm_from_being_resolved(tmp_path: Path, how: str, reason: str) -> None:
    """The estimate is that of the runs that learned; the table names the run and counts it."""
    good = answer(planted(tmp_path / "good"))
    assert not good.status.startswith("not resolved")
    assert good.ci is not None
    assert good.ci[0] > 1
    store = planted(tmp_path / "live", how, ["dyn-s1-2"])
    assert store.runs.set_index("run_id")["did_not_learn"].dropna().to_dict() == {"dyn-s1-2": reason}
    found = answer(store)
    remark = "1 of 3 runs of dyn at s1 did not learn"
    assert found.status == "; ".join([f"not resolved: {remark}", *([] if good.status == "ok" else [good.status])])
    assert found.wall_clock is not None
    assert found.wall_clock.status.startswith(f"not resolved: {remark}")
    (failed,) = found.did_not_learn
    assert (failed.arm, failed.runs, failed.of, failed.run_ids) == ("dyn", 1, 12, ("dyn-s1-2",))
    reasons = {item.run_id: item.reason for item in found.excluded}
    assert reasons["dyn-s1-2"] == f"did not learn: {reason}"
    assert reasons["transformer-s1-2"] == "no partner of the same size and seed in dyn"
    text = multiplier_table([found])
    assert re_row(text, "dyn")["did not learn"] == "1 of 12"
    assert re_row(text, "dyn")["status"].startswith("not resolved [1")
    assert f"[1] {remark}" in text
    assert f"dyn-s1-2 (did not learn: {reason})" in text
    assert "did not learn" not in multiplier_table([good])
    shutil.rmtree(tmp_path / "live" / "dyn-s1-2")
    without = answer(load(tmp_path / "live"))
    assert (found.m, found.ci, found.n_seeds) == (without.m, without.ci, 2)


def re_row(text: str, arm: str) -> dict[str, str]:
    """The cells of one arm's row of the first Markdown table."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n\n")[0].splitlines()]
    return next(dict(zip(lines[0], line, strict=True)) for line in lines if line[0] == arm)


def test_a_frozen_store_and_an_old_one_tell_the_same(tmp_path: Path) -> None:
    """Logs that were written before run.json had the last gradient norm, and records without a vocabulary, too."""
    store = planted(tmp_path / "live", "zero gradient", ["dyn-s0-0"], sizes=2, seeds=1)
    fail(tmp_path / "live" / "dyn-s1-0", "guess")
    store = load(tmp_path / "live")
    reasons = store.runs["did_not_learn"]
    assert reasons.notna().sum() == 2
    freeze(store, tmp_path / "frozen")
    pd.testing.assert_frame_equal(load(tmp_path / "frozen").runs, store.runs)
    newer = ("vocabulary", "gradient_norm", "record_sha256")
    for path in (tmp_path / "live").glob("*/*.json"):
        old = {key: value for key, value in read_json(path).items() if key not in newer}
        if path.name == "config.json":
            old["config"] = {"model": {"vocabulary": VOCABULARY}}
        path.write_text(json.dumps(old))
    pd.testing.assert_frame_equal(load(tmp_path / "live").runs, store.runs)


def test_a_frozen_store_of_an_older_version_says_that_it_does_not_know(tmp_path: Path) -> None:
    live = planted(tmp_path / "live", sizes=2, seeds=1)
    freeze(live, tmp_path / "frozen")
    runs = tmp_path / "frozen" / "runs.parquet"
    old = pd.read_parquet(runs).drop(columns=["did_not_learn", "vocabulary", "gradient_norm"])
    old.to_parquet(runs)
    store = load(tmp_path / "frozen")
    assert store.problems == [
        f"{runs} was frozen by an older version and does not say which runs did not learn; freeze the live store again"
    ]
    assert store.runs["did_not_learn"].isna().all()
    freeze(store, tmp_path / "again")
    assert load(tmp_path / "again").problems == [store.problems[0].replace("frozen/", "again/")]
    merged = load_all([tmp_path / "frozen", tmp_path / "live"])  # what one of the two does not know is no contradiction
    assert len(merged.runs) == len(live.runs)
    with pytest.raises(ValueError, match=r"frozen does not say which of its runs did not learn, and .*live does"):
        freeze(merged, tmp_path / "mixed")


def test_a_baseline_that_fails_resolves_nothing(tmp_path: Path) -> None:
    found = answer(planted(tmp_path, "diverged", ["transformer-s0-1", "transformer-s2-0", "dyn-s2-0"]))
    assert found.status.startswith(
        "not resolved: 1 of 3 runs of dyn at s2 did not learn; "
        "2 of 12 runs of transformer did not learn (1 of 3 at s0, 1 of 3 at s2)"
    )
    assert re_row(multiplier_table([found]), "dyn")["did not learn"] == "1 of 12; 2 of 12 of transformer"
    (row,) = json.loads(multiplier_table([found], "json"))
    assert [(each["arm"], each["runs"], each["of"]) for each in row["did_not_learn"]] == [
        ("dyn", 1, 12),
        ("transformer", 2, 12),
    ]


def test_all_seeds_of_a_size(tmp_path: Path) -> None:
    """The size is left out of the estimate, and the answer says so."""
    found = answer(planted(tmp_path, "guess", [f"dyn-s3-{seed}" for seed in range(3)]))
    assert found.n_sizes == 3
    assert found.status.startswith("not resolved: 3 of 3 runs of dyn at s3 did not learn")


def test_an_arm_that_never_learned_is_refused_by_name(tmp_path: Path) -> None:
    store = planted(tmp_path, "diverged", ["dyn-s0-0", "dyn-s1-0"], sizes=2, seeds=1)
    with pytest.raises(ValueError, match=r"dyn: no run of dyn has finished and learned; 2 of 2 runs of dyn did not"):
        multipliers(store.runs)
    for seed in range(2):
        fail(tmp_path / f"transformer-s{seed}-0", "guess")
    with pytest.raises(ValueError, match=r"none of the runs learned: dyn-s0-0, did not learn: it diverged"):
        finished(load(tmp_path).runs)


def test_too_few_sizes_are_left(tmp_path: Path) -> None:
    store = planted(tmp_path, "guess", ["dyn-s1-0"], sizes=2, seeds=1)
    with pytest.raises(ValueError, match=r"1 paired size .*; 1 of 1 runs of dyn at s1 did not learn"):
        multipliers(store.runs)


def test_a_fit_says_which_runs_it_lacks(tmp_path: Path) -> None:
    store = planted(tmp_path, "guess", ["dyn-s1-2", "dyn-s2-1"], seeds=3)
    points, excluded, _ = fit_points(store, "c", None, None)
    law = fit(points, starts=300, polished=8)
    assert law.status.startswith("2 of 12 runs of dyn did not learn (1 of 3 at s1, 1 of 3 at s2)")
    assert [item.run_id for item in excluded] == ["dyn-s1-2", "dyn-s2-1"]
    assert len(points.loss) == 22
    assert law.parameter("E", "dyn") == pytest.approx(1.7, abs=0.02)


def test_isoflop_laws_and_their_multipliers_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for arm, gain in {"base": 1.0, "dyn": 1.3}.items():
        for compute in (1e18, 1e19, 1e20, 1e21):
            for size in best_size(compute) * np.exp(np.linspace(-1, 1, 7)):
                tokens = compute / 6 / size
                loss = E + (406.4 * size**-0.34 + 410.7 * tokens**-0.28) * gain**-0.15
                rows.append({"arm": arm, "N": size, "D": tokens, "C": compute, "loss": loss, "status": "done"})
    rows[-1] |= {"status": "diverged", "loss": None}
    pd.DataFrame(rows).to_csv(tmp_path / "points.csv", index=False)
    assert main(["isoflop", str(tmp_path / "points.csv"), "--baseline", "base", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    status = {law["arm"]: law["status"] for law in found["laws"]}
    assert status["base"] == "ok"
    assert status["dyn"].startswith("1 of 1 runs of dyn at N = 4.95874e+09 did not learn")
    (item,) = found["multipliers"]
    assert item["status"].startswith("not resolved: 1 of 1 runs of dyn")


def test_a_rate_that_is_too_high_counts_against_nobody(tmp_path: Path) -> None:
    """Each arm is compared at its best rate. A failure at a higher rate does not count, one at the best rate does."""
    sweep = write_sweep(tmp_path, {"dyn": 1.5}, sizes=3, seeds=2, noise=1e-4)
    for path in sorted(sweep.glob("*/config.json")):
        config = read_json(path)
        loss = read_json(path.parent / "run.json")["loss"]
        shutil.rmtree(path.parent)
        for factor, worse in ((0.5, 0.05), (1, 0.0), (2, 0.04), (4, 0.3)):
            run_id = f"{config['run_id']}-{factor:g}"
            vary, facts = {"learning_rate_factor": factor}, {"train.learning_rate": 1e-3 * factor}
            own = {"run_id": run_id, "vary": vary, "facts": facts, "vocabulary": VOCABULARY}
            changes = {key: value for key, value in config.items() if key not in ("arm", "size", "seed")} | own
            run_dir = write_config(sweep, config["arm"], config["size"], config["seed"], **changes)
            write_run(run_dir, loss + worse, tokens=config["tokens"])
    for seed in range(2):
        fail(tmp_path / f"dyn-s1-{seed}-4", "diverged")
    found = answer(load(tmp_path))
    assert found.did_not_learn == ()
    assert "did not learn" not in found.status
    note = "2 runs of dyn at learning rates above its best did not learn, and do not count"
    assert note in found.notes
    assert sum("did not learn" in item.reason for item in found.excluded) == 2
    points, _, lines = fit_points(load(tmp_path), "c", None, None)
    assert points.missing == ()
    assert note in lines
    fail(tmp_path / "dyn-s1-1-1", "diverged")
    found = answer(load(tmp_path))
    assert [(each.arm, each.runs) for each in found.did_not_learn] == [("dyn", 1)]
    assert found.status.startswith("not resolved: 1 of 4 runs of dyn at s1 did not learn")
    assert fit_points(load(tmp_path), "c", None, None)[0].missing


def test_the_branches_of_a_trunk_that_diverged(tmp_path: Path) -> None:
    trunk = write_config(tmp_path, "dyn", "s0", run_id="trunk", budget="trunk")
    fail(trunk, "diverged")
    write_config(tmp_path, "dyn", "s0", trunk="trunk", run_id="branch")
    write_run(write_config(tmp_path, "dyn", "s1"), 3.0)
    runs = load(tmp_path).runs
    assert runs.set_index("run_id")["did_not_learn"].to_dict()["branch"] == "its trunk diverged"
    (failed,) = unlearned(runs).values()
    assert (failed.runs, failed.of) == (1, 2)  # the trunk itself is no result


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_tables_of_points_that_can_tell(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"arm": arm, "N": 10.0**size, "D": 2e9, "seed": seed, "Val Loss": 3.0 + 0.1 / size, "vocab_size": VOCABULARY}
        | {"state": "finished", "grad_norm": 0.5}
        for arm in ("base", "dyn")
        for size in (6, 7, 8)
        for seed in (0, 1)
    ]
    rows[0] |= {"grad_norm": 0.0}
    rows[7] |= {"Val Loss": 6.3}
    rows[9] |= {"state": "Diverged", "Val Loss": None, "grad_norm": None}
    runs = load(write_points(pd.DataFrame(rows), tmp_path / f"points{suffix}")).runs
    assert [text.partition(" of")[0] for text in runs["did_not_learn"].dropna()] == [
        "its gradient is exactly zero",
        "its loss",
        "it diverged",
    ]
    assert list(runs.index[runs["did_not_learn"].notna()]) == [0, 7, 9]
    assert {arm: each.runs for arm, each in unlearned(runs).items()} == {"base": 1, "dyn": 2}
    done, excluded = finished(runs)
    assert (len(done), len(excluded)) == (9, 3)


def test_bits_a_byte_cannot_be_compared_with_the_vocabulary(tmp_path: Path) -> None:
    table = pd.DataFrame({"N": [1e6], "C": [1e18], "vocabulary": [2], "loss": [0.9]})
    table.rename(columns={"loss": "loss bits per byte"}).to_csv(tmp_path / "points.csv", index=False)
    found = load(tmp_path / "points.csv", {"loss": "loss bits per byte"}).runs
    assert found["did_not_learn"].isna().all()
    table.rename(columns={"loss": "loss bits per token"}).assign(**{"loss bits per token": 1.0}).to_csv(
        tmp_path / "token.csv", index=False
    )
    (reason,) = load(tmp_path / "token.csv", {"loss": "loss bits per token"}).runs["did_not_learn"]
    assert reason == "its loss of 0.693 nats is not below that of a guess, ln 2 = 0.693"


def test_means_by_group_are_of_the_runs_that_learned(tmp_path: Path) -> None:
    store = planted(tmp_path / "live", "guess", ["dyn-s0-1"], sizes=2, seeds=2)
    fail(tmp_path / "live" / "dyn-s0-0", "diverged")
    store = load(tmp_path / "live")
    columns, rows = grouped(store.runs, ["arm", "size"])
    assert columns[:5] == ["arm", "size", "runs", "did_not_learn", "loss"]
    by_cell = {(row[0], row[1]): row[2:5] for row in rows}
    assert by_cell["dyn", "s0"][:2] == (0, 2)
    assert math.isnan(by_cell["dyn", "s0"][2])
    assert by_cell["dyn", "s1"][:2] == (2, 0)
    columns, rows = grouped(store.runs, ["did_not_learn"])
    assert columns[:3] == ["did_not_learn", "runs", "loss"]
    _, rows = sql(store, "select arm, count(did_not_learn) from runs group by arm order by arm")
    assert rows == [("dyn", 2), ("transformer", 0)]
    columns, _ = grouped(planted(tmp_path / "good", sizes=2, seeds=1).runs, ["arm"])
    assert "did_not_learn" not in columns


def test_status_names_a_complete_run_that_did_not_learn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted(tmp_path, "zero gradient", ["dyn-s0-0"], sizes=2, seeds=1)
    assert main(["status", "--store", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "dyn-s0-0 complete: it did not learn: its gradient is exactly zero" in out
    assert out.count("did not learn") == 1


@pytest.mark.slow
def test_the_report_and_its_figures(tmp_path: Path) -> None:
    planted(tmp_path / "live", "guess", ["dyn-s1-2"])
    assert main(["report", str(tmp_path / "live"), "-o", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "23 finished runs, and 1 that did not learn" in page
    assert "Nothing is claimed: 1 of 3 runs of dyn at s1 did not learn." in page
    assert "dyn-s1-2: did not learn: its loss of 6.248 nats is not below that of a guess" in page
