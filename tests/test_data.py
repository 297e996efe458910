"""The data room: text -> shards -> batches, held to the text itself."""

import errno
import fcntl
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pyarrow import parquet
from tokenizers import Tokenizer

from experiments.data import build as build_module
from experiments.data import documents, shards, tokenizer
from experiments.data.batches import Batches, held_out, permute
from experiments.data.build import build
from experiments.data.corpus import find_files
from experiments.data.dataset import MANIFEST, Dataset
from experiments.data.inspect import inspect, to_dict
from experiments.data.spec import SPLITS, DataConfig, default_cache

# Many scripts, runs of white space, and the end-of-text token's own spelling, which is text in a document.
WORDS = [
    "def",
    "return",
    "self",
    "café",
    "naïve",
    "数据",
    "λ",
    "🙂",
    "==",
    "(",
    "\n\n    ",
    "\t",
    tokenizer.END_OF_TEXT,
]


def make_texts(count: int = 150, words: list[str] = WORDS) -> list[str]:
    rng = random.Random(0)
    return [f"{i}\r\n" + " ".join(rng.choices(words, k=rng.randrange(20, 120))) for i in range(count)]


def write_txt(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(parents=True)
    for i, text in enumerate(texts):
        (folder / f"{i:04d}.txt").write_bytes(text.encode())
    return folder


def specify(source: Path | str, **changes: Any) -> DataConfig:
    base = DataConfig(source=str(source), vocabulary=300, train_tokens=12_000, validation_tokens=400)
    return replace(base, **changes)


def expected_documents(texts: list[str], split: str) -> list[str]:
    """The definition again, in plain Python: distinct, split by the hash's end, ordered by the hash."""
    digests = {hashlib.sha256(text.encode()).digest(): text for text in texts}
    chosen = [d for d in digests if (int.from_bytes(d[-8:], "big") < 2**64 / 20) == (split == "validation")]
    return [digests[digest] for digest in sorted(chosen)]


def all_tokens(dataset: Dataset, split: str) -> NDArray[np.int64]:
    return dataset.windows(split, np.zeros(1, np.int64), dataset.tokens(split))[0]


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


@pytest.mark.parametrize("split", SPLITS)
def test_shards_decode_to_the_documents(dataset: Dataset, split: str) -> None:
    decoder = Tokenizer.from_file(str(dataset.path / "tokenizer.json"))
    end = decoder.token_to_id(tokenizer.END_OF_TEXT)
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
    assert held.targets.ravel().tolist() == targets.tolist()
    assert held.inputs.ravel().tolist() == all_tokens(data, "validation")[: 30 * 7].tolist()
    assert held.bytes_predicted == len(decoder.decode(targets.tolist()))
    # A model that knows nothing pays eight bits a byte, whatever the tokens are.
    nats = data.token_bytes()[held.targets].astype(float) * 8 * math.log(2)
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
    output, _ = there.communicate(timeout=60)
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
    assert shards.token_type(65536).itemsize == 2
    assert shards.token_type(65537).itemsize == 4


# Batches


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40))
def test_each_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    places = permute(np.arange(size), size, seed, np.full(size, epoch))
    assert sorted(places.tolist()) == list(range(size))


def chi_square(values: NDArray[np.int64], kinds: int) -> float:
    counts = np.bincount(values, minlength=kinds)
    expected = len(values) / kinds
    return float(((counts - expected) ** 2 / expected).sum())


def test_permutations_are_uniform_and_differ_by_seed_and_epoch() -> None:
    size, trials = 7, 20_000
    epochs = np.repeat(np.arange(trials), size)
    places = permute(np.tile(np.arange(size), trials), size, 0, epochs).reshape(trials, size)
    second = places[:, 1] - (places[:, 1] > places[:, 0])  # its rank among what the first left: 0..size-2
    # Bounds that chance exceeds once in 100,000: 6, 41 and 6 degrees of freedom.
    assert max(chi_square(column, size) for column in places.T) < 33.1
    assert chi_square(places[:, 0] * (size - 1) + second, size * (size - 1)) < 92
    by_seed = [permute(np.zeros(1, np.int64), size, seed, np.zeros(1, np.int64))[0] for seed in range(2000)]
    assert chi_square(np.array(by_seed), size) < 33.1


def test_the_order_stays_what_it_was() -> None:
    """A changed order would change every resumed run; if it must change, raise the dataset's schema."""
    assert permute(np.arange(10), 10, 1, np.zeros(10, np.int64)).tolist() == [5, 8, 0, 9, 4, 2, 7, 3, 1, 6]
    assert permute(np.array([0, 1, 2**29]), 10**9, 2**63 - 1, np.array([3, 3, 4])).tolist() == [
        161674940,
        725760604,
        329803221,
    ]


@settings(deadline=None, max_examples=25)
@given(length=st.integers(8, 700), size=st.integers(1, 50), seed=st.integers(0, 2**31))
def test_an_epoch_visits_each_window_once(dataset: Dataset, length: int, size: int, seed: int) -> None:
    batches = Batches(dataset, sequence_length=length, batch_sequences=size, seed=seed)
    n = batches.sequences_per_epoch
    tokens = all_tokens(dataset, "train")
    assert n == (len(tokens) - 1) // length
    steps = [batches.batch(step) for step in range(-(-2 * n // size))]
    inputs, targets = (np.concatenate(parts)[: 2 * n] for parts in zip(*steps, strict=True))
    assert (inputs[:, 1:] == targets[:, :-1]).all()
    windows = sorted(tokens[i * length : i * length + length + 1].tobytes() for i in range(n))
    seen = [row.tobytes() for row in np.concatenate([inputs, targets[:, -1:]], axis=1)]
    assert sorted(seen[:n]) == sorted(seen[n:]) == windows
    assert n < 10 or seen[:n] != seen[n:]


def test_a_batch_is_the_same_however_the_work_is_split_and_wherever_it_resumes(dataset: Dataset) -> None:
    def fresh(seed: int = 5) -> Batches:
        return Batches(dataset, sequence_length=16, batch_sequences=24, seed=seed)

    uninterrupted = fresh()
    stream = [uninterrupted.batch(step) for step in range(80)]  # over two epochs
    assert 2 * uninterrupted.sequences_per_epoch < 80 * 24
    for step in (79, 31, 0):
        for part in (1, 5, 8, 24):
            pieces = [fresh().batch(step, first, min(part, 24 - first)) for first in range(0, 24, part)]
            for whole, halves in zip(stream[step], zip(*pieces, strict=True), strict=True):
                assert (np.concatenate(halves) == whole).all()
    assert stream[0][0].dtype == np.int64
    assert not (fresh(6).batch(0)[0] == stream[0][0]).all()
    assert fresh().batch(3, 0, 0)[0].shape == (0, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: Batches(d, sequence_length=12_000, batch_sequences=1, seed=0), "1 to 11999.*got 12000"),
        (lambda d: Batches(d, sequence_length=0, batch_sequences=1, seed=0), "got 0"),
        (lambda d: Batches(d, sequence_length=8, batch_sequences=0, seed=0), "at least 1; got 0"),
        (lambda d: held_out(d, sequence_length=8, sequences=50), "1 to 49.*got 50; lower it"),
        (lambda d: held_out(d, sequence_length=400, sequences=1), "validation_tokens; got 400"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(dataset: Dataset, call: Callable[[Dataset], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(dataset)


# The cache


def start_builder(spec: DataConfig, cache: Path, **environment: str) -> subprocess.Popen[str]:
    code = (
        "import sys, json; from pathlib import Path\n"
        "from experiments.data.build import build\n"
        "from experiments.data.spec import DataConfig\n"
        "print(build(DataConfig(**json.loads(sys.argv[1])), Path(sys.argv[2]), progress=False))"
    )
    command = [sys.executable, "-c", code, json.dumps(vars(spec)), str(cache)]
    environment = {**os.environ, **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def visible(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if not path.name.endswith(".lock")]


def test_a_complete_dataset_is_found_not_built(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(specify(corpus), tmp_path)
    monkeypatch.setattr(build_module, "_write_dataset", lambda *_: pytest.fail("built again"))
    started = time.perf_counter()
    assert build(specify(corpus), tmp_path) == first
    assert time.perf_counter() - started < 0.5
    assert visible(tmp_path) == [first]


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
    paths = {builder.communicate(timeout=60)[0].strip() for builder in builders}
    assert [builder.returncode for builder in builders] == [0, 0, 0]
    assert paths == {str(path) for path in visible(tmp_path)}
    Dataset.open(paths.pop()).verify()


def test_without_locks_the_faster_builder_wins(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError("no locks on this file system")

    def overtaken(*arguments: Any) -> Any:
        monkeypatch.setattr(build_module, "_write_dataset", slow)
        build(specify(corpus), tmp_path)
        return slow(*arguments)

    slow = build_module._write_dataset
    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(build_module, "_write_dataset", overtaken)
    path = build(specify(corpus), tmp_path)
    assert visible(tmp_path) == [path]
    Dataset.open(path).verify()


def test_a_killed_builder_leaves_nothing_to_trip_on(corpus: Path, tmp_path: Path) -> None:
    def at_work() -> bool:
        return any(path.is_dir() for path in tmp_path.glob(".text-*"))

    killed = 0
    rng = random.Random(0)
    for _ in range(8):
        builder = start_builder(specify(corpus), tmp_path)
        while not at_work() and builder.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.06))
        builder.kill()
        builder.communicate(timeout=60)
        killed += at_work()
        for path in tmp_path.glob("text-*"):
            Dataset.open(path).verify()
            shutil.rmtree(path)
    assert killed, "no builder was killed at work, so this shows nothing"
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
    started = time.process_time()
    path = build(spec, tmp_path)
    assert time.process_time() - started < 15
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
    assert [file.name for file in find_files(spec)] == kept
    with_site = find_files(replace(spec, site_packages=True))
    assert [file.name for file in with_site] == [*kept, "p/f.py"]


def test_the_room_starts_without_torch_and_a_planner_without_numpy() -> None:
    code = (
        "import sys, experiments.data.spec; assert 'numpy' not in sys.modules\n"
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


# Bad input: one line that says what was got, what is wanted, and the remedy; nothing half written


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
        (lambda f: f, "must be a folder; got .*bad.* not there; give the folder"),
        (lambda f: write(f, "text") / "bad", "must be a folder; got .* a file; give the folder"),
        (lambda f: write(f / "a.md", "text"), "must hold .txt or .jsonl or .parquet files; got none under .*bad;"),
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
    corpus: Path, tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    refused(specify(corpus, **changes), tmp_path, message)


def test_a_corpus_that_changes_under_the_build_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_txt(tmp_path / "txt", make_texts())
    write_dataset = build_module._write_dataset

    def one_is_added(*arguments: Any) -> Any:
        (folder / "new.txt").write_text("new")
        return write_dataset(*arguments)

    def one_is_removed(*arguments: Any) -> Any:
        (folder / "0003.txt").unlink()
        return write_dataset(*arguments)

    monkeypatch.setattr(build_module, "_write_dataset", one_is_added)
    refused(specify(folder), tmp_path / "cache", "must stay as it is .*; got changes under .*; build again")
    monkeypatch.setattr(build_module, "_write_dataset", one_is_removed)
    refused(specify(folder), tmp_path / "cache", "must be readable; got .*0003.txt: No such file")


def test_a_full_disk_is_refused(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.SplitWriter, "add", full)
    refused(specify(corpus), tmp_path, "data cache must be .*; got .*: No space left on device; choose")


def edited_tokenizer(dataset: Dataset, edit: Callable[[dict[str, Any]], object]) -> str:
    content = json.loads((dataset.path / "tokenizer.json").read_text())
    edit(content)
    return json.dumps(content)


def rename_end(content: dict[str, Any]) -> None:
    content["added_tokens"][0]["content"] = "<|end|>"
    content["model"]["vocab"] = {
        "<|end|>" if token == tokenizer.END_OF_TEXT else token: number
        for token, number in content["model"]["vocab"].items()
    }


@pytest.mark.parametrize(
    ("edit", "vocabulary", "message"),
    [
        (None, 300, "must be a Hugging Face tokenizer.json; got"),
        (lambda content: content, 301, "vocabulary of the specification, 301; got 300 tokens, .* 299; set"),
        (lambda content: content.update(decoder=None), 300, "byte-level .*; got none"),
        (lambda content: content.update(decoder={"type": "Fuse"}), 300, "byte-level .*; got Fuse"),
        (rename_end, 300, r"must have the token <\|endoftext\|>"),
        (lambda content: content.update(normalizer={"type": "NFD"}), 300, r"must keep every byte; got \d+ bytes"),
    ],
)
def test_a_bad_tokenizer_is_refused(
    dataset: Dataset, corpus: Path, tmp_path: Path, edit: Any, vocabulary: int, message: str
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}" if edit is None else edited_tokenizer(dataset, edit))
    refused(specify(corpus, vocabulary=vocabulary, tokenizer=str(path)), tmp_path / "cache", message)


def test_a_missing_tokenizer_and_an_unwritable_cache_are_refused(corpus: Path, tmp_path: Path) -> None:
    refused(specify(corpus, tokenizer=str(tmp_path / "no.json")), tmp_path / "cache", "tokenizer must be .*no.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache must be a folder .*; got .*file.*; choose another"):
        build(specify(corpus), tmp_path / "file" / "cache")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": 256}, "vocabulary must be at least 257 .*; got 256"),
        ({"train_tokens": 1}, "train_tokens must be at least 2 .*; got 1"),
        ({"validation_tokens": 0}, "validation_tokens must be at least 2 .*; got 0"),
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


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-00000.bin", truncate, r"train-00000.bin must have 24000 bytes; got 23999 bytes; remove"),
        ("validation-00000.bin", Path.unlink, r"validation-00000.bin must have 800 bytes; got No such file"),
        ("train-00000.bin", flip_a_bit, r"train-00000.bin must have SHA-256 \w+; got \w+; remove"),
        ("tokenizer.json", truncate, r"tokenizer.json must have \d+ bytes; got \d+ bytes; remove"),
        (MANIFEST, Path.unlink, r"must hold manifest.json; got .*No such file.*dynconv data build"),
        (MANIFEST, lambda path: os.truncate(path, 99), "manifest.json must describe a dataset; got JSONDecode"),
        (MANIFEST, lambda path: recount(path, 12_001), "manifest.json must count .*; got 12001 .* hold 12000"),
        (MANIFEST, lambda path: path.write_text("[]"), "manifest.json must describe a dataset; got"),
        (MANIFEST, lambda path: path.write_text('{"schema": 0, "files": {}}'), "must have schema 1; got 0"),
    ],
)
def test_a_damaged_dataset_is_refused(
    corpus: Path, tmp_path: Path, name: str, damage: Callable[[Path], object], message: str
) -> None:
    path = build(specify(corpus), tmp_path)
    damage(path / name)
    with pytest.raises(ValueError, match=message):
        Dataset.open(path).verify()
    if damage is not flip_a_bit:
        with pytest.raises(ValueError, match=message):
            build(specify(corpus), tmp_path)
