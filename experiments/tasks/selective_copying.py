"""Selective copying of the MAD suite (Poli et al. 2024, arXiv 2403.17844, section 3).

Shapes: n sequences, T sequence length, M tokens to copy.
"""

from dataclasses import dataclass

import numpy as np

from experiments.draws import Draws
from experiments.tasks.base import Examples, Generator


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Generator):
    """M tokens among blanks, the copy token, and then M blanks, at which the tokens are due in their order.

    The last token of the vocabulary is the copy token, the one before it is blank, and the rest are copied. The places
    of the M tokens are a uniform choice among those before the copy token; in MAD's code the blanks are spread over the
    M gaps before the tokens, so that the last of them always stands next to the copy token.
    """

    kind = "selective_copying"

    tokens_to_copy: int = 16  # M

    def check(self) -> None:
        self.require("tokens_to_copy", 1, "else there is no answer")
        self.require("sequence_length", 2 * self.tokens_to_copy + 1, "the tokens, the copy token and as many answers")
        self.require("vocabulary", 3, "a token to copy, the blank and the copy token")

    def examples(self, draws: Draws, held_out: bool) -> Examples:  # noqa: ARG002  # both are the same
        n, count = len(draws), self.tokens_to_copy
        before = self.sequence_length - count - 1
        copied = draws.integers(self.vocabulary - 2, count)
        places = np.sort(draws.subsets(before, count), axis=1)
        inputs = np.full((n, self.sequence_length), self.vocabulary - 2, np.int64)
        np.put_along_axis(inputs, places, copied, 1)
        inputs[:, before] = self.vocabulary - 1
        targets, mask = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
        targets[:, before + 1 :], mask[:, before + 1 :] = copied, True
        return Examples(inputs, targets, mask)
