"""The data room refuses bad input in one line (got, wanted, remedy) and leaves nothing half written."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from texts import END_OF_TEXT, make_texts, specify, visible, write_txt

from experiments.cli.main import main
from experiments.data import dataset as dataset_module
from experiments.data import shards, writing
from experiments.data.build import build
from experiments.data.dataset import MANIFEST, Dataset
from experiments.data.inspect import inspect
from experiments.design.data import DataConfig


@pytest.fixture
def spec(tmp_path: Path) -> DataConfig:
    return specify(write_txt(tmp_path / "txt", make_texts()))


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path.parent


def bad_parquet(folder: Path, columns: dict[str, Any]) -> Path:
    folder.mkdir()
    parquet.write_table(pa.table(columns), folder / "a.parquet")
    return folder


def damaged_parquet(folder: Path) -> Path:
    path = bad_parquet(folder, {"text": [f"text {i}" for i in range(9999)]}) / "a.parquet"
    content = bytearray(path.read_bytes())
    content[100:2000] = b"\xff" * 1900
    path.write_bytes(content)
    return folder


def broken_link(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.txt").symlink_to(folder / "gone.txt")
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f, "must be a folder, or one file of .*; got .*bad.* not there; give the folder"),
        (
            lambda f: write(f, "text") / "bad",
            "must be a folder, or one file of .*; got .* another file; give the folder",
        ),
        (
            lambda f: write(f / "a.txt", "text") / "a.txt",
            "must have a separator; got .*a.txt.*; set what stands between",
        ),
        (
            lambda f: write(f / "a.md", "text"),
            r"must hold .arrow, .*or .txt.zst files; got none under .*bad, but 1 .md;",
        ),
        (lambda f: write(f / "a.txt", ""), "must hold text; got 1 empty and 0 undecodable"),
        (lambda f: write(f / "a.txt", b"\xff"), "must hold text; got 0 empty and 1 undecodable"),
        (lambda f: write(f / "a.jsonl", '{"text": "\\ud800"}'), "must hold text; got 0 empty and 1 undecodable"),
        (lambda f: write(f / "a.jsonl", b'{"text": "\xff"}'), "must hold text; got 0 empty and 1 undecodable"),
        (lambda f: write(f / "a.jsonl", '{"text": "x"}\n{"te'), "a.jsonl line 2 must be .*JSON.*; got .*; mend"),
        (lambda f: write(f / "a.jsonl", "[" * 100_000), "a.jsonl line 1 must be .*JSON"),
        (lambda f: write(f / "a.jsonl", '{"body": "x"}'), 'line 1 must be .*"text"; got .*body.*set text_field'),
        (lambda f: write(f / "a.jsonl", "3"), "line 1 must be .*\"text\"; got b'3'"),
        (lambda f: bad_parquet(f, {"body": ["x"]}), 'column "text"; got no such column, columns body; set'),
        (lambda f: bad_parquet(f, {"text": [1]}), 'column "text"; got int64'),
        (lambda f: write(f / "a.parquet", "PAR1"), "readable parquet file; got .*; write it again"),
        (damaged_parquet, "must be readable; got .*a.parquet: Corrupt snappy"),
        (broken_link, "must be readable; got .*a.txt: No such file"),
    ],
)
def test_a_bad_corpus_is_refused(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    refused(specify(make(tmp_path / "bad")), tmp_path / "cache", message)


def refused(spec: DataConfig, cache: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(spec, cache)
    assert "\n" not in str(caught.value)
    assert not cache.exists() or visible(cache) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_tokens": 10**9}, r"train_tokens must .*; got 1000000000, the corpus has \d+ train.*; lower"),
        ({"validation_tokens": 10**9}, r"validation_tokens must .*; got 1000000000, .* \d+ validation"),
        ({"vocabulary": 60_000}, r"vocabulary must .*; got 60000, its text yields \d+; lower"),
    ],
)
def test_more_than_the_corpus_holds_is_refused(
    spec: DataConfig, tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    refused(replace(spec, **changes), tmp_path / "cache", message)


@pytest.mark.parametrize(("text", "split"), [("text 0", "validation"), ("text 11", "train")])  # as their hashes fall
def test_a_corpus_of_one_document_is_refused(tmp_path: Path, text: str, split: str) -> None:
    folder = write(tmp_path / "bad" / "a.txt", text)
    message = f"both splits; got 1 documents in 1 files .*, none of them for {split}; split the text into more"
    refused(specify(folder), tmp_path / "cache", message)


def test_a_folder_that_cannot_be_listed_is_refused(
    spec: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "txt" / "closed"
    closed.mkdir()
    listing = os.scandir

    def scandir(path: str) -> Any:  # the tests may run as root, whom no permission stops
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    refused(spec, tmp_path / "cache", "must be readable; got .*closed: Permission denied; mend")


def test_a_corpus_that_changes_under_the_build_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_txt(tmp_path / "txt", make_texts())
    prepare = writing.prepare

    def one_is_added(*arguments: Any) -> Any:
        (folder / "new.txt").write_text("new")
        return prepare(*arguments)

    def one_is_removed(*arguments: Any) -> Any:
        (folder / "0003.txt").unlink()
        return prepare(*arguments)

    monkeypatch.setattr(writing, "prepare", one_is_added)
    refused(specify(folder), tmp_path / "cache", "must stay as it is .*; got changes under .*; build again")
    monkeypatch.setattr(writing, "prepare", one_is_removed)
    refused(specify(folder), tmp_path / "cache", "must be readable; got .*0003.txt: No such file")


def test_a_full_disk_is_refused(spec: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.SplitWriter, "add", full)
    refused(spec, tmp_path / "cache", "data cache must be .*; got .*: No space left on device; choose")


def edited_tokenizer(dataset: Dataset, edit: Callable[[dict[str, Any]], object]) -> str:
    content = json.loads((dataset.path / "tokenizer.json").read_text())
    edit(content)
    return json.dumps(content)


def rename_end(content: dict[str, Any]) -> None:
    content["added_tokens"][0]["content"] = "<|end|>"
    content["model"]["vocab"] = {
        "<|end|>" if token == END_OF_TEXT else token: number for token, number in content["model"]["vocab"].items()
    }


@pytest.mark.parametrize(
    ("edit", "vocabulary", "message"),
    [
        (None, 300, "must be a Hugging Face tokenizer.json; got"),
        (
            lambda content: content,
            299,
            "vocabulary of the specification, 299; got 300 tokens, .* 299; set vocabulary to 300",
        ),
        (lambda content: content.update(decoder=None), 300, r"keep every byte; got \d+ bytes of"),
        (lambda content: content.update(decoder={"type": "Fuse"}), 300, r"keep every byte; got \d+ bytes of"),
        (rename_end, 300, r"must have the token <\|endoftext\|>; got none; set end_of_text .*\(<\|end\|>\)"),
        (
            lambda content: content.update(
                normalizer={"type": "Replace", "pattern": {"String": "def"}, "content": "fed"}
            ),
            300,
            r"give back every character; got 'fed.* for 'def.*; give",
        ),
        (lambda content: content.update(normalizer={"type": "NFD"}), 300, r"keep every byte; got \d+ bytes of"),
        (lambda content: content["pre_tokenizer"].update(add_prefix_space=True), 300, r"keep every byte; got \d+"),
    ],
)
def test_a_bad_tokenizer_is_refused(
    dataset: Dataset, spec: DataConfig, tmp_path: Path, edit: Any, vocabulary: int, message: str
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}" if edit is None else edited_tokenizer(dataset, edit))
    refused(replace(spec, vocabulary=vocabulary, tokenizer=str(path)), tmp_path / "cache", message)


def test_a_missing_tokenizer_and_an_unwritable_cache_are_refused(spec: DataConfig, tmp_path: Path) -> None:
    refused(replace(spec, tokenizer=str(tmp_path / "no.json")), tmp_path / "cache", "tokenizer must be .*no.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache must be a folder .*; got .*file.*; choose another"):
        build(spec, tmp_path / "file" / "cache")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": 256}, "vocabulary must be at least 257 .*; got 256"),
        ({"train_tokens": 1}, "train_tokens must be at least 2 .*; got 1"),
        ({"validation_tokens": 0}, "validation_tokens must be at least 2 .*; got 0"),
        ({"separator": ""}, 'separator must not be empty; got ""'),
        ({"validation_source": "python"}, 'validation_source must be a folder or a file of text; got "python"'),
        ({"site_packages": True}, 'site_packages needs source = "python"; got source = "x"'),
    ],
)
def test_a_bad_specification_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        specify("x", **changes)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def recount(manifest: Path, tokens: int) -> None:
    content = json.loads(manifest.read_text())
    content["splits"]["train"]["tokens"] = tokens
    manifest.write_text(json.dumps(content))


def without(key: str) -> Callable[[Path], object]:
    def remove(manifest: Path) -> None:
        content = json.loads(manifest.read_text())
        del content[key]
        manifest.write_text(json.dumps(content))

    return remove


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[6] ^= 1  # of the lower byte: another token of the vocabulary
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-00000.bin", truncate, r"train-00000.bin must have 80000 bytes; got 79999 bytes; remove"),
        ("validation-00000.bin", Path.unlink, r"validation-00000.bin must have 4000 bytes; got No such file"),
        ("train-00000.bin", flip_a_bit, r"train-00000.bin must have SHA-256 \w+; got \w+; remove"),
        ("tokenizer.json", truncate, r"tokenizer.json must have \d+ bytes; got \d+ bytes; remove"),
        (MANIFEST, Path.unlink, r"must hold manifest.json; got .*No such file.*dynconv data build"),
        (MANIFEST, lambda path: os.truncate(path, 99), "manifest.json must describe a dataset; got JSONDecode"),
        (MANIFEST, lambda path: recount(path, 40_001), "manifest.json must count .*; got 40001 .* hold 40000"),
        (MANIFEST, lambda path: path.write_text("[]"), "manifest.json must describe a dataset; got"),
        (MANIFEST, lambda path: path.write_text('{"schema": 0, "files": {}}'), "must have schema 1; got 0"),
        (
            MANIFEST,
            lambda path: path.write_text('{"schema": 1, "files": {}}'),
            "describe a dataset; got KeyError.'spec'",
        ),
        (MANIFEST, without("splits"), "must describe a dataset; got KeyError.'splits'.*; remove"),
        (MANIFEST, without("files"), "must describe a dataset; got KeyError.'files'.*; remove"),
    ],
)
def test_a_damaged_dataset_is_refused(
    tiny_data: DataConfig,
    dataset: Dataset,
    tmp_path: Path,
    name: str,
    damage: Callable[[Path], object],
    message: str,
) -> None:
    path = tmp_path / dataset.path.name
    shutil.copytree(dataset.path, path)
    damage(path / name)
    with pytest.raises(ValueError, match=message):
        Dataset.open(path).verify()
    if damage is not flip_a_bit:  # lengths are checked at every opening, contents on request
        with pytest.raises(ValueError, match=message):
            build(tiny_data, tmp_path)


@pytest.mark.parametrize("crc", [True, False])  # datasets of older versions have no checksums of blocks
@pytest.mark.parametrize("block_bytes", [64, 2**20])
def test_a_run_spot_checks_its_data(
    tiny_data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, crc: bool
) -> None:
    monkeypatch.setattr(dataset_module, "BLOCK_BYTES", block_bytes)
    data = Dataset.open(build(tiny_data, tmp_path))
    if not crc:
        for entry in data.manifest["files"].values():
            del entry["crc32"]
    data.spot_check("a run")
    blocks = sum(-(-entry["bytes"] // block_bytes) for entry in data.manifest["files"].values())
    assert (blocks > 1000) == (block_bytes == 64)

    def check() -> None:  # many runs look at 64 blocks each
        for run in range(1 if block_bytes > 64 else 200):
            data.spot_check(f"run {run}")

    flip_a_bit(data.path / "train-00000.bin")
    if crc:
        with pytest.raises(ValueError, match=r"train-00000.bin must be as it was built; got .* bytes 0 to \d+; remove"):
            check()
    with (data.path / "train-00000.bin").open("r+b") as shard:
        shard.write(np.full(2000, 300, "<u2").tobytes())
    with pytest.raises(
        ValueError, match=r"train-00000.bin must (be as it was|hold tokens below .*, 300; got 300; rem)"
    ):
        check()


def test_a_token_outside_the_vocabulary_is_refused_where_it_is_met(tiny_data: DataConfig, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", 1000)
        path = build(tiny_data, tmp_path)
    with (path / "train-00002.bin").open("r+b") as shard:
        shard.seek(2 * 700)
        shard.write(np.array([65_535], "<u2").tobytes())
    data = Dataset.open(path)
    data.windows("train", np.array([0, 2701]), 200)
    with pytest.raises(
        ValueError, match=r"train-00002.bin must hold tokens below the vocabulary, 300; got 65535; remove"
    ):
        data.windows("train", np.array([0, 2501]), 200)


@pytest.mark.parametrize("key", ["python", "corpus"])
def test_inspecting_a_manifest_without_a_key_is_refused(dataset: Dataset, tmp_path: Path, key: str) -> None:
    shutil.copytree(dataset.path, tmp_path / "data")
    without(key)(tmp_path / "data" / MANIFEST)
    with pytest.raises(ValueError, match=f"manifest.json must describe a dataset; got KeyError.'{key}'"):
        inspect(tmp_path / "data")


def test_inspect_verifies_on_request(dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data"
    shutil.copytree(dataset.path, path)
    assert main(["data", "inspect", str(path), "--verify", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["sha256"] == dataset.sha256
    assert printed.err == f"{path}: every file has its checksum\n"

    flip_a_bit(path / "train-00000.bin")
    assert main(["data", "inspect", str(path)]) == 0  # not noticed: only lengths are checked
    capsys.readouterr()
    assert main(["data", "inspect", str(path), "--verify"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "train-00000.bin must have SHA-256" in printed.err
    assert printed.err.count("\n") == 1
