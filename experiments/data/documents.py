"""Documents in the order of their content's hash, without duplicates, in bounded memory.

They are written to disk in buckets by the first bits of the hash; then one bucket at a time is indexed and read in the
order of the hashes. So the result depends on the documents' content alone, not on file names, order or format, buckets
can be worked on side by side, and a bucket takes DIGEST_BYTES + 16 bytes of memory for each of its documents.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from analysis.logs.files import write_json
from experiments.design.data import SPLITS

# One document in twenty: enough of the 10 MB embedded corpus for a held-out set of 250,000 tokens, while the
# loss of text to train on stays small. Both splits are then cut to the tokens that the specification asks for.
VALIDATION_FRACTION = 0.05

BUCKET_BYTES = 16 * 2**20
MOST_BUCKETS = 128  # two open files each, well below the usual limit of 1024
DIGEST_BYTES = 32
LENGTH_BYTES = 8
COUNTS = "counts.json"  # written last: the documents are all there


def split_of(digest: bytes) -> str:
    """The split of a document, from the last bits of its hash; the first bits decide the order, so the two are
    independent."""
    position = int.from_bytes(digest[-8:], "big") / 2**64
    return "validation" if position < VALIDATION_FRACTION else "train"


class Documents:
    """Documents under `folder`: `add` them inside a `with` block, then `finish`, and read them as often as wanted."""

    def __init__(self, folder: Path, text_bytes: int) -> None:
        self.buckets = min(MOST_BUCKETS, 1 + text_bytes // BUCKET_BYTES)
        self.added: Counter[str] = Counter()  # by split, duplicates among them
        self.folder = folder
        self._stack = ExitStack()
        self._files: dict[str, list[BinaryIO]] = {}

    @classmethod
    def finished(cls, folder: Path) -> tuple[Self, dict[str, Any]] | None:
        """What an earlier process finished in this folder, and the facts it noted; None if it did not."""
        try:
            noted = json.loads((folder / COUNTS).read_text())
        except (OSError, ValueError):
            return None
        documents = cls(folder, 0)
        documents.buckets = noted["buckets"]
        return documents, noted["facts"]

    def __enter__(self) -> Self:
        self._files = {
            split: [self._stack.enter_context(self._path(split, i).open("wb")) for i in range(self.buckets)]
            for split in SPLITS
        }
        return self

    def _path(self, split: str, bucket: int) -> Path:
        return self.folder / f"{split}-{bucket:03d}"

    def add(self, text: bytes) -> None:
        digest = hashlib.sha256(text).digest()
        split = split_of(digest)
        bucket = int.from_bytes(digest[:4], "big") * self.buckets >> 32
        file = self._files[split][bucket]
        file.write(digest + len(text).to_bytes(LENGTH_BYTES, "big"))
        file.write(text)
        self.added[split] += 1

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def finish(self, facts: dict[str, Any]) -> None:
        """Note that all documents are there, and `facts` about them."""
        write_json(self.folder / COUNTS, {"buckets": self.buckets, "facts": facts})

    def text_bytes(self, split: str) -> int:
        """Bytes of a split's documents and their hashes, duplicates among them."""
        return sum(self._path(split, bucket).stat().st_size for bucket in range(self.buckets))

    def count(self, split: str, bucket: int) -> int:
        """Distinct documents of a bucket."""
        return len(self._index(split, bucket)[0])

    def texts(self, split: str, bucket: int) -> Iterator[bytes]:
        """The distinct documents of a bucket, in order. Raises OSError if one is not what was written."""
        digests, offsets = self._index(split, bucket)
        with self._path(split, bucket).open("rb") as file:
            for digest, offset in zip(digests.tolist(), offsets.tolist(), strict=True):
                file.seek(offset)
                text = file.read(int.from_bytes(file.read(LENGTH_BYTES), "big"))
                if hashlib.sha256(text).digest().rstrip(b"\0") != digest:
                    raise OSError(None, "a document is not what was written there", file.name)
                yield text

    def distinct(self, split: str) -> Iterator[bytes]:
        for bucket in range(self.buckets):
            yield from self.texts(split, bucket)

    def _index(self, split: str, bucket: int) -> tuple[NDArray[np.bytes_], NDArray[np.int64]]:
        """The distinct hashes in order, and where the length of each one's text lies."""
        digests, offsets = bytearray(), array("q")
        with self._path(split, bucket).open("rb") as file:
            while digest := file.read(DIGEST_BYTES):
                digests += digest
                offsets.append(file.tell())
                file.seek(int.from_bytes(file.read(LENGTH_BYTES), "big"), 1)
        # numpy pads with zeros on the right, which changes neither order nor equality of hashes of one length
        found, first = np.unique(np.frombuffer(bytes(digests), f"S{DIGEST_BYTES}"), return_index=True)
        return found, np.frombuffer(offsets, np.int64)[first]
