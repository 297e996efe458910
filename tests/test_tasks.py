"""Generated tasks: every answer follows from what comes before it, and the distributions are those that are stated."""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from experiments.draws import Draws
from experiments.tasks.base import Examples, Generator
from experiments.tasks.compression import Compression
from experiments.tasks.fuzzy_recall import FuzzyRecall
from experiments.tasks.in_context_recall import InContextRecall, NoisyRecall
from experiments.tasks.memorize import Memorize
from experiments.tasks.mqar import MQAR
from experiments.tasks.selective_copying import SelectiveCopying
from experiments.tasks.stream import HELD_OUT_KEY, GeneratedTask

SETTINGS: dict[str, Generator] = {
    "mqar": MQAR(sequence_length=64, vocabulary=64, pairs=8),
    "mqar, random filler": MQAR(sequence_length=64, vocabulary=64, pairs=8, filler="random"),
    "mqar, long keys": MQAR(sequence_length=90, vocabulary=40, pairs=7, key_length=4, key_vocabulary=3, power=0.5),
    "in-context recall": InContextRecall(sequence_length=64, vocabulary=17),
    "noisy recall": NoisyRecall(sequence_length=64, vocabulary=24, noise=0.4, noise_vocabulary=8),
    "fuzzy recall": FuzzyRecall(sequence_length=64, vocabulary=12),
    "fuzzy recall, answers": FuzzyRecall(sequence_length=65, vocabulary=9, value_length=2, train_on="answers"),
    "selective copying": SelectiveCopying(sequence_length=50, vocabulary=7, tokens_to_copy=8),
    "compression": Compression(sequence_length=20, vocabulary=7),
    "memorize": Memorize(sequence_length=32, vocabulary=64),
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


def solve_recall(_: InContextRecall, prefix: list[int]) -> int:
    """The token that first followed the last one, which is a key and stands at an even place."""
    *before, key = prefix
    assert len(before) % 2 == 0
    return next(value for token, value in zip(before[::2], before[1::2], strict=True) if token == key)


def solve_fuzzy(generator: FuzzyRecall, prefix: list[int]) -> int:
    """The next token of the value that the key at the end, or before the piece of a value at the end, had at first."""
    keys, filler = (generator.vocabulary - 1) // 2, generator.vocabulary - 1
    runs: list[tuple[bool, list[int]]] = []  # alternately a key and a value
    for token in prefix:
        if token == filler:
            assert not runs
        elif runs and runs[-1][0] == (token < keys):
            runs[-1][1].append(token)
        else:
            runs.append((token < keys, [token]))
    piece = [] if runs[-1][0] else runs.pop()[1]
    key = runs.pop()[1]
    pairs = zip(runs[::2], runs[1::2], strict=True)
    value = next(value for (_, shown), (_, value) in pairs if shown == key)
    assert value[: len(piece)] == piece
    return value[len(piece)]


def solve_copying(generator: SelectiveCopying, prefix: list[int]) -> int:
    place = prefix.index(generator.vocabulary - 1)
    copied = [token for token in prefix[:place] if token < generator.vocabulary - 2]
    return copied[len(prefix) - place - 2]


@functools.cache
def facts_in_training(generator: Memorize) -> dict[int, int]:
    known: dict[int, int] = {}
    for shown, answer in answers(generator.examples(Draws(0, np.arange(200)), held_out=False)):
        assert known.setdefault(shown[-2], answer) == answer
    return known


def solve_memorize(generator: Memorize, prefix: list[int]) -> int:
    """From a table of what training shows: no prefix states a fact."""
    return facts_in_training(generator)[prefix[-2]]


SOLVERS: dict[str, Any] = {
    "mqar": solve_mqar,
    "in_context_recall": solve_recall,
    "noisy_recall": solve_recall,
    "fuzzy_recall": solve_fuzzy,
    "selective_copying": solve_copying,
    "memorize": solve_memorize,
}


@every_setting
def test_every_answer_follows_from_its_prefix(generator: Generator) -> None:
    """So the best possible accuracy is 1."""
    if generator.reads_last_token:  # every target is one of the inputs, all of which the last token follows
        whole = examples(generator)
        assert whole.mask is not None
        assert (whole.inputs == whole.targets)[whole.mask].all()
        assert whole.mask[:, :-1].all()
        assert (whole.inputs[:, -1] == generator.vocabulary - 1).all()
        return
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
    "in-context recall": "1-d073aa4908a8",
    "noisy recall": "1-2793bae0f8af",
    "fuzzy recall": "1-2a00ae8f6a77",
    "fuzzy recall, answers": "1-271be23899f0",
    "selective copying": "1-95a58a533f91",
    "compression": "1-98226d04f5ec",
    "memorize": "1-eb8f03ca9e37",
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
    further = {at: task.further_held_out(at) for at in task.further}
    assert {at: each.inputs.shape[1] for at, each in further.items()} == {
        "sequence_length=128": 128,
        "pairs=4": 32,
        "pairs=16": 128,
    }
    for at, found in further.items():
        variant = generator.further()[at]
        assert found.positions == variant.pairs * 1280
        assert all(solve_mqar(variant, prefix) == answer for prefix, answer in answers(found.rows(0, 50)))


# The MAD suite


def test_a_key_is_due_from_its_second_time_on() -> None:
    generator = InContextRecall(sequence_length=64, vocabulary=16)
    found = examples(generator, 2000)
    assert found.mask is not None
    keys = found.inputs[:, ::2]
    for row, mask in zip(keys[:200].tolist(), found.mask[:200], strict=True):
        assert mask[::2].tolist() == [key in row[:place] for place, key in enumerate(row)]
        assert not mask[1::2].any()
    # A key is new at pair i with a chance of (1 - 1/8)^i, but at the last pair, which is never new.
    expected = 31 - sum((7 / 8) ** place for place in range(31)) + 1
    assert found.positions / 2000 == pytest.approx(expected, abs=0.15)  # its standard error is 0.03
    assert stats.chisquare(np.bincount(keys[:, 5], minlength=8)).pvalue > 1e-4


def test_training_counts_every_next_token_or_the_answers_alone() -> None:
    for name in ("in-context recall", "fuzzy recall"):
        generator = SETTINGS[name]
        every, alone = (examples(replace(generator, train_on=on), held_out=False) for on in ("all", "answers"))
        assert every.mask is not None
        assert alone.mask is not None
        assert (every.inputs == alone.inputs).all()
        assert every.positions > 1.2 * alone.positions
        assert (every.mask | ~alone.mask).all()
        assert (every.targets[:, :-1] == every.inputs[:, 1:])[every.mask[:, :-1]].all()


def test_the_share_of_noise_is_as_stated() -> None:
    generator = NoisyRecall(sequence_length=64, vocabulary=24, noise=0.4, noise_vocabulary=8)
    found = examples(generator, 5000)
    noise = found.inputs >= 16
    assert (noise[:, ::2] == noise[:, 1::2]).all()
    assert not noise[:, -2:].any()
    pairs = noise[:, :-2:2]
    assert not pairs.all(1).any()
    assert pairs.mean() == pytest.approx(0.4 * 30 / 31, abs=0.01)  # one pair of 31 is kept; standard error 0.0012
    assert stats.chisquare(np.bincount(found.inputs[noise] - 16)).pvalue > 1e-4
    assert found.mask is not None
    assert not found.mask[noise].any()


def test_sizes_of_fuzzy_keys_and_values_are_uniform_and_held_out_keys_are_full() -> None:
    generator = FuzzyRecall(sequence_length=64, vocabulary=40)  # so many keys that few come twice
    for held_out, key_sizes in ((True, [3]), (False, [1, 2, 3])):
        found = examples(generator, 3000, held_out)
        kind = np.digitize(found.inputs, [19, 39])  # 0 a key, 1 a value, 2 filler
        sizes: dict[int, list[int]] = {0: [], 1: []}
        for row in kind[:, :-3].tolist():  # the last value is not whole: its last token is only a target
            begin = row.index(0)
            runs = [(kind, len(list(run))) for kind, run in itertools.groupby(row[begin:])]
            for which, size in runs[:4]:  # the sizes of the first pairs do not depend on what fits at the end
                sizes[which].append(size)
        assert sorted(set(sizes[0])) == key_sizes
        for counted, kinds in ((sizes[0], key_sizes), (sizes[1], [1, 2, 3])):
            counts = np.array([counted.count(size) for size in kinds])
            assert len(kinds) == 1 or stats.chisquare(counts).pvalue > 1e-4
        tokens = found.inputs[kind == 0]
        assert stats.chisquare(np.bincount(tokens)).pvalue > 1e-6
        filled = (kind == 2).sum(1)
        assert filled.max() <= 10  # less than another pair and the difference of the last one's size
        last = found.mask[:, -1] if found.mask is not None else None
        assert last is not None
        assert last.all()


def test_copied_tokens_stand_anywhere_and_in_order() -> None:
    generator = SelectiveCopying(sequence_length=15, vocabulary=7, tokens_to_copy=3)
    found = examples(generator, 20_000)
    before = found.inputs[:, :11]
    assert ((before < 5).sum(1) == 3).all()
    code = (before < 5) @ (2 ** np.arange(11))
    counts = np.bincount(code)[np.unique(code)]
    assert len(counts) == math.comb(11, 3)
    assert stats.chisquare(counts).pvalue > 1e-4
    assert stats.chisquare(np.bincount(found.inputs[:, :11][before < 5])).pvalue > 1e-4
    assert (found.inputs[:, 11] == 6).all()
    assert (found.inputs[:, 12:] == 5).all()


def test_what_training_cannot_tell_bounds_memorize() -> None:
    """A table of the training set answers as many held-out keys as the closed form says."""
    generator = Memorize(sequence_length=32, vocabulary=513, train_sequences=20)  # 256 keys, 320 draws
    assert generator.keys == 256
    assert len(set(generator.values().tolist())) == 256
    assert generator.best_accuracy() == pytest.approx(1 - math.exp(-320 / 256), abs=0.002)
    right = []
    for seed in range(40):
        task = GeneratedTask(replace(generator, held_out_sequences=100), "facts", batch_sequences=20, seed=seed)
        known = {prefix[-2] for prefix, _ in answers(task.batch(0, 0, 20))}
        right.append(np.mean([prefix[-2] in known for prefix, _ in answers(task.held_out)]))
    assert np.mean(right) == pytest.approx(generator.best_accuracy(), abs=4 * np.std(right) / math.sqrt(40))
    assert generator.facts()["best_accuracy"] == generator.best_accuracy()
    assert (replace(generator, map_seed=1).values() != generator.values()).mean() > 0.9
    assert sorted(Memorize(sequence_length=4, vocabulary=9).values()) == [4, 5, 6, 7]


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
    further = task.further_held_out("pairs=3")
    assert further.mask is not None
    losses = np.where(further.mask, 2.0, np.nan)
    assert task.scores(further, losses, further.mask, "pairs=3") == {
        "loss@pairs=3": 2.0,
        "accuracy@pairs=3": 1.0,
        "exact@pairs=3": 1.0,
        "success@pairs=3": 1.0,
    }
