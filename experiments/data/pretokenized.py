"""Tokens that another project made, read where they lie: a dataset of them is an index in the cache, not a copy.

    uint16, uint32    tokens and nothing else, as the prepare.py of github.com/karpathy/nanoGPT writes
    llm.c             a header of 256 int32 (magic, version, number of tokens), then the tokens:
                      github.com/karpathy/llm.c, dev/data/data_common.py, and the shards of modded-nanogpt
    megatron          X.bin with X.idx, the IndexedDataset of Megatron-LM: megatron/core/datasets/readme.md

The identity of such data is the hash of the tokens that are used, by file and as so many bits each: wherever they lie,
and with a header or without one.
"""

import dataclasses
import hashlib
import json
import shutil
import socket
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.logs.files import write_atomically
from experiments.data import hub
from experiments.data import tokenizer as bpe
from experiments.data.dataset import (
    BLOCK_BYTES,
    MANIFEST,
    SCHEMA,
    TOKEN_BYTES,
    TOKENIZER,
    Shard,
    documents_name,
    shard_name,
    sync_and_hash,
)
from experiments.design.data import SPLITS, DataConfig
from experiments.terminal import bar

LLM_C_HEADER_BYTES = 256 * 4
LLM_C_TYPES = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # (magic, version)
MEGATRON_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the type, sequences, entries of the documents
MEGATRON_MAGIC = b"MMIDIDX\0\0"
MEGATRON_TYPES = {8: "<u2", 4: "<u4"}  # uint16; and int32, whose tokens are not negative


class Tokens(NamedTuple):
    """A stretch of tokens, and where in it documents begin, if the format has an index that says so."""

    shard: Shard
    starts: NDArray[np.int64] | None


def find_tokens(spec: DataConfig) -> dict[str, list[Tokens]]:
    """Split -> the stretches of tokens that it takes, in their order. Reads headers and indices only.

    The held-out text is the beginning of `validation_source`, or else the end of the source. Raises ValueError if a
    file is not of the format, or there are too few tokens.
    """
    held_out = [] if spec.validation_source is None else _files(spec.validation_source, spec)
    train = [_open(path, spec) for path in _files(spec.source, spec) if path not in held_out]
    available = sum(tokens.shard.tokens for tokens in train)
    if spec.validation_source is None:
        available -= spec.validation_tokens
        taken = _take(train, max(0, available), spec.validation_tokens)
    else:
        taken = _take([_open(path, spec) for path in held_out], 0, spec.validation_tokens)
        if (got := sum(tokens.shard.tokens for tokens in taken)) < spec.validation_tokens:
            raise ValueError(
                f"validation_tokens must be at most what validation_source holds; got {spec.validation_tokens}, "
                f"{spec.validation_source} has {got}; lower validation_tokens"
            )
    if spec.train_tokens > available:
        beside = "" if held_out else " beside the validation_tokens at its end"
        raise ValueError(
            f"train_tokens must be at most what the source holds{beside}; got {spec.train_tokens}, {spec.source} has "
            f"{max(0, available)}; lower train_tokens or add files"
        )
    return {"train": _take(train, 0, spec.train_tokens), "validation": taken}


def index(spec: DataConfig, cache: Path) -> Path:
    """The folder in `cache` with the index of the tokens of `spec`, made unless it is there already: every token is
    compared with the vocabulary, and hashed. Raises ValueError naming a file that holds others."""
    tokenizer_json = bpe.read(spec)
    found = find_tokens(spec)
    paths = list(dict.fromkeys(tokens.shard.path for split in SPLITS for tokens in found[split]))
    as_they_are = _state(paths)
    settings = dataclasses.asdict(spec) | {"source": None, "validation_source": None, "tokenizer": None}
    key = [SCHEMA, settings, hashlib.sha256(tokenizer_json).hexdigest(), list(map(str, paths))]
    known = cache / f".{_hash([key, as_they_are])}.content"  # files that nobody wrote to are not read again
    if known.exists() and (cache / known.read_text()).exists():
        return cache / known.read_text()
    working = Path(tempfile.mkdtemp(prefix=f".tokens.{socket.gethostname()}.", dir=cache))
    try:
        dataset = working / "dataset"  # not as private as a temporary folder is
        dataset.mkdir()
        manifest = _write(dataset, spec, found, tokenizer_json)
        if _state(paths) != as_they_are:
            raise ValueError(
                f"the tokens must stay as they are while they are read; got changes under {spec.source}; "
                "build again when nothing writes there"
            )
        hashes = [entry["sha256"] for entry in manifest["files"].values()]
        target = cache / f"tokens-{spec.vocabulary}-{_hash([key, hashes])}"
        (dataset / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        sync_and_hash(dataset / MANIFEST)
        try:
            dataset.replace(target)
        except OSError:  # there is one: of another process, or of an earlier one, whose files were touched since
            if not target.exists():
                raise
    finally:
        shutil.rmtree(working, ignore_errors=True)
    write_atomically(known, lambda path: path.write_text(target.name))
    return target


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _state(paths: list[Path]) -> list[list[int]]:
    return [[(status := path.stat()).st_size, status.st_mtime_ns] for path in paths]


def _files(place: str, spec: DataConfig) -> list[Path]:
    """The .bin files of a folder, one file, those that a pattern fits, or Megatron's prefix of a file; by name."""
    path = Path(place).expanduser()
    with_suffix = path.with_name(f"{path.name}.bin")
    if path.is_dir():
        found = sorted(path.glob("*.bin"))
    elif path.exists() or with_suffix.exists():
        found = [path if path.exists() else with_suffix]
    else:
        found = sorted(path.parent.glob(path.name))
    if not found:
        raise ValueError(
            f'the tokens of pretokenized = "{spec.pretokenized}" must be .bin files; got none at {place}; give their '
            "folder, or a pattern such as tokens/train_*.bin"
        )
    return [file.resolve() for file in found]


def _open(path: Path, spec: DataConfig) -> Tokens:
    try:
        size = path.stat().st_size
        if spec.pretokenized == "megatron":
            return _open_megatron(path, size)
        if spec.pretokenized == "llm.c":
            return Tokens(_open_llm_c(path, size), None)
        return Tokens(_open_plain(path, size, "<u2" if spec.pretokenized == "uint16" else "<u4"), None)
    except OSError as error:
        raise ValueError(f"{path} must be readable; got {error.strerror}; mend or remove it") from error


def _open_plain(path: Path, size: int, kind: str) -> Shard:
    with path.open("rb") as file:
        begins = file.read(BLOCK_BYTES)
    if _llm_c_type(begins) is not None:
        raise ValueError(f'{path} must hold tokens only; got a header of llm.c; set pretokenized = "llm.c"')
    if path.with_suffix(".idx").exists():
        raise ValueError(f'{path} must hold tokens only; got an index beside it; set pretokenized = "megatron"')
    pairs = np.frombuffer(begins[: len(begins) // 4 * 4], "<u2").reshape(-1, 2)
    if kind == "<u2" and len(pairs) > 8 and pairs[:, 0].any() and not pairs[:, 1].any():
        raise ValueError(
            f'{path} must hold numbers of 16 bits; got zero as every second one; set pretokenized = "uint32"'
        )
    tokens, rest = divmod(size, np.dtype(kind).itemsize)
    if rest:
        raise ValueError(
            f"{path} must hold whole tokens of {np.dtype(kind).itemsize} bytes; got {size} bytes; copy it again"
        )
    return Shard(path, 0, tokens, np.dtype(kind))


def _open_llm_c(path: Path, size: int) -> Shard:
    with path.open("rb") as file:
        header = file.read(LLM_C_HEADER_BYTES)
    kind = _llm_c_type(header)
    if kind is None or len(header) < LLM_C_HEADER_BYTES:
        raise ValueError(
            f"{path} must begin with a header of llm.c (magic and version {', '.join(map(str, LLM_C_TYPES))}); got "
            f'{header[:8].hex(" ") or "nothing"}; give other files, or another format than pretokenized = "llm.c"'
        )
    tokens = struct.unpack_from("<i", header, 8)[0]
    if size != LLM_C_HEADER_BYTES + tokens * kind.itemsize:
        raise ValueError(
            f"{path} must have the {tokens} tokens of its header, {LLM_C_HEADER_BYTES + tokens * kind.itemsize} bytes; "
            f"got {size}; copy it again"
        )
    return Shard(path, LLM_C_HEADER_BYTES, tokens, kind)


def _llm_c_type(header: bytes) -> np.dtype[Any] | None:
    kind = LLM_C_TYPES.get(struct.unpack_from("<ii", header)) if len(header) >= 8 else None
    return None if kind is None else np.dtype(kind)


def _open_megatron(path: Path, size: int) -> Tokens:
    """The whole file, whose sequences must follow one another; documents begin where the index says."""
    place = path.with_suffix(".idx")
    if not place.exists():
        raise ValueError(f"{path} must have its index beside it; got no {place.name}; copy both")
    raw = place.read_bytes()
    magic, version, code, sequences, entries = (
        MEGATRON_HEADER.unpack_from(raw) if len(raw) >= MEGATRON_HEADER.size else (b"", 0, 0, 0, 0)
    )
    if magic != MEGATRON_MAGIC or version != 1 or len(raw) < MEGATRON_HEADER.size + 12 * sequences + 8 * entries:
        raise ValueError(f"{place} must be a whole index of Megatron-LM, version 1; got another file; copy it again")
    if code not in MEGATRON_TYPES:
        raise ValueError(
            f"{path} must hold uint16 or int32 (Megatron's codes 8 and 4); got code {code}; convert the file"
        )
    kind = np.dtype(MEGATRON_TYPES[code])
    lengths = np.frombuffer(raw, "<i4", sequences, MEGATRON_HEADER.size)
    pointers = np.frombuffer(raw, "<i8", sequences, MEGATRON_HEADER.size + 4 * sequences)
    documents = np.frombuffer(raw, "<i8", entries, MEGATRON_HEADER.size + 12 * sequences)
    ends = np.cumsum(lengths, dtype=np.int64)
    first = np.concatenate([[0], ends])
    in_order = (pointers == first[:-1] * kind.itemsize).all() and (lengths >= 0).all()
    if not in_order or size != first[-1] * kind.itemsize or not ((documents >= 0) & (documents <= sequences)).all():
        raise ValueError(
            f"{path} must hold the sequences of its index one after another; got {size} bytes for {first[-1]} tokens "
            "in another order or number; merge or copy it again"
        )
    starts = np.unique(first[documents])
    return Tokens(Shard(path, 0, int(first[-1]), kind), starts[starts < first[-1]])


def _take(found: list[Tokens], skip: int, wanted: int) -> list[Tokens]:
    """`wanted` tokens after the first `skip`; fewer if there are no more."""
    taken = []
    for (path, offset, tokens, kind), starts in found:
        low, high = min(skip, tokens), min(skip + wanted, tokens)
        skip, wanted = skip - low, wanted - (high - low)
        if high > low:
            if starts is not None:
                starts = starts[(starts >= low) & (starts < high)] - low
            taken.append(Tokens(Shard(path, offset + low * kind.itemsize, high - low, kind), starts))
    return taken


def _write(folder: Path, spec: DataConfig, found: dict[str, list[Tokens]], tokenizer_json: bytes) -> dict[str, Any]:
    """Write what the tokens lack for a dataset; returns the manifest."""
    coder = bpe.load(tokenizer_json, spec.vocabulary, spec.end_of_text)
    (folder / TOKENIZER).write_bytes(tokenizer_json)
    (folder / TOKEN_BYTES).write_bytes(coder.token_bytes.astype("<u2").tobytes())
    files, splits = {}, {}
    total = sum(tokens.shard.tokens * tokens.shard.type.itemsize for split in SPLITS for tokens in found[split])
    with bar("checking the tokens", total, "B") as done:
        for split in SPLITS:
            checked = []
            for number, tokens in enumerate(found[split]):
                checked.append(_check(tokens.shard, spec.vocabulary, coder, done.update))
                files[shard_name(split, number)] = checked[-1].entry
            starts = _starts(found[split], checked)
            (folder / documents_name(split)).write_bytes(starts.astype("<u8").tobytes())
            splits[split] = {
                "tokens": sum(tokens.shard.tokens for tokens in found[split]),
                "bytes": sum(each.text_bytes for each in checked),
                "documents": len(starts),
                "ends_of_text": sum(len(each.ends) for each in checked),
            }
    paths = {tokens.shard.path for split in SPLITS for tokens in found[split]}
    return {
        "schema": SCHEMA,
        "spec": dataclasses.asdict(spec),
        "python": None,
        "corpus": {"files": len(paths), "bytes": total},
        "origins": hub.origins(spec),
        "not_read": {},
        "splits": splits,
        "files": files | {path.name: sync_and_hash(path) for path in sorted(folder.iterdir())},
    }


class _Checked(NamedTuple):
    entry: dict[str, Any]  # of the manifest
    text_bytes: int
    ends: NDArray[np.int64]  # places of the end-of-text token


def _check(shard: Shard, vocabulary: int, coder: bpe.Coder, report: Any) -> _Checked:
    """Read a stretch once: its hashes, text and documents. Raises ValueError at a token outside the vocabulary."""
    digest, checks, text_bytes, ends = hashlib.sha256(), list[int](), 0, list[NDArray[np.int64]]()
    for place, block in _blocks(shard):
        if (largest := int(block.max())) >= vocabulary:
            raise ValueError(
                f"{shard.path} must hold tokens below the vocabulary, {vocabulary}; got {largest}; set vocabulary, or "
                "pretokenized to the format that it has"
            )
        raw = block.tobytes()
        digest.update(raw)
        checks.append(zlib.crc32(raw))
        text_bytes += int(coder.token_bytes[block].sum(dtype=np.int64))
        ends.append(np.flatnonzero(block == coder.end_of_text) + place)
        report(len(raw))
    entry = {
        "bytes": shard.tokens * shard.type.itemsize,
        "sha256": digest.hexdigest(),
        "crc32": checks,
        "path": str(shard.path),
        "offset": shard.offset,
        "type": shard.type.str,
        "file_bytes": shard.path.stat().st_size,
    }
    return _Checked(entry, text_bytes, np.concatenate(ends))


def _blocks(shard: Shard) -> Iterator[tuple[int, NDArray[Any]]]:
    tokens = shard.read()
    at_a_time = BLOCK_BYTES // shard.type.itemsize
    for place in range(0, shard.tokens, at_a_time):
        yield place, np.asarray(tokens[place : place + at_a_time])


def _starts(found: list[Tokens], checked: list[_Checked]) -> NDArray[np.int64]:
    """Where documents of a split begin: by the index; or at ends of text, if the split begins with one, as llm.c has
    it, or else after them."""
    starts, before = [np.zeros(1, np.int64)], 0
    separators_first = bool(len(checked[0].ends)) and checked[0].ends[0] == 0
    for tokens, each in zip(found, checked, strict=True):
        own = tokens.starts if tokens.starts is not None else each.ends + (0 if separators_first else 1)
        starts.append(own + before)
        before += tokens.shard.tokens
    every = np.unique(np.concatenate(starts))
    return every[every < before]
