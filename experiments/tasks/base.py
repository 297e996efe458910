"""The interface of tasks, in numpy.

Shapes: n sequences, T sequence length.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Examples(NamedTuple):
    """Sequences of inputs and targets, and which of the targets count."""

    inputs: NDArray[np.int64]  # [n, T] token ids
    targets: NDArray[np.int64]  # [n, T]
    mask: NDArray[np.bool_] | None = None  # [n, T]: True where a target counts; None: all count

    def rows(self, low: int, high: int) -> "Examples":
        """Sequences `low` to `high` - 1."""
        return Examples(*(None if array is None else array[low:high] for array in self))  # type: ignore[arg-type]

    def in_pairs(self) -> "Examples":
        """The same sequences, those of the first half each followed by one of the second half.

        Neighbours in a text are not paired: a control that must get no information about a sequence from its partner
        would get some from what follows it. Of an odd number, the last one's partner is the first sequence again,
        whose targets then do not count.
        """
        count = len(self.inputs)
        half = -(-count // 2)
        order = np.arange(2 * half).reshape(2, half).T.flatten()
        mask = np.ones(self.targets.shape, dtype=bool) if self.mask is None else self.mask
        mask = np.where((order < count)[:, None], mask[order % count], False)
        return Examples(self.inputs[order % count], self.targets[order % count], mask)

    @property
    def positions(self) -> int:
        """The number of targets that count."""
        return int(self.targets.size if self.mask is None else self.mask.sum())


class Task(Protocol):
    """A stream of training examples, a fixed held-out set, and the metrics of an evaluation on it.

    Losses are means over the targets that count.
    """

    name: str
    sha256: str  # of the data; a checkpoint is only loaded with the data it was trained on
    held_out: Examples

    def batch(self, step: int, first: int, count: int) -> Examples:
        """Sequences `first` to `first + count` - 1 of the global batch of a 0-based step. Every call gives the same."""
        ...

    def metrics(self, loss: float) -> Mapping[str, float]:
        """Metrics by name, at least "loss", from the mean held-out loss in nats per target."""
        ...
