"""Generated tasks: their settings, which are the identity of their data, and what each mistake says."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_task_runs import write
from test_tasks import SETTINGS, examples

from experiments.cli.main import main
from experiments.draws import Draws
from experiments.tasks.base import Examples, Generator
from experiments.tasks.compression import Compression
from experiments.tasks.fuzzy_recall import FuzzyRecall
from experiments.tasks.in_context_recall import InContextRecall, NoisyRecall
from experiments.tasks.memorize import Memorize
from experiments.tasks.mqar import MQAR
from experiments.tasks.registry import generators
from experiments.tasks.selective_copying import SelectiveCopying
from experiments.tasks.stream import GeneratedTask


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


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (InContextRecall, {"sequence_length": 63}, "must be even, as pairs have two tokens; got 63"),
        (InContextRecall, {"vocabulary": 1}, r"vocabulary must be at least 2 \(a key, a value and the noise\); got 1"),
        (NoisyRecall, {"vocabulary": 17}, "vocabulary must be at least 18"),
        (NoisyRecall, {"noise": 1.0}, "noise must be above 0 and below 1; got 1.0"),
        (FuzzyRecall, {"sequence_length": 11}, r"sequence_length must be at least 12 \(two pairs of up to 6 tokens"),
        (FuzzyRecall, {"vocabulary": 6}, "vocabulary must be at least 7"),
        (SelectiveCopying, {"sequence_length": 32}, "sequence_length must be at least 33"),
        (SelectiveCopying, {"vocabulary": 2}, "vocabulary must be at least 3"),
        (Compression, {"vocabulary": 2}, "vocabulary must be at least 3"),
        (Compression, {"sequence_length": 1}, "sequence_length must be at least 2"),
        (Memorize, {"vocabulary": 2}, "vocabulary must be at least 3"),
        (Memorize, {"sequence_length": 1}, "sequence_length must be at least 2"),
    ],
)
def test_mad_settings_that_do_not_fit_are_refused(
    kind: type[Generator], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**({"sequence_length": 64, "vocabulary": 64} | settings))


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


def test_power_is_for_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["power", str(write(tmp_path))]) == 2
    assert "a sweep on text is wanted; recall trains on generated tasks" in capsys.readouterr().err


def test_data_of_a_generated_task_is_not_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "build", str(write(tmp_path))]) == 2
    assert "trains on generated tasks, for which no data is built; submit it" in capsys.readouterr().err
