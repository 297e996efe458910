"""A generated task as the trainer uses it: its batches, its held-out sets and its metrics.

Shapes: n sequences, T sequence length.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from experiments.draws import Draws, permute
from experiments.tasks.base import Examples, Generator

AHEAD_TOKENS = 2**18  # generated at once, which takes numpy little longer than one small batch
HELD_OUT_KEY = 2**63  # of the held-out sets' draws; a training stream's key is its seed, which is smaller


class GeneratedTask:
    """Sequences that a generator makes. Sequence k of a seed's training stream is a function of (settings, seed, k).

    The held-out sets are the same for every seed, and their draws are independent of those of every training stream. A
    sequence is in both by chance alone: with a chance below 1e-10 for any in the shipped sweeps, whose tasks have 1e17
    and more about equally likely sequences, and often in tasks with few different ones.
    """

    def __init__(self, generator: Generator, name: str, batch_sequences: int, seed: int) -> None:
        self.name = name
        self.generator = generator
        self.vocabulary, self.sha256 = generator.vocabulary, generator.sha256
        self.held_out = _held_out(generator, name)
        self.further = generator.further()
        self._batch_sequences, self._seed = batch_sequences, seed
        self._block = max(batch_sequences, AHEAD_TOKENS // generator.sequence_length)
        self._first = 0
        self._ahead = self._generate(0, 0)  # the sequences from `_first` on

    def batch(self, step: int, first: int, count: int) -> Examples:
        low = step * self._batch_sequences + first
        if not self._first <= low <= low + count <= self._first + len(self._ahead.inputs):
            self._first, self._ahead = low, self._generate(low, max(count, self._block))
        return self._ahead.rows(low - self._first, low - self._first + count)

    def _generate(self, first: int, count: int) -> Examples:
        numbers = first + np.arange(count, dtype=np.int64)
        different = self.generator.train_sequences
        if different is not None:
            epoch, place = np.divmod(numbers, different)
            numbers = permute(place, different, self._seed, epoch)
        return self.generator.examples(Draws(self._seed, numbers), held_out=False)

    def metrics(self, loss: float) -> Mapping[str, float]:
        return {"loss": loss}

    def further_held_out(self, at: str) -> Examples:
        """The held-out set at a key of `further`, made when it is asked for: only the end of a run needs it."""
        return _held_out(self.further[at], f"{self.name} at {at}")

    def scores(
        self,
        held_out: Examples,  # one of the held-out sets, perhaps in another order
        losses: NDArray[np.float64],  # [n, T] in nats
        correct: NDArray[np.bool_],  # [n, T]: where the likeliest token is the target
        at: str = "",  # the name of the set: "" for the task's own, else a key of `further`
    ) -> dict[str, float]:
        """Metrics by name: loss, accuracy, exact and success, and loss and accuracy of each group.

        accuracy is the share of answers that are right, exact that of sequences whose answers are all right, and
        success is 1 for an accuracy of at least `success_accuracy`, else 0. The name of a set or a group follows an
        "@", as in "accuracy@pairs=32" and "accuracy@key_length=2".
        """
        mask = held_out.mask
        assert mask is not None
        accuracy = float(correct[mask].mean())
        all_right = np.asarray(np.logical_or(correct, ~mask).all(axis=1))  # [n]
        found = {
            "loss": float(losses[mask].mean()),
            "accuracy": accuracy,
            "exact": float(all_right[mask.any(1)].mean()),
            "success": float(accuracy >= self.generator.success_accuracy),
        }
        if at:
            return {f"{name}@{at}": value for name, value in found.items()}
        if held_out.group is not None:
            for group in np.unique(held_out.group[mask]).tolist():
                among = mask & (held_out.group == group)
                label = f"@{self.generator.group_name}={group}"
                found["loss" + label] = float(losses[among].mean())
                found["accuracy" + label] = float(correct[among].mean())
        return found


def _held_out(generator: Generator, name: str) -> Examples:
    """A held-out set. Raises ValueError if the generator gives no mask, or a sequence without a target that counts."""
    numbers = np.arange(generator.held_out_sequences, dtype=np.int64)
    examples = generator.examples(Draws(HELD_OUT_KEY, numbers), held_out=True)
    if examples.mask is None or not examples.mask.any(1).all():
        got = "none" if examples.mask is None else "one that leaves sequences without an answer"
        raise ValueError(
            f"the task {name} must give a mask in which every held-out sequence has an answer; got {got}; "
            f"correct `examples` of kind {generator.kind!r}"
        )
    return examples
