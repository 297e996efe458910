"""Fuzzy recall of the MAD suite (Poli et al. 2024, arXiv 2403.17844, section 3): keys and values of several tokens.

Shapes: n sequences, T sequence length, P pairs.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from experiments.draws import Draws, first_places
from experiments.tasks.base import Examples, Generator

MOST_KEYS = 2**62  # a key is compared as one whole number


@dataclass(frozen=True, kw_only=True)
class FuzzyRecall(Generator):
    """Pairs of a key and a value of up to `key_length` and `value_length` tokens, none twice in a key or value.

    Of the vocabulary without its last token, which fills the front, the first half makes keys and the rest values. The
    lengths are uniform. A key has one value throughout a sequence, which ends with one of the keys before and its
    value. Answers are all tokens of the values of keys that came before.

    As in MAD's code, training counts every next token (but for the filler), unless `train_on = "answers"`, and all keys
    of the held-out set have the full length: of a shorter one, nothing would tell that it has ended.
    """

    kind = "fuzzy_recall"

    key_length: int = 3
    value_length: int = 3
    train_on: Literal["all", "answers"] = "all"

    def check(self) -> None:
        for name in ("key_length", "value_length"):
            self.require(name, 1, "a pair has both")
        pair = self.key_length + self.value_length
        self.require("sequence_length", 2 * pair, f"two pairs of up to {pair} tokens each")
        least = 1 + 2 * max(self.key_length, self.value_length)
        self.require("vocabulary", least, "the filler, and different tokens for the longest key and the longest value")
        if (self._keys + 1) ** self.key_length > MOST_KEYS:
            raise ValueError(f"key_length = {self.key_length} gives too many keys; lower it or the vocabulary")

    @property
    def _keys(self) -> int:
        return (self.vocabulary - 1) // 2

    def examples(self, draws: Draws, held_out: bool) -> Examples:
        n, most = len(draws), self.sequence_length // 2
        longest = self.key_length + self.value_length
        key_size = np.full((n, most), self.key_length)
        if not held_out:
            key_size = 1 + draws.integers(self.key_length, most)
        value_size = 1 + draws.integers(self.value_length, most)
        key_tokens = draws.subsets(self._keys, self.key_length, most)  # [n, P, key_length]
        value_tokens = self._keys + draws.subsets(self.vocabulary - 1 - self._keys, self.value_length, most)

        # A key that came before has the value that it had at first.
        used = np.arange(self.key_length) < key_size[:, :, None]
        code = np.where(used, key_tokens + 1, 0) @ (self._keys + 1) ** np.arange(self.key_length, dtype=np.int64)
        first = first_places(code)
        value_size = np.take_along_axis(value_size, first, 1)
        value_tokens = np.take_along_axis(value_tokens, first[:, :, None], 1)

        # As many pairs as fit before the last one, which repeats one of them.
        count = (np.cumsum(key_size + value_size, axis=1) <= self.sequence_length + 1 - longest).sum(1)
        last = (draws.uniform(1)[:, 0] * count).astype(np.int64)
        place = np.arange(most + 1)
        pair = np.where(place < count[:, None], place, last[:, None])  # [n, P + 1]: which pair stands at a place
        there = place <= count[:, None]
        repeated = there & ((place == count[:, None]) | (np.take_along_axis(first, pair, 1) < place))
        sizes = [np.where(there, np.take_along_axis(size, pair, 1), 0) for size in (key_size, value_size)]
        ends = np.cumsum(sizes[0] + sizes[1], axis=1)
        value_starts = self.sequence_length + 1 - ends[:, -1:] + ends - sizes[1]

        tokens = np.full((n, self.sequence_length + 1), self.vocabulary - 1, np.int64)
        answer = np.zeros(tokens.shape, bool)
        for own, size, starts in (
            (key_tokens, sizes[0], value_starts - sizes[0]),
            (value_tokens, sizes[1], value_starts),
        ):
            for offset in range(own.shape[2]):
                row, at = np.nonzero(offset < size)
                tokens[row, starts[row, at] + offset] = own[row, pair[row, at], offset]
                if own is value_tokens:
                    answer[row, starts[row, at] + offset] = repeated[row, at]
        mask = answer[:, 1:]
        if not held_out and self.train_on == "all":
            mask = tokens[:, 1:] != self.vocabulary - 1
        return Examples(tokens[:, :-1], tokens[:, 1:], mask)
