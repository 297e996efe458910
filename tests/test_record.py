"""A run's record: what it keeps, what may stand beside it in a store, and the trained run it leads back to."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from analysis.logs.files import read_json
from experiments.data.build import build
from experiments.data.dataset import Dataset
from experiments.design.config import RunConfig
from experiments.evaluation.load import load_run
from experiments.parts.short_convolution import StaticConvolution
from experiments.training.record import check_store, read_record, submitted_otherwise
from experiments.training.run import Run

Submitted = Callable[..., Path]


def test_facts_stand_under_their_parts_names(tiny_run: RunConfig, submitted: Submitted, tmp_path: Path) -> None:
    record = read_json(submitted(replace(tiny_run, vary={"clip_norm": 0.5}), tmp_path) / "config.json")
    facts = record["facts"]
    assert (facts["mixer.kind"], facts["attention.qk_norm"], facts["ffn.kind"]) == ("attention", False, "swiglu")
    assert (facts["conv.kind"], facts["conv.sites"], facts["conv.width"], facts["conv.rank"]) == (
        "lowrank",
        "qkv",
        4,
        2,
    )
    assert facts["train.learning_rate"] == 1e-2
    assert record["vary"] == {"clip_norm": 0.5}
    assert record["budget"] == "some tokens"


def test_runs_share_one_tokenizer(
    tiny_run: RunConfig, submitted: Submitted, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file on disk, whichever run is removed; a copy where the file system has no links."""
    runs = [submitted(replace(tiny_run, seed=seed), tmp_path) / "tokenizer.json" for seed in (1, 2, 2)]
    assert len({path.stat().st_ino for path in runs}) == 1
    runs[0].unlink()
    assert runs[1].read_bytes() == (dataset.path / "tokenizer.json").read_bytes()

    def no_links(*_: object) -> None:
        raise OSError("Operation not supported")

    monkeypatch.setattr("os.link", no_links)
    copy = submitted(replace(tiny_run, seed=2), tmp_path) / "tokenizer.json"
    assert copy.read_bytes() == (dataset.path / "tokenizer.json").read_bytes()
    assert copy.stat().st_nlink == 1


def test_a_record_that_was_edited_is_refused(tiny_run: RunConfig, submitted: Submitted, tmp_path: Path) -> None:
    run_dir = submitted(tiny_run, tmp_path)
    assert read_record(run_dir)[1] == tiny_run
    path = run_dir / "config.json"
    path.write_text(path.read_text().replace('"learning_rate": 0.01,\n   "held', '"learning_rate": 0.02,\n   "held'))
    with pytest.raises(ValueError, match=r"describes run .*; it was edited after it was submitted"):
        read_record(run_dir)


def test_a_store_takes_one_configuration_of_a_cell(
    tiny_run: RunConfig, dataset: Dataset, submitted: Submitted, tmp_path: Path
) -> None:
    """Every part of the cell tells runs apart; whatever else differs does not, and is named."""
    submitted(tiny_run, tmp_path)
    other = replace(tiny_run, model=replace(tiny_run.model, conv=StaticConvolution(("v",))))
    for beside in (
        tiny_run,
        replace(other, arm="static"),
        replace(other, size="small"),
        replace(other, budget="more tokens"),
        replace(other, seed=4),
        replace(other, vary={"learning_rate_factor": 2.0}),
    ):
        check_store([beside], tmp_path, dataset.sha256)
    with pytest.raises(
        ValueError, match=r"another configuration of lowrank-qkv tiny seed 3 at some tokens \(.*model.con"
    ):
        check_store([other], tmp_path, dataset.sha256)
    faster = replace(tiny_run, train=replace(tiny_run.train, learning_rate=0.02))
    with pytest.raises(
        ValueError, match=r"\(train.learning_rate: 0.01 there, 0.02 now\); make what differs an axis in \["
    ):
        check_store([faster], tmp_path, dataset.sha256)


def test_a_store_takes_one_dataset(tiny_run: RunConfig, submitted: Submitted, tmp_path: Path) -> None:
    submitted(tiny_run, tmp_path)
    with pytest.raises(
        ValueError, match=r"was submitted with data \w{12}; the data is now 000000000000; restore it, or"
    ):
        check_store([tiny_run], tmp_path, "0" * 64)


def test_runs_that_were_submitted_otherwise_are_told(tiny_run: RunConfig, submitted: Submitted, tmp_path: Path) -> None:
    """Their ids are the same, and nothing else would say so where all of them are complete."""
    assert tiny_run.data is not None
    submitted(tiny_run, tmp_path)
    assert submitted_otherwise([tiny_run, replace(tiny_run, seed=9)], tmp_path) == []
    moved = replace(tiny_run, data=replace(tiny_run.data, source="/elsewhere"))
    assert moved.run_id == tiny_run.run_id
    (note,) = submitted_otherwise([moved], tmp_path)
    was = f"1 runs in {tmp_path} were submitted with data.source = {tiny_run.data.source!r}, which is '/elsewhere' in"
    assert note.startswith(was)
    raw = replace(tiny_run, data=replace(tiny_run.data, pretokenized="uint16", tokenizer="/t.json"))
    said = [note.partition(" with ")[2].split(" = ")[0] for note in submitted_otherwise([raw], tmp_path)]
    assert said == ["data.pretokenized", "data.tokenizer"]
    often = replace(tiny_run, baseline="lowrank-qkv", train=replace(tiny_run.train, evaluate_every=16))
    assert often.run_id == tiny_run.run_id
    assert submitted_otherwise([often], tmp_path) == []  # when it is submitted again its record is written again
    (tmp_path / tiny_run.run_id / "run.json").touch()
    first, second = submitted_otherwise([often], tmp_path)
    assert f"baseline = {tiny_run.baseline!r}, which is 'lowrank-qkv' in the sweep now: they stay as they" in first
    assert "train.evaluate_every = 1024, which is 16 in the sweep now: they stay as they were submitted" in second


@pytest.mark.parametrize("foreign", ['{"arm": []}', '{"arm": "a", "size": "b", "budget": "c", "seed": 0, "vary": {}}'])
def test_a_foreign_record_in_a_store_is_left_alone(
    tiny_run: RunConfig, dataset: Dataset, foreign: str, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(foreign)
    check_store([tiny_run], tmp_path, dataset.sha256)


def test_two_folders_with_equal_text_are_the_same_data(
    tiny_run: RunConfig, dataset: Dataset, text_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for path in text_folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    moved = replace(tiny_run.data, source=str(copy))
    assert replace(tiny_run, data=moved).run_id == tiny_run.run_id
    assert Dataset.open(build(moved, tmp_path / "cache")).sha256 == dataset.sha256
    (copy / path.name).write_text("changed")
    assert Dataset.open(build(moved, tmp_path / "cache")).sha256 != dataset.sha256


def test_a_trained_run_is_a_model_with_its_tokenizer(tiny_run: RunConfig, submitted: Submitted, tmp_path: Path) -> None:
    run_dir = submitted(tiny_run, tmp_path)
    with pytest.raises(ValueError, match=r"is not finished; `dynconv status` says where it stands"):
        load_run(run_dir)
    Run(run_dir)()
    _, model, tokenizer = load_run(run_dir)
    text = "def run(self):\n    return 1\n"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]))
    assert loss < torch.tensor(300.0).log()  # better than before it was trained
    assert not model.training
