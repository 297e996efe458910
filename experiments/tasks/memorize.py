"""Memorization of the MAD suite (Poli et al. 2024, arXiv 2403.17844, section 3): facts that no sequence states.

Shapes: n sequences, T sequence length, K keys.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiments.draws import Draws
from experiments.parts.base import Fact
from experiments.tasks.base import Examples, Generator


@dataclass(frozen=True, kw_only=True)
class Memorize(Generator):
    """T / 2 keys, each followed by the insert token, at which the key's value is due. Values are never shown.

    Of the vocabulary without its last token, the insert token, the first half are the keys and the rest values. Each
    key has one value in all sequences, of training and held out, and no two keys share one. Only training can tell
    which, so that a limited training set bounds the accuracy.
    """

    kind = "memorize"

    map_seed: int = 0  # decides which value each key has

    def check(self) -> None:
        self.require("sequence_length", 2, "a key and the place of its answer")
        self.require("vocabulary", 3, "a key, a value and the insert token")
        self.require("map_seed", 0, "a seed")

    @property
    def keys(self) -> int:
        return (self.vocabulary - 1) // 2

    def values(self) -> NDArray[np.int64]:  # [K]
        """The value of each key."""
        order = Draws(self.map_seed, np.zeros(1, np.int64)).uniform(self.vocabulary - 1 - self.keys)[0]
        return self.keys + np.argsort(order, kind="stable")[: self.keys]

    def best_accuracy(self) -> float:
        """The expected accuracy of a table of all pairs of key and value in the training set, which guesses no others.

        A key is missing from N sequences with a chance of (1 - 1/K)^(N T/2). Of always new sequences, none is missing
        in the end.
        """
        if self.train_sequences is None:
            return 1.0
        missing = (1 - 1 / self.keys) ** (self.train_sequences * (self.sequence_length // 2))
        return 1 - missing

    def facts(self) -> dict[str, Fact]:
        return super().facts() | {"best_accuracy": self.best_accuracy()}

    def examples(self, draws: Draws, held_out: bool) -> Examples:  # noqa: ARG002  # both are the same
        pairs = self.sequence_length // 2
        keys = draws.integers(self.keys, pairs)
        inputs = np.full((len(draws), self.sequence_length), self.vocabulary - 1, np.int64)
        targets, mask = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
        inputs[:, : 2 * pairs : 2] = keys
        targets[:, 1::2], mask[:, 1::2] = self.values()[keys], True
        return Examples(inputs, targets, mask)
