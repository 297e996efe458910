"""Compression of the MAD suite (Poli et al. 2024, arXiv 2403.17844, section 3)."""

from dataclasses import dataclass

import numpy as np

from experiments.draws import Draws
from experiments.tasks.base import Examples, Generator


@dataclass(frozen=True, kw_only=True)
class Compression(Generator):
    """T - 1 random tokens and the compression token, from whose state alone all of them are due, each at its place.

    The last token of the vocabulary is the compression token. The model gets a readout that decodes every position from
    the last token's state, as in MAD's code. Ours has no biases.
    """

    kind = "compression"
    reads_last_token = True

    def check(self) -> None:
        self.require("sequence_length", 2, "a token and the compression token")
        self.require("vocabulary", 3, "two different tokens and the compression token")

    def examples(self, draws: Draws, held_out: bool) -> Examples:  # noqa: ARG002  # both are the same
        inputs = np.full((len(draws), self.sequence_length), self.vocabulary - 1, np.int64)
        inputs[:, :-1] = draws.integers(self.vocabulary - 1, self.sequence_length - 1)
        mask = np.ones(inputs.shape, bool)
        mask[:, -1] = False
        return Examples(inputs, inputs, mask)
