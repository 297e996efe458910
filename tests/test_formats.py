"""Corpora in the formats that people have, and tokenizers that were not made here."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from texts import END_OF_TEXT, all_tokens, expected_documents, make_texts, specify, visible, write_txt
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from experiments.data.build import build
from experiments.data.corpus import find_files
from experiments.data.dataset import Dataset
from experiments.data.formats import read_documents
from experiments.data.inspect import inspect
from experiments.design.data import SPLITS, DataConfig

TEXTS = make_texts(40)
ROWS = [{"text": text} for text in TEXTS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstd(content: bytes) -> bytes:
    """Two frames, as parallel compressors and appending write them."""
    half = len(content) // 2
    return b"".join(pa.compress(part, codec="zstd", asbytes=True) for part in (content[:half], content[half:]))


def arrow(new: Callable[..., Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        table = pa.table({"text": TEXTS})
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)

    return write


def table(column: pa.Array, name: str = "text") -> Callable[[Path], None]:
    return lambda path: parquet.write_table(pa.table({"id": range(len(column)), name: column}), path)


STRUCTS = pa.array([{"n": i, "text": text} for i, text in enumerate(TEXTS)])


@pytest.mark.parametrize(
    ("name", "write", "changes"),
    [
        ("a.jsonl.gz", lambda path: path.write_bytes(gzip.compress(LINES[:999]) + gzip.compress(LINES[999:])), {}),
        ("a.jsonl.zst", lambda path: path.write_bytes(zstd(LINES)), {}),
        ("a.json", lambda path: path.write_text(json.dumps(ROWS)), {}),
        ("a.json", lambda path: path.write_text(json.dumps(ROWS, indent=1)), {}),
        ("a.json.gz", lambda path: path.write_bytes(gzip.compress(LINES)), {}),
        ("a.json.gz", lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())), {}),
        ("a.arrow", arrow(pa.ipc.new_file), {}),
        ("a.arrow", arrow(pa.ipc.new_stream), {}),
        ("a.parquet", table(pa.array(TEXTS).dictionary_encode()), {}),
        ("a.parquet", table(pa.array(TEXTS, pa.string_view())), {}),
        ("a.parquet", table(STRUCTS, "a"), {"text_field": "a.text"}),
        ("a.parquet", table(pa.array([{"b": row} for row in STRUCTS]), "a"), {"text_field": "a.b.text"}),
        ("a.parquet", table(pa.array(TEXTS), "a.text"), {"text_field": "a.text"}),
        ("a.jsonl", lambda path: path.write_bytes(LINES.replace(b'{"text"', b'{"a.text"')), {"text_field": "a.text"}),
        ("a.json", lambda path: path.write_text(json.dumps([{"a": row} for row in ROWS])), {"text_field": "a.text"}),
        ("a.txt", lambda path: path.write_bytes("\n<|end|>\n".join(TEXTS).encode()), {"separator": "<|end|>"}),
        ("a.txt.zst", lambda path: path.write_bytes(zstd("\f".join(TEXTS).encode())), {"separator": "\f"}),
    ],
)
@pytest.mark.parametrize("single", [False, True])
def test_every_format_gives_the_documents(
    name: str, write: Callable[[Path], object], changes: dict[str, Any], single: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("experiments.data.formats.CHUNK_BYTES", 100)
    monkeypatch.setattr("experiments.data.formats.ROWS_AT_A_TIME", 3)
    write(tmp_path / name)
    spec = specify(tmp_path / name if single else tmp_path, **changes)
    (file,) = find_files(spec).files
    assert [raw and raw.decode() for raw in read_documents(file.path, spec)] == TEXTS


MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because.\n"}]


def test_messages_become_one_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": MESSAGES}) + "\n")
    parquet.write_table(pa.table({"messages": [MESSAGES, None]}), tmp_path / "b.parquet")
    spec = specify(tmp_path, text_field="messages")
    read = [list(read_documents(file.path, spec)) for file in find_files(spec).files]
    assert read == [[b"user: Why?\n\nassistant: Because.\n"], [b"user: Why?\n\nassistant: Because.\n", b""]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(LINES)[:-9], "must be readable; got .*a.jsonl.gz: Compressed file ended"),
        ("a.jsonl.gz", b"not packed", "must be readable; got .*a.jsonl.gz: Not a gzipped file"),
        ("a.jsonl.zst", zstd(LINES)[:-9], "must be readable; got .*a.jsonl.zst: "),
        ("a.json", b'[{"text": "x"}', "a.json must hold JSON; got .*; mend"),
        ("a.json", b'[{"text": 1}]', 'a.json entry 1 must be an object with text.*"text"; got .*; set text_field'),
        ("a.json", b'[{"text": [{"role": "user"}]}]', "entry 1 must be an object with text, or a list of messages"),
        ("a.json", b'{"text": "x"}\n{"te', "a.json line 2 must be a JSON object; got .*; mend or remove the line"),
        ("a.arrow", b"ARROW1 and no more", "must be a readable Arrow file; got .*; write it again"),
        ("a.arrow", b"", "must be a readable Arrow file; got .*; write it again"),
    ],
)
def test_damaged_files_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        list(read_documents(tmp_path / name, specify(tmp_path)))
    assert "\n" not in str(caught.value)


def test_what_is_not_read_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_txt(tmp_path / "text", make_texts())
    for name in ["notes.md", "b.md", "LICENSE", "rows.csv", ".hidden.txt", "0001.txt~", "#0002.txt#", "state.json"]:
        (folder / name).write_text(f"not text of the corpus: {name}")
    (folder / ".git" / "deep").mkdir(parents=True)
    (folder / ".git" / "deep" / "a.txt").write_text("nor this")
    said = "4 hidden or an editor's, 2 .md, 1 .csv, 1 metadata, 1 without a suffix"
    built = build(specify(folder), tmp_path / "cache")
    assert f"{folder}: not read: {said}\n" in capsys.readouterr().err
    assert f"not read     {said}\n" in inspect(built)
    assert Dataset.open(built).manifest["corpus"]["documents"] == len(make_texts())


# Held-out text


def test_held_out_text_of_your_own(tmp_path: Path) -> None:
    """All of it is held out and nothing else, and what is held out is not trained on."""
    texts = make_texts(300)
    train, held_out = write_txt(tmp_path / "train", texts[:200]), write_txt(tmp_path / "held", texts[190:])
    spec = specify(train, validation_source=str(held_out))
    dataset = Dataset.open(build(spec, tmp_path / "cache"))
    counts = dataset.manifest["splits"]
    assert [counts[split]["distinct"] for split in SPLITS] == [190, 110]
    decoder = Tokenizer.from_file(str(dataset.path / "tokenizer.json"))
    for split, own in (("train", texts[:190]), ("validation", texts[190:])):
        ids = all_tokens(dataset, split)
        parts = np.split(ids, dataset.document_starts(split)[1:].astype(np.int64))[:-1]
        assert {decoder.decode(part[:-1].tolist(), skip_special_tokens=False) for part in parts} <= set(own)
    assert dataset.manifest["corpus"]["held_out"] == 10
    assert dataset.manifest["corpus"]["duplicates"] == 0
    assert "10 for training that are held out" in inspect(dataset.path)
    other = build(specify(train), tmp_path / "cache")
    assert Dataset.open(other).sha256 != dataset.sha256


@pytest.mark.parametrize("drop", [False, True])
def test_near_copies_are_not_held_out(drop: bool, tmp_path: Path) -> None:
    """Forty texts are there five times, each time with another first line, beside two hundred others."""
    rng = np.random.default_rng(0)
    bodies = ["\n".join(f"{rng.integers(10**9)} = {rng.integers(10**9)}" for _ in range(40)) for _ in range(40)]
    alone = ["\n".join(f"{rng.integers(10**9)} # {rng.integers(10**9)}" for _ in range(40)) for _ in range(200)]
    texts = [*alone, *(f"# copy {k}\n{body}" for body in bodies for k in range(5))]
    spec = specify(write_txt(tmp_path / "txt", texts), drop_near_copies=drop, validation_tokens=4_000)
    dataset = Dataset.open(build(spec, tmp_path / "cache"))
    held_out = [text for text in expected_documents(texts, "validation") if text.startswith("# copy")]
    assert len(held_out) > 5
    counts = dataset.manifest["splits"]["validation"]
    left = len(expected_documents(texts, "validation")) - drop * len(held_out)
    assert counts["distinct"] == left
    assert dataset.manifest["corpus"].get("near_copies") == (len(held_out) if drop else None)
    assert dataset.manifest["corpus"]["duplicates"] == 0
    ids = all_tokens(dataset, "validation").tolist()
    text = Tokenizer.from_file(str(dataset.path / "tokenizer.json")).decode(ids)
    assert ("# copy" in text) != drop


# Tokenizers


def granite_like() -> Tokenizer:
    """Byte-level with a pattern of its own, more special tokens than one, and another end of text, as Granite 4 has.

    The pattern is the published one of that family of tokenizers; the merges are a few of English.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, "re", "et", "ur", "Ġs", "se", "el"]
    merges = [("r", "e"), ("e", "t"), ("u", "r"), ("Ġ", "s"), ("s", "e"), ("e", "l")]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name) for name in ("<|end_of_text|>", "<|pad|>", "<|start_of_role|>")])
    return made


def byte_fallback() -> Tokenizer:
    """Spaces are written ▁, and a character that is no token as its bytes, as SentencePiece does."""
    tokens = ["<unk>", END_OF_TEXT, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "d", "e", "f", "de", "▁de"]
    merges = [("d", "e"), ("▁", "de")]
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens([END_OF_TEXT])
    return made


def with_nfc() -> Tokenizer:
    made = granite_like()
    made.normalizer = normalizers.NFC()
    return made


@pytest.mark.parametrize(
    ("make", "end"), [(granite_like, "<|end_of_text|>"), (with_nfc, "<|pad|>"), (byte_fallback, END_OF_TEXT)]
)
@pytest.mark.parametrize("vocabulary", [None, 500, 70_000])  # as many as the tokenizer has, and padded
def test_tokenizers_that_lose_nothing(
    make: Callable[[], Tokenizer], end: str, vocabulary: int | None, tmp_path: Path
) -> None:
    made = make()
    (tmp_path / "tokenizer.json").write_text(made.to_str())
    folder = write_txt(tmp_path / "text", make_texts())
    spec = DataConfig(
        source=str(folder), tokenizer=str(tmp_path / "tokenizer.json"), end_of_text=end, train_tokens=12_000,
        vocabulary=vocabulary or made.get_vocab_size(), validation_tokens=400,
    )  # fmt: skip
    dataset = Dataset.open(build(spec, tmp_path / "cache"))
    assert len(dataset.token_bytes()) == spec.vocabulary
    for split in SPLITS:
        ids = all_tokens(dataset, split)
        parts = np.split(ids, np.flatnonzero(ids == made.token_to_id(end)) + 1)[:-1]
        texts = [made.decode(part[:-1].tolist(), skip_special_tokens=False) for part in parts]
        assert texts
        assert set(texts) <= set(make_texts())
        assert dataset.token_bytes()[np.concatenate(parts)].sum() == sum(len(text.encode()) for text in texts)
    assert visible(tmp_path / "cache") == [dataset.path]


def test_a_normalizer_that_changes_the_text_is_refused(tmp_path: Path) -> None:
    """NFC makes one character of e and an accent: legal on texts without such pairs, as above, and not on others."""
    folder = write_txt(tmp_path / "text", [text.replace("é", "e\u0301") for text in make_texts()])
    (tmp_path / "tokenizer.json").write_text(with_nfc().to_str())
    spec = specify(folder, tokenizer=str(tmp_path / "tokenizer.json"), end_of_text="<|pad|>")
    with pytest.raises(ValueError, match=r"the tokenizer must keep every byte; got \d+ bytes of \d+ from"):
        build(spec, tmp_path / "cache")
