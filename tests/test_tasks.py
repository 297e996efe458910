"""Generated tasks: every answer follows from what comes before it, and the distributions are those that are stated."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from experiments.draws import Draws
from experiments.tasks.base import Examples, Generator
from experiments.tasks.mqar import MQAR
from experiments.tasks.registry import generators
from experiments.tasks.stream import HELD_OUT_KEY, GeneratedTask

SETTINGS: dict[str, Generator] = {
    "mqar": MQAR(sequence_length=64, vocabulary=64, pairs=8),
    "mqar, random filler": MQAR(sequence_length=64, vocabulary=64, pairs=8, filler="random"),
    "mqar, long keys": MQAR(sequence_length=90, vocabulary=40, pairs=7, key_length=4, key_vocabulary=3, power=0.5),
}
every_setting = pytest.mark.parametrize("generator", SETTINGS.values(), ids=SETTINGS.keys())


def examples(generator: Generator, count: int = 300, held_out: bool = True) -> Examples:
    return generator.examples(Draws(HELD_OUT_KEY, np.arange(count)), held_out)


def answers(found: Examples) -> Iterator[tuple[list[int], int]]:
    """Every prefix that ends where an answer is due, and the answer."""
    assert found.mask is not None
    for row, place in np.argwhere(found.mask).tolist():
        yield found.inputs[row, : place + 1].tolist(), int(found.targets[row, place])


# Solvers: they read the prefix as a person would, and share no code with the generators.


def solve_mqar(generator: MQAR, prefix: list[int]) -> int:
    """The value after the first place where the key at the end stands as a whole key."""
    last_key = generator._key_tokens
    key: list[int] = []
    for token in reversed(prefix):
        if not 1 <= token <= last_key or len(key) == generator.key_length:
            break
        key.insert(0, token)
    pairs = prefix[: generator.pairs * (generator.key_length + 1)]
    known: dict[tuple[int, ...], int] = {}
    run: list[int] = []
    for token in pairs:
        if 1 <= token <= last_key and not (generator.key_length == 1 and run):
            run.append(token)
        elif run:
            known.setdefault(tuple(run), token)
            run = []
    return known[tuple(key)]


SOLVERS: dict[str, Any] = {"mqar": solve_mqar}


@every_setting
def test_every_answer_follows_from_its_prefix(generator: Generator) -> None:
    """So the best possible accuracy is 1."""
    solve = SOLVERS[generator.kind]
    found = list(answers(examples(generator)))
    assert len(found) >= 300
    assert [solve(generator, prefix) for prefix, _ in found] == [answer for _, answer in found]


@every_setting
def test_tokens_are_of_the_vocabulary_and_every_sequence_has_an_answer(generator: Generator) -> None:
    for held_out in (True, False):
        found = examples(generator, held_out=held_out)
        assert found.inputs.shape == found.targets.shape == (300, generator.sequence_length)
        assert 0 <= found.inputs.min() <= found.inputs.max() < generator.vocabulary
        assert found.inputs.max() >= generator.vocabulary - 2  # nothing of the vocabulary is left over
        mask = np.ones(found.inputs.shape, bool) if found.mask is None else found.mask
        assert mask.any(1).all()
        assert 0 <= found.targets[mask].min() <= found.targets[mask].max() < generator.vocabulary


@every_setting
def test_a_batch_is_a_function_of_seed_and_step(generator: Generator) -> None:
    """In any order, in any parts, and in a task that was made anew, as a resumed run makes it."""
    task = GeneratedTask(generator, "x", batch_sequences=12, seed=5)
    batches = [task.batch(step, 0, 12) for step in range(4)]
    anew = GeneratedTask(generator, "x", batch_sequences=12, seed=5)
    for step in (3, 0, 2):
        for low, high in ((0, 12), (5, 9), (9, 12), (12, 12)):
            for got, want in zip(anew.batch(step, low, high - low), batches[step].rows(low, high), strict=True):
                assert got is want is None or (got == want).all()
    other = GeneratedTask(generator, "x", batch_sequences=12, seed=6)
    assert (other.batch(0, 0, 12).inputs != batches[0].inputs).any()
    assert (batches[1].inputs != batches[0].inputs).any()
    assert (task.held_out.inputs == other.held_out.inputs).all()


@every_setting
def test_a_limited_training_set_is_seen_anew_in_every_epoch(generator: Generator) -> None:
    task = GeneratedTask(replace(generator, train_sequences=30), "x", batch_sequences=10, seed=5)

    def epoch(number: int) -> list[bytes]:
        batches = [task.batch(3 * number + step, 0, 10).inputs for step in range(3)]
        return [row.tobytes() for row in np.concatenate(batches)]

    first, second = epoch(0), epoch(1)
    assert len(set(first)) > 20  # a task with few sequences may repeat one by chance
    assert sorted(first) == sorted(second)
    assert first != second


@every_setting
def test_held_out_sequences_are_not_among_those_of_training(generator: Generator) -> None:
    """Both are drawn from so many that one of 10^5 by 10^3 pairs is equal with a chance below 1e-6."""
    task = GeneratedTask(replace(generator, held_out_sequences=1000), "x", batch_sequences=1000, seed=0)
    held_out = {row.tobytes() for row in task.held_out.inputs}
    trained = {row.tobytes() for step in range(3) for row in task.batch(step, 0, 1000).inputs}
    assert len(held_out) == 1000
    assert len(trained) == 3000
    assert not held_out & trained


PINNED = {
    "mqar": "1-af95bfe39df8",
    "mqar, random filler": "1-1d5ea472ab4b",
    "mqar, long keys": "1-63c7791ee0f2",
}


def test_what_a_version_generates_stays_what_it_was() -> None:
    """Else a resumed run would go on with other data. Whoever changes a generator raises its `version` and this."""
    import hashlib

    found = {}
    for name, generator in SETTINGS.items():
        digest = hashlib.sha256()
        for held_out in (True, False):
            for array in examples(generator, 20, held_out):
                if array is not None:
                    digest.update(np.ascontiguousarray(array).tobytes())
        found[name] = f"{generator.version}-{digest.hexdigest()[:12]}"
    assert found == PINNED


# MQAR


def test_gaps_follow_the_power_law() -> None:
    """The slot of the pair whose slot is drawn first has exactly the stated chances."""
    generator = MQAR(sequence_length=48, vocabulary=64, pairs=4, power=0.3)
    found = examples(generator, 20_000)
    first_keys = found.inputs[:, 0]
    slots = (found.inputs[:, 8:] == first_keys[:, None]).argmax(1) // 2
    weights = np.arange(1, 21) ** (0.3 - 1.0)
    counts = np.bincount(slots, minlength=20)
    assert stats.chisquare(counts, 20_000 * weights / weights.sum()).pvalue > 1e-4


def test_lengths_of_keys_are_uniform_and_keys_differ() -> None:
    generator = MQAR(sequence_length=40, vocabulary=40, pairs=4, key_length=4, key_vocabulary=9)
    keys, lengths = generator._keys(Draws(1, np.arange(20_000)))
    counts = np.bincount(lengths[:, 0], minlength=5)[1:]  # the first key of a sequence repeats none
    assert stats.chisquare(counts).pvalue > 1e-4
    for length in (1, 3):
        tokens = keys[:, 0, :length][lengths[:, 0] == length]
        assert stats.chisquare(np.bincount(tokens[:, -1], minlength=10)[1:]).pvalue > 1e-4
    written = [
        {tuple(key[:length]) for key, length in zip(row, of_row, strict=True)}
        for row, of_row in zip(keys[:1000].tolist(), lengths[:1000].tolist(), strict=True)
    ]
    assert {len(different) for different in written} == {4}


def test_answers_are_spread_evenly_over_the_values() -> None:
    generator = SETTINGS["mqar, long keys"]
    found = examples(generator, 5000)
    counts = np.bincount(found.targets[found.mask], minlength=40)
    assert counts[:4].sum() == 0
    assert stats.chisquare(counts[4:]).pvalue > 1e-4


def test_longer_sets_are_those_of_their_settings() -> None:
    generator = replace(SETTINGS["mqar"], evaluate_pairs=(4, 16), evaluate_lengths=(128,))
    task = GeneratedTask(generator, "recall", 8, 0)
    assert {at: each.inputs.shape[1] for at, each in task.further.items()} == {
        "sequence_length=128": 128,
        "pairs=4": 32,
        "pairs=16": 128,
    }
    for at, found in task.further.items():
        variant = generator.further()[at]
        assert found.positions == variant.pairs * 1280
        assert all(solve_mqar(variant, prefix) == answer for prefix, answer in answers(found.rows(0, 50)))


# Metrics


def test_metrics_are_those_of_the_answers() -> None:
    generator = replace(SETTINGS["mqar, long keys"], held_out_sequences=50, evaluate_pairs=(3,))
    task = GeneratedTask(generator, "recall", 8, 0)
    mask, lengths = task.held_out.mask, task.held_out.group
    assert mask is not None
    assert lengths is not None
    losses = np.where(mask, lengths.astype(float), 1e9)  # what is no answer must not count
    right = np.where(mask, lengths <= 3, False)
    found = task.scores(task.held_out, losses, right)
    flat = lengths[mask]
    assert found["loss"] == pytest.approx(flat.mean())
    assert found["accuracy"] == (flat <= 3).mean()
    assert found["exact"] == np.mean([(row[on] <= 3).all() for row, on in zip(lengths, mask, strict=True)])
    assert found["success"] == 0.0
    assert [found[f"accuracy@key_length={length}"] for length in (1, 2, 3, 4)] == [1, 1, 1, 0]
    assert [found[f"loss@key_length={length}"] for length in (1, 2, 3, 4)] == [1, 2, 3, 4]
    lenient = GeneratedTask(replace(generator, success_accuracy=found["accuracy"]), "recall", 8, 0)
    assert lenient.scores(task.held_out, losses, right)["success"] == 1.0
    further = task.further["pairs=3"]
    assert further.mask is not None
    losses = np.where(further.mask, 2.0, np.nan)
    assert task.scores(further, losses, further.mask, "pairs=3") == {
        "loss@pairs=3": 2.0,
        "accuracy@pairs=3": 1.0,
        "exact@pairs=3": 1.0,
        "success@pairs=3": 1.0,
    }


# Settings


def test_the_identity_of_the_data_is_the_settings() -> None:
    generator = SETTINGS["mqar"]
    assert generator.sha256 == replace(generator).sha256
    assert replace(generator, pairs=7).sha256 != generator.sha256
    assert len({each.sha256 for each in SETTINGS.values()}) == len(SETTINGS)

    class Next(MQAR):
        version = 2

    assert Next(sequence_length=64, vocabulary=64, pairs=8).sha256 != generator.sha256


def test_kinds_are_registered_once() -> None:
    kinds = [cls.kind for cls in generators()]
    assert len(set(kinds)) == len(kinds)
    assert {each.kind for each in SETTINGS.values()} == set(kinds)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"pairs": 17},
            r"sequence_length must be at least 68 \(17 pairs and as many keys, of up to 2 tokens each\)",
        ),
        ({"pairs": 0}, "pairs must be at least 1"),
        (
            {"vocabulary": 16},
            r"7 key tokens give 7 keys of up to 1 tokens; 8, the number of pairs, to 2\^53 are",
        ),
        (
            {"key_vocabulary": 60},
            r"vocabulary must be at least 69 \(a blank, the key tokens, and a value for e",
        ),
        ({"power": 0.0}, "power must be above 0"),
        ({"key_length": 2, "filler": "random", "pairs": 4}, "hides where keys of several tokens begin"),
        ({"sequence_length": 0}, "sequence_length must be 1 to"),
        ({"success_accuracy": 90.0}, "success_accuracy must be above 0 and at most 1; got 90"),
        ({"evaluate_pairs": (40,)}, "a further held-out set: 31 key tokens give 31 keys of up to 1 tokens; 40, the n"),
        ({"evaluate_lengths": (64,)}, "a further held-out set at sequence_length=64 is the task's own; remove it"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MQAR(**({"sequence_length": 64, "vocabulary": 64, "pairs": 8} | settings))


@dataclass(frozen=True, kw_only=True)
class Maskless(Generator):
    kind = "maskless"
    rows_without: int = 0  # sequences without an answer; 0: no mask at all

    def check(self) -> None:
        pass

    def examples(self, draws: Draws, held_out: bool) -> Examples:  # noqa: ARG002
        inputs = draws.integers(self.vocabulary, self.sequence_length)
        mask: NDArray[np.bool_] = np.ones(inputs.shape, bool)
        mask[: self.rows_without] = False
        return Examples(inputs, inputs, mask if self.rows_without else None)


@pytest.mark.parametrize(("rows", "got"), [(0, "none"), (1, "one that leaves sequences without an answer")])
def test_a_task_without_a_mask_is_refused(rows: int, got: str) -> None:
    generator = Maskless(sequence_length=8, vocabulary=5, rows_without=rows)
    with pytest.raises(ValueError, match=f"the task odd must give a mask in which .*; got {got}; correct"):
        GeneratedTask(generator, "odd", 4, 0)


def test_chance_is_what_a_guess_among_the_shown_values_gets() -> None:
    """A model that only learns which values were shown answers 1 in P right; its loss is ln P."""
    generator = SETTINGS["mqar"]
    found = examples(generator, 2000)
    shown = found.inputs[:, 1:16:2]
    rows, places = np.nonzero(found.mask)
    targets = found.targets[rows, places]
    assert (shown[rows] == targets[:, None]).sum(1).tolist() == [1] * len(rows)
    guesses = shown[rows, np.random.default_rng(0).integers(8, size=len(rows))]
    assert (guesses == targets).mean() == pytest.approx(1 / 8, abs=4 * math.sqrt(1 / 8 / len(rows)))
