"""Documents in the order of their content's hash, without duplicates, in bounded memory.

They are written to disk in buckets by the first bits of the hash; then one bucket at a time is indexed and read in the
order of the hashes. So the result depends on the documents' content alone, not on file names, order or format, both
writing and reading can be shared out, and a bucket takes DIGEST_BYTES + 24 bytes of memory for each of its documents.

    part-000/train-000 ...   what one process wrote: records of hash, length, text
    part-000/counts.json     written last: the part is all there
    documents.json           written last of all
    left-out                 hashes of held-out documents that are not to be read
"""

import hashlib
import json
from array import array
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from analysis.logs.files import write_atomically, write_json
from experiments.design.data import SPLITS

# One document in twenty: enough of the 10 MB embedded corpus for a held-out set of 250,000 tokens, while the
# loss of text to train on stays small. Both splits are then cut to the tokens that the specification asks for.
VALIDATION_FRACTION = 0.05

BUCKET_BYTES = 16 * 2**20
MOST_BUCKETS = 128  # two open files each, well below the usual limit of 1024
DIGEST_BYTES = 32
DIGEST = f"S{DIGEST_BYTES}"
LENGTH_BYTES = 8
COUNTS = "counts.json"
DOCUMENTS = "documents.json"
LEFT_OUT = "left-out"


def bucket_count(text_bytes: int) -> int:
    return min(MOST_BUCKETS, 1 + text_bytes // BUCKET_BYTES)


def split_of(digest: bytes) -> str:
    """The split of a document, from the last bits of its hash; the first bits decide the order, so the two are
    independent."""
    position = int.from_bytes(digest[-8:], "big") / 2**64
    return "validation" if position < VALIDATION_FRACTION else "train"


class Part:
    """Documents that one process writes: `add` them inside a `with` block, then `finish`."""

    def __init__(self, folder: Path, buckets: int) -> None:
        self.folder, self._buckets = folder, buckets
        self._stack = ExitStack()
        self._files: dict[str, list[BinaryIO]] = {}

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files = {
            split: [self._stack.enter_context(_path(self.folder, split, i).open("wb")) for i in range(self._buckets)]
            for split in SPLITS
        }
        return self

    def add(self, text: bytes, split: str | None = None) -> None:
        """To a split, or to the one that the document's hash decides."""
        digest = hashlib.sha256(text).digest()
        bucket = int.from_bytes(digest[:4], "big") * self._buckets >> 32
        file = self._files[split or split_of(digest)][bucket]
        file.write(digest + len(text).to_bytes(LENGTH_BYTES, "big"))
        file.write(text)

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def finish(self, counts: Mapping[str, int]) -> None:
        write_json(self.folder / COUNTS, counts)


def finished_part(folder: Path) -> dict[str, int] | None:
    """The counts of a part that is all there; None for one that is not."""
    try:
        counts: dict[str, int] = json.loads((folder / COUNTS).read_text())
    except (OSError, ValueError):
        return None
    return counts


def finish(folder: Path, buckets: int, *, held_out_by_name: bool) -> "Documents":
    """Note that all parts are there; and whether held-out text came by name, so that it is not to be trained on."""
    write_json(folder / DOCUMENTS, {"buckets": buckets, "held_out_by_name": held_out_by_name})
    return Documents(folder)


class Documents:
    """The distinct documents of all parts in a folder that is finished, to be read as often as wanted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        noted = json.loads((folder / DOCUMENTS).read_text())
        self.buckets: int = noted["buckets"]
        self._held_out_by_name: bool = noted["held_out_by_name"]
        self._parts = sorted(folder.glob("part-*"))

    def leave_out(self, digests: list[bytes]) -> None:
        """Read these held-out documents no more."""
        write_atomically(self.folder / LEFT_OUT, lambda path: path.write_bytes(b"".join(digests)))

    def text_bytes(self, split: str) -> int:
        """Bytes of a split's documents and their hashes, duplicates among them."""
        paths = (_path(part, split, bucket) for part in self._parts for bucket in range(self.buckets))
        return sum(path.stat().st_size for path in paths)

    def count(self, split: str) -> int:
        """Distinct documents of a split."""
        return sum(len(self._index(split, bucket).digests) for bucket in range(self.buckets))

    def count_held_out(self) -> int:
        """Distinct documents that would be trained on, were they not held out by name."""
        return sum(self._index("train", bucket).left_out for bucket in range(self.buckets))

    def distinct(self, split: str, *, all_held_out: bool = False) -> Iterator[bytes]:
        """Bucket by bucket; with those that `leave_out` leaves out, if `all_held_out`."""
        for bucket in range(self.buckets):
            yield from self.texts(split, bucket, all_held_out=all_held_out)

    def texts(self, split: str, bucket: int, *, all_held_out: bool = False) -> Iterator[bytes]:
        """The distinct documents of a bucket, in order. Raises OSError if one is not what was written."""
        index = self._index(split, bucket, all_held_out=all_held_out)
        with ExitStack() as stack:
            files = [stack.enter_context(_path(part, split, bucket).open("rb")) for part in self._parts]
            for digest, part, offset in zip(*(column.tolist() for column in index[:3]), strict=True):
                file = files[part]
                file.seek(offset)
                text = file.read(int.from_bytes(file.read(LENGTH_BYTES), "big"))
                if hashlib.sha256(text).digest().rstrip(b"\0") != digest:
                    raise OSError(None, "a document is not what was written there", file.name)
                yield text

    def _index(self, split: str, bucket: int, *, all_held_out: bool = False) -> "_Index":
        digests, parts, offsets = bytearray(), array("q"), array("q")
        for number, part in enumerate(self._parts):
            with _path(part, split, bucket).open("rb") as file:
                while digest := file.read(DIGEST_BYTES):
                    digests += digest
                    parts.append(number)
                    offsets.append(file.tell())
                    file.seek(int.from_bytes(file.read(LENGTH_BYTES), "big"), 1)
        # numpy pads with zeros on the right, which changes neither order nor equality of hashes of one length
        found, first = np.unique(np.frombuffer(bytes(digests), DIGEST), return_index=True)
        unwanted: NDArray[np.bytes_] = np.zeros(0, DIGEST)
        if split == "train" and self._held_out_by_name:
            unwanted = self._index("validation", bucket).digests
        if split == "validation" and not all_held_out and (self.folder / LEFT_OUT).exists():
            unwanted = np.fromfile(self.folder / LEFT_OUT, DIGEST)
        kept = ~np.isin(found, unwanted)
        first = first[kept]
        part_of, offset_of = (np.frombuffer(column, np.int64)[first] for column in (parts, offsets))
        return _Index(found[kept], part_of, offset_of, len(found) - len(first))


class _Index(NamedTuple):
    """Of a bucket: its distinct hashes in order, and where the length of each one's text lies."""

    digests: NDArray[np.bytes_]
    parts: NDArray[np.int64]
    offsets: NDArray[np.int64]
    left_out: int


def _path(part: Path, split: str, bucket: int) -> Path:
    return part / f"{split}-{bucket:03d}"
