"""In-context and noisy recall of the MAD suite (Poli et al. 2024, arXiv 2403.17844, section 3).

Shapes: n sequences, T sequence length, P pairs, K key tokens.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from experiments.draws import Draws, first_places
from experiments.tasks.base import Examples, Generator


@dataclass(frozen=True, kw_only=True)
class InContextRecall(Generator):
    """T / 2 pairs of a key and a value, one token each; a key has one value throughout a sequence.

    The first half of the vocabulary are keys, the second values, each drawn uniformly. An answer is due at every key
    that came before; the last pair repeats one of the keys before it. As in MAD's code, training counts every next
    token, unless `train_on = "answers"`.
    """

    kind = "in_context_recall"

    train_on: Literal["all", "answers"] = "all"

    def check(self) -> None:
        if self.sequence_length % 2:
            raise ValueError(f"sequence_length must be even, as pairs have two tokens; got {self.sequence_length}")
        self.require("sequence_length", 4, "two pairs")
        self.require("vocabulary", 2 + self._noise_tokens, "a key, a value and the noise")

    @property
    def _noise_tokens(self) -> int:
        return 0

    @property
    def _noise_share(self) -> float:
        return 0.0

    def examples(self, draws: Draws, held_out: bool) -> Examples:
        n, pairs = len(draws), self.sequence_length // 2
        both = self.vocabulary - self._noise_tokens
        keys = draws.integers(both // 2, pairs)
        values = both // 2 + draws.integers(both - both // 2, both // 2)  # [n, K]: of each key
        noisy = self._noisy_pairs(draws, pairs)
        # The last pair repeats one of the pairs before it that are not noise, each as likely as any other.
        candidate = np.where(noisy[:, :-1], -1.0, draws.uniform(pairs - 1)).argmax(1)
        keys[:, -1] = keys[np.arange(n), candidate]
        shown = np.where(noisy, -1 - np.arange(pairs), keys)  # noise equals no other pair
        repeated = first_places(shown) < np.arange(pairs)

        tokens = np.stack([keys, np.take_along_axis(values, keys, 1)], axis=2)
        if self._noise_tokens:
            noise = both + draws.integers(self._noise_tokens, pairs, 2)
            tokens = np.where(noisy[:, :, None], noise, tokens)
        inputs = tokens.reshape(n, self.sequence_length)
        targets, mask = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
        targets[:, :-1] = inputs[:, 1:]
        mask[:, ::2] = repeated
        if not held_out and self.train_on == "all":
            mask[:, :-1] = True
        return Examples(inputs, targets, mask)

    def _noisy_pairs(self, draws: Draws, pairs: int) -> np.ndarray:
        """Which pairs are noise [n, P]: not the last one, and not all of the others."""
        noisy = np.zeros((len(draws), pairs), bool)
        if self._noise_share:
            kept = draws.integers(pairs - 1, 1)
            noisy[:, :-1] = draws.uniform(pairs - 1) < self._noise_share
            np.put_along_axis(noisy, kept, False, 1)
        return noisy


@dataclass(frozen=True, kw_only=True)
class NoisyRecall(InContextRecall):
    """In-context recall in which a share of the pairs is replaced by two noise tokens each.

    The last `noise_vocabulary` tokens of the vocabulary are noise. One pair before the last is never replaced.
    """

    kind = "noisy_recall"

    noise: float = 0.2  # the chance that a pair is noise
    noise_vocabulary: int = 16

    def check(self) -> None:
        if not 0 < self.noise < 1:
            raise ValueError(f"noise must be above 0 and below 1; got {self.noise}; correct it")
        self.require("noise_vocabulary", 1, "noise needs a token")
        super().check()

    @property
    def _noise_tokens(self) -> int:
        return self.noise_vocabulary

    @property
    def _noise_share(self) -> float:
        return self.noise
