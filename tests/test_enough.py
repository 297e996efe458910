"""A corpus of more files than are wanted: which are read, that they are enough, and the same everywhere."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from texts import all_tokens, make_texts, specify, visible, write_txt

from experiments.data import enough
from experiments.data import tokenizer as bpe
from experiments.data.build import build
from experiments.data.corpus import find_files
from experiments.data.dataset import Dataset
from experiments.data.formats import read_documents
from experiments.design.data import SPLITS, DataConfig


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(bpe.train([text.encode() for text in make_texts()], 300, DataConfig.end_of_text))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty files of a hundred documents each, half of them packed."""
    folder = tmp_path_factory.mktemp("corpus") / "jsonl"
    folder.mkdir()
    for part in range(40):
        rows = [json.dumps({"text": f"{part} {text}", "id": number}) for number, text in enumerate(make_texts(100))]
        content = "\n".join(rows).encode()
        if part % 2:
            (folder / f"{part:02d}.jsonl").write_bytes(content)
        else:
            (folder / f"{part:02d}.jsonl.gz").write_bytes(gzip.compress(content))
    return folder


def built(spec: DataConfig, cache: Path) -> Dataset:
    return Dataset.open(build(spec, cache))


@pytest.mark.parametrize("given", [True, False])
def test_only_as_many_files_are_read_as_are_needed(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    opened: set[str] = set()

    def noted(path: Path, spec: DataConfig) -> Any:
        opened.add(path.name)
        return read_documents(path, spec)

    monkeypatch.setattr("experiments.data.reading.read_documents", noted)
    monkeypatch.setattr(enough, "read_documents", noted)
    spec = specify(
        corpus, read_all=False, train_tokens=60_000, validation_tokens=1500, tokenizer=str(tokenizer) if given else None
    )
    data = built(spec, tmp_path / "cache")
    assert data.tokens("train") == 60_000
    per_file = len(all_tokens(data, "train")) / data.manifest["corpus"]["files"]
    assert 3 <= len(opened) < 25
    assert data.manifest["corpus"]["files"] == len(opened)
    assert data.manifest["not_read"] == {"files more than are needed": 40 - len(opened)}
    assert per_file > 2000
    before = len(opened)
    assert built(spec, tmp_path / "cache").path == data.path
    assert len(opened) == before


def test_the_choice_is_the_same_wherever_the_files_lie(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"read_all": False, "train_tokens": 60_000, "tokenizer": str(tokenizer)}
    first = built(specify(corpus, **settings), tmp_path / "a")
    shutil.copytree(corpus, tmp_path / "copy")
    again = built(specify(tmp_path / "copy", **settings), tmp_path / "b")
    assert again.sha256 == first.sha256
    assert again.path.name == first.path.name
    whole = built(specify(corpus, **settings | {"read_all": True}), tmp_path / "a")
    assert whole.sha256 != first.sha256
    read = {
        file.name
        for file in enough.choose(specify(corpus, **settings), find_files(specify(corpus)), None, tmp_path).files
    }
    assert read != {f"{part:02d}.jsonl" for part in range(len(read))}, "the first by name are no sample"


def test_where_all_is_needed_it_is_as_if_all_were_read(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train_tokens": 550_000, "validation_tokens": 20_000, "tokenizer": str(tokenizer)}
    data = built(specify(corpus, read_all=False, **settings), tmp_path / "cache")
    whole = built(specify(corpus, **settings), tmp_path / "cache")
    assert data.manifest["corpus"]["files"] == 40
    assert data.manifest["not_read"] == {}
    assert data.sha256 == whole.sha256


def test_held_out_text_of_its_own_is_chosen_by_itself(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    held_out = write_txt(tmp_path / "held out", make_texts())
    spec = specify(
        corpus,
        validation_source=str(held_out),
        read_all=False,
        tokenizer=str(tokenizer),
        train_tokens=60_000,
        validation_tokens=1000,
    )
    data = built(spec, tmp_path / "cache")
    assert [data.tokens(split) for split in SPLITS] == [60_000, 1000]
    assert data.manifest["not_read"]["files more than are needed"] > 100


def test_too_few_tokens_after_all_are_an_error_that_says_what_to_do(tokenizer: Path, tmp_path: Path) -> None:
    """Where most files are copies of others."""
    for number in range(30):
        (tmp_path / "txt" / f"{number}").mkdir(parents=True)
        for part in range(6):
            (tmp_path / "txt" / f"{number}" / f"{part}.txt").write_text("\n".join(make_texts(40)) + str(number // 25))
    spec = specify(
        tmp_path / "txt", read_all=False, tokenizer=str(tokenizer), train_tokens=60_000, validation_tokens=50
    )
    with pytest.raises(
        ValueError, match=r"or set read_all = true, as only some of its files were read|for both splits"
    ):
        build(spec, tmp_path / "cache")
    assert [path for path in visible(tmp_path / "cache") if path.is_dir()] == []
