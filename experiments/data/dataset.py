"""A built dataset on disk: memory-mapped shards of token ids, described by manifest.json. Without torch.

    manifest.json               the specification, counts, and each file's length, SHA-256, and CRC-32 of each block
    tokenizer.json              as the Hugging Face library writes it
    token-bytes.bin             uint16 [vocabulary]: the UTF-8 bytes each token stands for
    train-00000.bin ...         token ids, SHARD_TOKENS in each but the last; documents end with end-of-text
    train-documents.bin         uint64: the position of each document's first token
    validation-00000.bin ...    likewise

All numbers are little-endian. Shards of tokens that another project made (pretokenized.py) are not in the folder: the
manifest says in which file each lies, from which byte on and in which type.
"""

import hashlib
import itertools
import json
import os
import random
import re
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from experiments.design.data import SPLITS
from experiments.terminal import bar

SCHEMA = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
TOKEN_BYTES = "token-bytes.bin"
REMEDY = "remove the folder and build the data again"

BLOCK_BYTES = 2**20  # what a run checks of a dataset is a sample of such blocks, of all its files
BLOCKS_CHECKED = 64


def _content_sha256(files: Mapping[str, tuple[int, str]]) -> str:
    """One hash of all files' names, lengths and hashes."""
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def token_type(vocabulary: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocabulary <= 2**16 else "<u4")


class Shard(NamedTuple):
    """Tokens as they lie in a file."""

    path: Path
    offset: int  # bytes before the first token
    tokens: int
    type: np.dtype[Any]

    def read(self) -> NDArray[Any]:  # [tokens], memory-mapped
        return np.memmap(self.path, self.type, "r", self.offset, (self.tokens,))


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.bin"


def documents_name(split: str) -> str:
    return f"{split}-documents.bin"


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_and_hash(path: Path) -> dict[str, Any]:
    """Force a file to disk; returns its length, SHA-256 and each block's CRC-32, as the manifest lists them."""
    digest, checks = hashlib.sha256(), []
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            checks.append(zlib.crc32(block))
        return {"bytes": file.tell(), "sha256": digest.hexdigest(), "crc32": checks}


class Dataset:
    """A dataset to read from; make one with `Dataset.open`.

    `sha256` identifies every byte of the shards and of the tokenizer, wherever the text lay.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], sha256: str) -> None:
        self.path = path
        self.manifest = manifest
        self.sha256 = sha256
        self.vocabulary: int = manifest["spec"]["vocabulary"]
        self.tokenizer_sha256: str = manifest["files"][TOKENIZER]["sha256"]
        self._names = {split: _shard_names(manifest["files"], split) for split in SPLITS}
        self._shards: dict[str, list[NDArray[Any]]] = {
            split: [self._shard(name).read() for name in names] for split, names in self._names.items()
        }
        self._first = {  # the place in its split of each shard's first token
            split: [0, *itertools.accumulate(map(len, parts))][:-1] for split, parts in self._shards.items()
        }

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Check the manifest and the length of each file, without reading the shards.

        Raises ValueError naming what is wrong.
        """
        path = Path(path)
        try:
            raw = (path / MANIFEST).read_bytes()
        except OSError as error:
            raise ValueError(
                f"a dataset must hold {MANIFEST}; got {path}: {error.strerror}; run `dynconv data build`"
            ) from error
        with manifest_errors(path):
            manifest = json.loads(raw)
            schema = manifest["schema"]
            expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
            wanted = {  # the whole file of another project, of which a shard may be a part
                Path(path, entry.get("path", name)): entry.get("file_bytes", entry["bytes"])
                for name, entry in manifest["files"].items()
            }
        if schema != SCHEMA:
            raise ValueError(f"{path / MANIFEST} must have schema {SCHEMA}; got {schema}; {REMEDY}")
        for file, length in wanted.items():
            _check_length(file, length)
        with manifest_errors(path):
            dataset = cls(path, manifest, _content_sha256(expected))
            counted = {split: dataset.tokens(split) for split in SPLITS}
        for split, parts in dataset._shards.items():
            if (got := sum(map(len, parts))) != counted[split]:
                raise ValueError(
                    f"{path / MANIFEST} must count the tokens of its shards; got {counted[split]} for {split}, whose "
                    f"shards hold {got}; {REMEDY}"
                )
        return dataset

    def verify(self) -> None:
        """Read every file and compare it with its checksum. Raises ValueError naming the first that differs."""
        files = self.manifest["files"]
        with bar("verifying", sum(entry["bytes"] for entry in files.values()), "B") as done:
            for name, entry in files.items():
                path, offset = self._place(name)
                _check_length(path, entry.get("file_bytes", entry["bytes"]))
                if (got := _checksum(path, offset, entry["bytes"])) != entry["sha256"]:
                    raise ValueError(f"{path} must have SHA-256 {entry['sha256']}; got {got}; {REMEDY}")
                done.update(entry["bytes"])

    def spot_check(self, seed: str) -> None:
        """Compare BLOCKS_CHECKED blocks, which `seed` chooses, with their checksums: runs together check everything.

        Raises ValueError naming a file that differs, or holds a token outside the vocabulary.
        """
        blocks = [
            (name, number)
            for name, entry in sorted(self.manifest["files"].items())
            for number in range(-(-entry["bytes"] // BLOCK_BYTES))
        ]
        for name, number in random.Random(seed).sample(blocks, min(BLOCKS_CHECKED, len(blocks))):
            (path, offset), entry = self._place(name), self.manifest["files"][name]
            first = offset + number * BLOCK_BYTES
            with path.open("rb") as file:
                file.seek(first)
                block = file.read(min(BLOCK_BYTES, offset + entry["bytes"] - first))
            checks = entry.get("crc32")  # datasets of older versions have none
            if checks and zlib.crc32(block) != checks[number]:
                raise ValueError(
                    f"{path} must be as it was built; got other content in bytes {first} to "
                    f"{first + len(block) - 1}; {REMEDY}"
                )
            if any(name in names for names in self._names.values()):
                self._check_tokens(np.frombuffer(block, self._shard(name).type), name)

    def _place(self, name: str) -> tuple[Path, int]:
        """The path of a file of the manifest, and where in it that begins: of tokens elsewhere, not always at 0."""
        entry = self.manifest["files"][name]
        return Path(self.path, entry.get("path", name)), entry.get("offset", 0)

    def _shard(self, name: str) -> Shard:
        entry = self.manifest["files"][name]
        kind = np.dtype(entry.get("type", token_type(self.vocabulary)))
        return Shard(*self._place(name), entry["bytes"] // kind.itemsize, kind)

    def _check_tokens(self, tokens: NDArray[Any], name: str) -> None:
        if len(tokens) and (largest := int(tokens.max())) >= self.vocabulary:
            raise ValueError(
                f"{self._place(name)[0]} must hold tokens below the vocabulary, {self.vocabulary}; got {largest}; "
                f"{REMEDY}"
            )

    def tokens(self, split: str) -> int:
        """The number of tokens in "train" or "validation"."""
        return int(self.manifest["splits"][split]["tokens"])

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes a token of the train split."""
        train = self.manifest["splits"]["train"]
        return float(train["bytes"] / train["tokens"])

    def token_bytes(self) -> NDArray[np.uint16]:  # [vocabulary]
        """The UTF-8 bytes that each token stands for; zero for end-of-text."""
        return np.fromfile(self.path / TOKEN_BYTES, dtype="<u2")

    def document_starts(self, split: str) -> NDArray[np.uint64]:  # [documents]
        """The position in the split of each document's first token."""
        return np.memmap(self.path / documents_name(split), dtype="<u8", mode="r")

    def windows(
        self,
        split: str,
        starts: NDArray[np.int64],  # [n]
        length: int,
    ) -> NDArray[np.int64]:  # [n, length]
        """The `length` tokens from each start on, across the borders of shards if need be.

        Raises ValueError naming the shard if one is outside the vocabulary.
        """
        assert len(starts) == 0 or 0 <= starts.min() <= starts.max() <= self.tokens(split) - length
        windows = np.empty((len(starts), length), dtype=np.int64)
        shards, first = self._shards[split], self._first[split]
        for window, start in zip(windows, starts.tolist(), strict=True):
            shard, done = bisect_right(first, start) - 1, 0
            while done < length:
                offset = start + done - first[shard]
                part = shards[shard][offset : offset + length - done]
                window[done : done + len(part)] = part
                done += len(part)
                shard += 1
        if windows.size and windows.max() >= self.vocabulary:
            for name, shard_tokens in zip(self._names[split], shards, strict=True):
                self._check_tokens(shard_tokens, name)
        return windows


@contextmanager
def manifest_errors(folder: Path) -> Iterator[None]:
    """Turn errors of this block, which reads the manifest, into a ValueError that names the file: a key is missing, or
    holds something else."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"{folder / MANIFEST} must describe a dataset; got {error!r} while reading it; {REMEDY}"
        ) from error


def _shard_names(files: Mapping[str, Any], split: str) -> list[str]:
    return sorted(name for name in files if re.fullmatch(rf"{split}-[0-9]{{5}}\.bin", name))


def _checksum(path: Path, offset: int, length: int) -> str:
    """The SHA-256 of a stretch of a file, or why it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            file.seek(offset)
            while length and (block := file.read(min(BLOCK_BYTES, length))):
                digest.update(block)
                length -= len(block)
    except OSError as error:
        return str(error.strerror)
    return digest.hexdigest()


def _check_length(path: Path, wanted: int) -> None:
    try:
        got = f"{path.stat().st_size} bytes"
    except OSError as error:
        got = str(error.strerror)
    if got != f"{wanted} bytes":
        raise ValueError(f"{path} must have {wanted} bytes; got {got}; {REMEDY}")
