"""Random numbers that a key and a position alone decide, so that any batch can be made on its own, in any order.

The arithmetic is written out here, so that no new version of a random generator can change the data.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8  # four make a pseudorandom permutation (Luby and Rackoff 1988); halves of few bits need more
_STEP = 0x9E3779B97F4A7C15  # of SplitMix64's state: 2^64 over the golden ratio


class Draws:
    """Independent streams of random numbers, one for each of n sequences.

    The stream of a sequence is SplitMix64 (Steele, Lea and Flood 2014) from a start that hashes (key, its number). Each
    call goes on where the last one stopped.
    """

    def __init__(self, key: int, sequences: NDArray[np.int64]) -> None:  # [n]
        hashed = mix(np.full(len(sequences), key, np.uint64))
        self._start = mix(hashed ^ sequences.astype(np.uint64))
        self._drawn = 0

    def __len__(self) -> int:
        return len(self._start)

    def fork(self) -> "Draws":
        """Streams of their own, independent of the rest of these."""
        forked = Draws(0, np.zeros(len(self), np.int64))
        forked._start = mix(self._start ^ mix(np.full(len(self), self._drawn, np.uint64)))
        self._drawn += 1
        return forked

    def uniform(self, *shape: int) -> NDArray[np.float64]:
        """[n, *shape] numbers in [0, 1), multiples of 2^-53."""
        count = int(np.prod(shape))
        place = np.arange(self._drawn, self._drawn + count, dtype=np.uint64) * np.uint64(_STEP)
        bits = mix(self._start[:, None] + place) >> np.uint64(11)
        self._drawn += count
        return (bits.astype(np.float64) * 2.0**-53).reshape(len(self._start), *shape)

    def integers(self, size: int, *shape: int) -> NDArray[np.int64]:
        """[n, *shape] whole numbers from 0 to size - 1. Their chances are equal within size * 2^-53."""
        return (self.uniform(*shape) * size).astype(np.int64)

    def subsets(self, size: int, count: int, *shape: int) -> NDArray[np.int64]:
        """[n, *shape, count] different whole numbers from 0 to size - 1; all choices and orders are as likely."""
        assert count <= size, (count, size)
        uniform = self.uniform(*shape, count)
        chosen = np.empty(uniform.shape, np.int64)
        for place in range(count):
            # Choose among the numbers that are left, then step over the smaller ones that were taken.
            number = (uniform[..., place] * (size - place)).astype(np.int64)
            taken = np.sort(chosen[..., :place], axis=-1)
            for other in range(place):
                number += number >= taken[..., other]
            chosen[..., place] = number
        return chosen

    def weighted_subsets(self, weights: NDArray[np.float64], count: int) -> NDArray[np.int64]:
        """[n, count] different indices of `weights`, drawn one after another with chances in proportion to the weights.

        The order of independent exponential times with these rates is such a draw (Efraimidis and Spirakis 2006).
        """
        assert count <= len(weights), (count, len(weights))
        times = -np.log1p(-self.uniform(len(weights))) / weights
        return np.argsort(times, axis=1, kind="stable")[:, :count].astype(np.int64)

    def distinct(
        self, draw: Callable[["Draws", int], NDArray[np.int64]], count: int
    ) -> NDArray[np.int64]:  # [n, count]
        """`count` different numbers a sequence: `draw(stream, m)` gives [n, m] numbers, of which repeats are left out.

        The caller sees to it that there are enough different numbers for this to end soon.
        """
        stream = self.fork()  # so that what follows does not depend on how many numbers other sequences needed
        drawn = draw(stream, 2 * count)
        while True:
            fresh = first_places(drawn) == np.arange(drawn.shape[1])
            if (fresh.sum(1) >= count).all():
                order = np.argsort(~fresh, axis=1, kind="stable")[:, :count]
                return np.take_along_axis(drawn, order, 1)
            drawn = np.concatenate([drawn, draw(stream, drawn.shape[1])], axis=1)


def first_places(values: NDArray[np.int64]) -> NDArray[np.int64]:  # [n, m] -> [n, m]
    """For each number of a row, the place where the row has it for the first time."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, 1)
    begins = np.ones(ordered.shape, bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group_start = np.maximum.accumulate(np.where(begins, np.arange(values.shape[1]), 0), axis=1)
    firsts = np.empty_like(order)
    np.put_along_axis(firsts, order, np.take_along_axis(order, group_start, 1), 1)
    return firsts


def permute(
    place: NDArray[np.int64],  # [n], in 0..size-1
    size: int,
    seed: int,
    epoch: NDArray[np.int64],  # [n]
) -> NDArray[np.int64]:  # [n], in 0..size-1
    """Where each place goes in the permutation of 0..size-1 that seed and epoch decide, computed place by place.

    A Feistel network permutes the numbers below the next power of four; a result outside 0..size-1 is permuted again
    until it is inside (cycle walking, Black and Rogaway 2002), in fewer than four passes on average.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    epoch_key = mix(mix(np.full(len(place), seed, np.int64).view(np.uint64)) ^ epoch.view(np.uint64))
    keys = [mix(epoch_key + np.uint64(number)) for number in range(1, ROUNDS + 1)]
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
        left, right = right, left ^ (mix(right + key) & mask)
    return left << half | right


def mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): every input bit moves every output bit."""
    value = value + np.uint64(_STEP)
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return value ^ value >> np.uint64(31)
