"""The data room: text -> shards -> batches, held to the text itself."""

import fcntl
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from launches import PATIENCE
from pyarrow import parquet
from texts import END_OF_TEXT, all_tokens, expected_documents, make_texts, specify, visible, write_txt
from tokenizers import Tokenizer

from experiments.data import build as build_module
from experiments.data import documents, shards, tokenizer, writing
from experiments.data.batches import held_out
from experiments.data.build import build
from experiments.data.corpus import find_files
from experiments.data.dataset import Dataset, token_type
from experiments.data.inspect import inspect, to_dict
from experiments.design.data import SPLITS, DataConfig, default_cache


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_txt(tmp_path_factory.mktemp("corpus") / "txt", make_texts())


@pytest.fixture(scope="module")
def dataset(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Several shards and buckets, so that what holds for it holds across their borders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TOKENS", 1000)
        patch.setattr(documents, "BUCKET_BYTES", 10_000)
        return Dataset.open(build(specify(corpus), tmp_path_factory.mktemp("cache")))


# Text to shards


@pytest.fixture(scope="module")
def dataset_in_pieces(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Each document is encoded in several pieces, as a long one is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "PIECE_BYTES", 100)
        patch.setattr(tokenizer, "BATCH_BYTES", 1000)
        return Dataset.open(build(specify(corpus), tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("built", ["dataset", "dataset_in_pieces"])
@pytest.mark.parametrize("split", SPLITS)
def test_shards_decode_to_the_documents(split: str, built: str, request: pytest.FixtureRequest) -> None:
    dataset: Dataset = request.getfixturevalue(built)
    decoder = Tokenizer.from_file(str(dataset.path / "tokenizer.json"))
    end = decoder.token_to_id(END_OF_TEXT)
    ids = all_tokens(dataset, split)
    parts = np.split(ids, dataset.document_starts(split)[1:].astype(np.int64))
    expected = expected_documents(make_texts(), split)[: len(parts)]

    assert len(ids) == dataset.tokens(split) == getattr(specify(""), f"{split}_tokens")
    for part, text in zip(parts[:-1], expected[:-1], strict=True):
        assert part[-1] == end
        assert decoder.decode(part[:-1].tolist(), skip_special_tokens=False) == text
        assert dataset.token_bytes()[part].sum() == len(text.encode())
    cut = decoder.decode(parts[-1].tolist()).rstrip("\N{REPLACEMENT CHARACTER}")
    assert expected[-1].startswith(cut)
    assert dataset.manifest["splits"][split]["bytes"] == dataset.token_bytes()[ids].sum()


def test_bytes_per_token_is_exact_against_the_decoded_text(tmp_path: Path) -> None:
    folder = write_txt(tmp_path / "txt", make_texts(words=["abc", "de", "\n", "==", "return"]))
    data = Dataset.open(build(specify(folder, train_tokens=9000, validation_tokens=220), tmp_path))
    decoder = Tokenizer.from_file(str(data.path / "tokenizer.json"))
    assert data.bytes_per_token == len(decoder.decode(all_tokens(data, "train").tolist())) / data.tokens("train")

    held = held_out(data, sequence_length=7, sequences=30)
    targets = all_tokens(data, "validation")[1 : 30 * 7 + 1]
    assert held.examples.targets.ravel().tolist() == targets.tolist()
    assert held.examples.inputs.ravel().tolist() == all_tokens(data, "validation")[: 30 * 7].tolist()
    assert held.bytes_predicted == len(decoder.decode(targets.tolist()))
    # A model that knows nothing pays eight bits a byte, whatever the tokens are.
    nats = data.token_bytes()[held.examples.targets].astype(float) * 8 * math.log(2)
    assert held.bits_per_byte(nats.mean()) == pytest.approx(8, rel=1e-12)


def test_formats_names_order_and_duplicates_do_not_matter(dataset: Dataset, tmp_path: Path) -> None:
    texts = make_texts()
    random.Random(1).shuffle(texts)
    write_txt(tmp_path / "txt" / "deep" / "er", texts)
    (tmp_path / "txt" / "copy.txt").write_bytes(texts[0].encode())
    (tmp_path / "txt" / "again.txt").write_bytes(texts[0].encode())
    (tmp_path / "jsonl").mkdir()
    rows = [json.dumps({"body": text, "n": 1}) for text in [*texts, texts[3], ""]]
    (tmp_path / "jsonl" / "a.jsonl").write_text("\n".join(rows[:70]) + "\n\n")
    (tmp_path / "jsonl" / "b.jsonl").write_text("\n".join(rows[70:]))
    (tmp_path / "parquet").mkdir()
    half = pa.array(texts[:60], pa.string()), pa.array([*texts[60:], None], pa.large_string())
    for i, column in enumerate(half):
        parquet.write_table(pa.table({"body": column}), tmp_path / "parquet" / f"{i}.parquet")

    for folder, duplicates in [("txt", 2), ("jsonl", 1), ("parquet", 0)]:
        spec = specify(tmp_path / folder, text_field="body")
        built = Dataset.open(build(spec, tmp_path / "cache"))
        assert built.manifest["corpus"]["duplicates"] == duplicates
        assert built.tokenizer_sha256 == dataset.tokenizer_sha256
        for split in SPLITS:
            assert (all_tokens(built, split) == all_tokens(dataset, split)).all()
            assert (built.document_starts(split) == dataset.document_starts(split)).all()


def test_train_and_validation_share_no_document_and_one_in_twenty_is_held_out(dataset: Dataset) -> None:
    texts = make_texts()
    train, validation = (expected_documents(texts, split) for split in SPLITS)
    assert set(train) | set(validation) == set(texts)
    counts = dataset.manifest["splits"]
    assert [counts[split]["distinct"] for split in SPLITS] == [len(train), len(validation)]
    digests = [hashlib.sha256(str(i).encode()).digest() for i in range(20_000)]
    held = sum(documents.split_of(digest) == "validation" for digest in digests)
    assert abs(held - 1000) < 4 * math.sqrt(20_000 * 0.05 * 0.95)  # four standard deviations


def test_another_process_with_one_thread_builds_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    here = Dataset.open(build(specify(corpus), tmp_path / "a"))
    there = start_builder(specify(corpus), tmp_path / "b", RAYON_NUM_THREADS="1", PYTHONHASHSEED="7")
    output, _ = there.communicate(timeout=PATIENCE)
    assert Dataset.open(output.strip()).sha256 == here.sha256


def test_a_given_tokenizer_is_used_as_it_is(dataset: Dataset, corpus: Path, tmp_path: Path) -> None:
    path = dataset.path / "tokenizer.json"
    built = Dataset.open(build(specify(corpus, tokenizer=str(path)), tmp_path))
    assert built.tokenizer_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (all_tokens(built, "train") == all_tokens(dataset, "train")).all()


@given(st.lists(st.text(max_size=60)), st.integers(4, 20))
def test_pieces_cut_between_characters_and_lose_nothing(texts: list[str], most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "PIECE_BYTES", most)
        pieces = list(tokenizer.pieces(text.encode() for text in texts))
    joined = [""]
    for piece in pieces:
        assert len(piece.text) <= most
        joined[-1] += piece.text.decode()
        joined += [""] * piece.ends_document
    assert joined == [*texts, ""]


def test_a_large_vocabulary_takes_four_bytes_a_token() -> None:
    assert token_type(65536).itemsize == 2
    assert token_type(65537).itemsize == 4


# The cache


def start_builder(spec: DataConfig, cache: Path, **environment: str) -> subprocess.Popen[str]:
    code = (
        "import sys, json; from pathlib import Path\n"
        "from experiments.data.build import build\n"
        "from experiments.design.data import DataConfig\n"
        "print(build(DataConfig(**json.loads(sys.argv[1])), Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, json.dumps(vars(spec)), str(cache)]
    environment = {**os.environ, **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_complete_dataset_is_found_not_built(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(specify(corpus), tmp_path)
    written = {path: path.stat() for path in first.iterdir()}
    monkeypatch.setattr(writing, "write", lambda *_: pytest.fail("built again"))
    assert build(specify(corpus), tmp_path) == first
    assert visible(tmp_path) == [first]
    for path, before in written.items():
        now = path.stat()
        assert (now.st_ino, now.st_size, now.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)


def test_touched_moved_and_renamed_text_is_not_built_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(specify(corpus), tmp_path / "cache")
    monkeypatch.setattr(writing, "write", lambda *_: pytest.fail("built again"))
    shutil.copytree(corpus, tmp_path / "copy")
    (tmp_path / "copy" / "0000.txt").rename(tmp_path / "copy" / "renamed.txt")
    assert build(specify(tmp_path / "copy"), tmp_path / "cache") == first
    (tmp_path / "copy" / "0001.txt").touch()
    assert build(specify(tmp_path / "copy"), tmp_path / "cache") == first
    monkeypatch.setattr(build_module, "file_sha256", lambda _: pytest.fail("read again, though nobody wrote to it"))
    assert build(specify(tmp_path / "copy"), tmp_path / "cache") == first


def test_another_specification_or_other_text_is_another_dataset(tmp_path: Path) -> None:
    folder = write_txt(tmp_path / "txt", make_texts())
    first = build(specify(folder), tmp_path / "cache")
    second = build(specify(folder, train_tokens=11_000), tmp_path / "cache")
    (folder / "0000.txt").write_text("other text")
    third = build(specify(folder), tmp_path / "cache")
    assert len({first, second, third}) == 3
    assert Dataset.open(first).sha256 != Dataset.open(third).sha256


def test_concurrent_builders_agree(corpus: Path, tmp_path: Path) -> None:
    builders = [start_builder(specify(corpus), tmp_path) for _ in range(3)]
    paths = {builder.communicate(timeout=PATIENCE)[0].strip() for builder in builders}
    assert [builder.returncode for builder in builders] == [0, 0, 0]
    assert paths == {str(path) for path in visible(tmp_path)}
    Dataset.open(paths.pop()).verify()


def test_a_builder_that_waits_says_so(corpus: Path, tmp_path: Path) -> None:
    path = build(specify(corpus), tmp_path)
    shutil.rmtree(path)
    with (tmp_path / f".{path.name}.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        builder = start_builder(specify(corpus), tmp_path)
        assert builder.stderr is not None
        assert builder.stderr.readline() == f"{path}: another process builds it; waiting for that\n"
        assert not path.exists()
    output, _ = builder.communicate(timeout=PATIENCE)
    assert output.strip() == str(path)
    Dataset.open(path).verify()


def test_without_locks_the_faster_builder_wins(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError("no locks on this file system")

    def overtaken(*arguments: Any) -> Any:
        monkeypatch.setattr(writing, "write", slow)
        build(specify(corpus), tmp_path)
        return slow(*arguments)

    slow = writing.write
    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(writing, "write", overtaken)
    path = build(specify(corpus), tmp_path)
    assert visible(tmp_path) == [path]
    Dataset.open(path).verify()


def test_a_killed_builder_leaves_nothing_to_trip_on(corpus: Path, tmp_path: Path) -> None:
    def folders() -> set[Path]:
        return {path for path in tmp_path.glob(".text-*") if path.is_dir()}

    rng, kills, window = random.Random(0), 0, 0.06
    while kills < 6:
        left = folders()
        builder = start_builder(specify(corpus), tmp_path)
        while folders() <= left and builder.poll() is None:  # until it is at work, in a folder of its own
            time.sleep(0.001)
        time.sleep(rng.uniform(0, window))
        builder.kill()
        builder.communicate(timeout=PATIENCE)
        assert builder.returncode in (0, -signal.SIGKILL)
        killed = builder.returncode == -signal.SIGKILL
        kills += killed
        window *= 1.2 if killed else 0.5  # so that at any speed about four are killed to one that ends
        for path in tmp_path.glob("text-*"):
            Dataset.open(path).verify()
            shutil.rmtree(path)
    path = build(specify(corpus), tmp_path)
    assert visible(tmp_path) == [path]
    Dataset.open(path).verify()


def test_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DYNCONV_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache/dynconv/data"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert default_cache() == tmp_path / "x/dynconv/data"
    monkeypatch.setenv("DYNCONV_CACHE", str(tmp_path / "y"))
    assert default_cache() == tmp_path / "y"


# The embedded corpus


def test_embedded_corpus(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec = DataConfig(vocabulary=512, train_tokens=2_000_000, validation_tokens=100_000)
    path = build(spec, tmp_path)
    assert capfd.readouterr().out == ""
    data = Dataset.open(path)
    assert data.tokens("train") == 2_000_000
    assert 1.5 < data.bytes_per_token < 3
    assert data.manifest["python"] == sys.version.split()[0]


def test_embedded_corpus_is_what_every_installation_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ["a.py", "json/b.py"]
    left_out = ["test/c.py", "json/tests/d.py", "tkinter/e.py", "site-packages/p/f.py", "config-3/g.py"]
    for name in [*kept, *left_out, "_sysconfigdata__linux.py", "a.txt"]:
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text(name)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "h.py").write_text("h")
    (tmp_path / "lib" / "link.py").symlink_to(tmp_path / "elsewhere" / "h.py")
    (tmp_path / "lib" / "folder").symlink_to(tmp_path / "elsewhere")
    places = {"stdlib": "lib", "purelib": "lib/site-packages", "platlib": "lib/site-packages"}
    monkeypatch.setattr(sysconfig, "get_path", lambda key: str(tmp_path / places[key]))

    spec = DataConfig(vocabulary=512, train_tokens=2, validation_tokens=2)
    assert [file.name for file in find_files(spec).files] == kept
    with_site = find_files(replace(spec, site_packages=True)).files
    assert [file.name for file in with_site] == [*kept, "p/f.py"]


def test_the_room_starts_without_torch_and_a_planner_without_numpy() -> None:
    code = (
        "import sys, experiments.design.data; assert 'numpy' not in sys.modules\n"
        "import experiments.data.build, experiments.data.batches, experiments.data.inspect\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_inspect_says_what_is_there(dataset: Dataset) -> None:
    facts = to_dict(dataset.path)
    json.dumps(facts)
    assert expected_documents(make_texts(), "train")[0].startswith(facts["sample"][:40])
    text = inspect(dataset.path)
    for part in ("12,000 tokens", "150 documents", "0 duplicates", dataset.sha256, repr(facts["sample"])):
        assert part in text
    assert text.isprintable() or set(text) - set("\n") == {c for c in text if c.isprintable()}
