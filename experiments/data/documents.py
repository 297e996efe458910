"""Documents in the order of their content's hash, without duplicates, in bounded memory.

They are written to disk in buckets by the first bits of the hash; then one bucket at a time is sorted in memory. So
the result depends on the documents' content alone, not on file names, order or format, and memory stays within a few
times the larger of a bucket and the longest document.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Self

from experiments.design.data import SPLITS

# One document in twenty: enough of the 10 MB embedded corpus for a held-out set of 250,000 tokens, while the
# loss of text to train on stays small. Both splits are then cut to the tokens that the specification asks for.
VALIDATION_FRACTION = 0.05

BUCKET_BYTES = 64 * 2**20
MOST_BUCKETS = 128  # two open files each, well below the usual limit of 1024
DIGEST_BYTES = 32
LENGTH_BYTES = 8


def split_of(digest: bytes) -> str:
    """The split of a document, from the last bits of its hash; the first bits decide the order, so the two are
    independent."""
    position = int.from_bytes(digest[-8:], "big") / 2**64
    return "validation" if position < VALIDATION_FRACTION else "train"


class Documents:
    """Documents kept on disk under `folder`: `add` them inside a `with` block, then read `distinct(split)` as often as
    wanted."""

    def __init__(self, folder: Path, corpus_bytes: int) -> None:
        self._buckets = min(MOST_BUCKETS, 1 + corpus_bytes // BUCKET_BYTES)
        self._paths = {split: [folder / f"{split}-{bucket:03d}" for bucket in range(self._buckets)] for split in SPLITS}
        self.added: Counter[str] = Counter()  # by split, duplicates among them
        self._stack = ExitStack()
        self._files: dict[str, list[BinaryIO]] = {
            split: [self._stack.enter_context(path.open("wb")) for path in paths]
            for split, paths in self._paths.items()
        }

    def __enter__(self) -> Self:
        return self

    def add(self, text: bytes) -> None:
        digest = hashlib.sha256(text).digest()
        split = split_of(digest)
        bucket = int.from_bytes(digest[:4], "big") * self._buckets >> 32
        file = self._files[split][bucket]
        file.write(digest + len(text).to_bytes(LENGTH_BYTES, "big"))
        file.write(text)
        self.added[split] += 1

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def distinct(self, split: str) -> Iterator[bytes]:
        for path in self._paths[split]:
            with path.open("rb") as file:
                texts = dict(_records(file))
            for digest in sorted(texts):
                yield texts.pop(digest)


def _records(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    while digest := file.read(DIGEST_BYTES):
        yield digest, file.read(int.from_bytes(file.read(LENGTH_BYTES), "big"))
