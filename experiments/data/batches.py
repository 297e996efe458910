"""Batches of tokens, which seed and step alone decide, and the fixed held-out set. Needs numpy only.

Legend: T sequence length, n sequences.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.data.dataset import Dataset

AHEAD = 4096  # sequences whose places are permuted at once: that takes numpy little longer than those of one batch
ROUNDS = 8  # four make a pseudorandom permutation (Luby and Rackoff 1988); halves of few bits need more


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


def permute(
    place: NDArray[np.int64],  # [n], in 0..size-1
    size: int,
    seed: int,
    epoch: NDArray[np.int64],  # [n]
) -> NDArray[np.int64]:  # [n], in 0..size-1
    """Where each place goes in the permutation of 0..size-1 that seed and epoch decide, computed place by place.

    A Feistel network permutes the numbers below the next power of four; a result outside 0..size-1 is permuted again
    until it is inside (cycle walking, Black and Rogaway 2002), in fewer than four passes on average. The arithmetic
    is written out here, so that no new version of a random generator can change the order of the data.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    epoch_key = _mix(_mix(np.full(len(place), seed, np.int64).view(np.uint64)) ^ epoch.view(np.uint64))
    keys = [_mix(epoch_key + np.uint64(number)) for number in range(1, ROUNDS + 1)]
    result = place.astype(np.uint64)
    outside = np.ones(len(place), dtype=bool)
    while outside.any():
        result[outside] = _feistel(result[outside], half, [key[outside] for key in keys])
        outside = result >= size
    return result.astype(np.int64)


def _feistel(value: NDArray[np.uint64], half: np.uint64, keys: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return left << half | right


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): every input bit moves every output bit."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return value ^ value >> np.uint64(31)
