"""Multi-query associative recall, MQAR (Arora et al. 2023, arXiv 2312.04927), also with keys of several tokens.

Shapes: n sequences, T sequence length, P pairs, L the length of the longest key.
"""

from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from experiments.draws import Draws
from experiments.tasks.base import Examples, Generator

BLANK = 0
MOST_KEYS = 2**53  # a key is drawn as one number


@dataclass(frozen=True, kw_only=True)
class MQAR(Generator):
    """P pairs of a key and a value; then each key comes once more, and the model must answer with its value.

    Token 0 is blank, the next `key_vocabulary` tokens are those of keys, and the rest are values. The pairs take the
    first P (L + 1) tokens, and what they leave of these is blank. After them come slots of L + 1 tokens; each key takes
    a slot and begins it. The answer is due at the key's last token. Values are not shown again.

    The gap, in slots, between the pairs and a key's slot follows a power law: slot i = 1, 2, ... has weight
    i^(power - 1). With `filler = "random"` every blank becomes a random token, as in the paper's code.

    arXiv 2606.03825 shows keys of variable length, and its settings are not known to us. Ours: lengths are uniform on
    1..L, tokens uniform and independent, and of equal keys in a sequence all but the first are drawn again. Keys
    must be followed by a value or a blank, so that one can tell where they begin and end: the filler is blank then.
    """

    kind = "mqar"
    group_name = "key_length"

    pairs: int
    key_length: int = 1  # L
    key_vocabulary: int | None = None  # None: half of the vocabulary, with the blank
    power: float = 0.01  # 1: gaps are uniform
    filler: Literal["blank", "random"] = "blank"
    evaluate_pairs: tuple[int, ...] = ()  # also held-out sets of so many pairs, in sequences longer in proportion

    def check(self) -> None:
        for name in ("pairs", "key_length"):
            self.require(name, 1, "a task without pairs has nothing to recall")
        slot = self.key_length + 1
        least = 2 * self.pairs * slot
        self.require("sequence_length", least, f"{self.pairs} pairs and as many keys, of up to {slot} tokens each")
        if not 0 < self.power <= 1:
            raise ValueError(f"power must be above 0 and at most 1; got {self.power}; correct it")
        if self.filler == "random" and self.key_length > 1:
            raise ValueError('filler = "random" hides where keys of several tokens begin; set filler = "blank"')
        keys = sum(self._key_tokens**length for length in range(1, self.key_length + 1))
        if self._key_tokens < 1 or keys < self.pairs or keys > MOST_KEYS:
            raise ValueError(
                f"{self._key_tokens} key tokens give {keys} keys of up to {self.key_length} tokens; {self.pairs}, the "
                "number of pairs, to 2^53 are wanted; change key_vocabulary, vocabulary or key_length"
            )
        least = 1 + self._key_tokens + self.pairs
        self.require("vocabulary", least, "a blank, the key tokens, and a value for each pair")

    @property
    def _key_tokens(self) -> int:
        return self.vocabulary // 2 - 1 if self.key_vocabulary is None else self.key_vocabulary

    def variants(self, plain: Self) -> dict[str, Self]:
        found = super().variants(plain)
        for pairs in self.evaluate_pairs:
            found[f"pairs={pairs}"] = replace(
                plain, pairs=pairs, sequence_length=self.sequence_length * pairs // self.pairs
            )
        return found

    def examples(self, draws: Draws, held_out: bool) -> Examples:  # noqa: ARG002  # both are the same
        n, slot = len(draws), self.key_length + 1
        keys, lengths = self._keys(draws)
        first_value = 1 + self._key_tokens
        values = first_value + draws.subsets(self.vocabulary - first_value, self.pairs)
        slots = self.sequence_length // slot - self.pairs
        weights = np.arange(1, slots + 1, dtype=np.float64) ** (self.power - 1)
        query_slots = draws.weighted_subsets(weights, self.pairs)

        inputs = np.full((n, self.sequence_length), BLANK, np.int64)
        targets, mask, group = np.zeros_like(inputs), np.zeros(inputs.shape, bool), np.zeros_like(inputs)
        rows = np.arange(n)[:, None]
        ends = np.cumsum(lengths + 1, axis=1)
        pair_starts, query_starts = ends - lengths - 1, self.pairs * slot + query_slots * slot
        for place in range(self.key_length):
            row, pair = np.nonzero(place < lengths)
            for starts in (pair_starts, query_starts):
                inputs[row, starts[row, pair] + place] = keys[row, pair, place]
        inputs[rows, ends - 1] = values
        answers = query_starts + lengths - 1
        targets[rows, answers], mask[rows, answers], group[rows, answers] = values, True, lengths
        if self.filler == "random":
            filler = draws.integers(self.vocabulary, self.sequence_length)
            inputs = np.where(inputs == BLANK, filler, inputs)
        return Examples(inputs, targets, mask, group)

    def _keys(self, draws: Draws) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Different keys [n, P, L], of which the first tokens count, and how many do [n, P]."""
        base = self._key_tokens
        powers = base ** np.arange(self.key_length, dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(powers * base)])  # of the numbers of the keys of each length

        def numbers(stream: Draws, count: int) -> NDArray[np.int64]:  # [n, count]
            length = stream.integers(self.key_length, count)
            return offsets[length] + (stream.uniform(count) * powers[length] * base).astype(np.int64)

        number = draws.distinct(numbers, self.pairs)
        lengths = np.searchsorted(offsets, number, side="right")
        rest = number - offsets[lengths - 1]
        return 1 + rest[:, :, None] // powers % base, lengths
