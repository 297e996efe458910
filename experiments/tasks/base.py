"""What a model can be trained on. numpy only.

Shapes: n sequences, T sequence length.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Examples(NamedTuple):
    """Sequences, and where they ask something of the model."""

    inputs: NDArray[np.int64]  # [n, T] token ids
    targets: NDArray[np.int64]  # [n, T]
    mask: NDArray[np.bool_] | None = None  # [n, T]: which targets count; None: all of them

    def rows(self, low: int, high: int) -> "Examples":
        """Some of the sequences."""
        return Examples(*(None if array is None else array[low:high] for array in self))  # type: ignore[arg-type]

    @property
    def positions(self) -> int:
        """How many targets count."""
        return int(self.targets.size if self.mask is None else self.mask.sum())


class Task(Protocol):
    """A stream of training examples, a fixed held-out set, and the metrics of a pass over it.

    Losses are means over the positions that count.
    """

    name: str
    sha256: str  # of the data: a checkpoint belongs to it
    held_out: Examples

    def batch(self, step: int, first: int, count: int) -> Examples:
        """`count` sequences of the global batch of a 0-based step, from its `first` on. The same whenever asked."""
        ...

    def metrics(self, loss: float) -> Mapping[str, float]:
        """By name, from the mean held-out loss in nats a target: at least "loss"."""
        ...
