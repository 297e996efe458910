"""Nothing mixed without a word: other code is refused at submission, and told where runs of it are compared."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from planted import ABOUT, write_config, write_sweep

from analysis.advantage.multiplier import multipliers
from analysis.logs.files import read_json
from analysis.logs.provenance import summarize
from analysis.logs.record import sealed
from analysis.logs.store import load
from analysis.logs.writer import RunLog
from analysis.pages.report import report
from analysis.pages.tables import multiplier_table
from experiments import source
from experiments.data.dataset import Dataset
from experiments.design.config import RunConfig
from experiments.launching import submit as launch
from experiments.launching.profile import Job, Profile

HERE = Profile("debug", default=Job(device="cpu"))
OTHER = "f" * 64


def submit(run: RunConfig, store: Path, dataset: Dataset, *accept: str) -> launch.Outcome:
    return launch.submit([run], HERE, store, cache=dataset.path.parent, accept=accept)


def test_a_store_takes_other_code_only_if_told_to(
    tiny_run: RunConfig,
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours, second, third = source.code_sha256(), replace(tiny_run, seed=4), replace(tiny_run, seed=5)
    assert submit(tiny_run, tmp_path, dataset).unsuccessful == []
    monkeypatch.setattr(source, "code_sha256", lambda: OTHER)
    with pytest.raises(
        ValueError, match=r"1 runs \(lowrank-qkv-tiny-s3-\w+\) were made by code .* --accept code"
    ) as refusal:
        submit(second, tmp_path, dataset)
    assert f"({ours[:12]}); this is " in str(refusal.value)
    assert f"({OTHER[:12]}); of what decides an outcome some modules differ; go on" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / second.run_id).exists()
    assert submit(second, tmp_path, dataset, "code").unsuccessful == []
    assert "goes on, as --accept code says" in capsys.readouterr().err
    assert submit(third, tmp_path, dataset).unsuccessful == []  # a version that the store has
    found = load(tmp_path).runs.set_index("seed")["code_sha256"]
    assert found.to_dict() == {3: ours, 4: OTHER, 5: OTHER}
    (attempt,) = read_json(tmp_path / second.run_id / "run.json")["attempts_made"]
    assert (attempt["code_sha256"], bool(attempt["code_commit"])) == (OTHER, True)


def test_the_modules_that_differ_are_named(
    tiny_run: RunConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert submit(tiny_run, tmp_path, dataset).unsuccessful == []
    found = source.module_hashes(source.root())
    changed = found | {"experiments/models/norm.py": OTHER}
    monkeypatch.setattr(source, "code_sha256", lambda: OTHER)
    real = source.module_hashes
    monkeypatch.setattr(source, "module_hashes", lambda at: changed if at == source.root() else real(at))
    with pytest.raises(ValueError, match=r"of what decides an outcome experiments/models/norm.py differ; go on with"):
        submit(replace(tiny_run, seed=4), tmp_path, dataset)


def test_code_that_is_edited_while_the_data_are_built_is_not_submitted_unchecked(
    tiny_run: RunConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "checkout"
    for name in source.module_hashes(source.root()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((source.root() / name).read_bytes())
    monkeypatch.setattr(source, "root", lambda: root)

    def build(*_: object) -> Path:
        with (root / "experiments/models/decoder.py").open("a") as file:
            file.write("EDITED = True\n")
        return dataset.path

    monkeypatch.setattr("experiments.data.build.build", build)
    store = tmp_path / "store"
    with pytest.raises(ValueError, match="the code was edited while the data were built; they are built now: submit"):
        launch.submit([tiny_run], HERE, store, cache=dataset.path.parent)
    assert not (store / tiny_run.run_id).exists()


def test_a_run_is_not_continued_by_other_code_unless_told_to(
    tiny_run: RunConfig, dataset: Dataset, submitted: Callable[..., Path], tmp_path: Path
) -> None:
    """Though another run of the store is of the version that goes on."""
    assert submit(replace(tiny_run, seed=4), tmp_path, dataset).unsuccessful == []
    run_dir = submitted(tiny_run, tmp_path)
    about = ABOUT | {"code_sha256": OTHER, "code_commit": "a" * 40}
    RunLog(run_dir, attempt=1, first_step=1, about=about).flush()
    submit_again = replace(tiny_run, seed=5)
    assert submit(submit_again, tmp_path, dataset).unsuccessful == []  # an attempt without a step made nothing
    log = RunLog(run_dir, attempt=2, first_step=1, about=about)
    log.step(1, 128, 5.0, 1.0, 1e-3, 0.1)
    log.flush()
    with pytest.raises(
        ValueError, match=r"1 runs \(lowrank-qkv-tiny-s3-\w+\) were begun by code aaaaaaaaaaaa \(ffffffff"
    ):
        submit(tiny_run, tmp_path, dataset)
    assert submit(tiny_run, tmp_path, dataset, "code").unsuccessful == []


def attempt(number: int, first: int, last: int | None, commit: str, **changes: object) -> dict[str, object]:
    about = ABOUT | {"code_commit": commit, "code_sha256": commit * 2}
    return about | {"attempt": number, "first_step": first, "step": last} | changes


def test_a_run_of_two_versions_is_shown_as_both() -> None:
    """The second attempt repeats what the first had done after its checkpoint; the third took no step."""
    found = summarize([attempt(1, 1, 240, "a"), attempt(2, 206, 558, "b"), attempt(3, 400, None, "c")])
    assert (found["code_commit"], found["code_sha256"], found["clock"]) == ("a (37%) + b (63%)", None, "mixed")
    same = summarize([attempt(1, 1, 240, "a"), attempt(2, 206, 558, "a")])
    assert (same.get("code_commit"), same["code_sha256"], same["clock"]) == (None, "aa", "alone")


def test_a_run_of_two_versions_is_logged_as_both(tmp_path: Path) -> None:
    run_dir = write_config(tmp_path)
    first = RunLog(run_dir, attempt=1, first_step=1, about=ABOUT | {"code_commit": "a" * 40})
    second = None
    for step in range(1, 5):
        if step == 2:
            first.flush()
            second = RunLog(run_dir, attempt=2, first_step=2, about=ABOUT | {"code_commit": "b" * 40})
        (second or first).step(step, 5_000_000 * step, 3.0, 1.0, 1e-3, 0.1)
    assert second is not None
    second.evaluation(4, 20_000_000, "text", {"loss": 3.0}, 0.1)
    second.finish({})
    (row,) = load(tmp_path).runs.to_dict("records")
    assert row["code_commit"] == f"{'a' * 40} (25%) + {'b' * 40} (75%)"


def test_a_branch_is_by_what_its_trunk_was_too(tmp_path: Path) -> None:
    """Of the trunk's steps those up to the branch count, whichever of its attempts went on."""
    about = ABOUT | {"device": "cpu"}
    for run_id, attempts in {"trunk": [(1, 6, "a"), (5, 8, "b")], "branch": [(6, 8, "c")]}.items():
        changes = {"trunk": "trunk", "branch_step": 5} if run_id == "branch" else {}
        run_dir = write_config(tmp_path, run_id=run_id, tokens=8, **changes)
        for number, (first, last, commit) in enumerate(attempts, 1):
            log = RunLog(run_dir, attempt=number, first_step=first, about=about | {"code_commit": commit})
            for step in range(first, last + 1):
                log.step(step, step, 3.0, 1.0, 1e-3, 0.1)
            log.flush()
        log.evaluation(8, 8, "text", {"loss": 3.0}, 0.1)
        log.finish({})
    runs = load(tmp_path).runs.set_index("run_id")
    assert runs["code_commit"].to_dict() == {"trunk": "a (50%) + b (50%)", "branch": "a (50%) + b (12%) + c (38%)"}
    assert runs["clock"].to_dict() == {"trunk": "alone", "branch": "mixed"}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "store", {"static": 1.1, "lowrank": 1.2}, seeds=1)


def change(store: Path, run_id: str, **values: object) -> None:
    path = store / run_id / "run.json"
    path.write_text(json.dumps(sealed(read_json(path) | values)))


def statuses(runs: pd.DataFrame) -> dict[str, str]:
    return {item.arm: item.status for item in multipliers(runs, resamples=50)[0]}


def test_pairs_that_share_everything_have_no_footnote_whatever_the_store_mixes(store: Path) -> None:
    for arm in ("transformer", "static", "lowrank"):
        change(store, f"{arm}-s0-0", device="NVIDIA A100", torch="2.12.0", code_commit="b" * 40)
    assert not [status for status in statuses(load(store).runs).values() if "within" in status]


def test_a_mixture_within_pairs_is_a_footnote_of_table_and_report(store: Path) -> None:
    change(store, "static-s1-0", device="NVIDIA A100")
    change(store, "static-s2-0", device=None, clock="mixed")
    change(store, "lowrank-s3-0", torch="2.12.0", dtype="bfloat16")
    change(store, "lowrank-s4-0", code_commit=f"{'a' * 40} (37%) + {'c' * 40} (63%)")
    wanted = {
        "static": [
            "device is not the same within 2 of 5 pairs (NVIDIA A100, cpu, several in one run): s1 seed 0, s2 seed 0"
        ],
        "lowrank": [
            "code is not the same within 1 of 5 pairs "
            "(aaaaaaaaaaaa (37%) + cccccccccccc (63%), cccccccccccc): s4 seed 0",
            "torch is not the same within 1 of 5 pairs (2.12.0, 2.13.0): s3 seed 0",
            "dtype is not the same within 1 of 5 pairs (bfloat16, float32): s3 seed 0",
        ],
    }
    runs = load(store).runs
    for arm, status in statuses(runs).items():
        said = [remark for remark in status.split("; ") if "within" in remark and "pairs" in remark]
        assert [remark.replace(" 20 tokens per parameter", "") for remark in said] == wanted[arm]
    text, page = multiplier_table(multipliers(runs, resamples=50)[0]), report(load(store))
    assert (
        "] Torch is not the same within 1 of 5 pairs" in text or "] torch is not the same within 1 of 5 pairs" in text
    )
    assert "orch is not the same within 1 of 5 pairs" in page


def test_equal_modules_are_the_same_code_whatever_the_commit(store: Path) -> None:
    for number, run_dir in enumerate(sorted(store.iterdir())):
        change(store, run_dir.name, code_commit=f"{number:040x}", code_sha256="d" * 64)
    assert not [status for status in statuses(load(store).runs).values() if "within" in status]
    change(store, "static-s1-0", code_sha256="e" * 64)
    assert "code is not the same within 1 of 5 pairs (" in statuses(load(store).runs)["static"]


def test_what_is_not_known_is_no_mixture(store: Path) -> None:
    runs = load(store).runs
    runs.loc[runs["arm"] == "static", ["device", "torch", "dtype", "code_commit", "clock"]] = pd.NA
    assert not [status for status in statuses(runs).values() if "within" in status]


def test_pairs_of_several_devices_are_told_by_size_though_the_two_runs_of_each_share_one(store: Path) -> None:
    for run_dir in store.iterdir():
        kind = "NVIDIA H200" if run_dir.name.split("-")[1] in ("s3", "s4") else "NVIDIA H100"
        change(store, run_dir.name, device=kind)
    found, _ = multipliers(load(store).runs, resamples=50)
    told = "pairs with transformer are of several devices: NVIDIA H100 at s0, s1, s2; NVIDIA H200 at s3, s4"
    assert all(item.notes == (told,) for item in found)
    for page in (multiplier_table(found), report(load(store))):
        assert page.count(f"P{told[1:]}.") == 1
    # A pair of unlike runs is in the status instead, and where a change with size is told it does not count.
    change(store, "static-s1-0", device="NVIDIA H200")
    by_arm = {item.arm: item for item in multipliers(load(store).runs, resamples=50)[0]}
    assert by_arm["static"].notes == (told.replace("s0, s1, s2", "s0, s2"),)
    assert "device is not the same within 1 of 5 pairs" in by_arm["static"].status
    assert by_arm["lowrank"].notes == (told,)


def test_rates_of_one_arm_and_size_that_were_tried_on_several_devices_are_told(store: Path) -> None:
    """The runs that are compared share a device; one of the rates that bracket them, trained later, does not."""
    runs = load(store).runs
    rates = pd.concat(
        [
            runs.assign(**{"vary.learning_rate_factor": rate, "loss": runs["loss"] + cost}).assign(
                run_id=runs["run_id"] + f"-{rate}"
            )
            for rate, cost in ((1.0, 0.02), (2.0, 0.0), (4.0, 0.02))
        ]
    ).reset_index(drop=True)
    found, _ = multipliers(rates, resamples=50)
    assert not [note for item in found for note in item.notes if "not the same" in note]
    later = rates["arm"].eq("static") & rates["size"].eq("s3") & rates["vary.learning_rate_factor"].eq(4)
    rates.loc[later, "device"] = "NVIDIA H200"
    by_arm = {item.arm: item for item in multipliers(rates, resamples=50)[0]}
    told = [note for note in by_arm["static"].notes if "not the same" in note]
    assert told == ["device is not the same over the learning rates of static at s3 (NVIDIA H200, cpu)"]
    assert "device" not in by_arm["static"].status
    assert not [note for note in by_arm["lowrank"].notes if "not the same" in note]
