"""Batches of tokens, which seed and step alone decide, and the fixed held-out set. Needs numpy only.

Legend: T sequence length, n sequences.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.data.dataset import Dataset
from experiments.draws import permute

AHEAD = 4096  # sequences whose places are permuted at once: that takes numpy little longer than those of one batch


class Batches:
    """The training stream: epoch after epoch, each a new permutation of the train split's windows.

    Windows hold T + 1 tokens and start T apart, so that every token but the first is a target once an epoch.
    Step k takes batch_sequences sequences from number k * batch_sequences on, and nothing else decides which: so a
    run resumes from its step number, every arm sees the same batches, and ranks and micro-batches may split them in
    any way.
    """

    def __init__(self, dataset: Dataset, *, sequence_length: int, batch_sequences: int, seed: int) -> None:
        if batch_sequences < 1:
            raise ValueError(f"batch_sequences must be at least 1; got {batch_sequences}; raise it")
        self.sequences_per_epoch = _windows(dataset, "train", sequence_length)
        self.batch_sequences = batch_sequences
        self._dataset, self._length, self._seed = dataset, sequence_length, seed
        self._ahead: NDArray[np.int64] = np.zeros(0, np.int64)  # windows of the sequences from `_first` on
        self._first = 0

    def batch(
        self,
        step: int,  # from 0
        first: int = 0,
        count: int | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # [n, T], [n, T]
        """Inputs and targets of sequences `first` to `first + count` of a step's batch (all of it: None)."""
        count = self.batch_sequences - first if count is None else count
        assert step >= 0
        assert 0 <= first <= first + count <= self.batch_sequences, (first, count, self.batch_sequences)
        window = self._windows(step * self.batch_sequences + first, count)
        return _inputs_and_targets(self._dataset, "train", window, self._length)

    def _windows(self, first: int, count: int) -> NDArray[np.int64]:  # [n]
        """Where sequences of the stream lie in the split."""
        if not self._first <= first <= first + count <= self._first + len(self._ahead):
            position = first + np.arange(max(count, AHEAD), dtype=np.int64)
            epoch, place = np.divmod(position, self.sequences_per_epoch)
            self._first, self._ahead = first, permute(place, self.sequences_per_epoch, self._seed, epoch)
        return self._ahead[first - self._first :][:count]


class HeldOut(NamedTuple):
    """The first sequences of the validation split."""

    inputs: NDArray[np.int64]  # [n, T]
    targets: NDArray[np.int64]  # [n, T]
    bytes_predicted: int  # UTF-8 bytes that the targets stand for

    def bits_per_byte(self, loss: float) -> float:
        """Mean loss in nats a target token -> bits a byte of text.

        Exact, because a byte-level token stands for a known number of bytes. The end-of-text token stands for no
        bytes; its loss counts all the same, spread over the bytes of the documents.
        """
        return loss * self.targets.size / (math.log(2) * self.bytes_predicted)


def held_out(dataset: Dataset, *, sequence_length: int, sequences: int) -> HeldOut:
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
    inputs, targets = _inputs_and_targets(dataset, "validation", np.arange(sequences), sequence_length)
    return HeldOut(inputs, targets, int(dataset.token_bytes()[targets].sum(dtype=np.int64)))


def _windows(dataset: Dataset, split: str, sequence_length: int) -> int:
    tokens = dataset.tokens(split)
    if not 1 <= sequence_length < tokens:
        raise ValueError(
            f"sequence_length must be 1 to {tokens - 1}, one below {split}_tokens; got {sequence_length}; "
            f"shorten it or raise {split}_tokens"
        )
    return (tokens - 1) // sequence_length


def _inputs_and_targets(
    dataset: Dataset, split: str, window: NDArray[np.int64], length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    tokens = dataset.windows(split, window * length, length + 1)
    return tokens[:, :-1], tokens[:, 1:]
