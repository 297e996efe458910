"""Packed documents: where they begin within the windows of a split, so that none sees another. Needs numpy only.

A window keeps its tokens; what a border of it cuts off a document is a document of its own. The first token of a
document is no target, because nothing of its own document precedes it: so the loss is that of the documents apart.

Legend: T sequence length, n windows, K the most documents of a window.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.data.dataset import Dataset

BLOCK = 2**16  # windows that are counted at once


class Packing:
    """The documents of a split, by window."""

    def __init__(self, dataset: Dataset, split: str, sequence_length: int) -> None:
        self._starts = dataset.document_starts(split)
        self._length = sequence_length
        self.most = 1  # K
        for windows, inside in _blocks(dataset, split, sequence_length):
            within = inside[inside % sequence_length > 0] // sequence_length
            self.most = max(self.most, 1 + int(np.bincount(within, minlength=windows).max()))

    def starts(
        self,
        window: NDArray[np.int64],  # [n]: their numbers
        most: int,  # K, of this split or a larger one
    ) -> NDArray[np.int64]:  # [n, K]
        """Where documents begin in each window, the first at 0, in order, and T where there are fewer than K."""
        found = np.full((len(window), most), self._length, dtype=np.int64)
        found[:, 0] = 0
        for row, inside in zip(found, self._inside(window), strict=True):
            row[1 : 1 + len(inside)] = inside
        return found

    def targets_that_count(
        self,
        window: NDArray[np.int64],  # [n]
    ) -> NDArray[np.bool_]:  # [n, T]
        """False where the target, the token after the input, is the first of a document."""
        mask = np.ones((len(window), self._length), dtype=bool)
        for row, inside in zip(mask, self._inside(window, with_next=True), strict=True):
            row[inside - 1] = False
        return mask

    def _inside(self, window: NDArray[np.int64], with_next: bool = False) -> list[NDArray[np.int64]]:
        """Where documents begin in each window but at its first token; `with_next`, also at the token after it."""
        begin = window * self._length
        low = np.searchsorted(self._starts, begin.astype(np.uint64), side="right")
        end = (begin + self._length + with_next).astype(np.uint64)
        high = np.searchsorted(self._starts, end, side="left")
        spans = zip(low.tolist(), high.tolist(), begin.tolist(), strict=True)
        return [self._starts[first:last].astype(np.int64) - start for first, last, start in spans]


class Share(NamedTuple):
    """What of a split's windows is within documents."""

    documents_per_sequence: float
    attention: float  # the sum of squared lengths of documents, over that of whole windows
    targets: float  # that count


@lru_cache(maxsize=8)  # All runs of a size that are submitted together ask for the same.
def share_within_documents(dataset: Dataset, sequence_length: int) -> Share:
    """The means over all windows of the train split."""
    total, documents, squares, first = 0, 0, 0.0, 0
    for windows, inside in _blocks(dataset, "train", sequence_length):
        end = windows * sequence_length
        borders = np.arange(0, end + 1, sequence_length, dtype=np.int64)
        lengths = np.diff(np.union1d(inside[inside < end], borders))
        total, documents = total + windows, documents + len(lengths)
        squares += float((lengths.astype(np.float64) ** 2).sum())
        first += len(inside)
    return Share(documents / total, squares / (total * sequence_length**2), 1 - first / (total * sequence_length))


def _blocks(dataset: Dataset, split: str, sequence_length: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Numbers of consecutive windows, and where documents begin in each such block: above 0, at most at its end."""
    starts = dataset.document_starts(split)
    windows = (dataset.tokens(split) - 1) // sequence_length
    for low in range(0, windows, BLOCK):
        high = min(low + BLOCK, windows)
        edges = np.array([low * sequence_length, high * sequence_length], dtype=np.uint64)
        first, last = np.searchsorted(starts, edges, side="right")
        yield high - low, starts[first:last].astype(np.int64) - low * sequence_length
