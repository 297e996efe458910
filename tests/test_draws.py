"""Random numbers by key and position: their distributions, and that a sequence's numbers are its own alone."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from experiments.draws import Draws, first_places

KEY = 12


def draws(count: int = 20_000) -> Draws:
    return Draws(KEY, np.arange(count))


def p_value(counts: NDArray[np.int64], chances: NDArray[np.float64]) -> float:
    return float(stats.chisquare(counts, chances * counts.sum()).pvalue)


def test_numbers_are_uniform_and_independent_of_their_neighbours() -> None:
    """Neighbours in a stream, and equal places of neighbouring sequences and keys."""
    numbers = Draws(KEY, np.arange(2000)).uniform(50)
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-4
    assert numbers.min() >= 0
    assert numbers.max() < 1
    other_key = Draws(KEY + 1, np.arange(2000)).uniform(50)
    for one, other in ((numbers[:, :-1], numbers[:, 1:]), (numbers[:-1], numbers[1:]), (numbers, other_key)):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 4.5 / np.sqrt(one.size)


def test_every_ordered_choice_is_as_likely() -> None:
    chosen = draws().subsets(4, 3)
    code = chosen @ [16, 4, 1]
    legal = [16 * a + 4 * b + c for a, b, c in itertools.permutations(range(4), 3)]
    counts = np.bincount(code, minlength=64)
    assert counts[legal].sum() == len(chosen)
    assert p_value(counts[legal], np.full(24, 1 / 24)) > 1e-4
    whole = draws(50).subsets(9, 9, 2)
    assert whole.shape == (50, 2, 9)
    assert (np.sort(whole, axis=2) == np.arange(9)).all()


def test_weighted_choices_are_drawn_one_after_another() -> None:
    weights = np.array([5.0, 1.0, 3.0])
    chosen = draws().weighted_subsets(weights, 2)
    total = weights.sum()
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    chances = np.array([weights[i] / total * weights[j] / (total - weights[i]) for i, j in pairs])
    counts = np.array([((chosen == pair).all(1)).sum() for pair in pairs])
    assert p_value(counts, chances) > 1e-4


def test_first_places_are_those_of_a_loop() -> None:
    values = draws(200).integers(5, 12)
    want = [[row.index(value) for value in row] for row in values.tolist()]
    assert first_places(values).tolist() == want


def test_distinct_numbers_are_the_first_different_ones_of_the_stream() -> None:
    count = 4
    stream = draws(500).fork()
    long = stream.integers(6, 8)  # as many as one call of `distinct` draws at first
    got = draws(500).distinct(lambda each, m: each.integers(6, m), count)
    for row, numbers in zip(got.tolist(), long.tolist(), strict=True):
        different = list(dict.fromkeys(numbers))
        assert row[: len(different[:count])] == different[:count]
        assert len(set(row)) == count


@pytest.mark.parametrize("rows", [[7], [3, 7, 1], list(range(40))])
def test_a_sequence_does_not_depend_on_its_company(rows: list[int]) -> None:
    """Not even where others need more numbers to find different ones."""

    def everything(streams: Draws) -> list[NDArray[np.int64]]:
        different = streams.distinct(lambda each, m: each.integers(5, m), 4)
        return [different, streams.integers(1000, 3), streams.subsets(10, 4)]

    alone = everything(Draws(KEY, np.array([7])))
    together = everything(Draws(KEY, np.array(rows)))
    for one, many in zip(alone, together, strict=True):
        assert (many[rows.index(7)] == one[0]).all()
