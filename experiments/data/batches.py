"""Batches of tokens, which seed and step alone decide, and the fixed held-out set. Needs numpy only.

Legend: T sequence length, n sequences.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.data.dataset import Dataset
from experiments.data.packing import Packing
from experiments.design.data import SPLITS
from experiments.draws import permute
from experiments.tasks.base import Examples

AHEAD = 4096  # sequences whose places are permuted at once: that takes numpy little longer than those of one batch


class Batches:
    """The training stream: epoch after epoch, each a new permutation of the train split's windows.

    Windows hold T + 1 tokens and start T apart, so that every token but the first is a target once an epoch.
    Step k takes batch_sequences sequences from number k * batch_sequences on, and nothing else decides which: so a
    run resumes from its step number, every arm sees the same batches, and ranks and micro-batches may split them in
    any way.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        sequence_length: int,
        batch_sequences: int,
        seed: int,
        most_documents: int | None = None,  # of a sequence, which are kept apart; None: documents are not told apart
    ) -> None:
        if batch_sequences < 1:
            raise ValueError(f"batch_sequences must be at least 1; got {batch_sequences}; raise it")
        self.sequences_per_epoch = _windows(dataset, "train", sequence_length)
        self.batch_sequences = batch_sequences
        self._dataset, self._length, self._seed = dataset, sequence_length, seed
        self._packing = None if most_documents is None else Packing(dataset, "train", sequence_length)
        self._most_documents = most_documents or 1
        self._ahead: NDArray[np.int64] = np.zeros(0, np.int64)  # windows of the sequences from `_first` on
        self._first = 0

    def batch(
        self,
        step: int,  # from 0
        first: int = 0,
        count: int | None = None,
    ) -> Examples:
        """Sequences `first` to `first + count` of a step's batch (all of it: None)."""
        count = self.batch_sequences - first if count is None else count
        assert step >= 0
        assert 0 <= first <= first + count <= self.batch_sequences, (first, count, self.batch_sequences)
        window = self._windows(step * self.batch_sequences + first, count)
        return _examples(self._dataset, "train", window, self._length, self._packing, self._most_documents)

    def _windows(self, first: int, count: int) -> NDArray[np.int64]:  # [n]
        """Where sequences of the stream lie in the split."""
        if not self._first <= first <= first + count <= self._first + len(self._ahead):
            position = first + np.arange(max(count, AHEAD), dtype=np.int64)
            epoch, place = np.divmod(position, self.sequences_per_epoch)
            self._first, self._ahead = first, permute(place, self.sequences_per_epoch, self._seed, epoch)
        return self._ahead[first - self._first :][:count]


class HeldOut(NamedTuple):
    """The first sequences of the validation split."""

    examples: Examples
    bytes_predicted: int  # UTF-8 bytes that the targets that count stand for

    def bits_per_byte(self, loss: float) -> float:
        """Mean loss in nats a target token -> bits a byte of text.

        Exact, because a byte-level token stands for a known number of bytes. The end-of-text token stands for no
        bytes; its loss counts all the same, spread over the bytes of the documents.
        """
        return loss * self.examples.positions / (math.log(2) * self.bytes_predicted)


def held_out(
    dataset: Dataset,
    *,
    sequence_length: int,
    sequences: int,
    most_documents: int | None = None,  # as of `Batches`
) -> HeldOut:
    """The first `sequences` of the validation split: the same for every seed, arm and step.

    Raises ValueError if the split has fewer.
    """
    available = _windows(dataset, "validation", sequence_length)
    if not 1 <= sequences <= available:
        raise ValueError(
            f"held-out sequences must be 1 to {available}, what {dataset.tokens('validation')} validation "
            f"tokens hold at sequence length {sequence_length}; got {sequences}; "
            "lower it or raise validation_tokens"
        )
    packing = None if most_documents is None else Packing(dataset, "validation", sequence_length)
    window = np.arange(sequences)
    examples = _examples(dataset, "validation", window, sequence_length, packing, most_documents or 1)
    counted = examples.targets if examples.mask is None else examples.targets[examples.mask]
    return HeldOut(examples, int(dataset.token_bytes()[counted].sum(dtype=np.int64)))


def most_documents(dataset: Dataset, sequence_length: int) -> int:
    """The most documents that a window of either split holds, counting what its borders cut off as documents.

    Raises ValueError if the data do not say where documents begin.
    """
    if len(dataset.document_starts("train")) < 2:
        raise ValueError(
            "packed keeps documents apart, and these data are one document; give separator, files of single documents, "
            "or tokens with an end of text between documents, or remove packed"
        )
    return max(Packing(dataset, split, sequence_length).most for split in SPLITS)


def _windows(dataset: Dataset, split: str, sequence_length: int) -> int:
    tokens = dataset.tokens(split)
    if not 1 <= sequence_length < tokens:
        raise ValueError(
            f"sequence_length must be 1 to {tokens - 1}, one below {split}_tokens; got {sequence_length}; "
            f"shorten it or raise {split}_tokens"
        )
    return (tokens - 1) // sequence_length


def _examples(
    dataset: Dataset, split: str, window: NDArray[np.int64], length: int, packing: Packing | None, most: int
) -> Examples:
    tokens = dataset.windows(split, window * length, length + 1)
    if packing is None:
        return Examples(tokens[:, :-1], tokens[:, 1:])
    mask, starts = packing.targets_that_count(window), packing.starts(window, most)
    return Examples(tokens[:, :-1], tokens[:, 1:], mask, starts=starts)
