"""Batches depend on (seed, step) alone, and each epoch sees each window once."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from texts import all_tokens

from experiments.data.batches import Batches, held_out
from experiments.data.dataset import Dataset
from experiments.draws import permute


@given(st.integers(1, 3000), st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40))
def test_each_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    places = permute(np.arange(size), size, seed, np.full(size, epoch))
    assert sorted(places.tolist()) == list(range(size))


def chi_square(values: NDArray[np.int64], kinds: int) -> float:
    counts = np.bincount(values, minlength=kinds)
    expected = len(values) / kinds
    return float(((counts - expected) ** 2 / expected).sum())


def test_permutations_are_uniform_and_differ_by_seed_and_epoch() -> None:
    size, trials = 7, 20_000
    epochs = np.repeat(np.arange(trials), size)
    places = permute(np.tile(np.arange(size), trials), size, 0, epochs).reshape(trials, size)
    second = places[:, 1] - (places[:, 1] > places[:, 0])  # its rank among what the first left: 0..size-2
    # Bounds that chance exceeds once in 100,000: 6, 41 and 6 degrees of freedom.
    assert max(chi_square(column, size) for column in places.T) < 33.1
    assert chi_square(places[:, 0] * (size - 1) + second, size * (size - 1)) < 92
    by_seed = [permute(np.zeros(1, np.int64), size, seed, np.zeros(1, np.int64))[0] for seed in range(2000)]
    assert chi_square(np.array(by_seed), size) < 33.1


def test_the_order_stays_what_it_was() -> None:
    """A changed order would change every resumed run; if it must change, raise the dataset's schema."""
    assert permute(np.arange(10), 10, 1, np.zeros(10, np.int64)).tolist() == [5, 8, 0, 9, 4, 2, 7, 3, 1, 6]
    assert permute(np.array([0, 1, 2**29]), 10**9, 2**63 - 1, np.array([3, 3, 4])).tolist() == [
        161674940,
        725760604,
        329803221,
    ]


def test_what_is_permuted_ahead_is_what_each_batch_asks_for(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order, in parts, across epochs and across the ends of what was permuted together."""
    batches = Batches(dataset, sequence_length=50, batch_sequences=20, seed=1)
    monkeypatch.setattr("experiments.data.batches.AHEAD", 1)
    alone = Batches(dataset, sequence_length=50, batch_sequences=20, seed=1)
    expected = [alone.batch(step) for step in range(120)]
    assert alone.sequences_per_epoch < 120 * 20
    monkeypatch.setattr("experiments.data.batches.AHEAD", 170)
    for step in [*range(120), 3, 90, 5, *range(30, 60)]:
        for first, count in ((0, 20), (0, 7), (7, 13), (20, 0)):
            for got, want in zip(batches.batch(step, first, count)[:2], expected[step][:2], strict=True):
                assert (got == want[first : first + count]).all()


@settings(max_examples=15)
@given(length=st.integers(40, 3000), size=st.integers(1, 50), seed=st.integers(0, 2**31))
def test_an_epoch_visits_each_window_once(dataset: Dataset, length: int, size: int, seed: int) -> None:
    batches = Batches(dataset, sequence_length=length, batch_sequences=size, seed=seed)
    n = batches.sequences_per_epoch
    tokens = all_tokens(dataset, "train")
    assert n == (len(tokens) - 1) // length
    steps = [batches.batch(step)[:2] for step in range(-(-2 * n // size))]
    inputs, targets = (np.concatenate(parts)[: 2 * n] for parts in zip(*steps, strict=True))
    assert (inputs[:, 1:] == targets[:, :-1]).all()
    windows = sorted(tokens[i * length : i * length + length + 1].tobytes() for i in range(n))
    seen = [row.tobytes() for row in np.concatenate([inputs, targets[:, -1:]], axis=1)]
    assert sorted(seen[:n]) == sorted(seen[n:]) == windows
    assert n < 10 or seen[:n] != seen[n:]


def test_a_batch_is_the_same_however_the_work_is_split_and_wherever_it_resumes(dataset: Dataset) -> None:
    def fresh(seed: int = 5) -> Batches:
        return Batches(dataset, sequence_length=50, batch_sequences=24, seed=seed)

    uninterrupted = fresh()
    stream = [uninterrupted.batch(step)[:2] for step in range(80)]  # over two epochs
    assert 2 * uninterrupted.sequences_per_epoch < 80 * 24
    for step in (79, 31, 0):
        for part in (1, 5, 8, 24):
            pieces = [fresh().batch(step, first, min(part, 24 - first))[:2] for first in range(0, 24, part)]
            for whole, halves in zip(stream[step], zip(*pieces, strict=True), strict=True):
                assert (np.concatenate(halves) == whole).all()
    assert stream[0][0].dtype == np.int64
    assert not (fresh(6).batch(0)[0] == stream[0][0]).all()
    assert fresh().batch(3, 0, 0)[0].shape == (0, 50)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: Batches(d, sequence_length=40_000, batch_sequences=1, seed=0), "1 to 39999.*got 40000"),
        (lambda d: Batches(d, sequence_length=0, batch_sequences=1, seed=0), "got 0"),
        (lambda d: Batches(d, sequence_length=8, batch_sequences=0, seed=0), "at least 1; got 0"),
        (lambda d: held_out(d, sequence_length=8, sequences=250), "1 to 249.*got 250; lower it"),
        (lambda d: held_out(d, sequence_length=2000, sequences=1), "validation_tokens; got 2000"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(dataset: Dataset, call: Callable[[Dataset], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(dataset)
