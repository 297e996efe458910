"""The interface of tasks, and the settings of a task whose sequences are generated. Imported without numpy.

Shapes: n sequences, T sequence length.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

from experiments.parts.base import Fact

if TYPE_CHECKING:  # `plan` of a sweep on text needs no numpy
    import numpy as np
    from numpy.typing import NDArray

    from experiments.draws import Draws

EVALUATE = "evaluate_"  # begins the names of settings that add held-out sets
LARGEST_TOKENS = 2**31  # of the vocabulary and of a sequence: larger ones are typing errors


class Examples(NamedTuple):
    """Sequences of inputs and targets, and which of the targets count."""

    inputs: NDArray[np.int64]  # [n, T] token ids
    targets: NDArray[np.int64]  # [n, T]
    mask: NDArray[np.bool_] | None = None  # [n, T]: True where a target counts; None: all count
    group: NDArray[np.int64] | None = None  # [n, T]: the group of a target that counts, where metrics are also by group
    # [n, K]: where packed documents begin in each sequence, in order, the first at 0; T where a sequence has fewer than
    # K. No document sees another. None: each sequence is one document.
    starts: NDArray[np.int64] | None = None

    def rows(self, low: int, high: int) -> Examples:
        """Sequences `low` to `high` - 1."""
        return Examples(*(None if array is None else array[low:high] for array in self))  # type: ignore[arg-type]

    def in_pairs(self) -> Examples:
        """The same sequences, those of the first half each followed by one of the second half.

        Neighbours in a text are not paired: a control that must get no information about a sequence from its partner
        would get some from what follows it. Of an odd number, the last one's partner is the first sequence again,
        whose targets then do not count.
        """
        import numpy as np

        count = len(self.inputs)
        half = -(-count // 2)
        order = np.arange(2 * half).reshape(2, half).T.flatten()
        mask = np.ones(self.targets.shape, dtype=bool) if self.mask is None else self.mask
        mask = np.where((order < count)[:, None], mask[order % count], False)
        group = None if self.group is None else self.group[order % count]
        assert self.starts is None, "no model whose sequences read one another takes packed documents"
        return Examples(self.inputs[order % count], self.targets[order % count], mask, group)

    @property
    def positions(self) -> int:
        """The number of targets that count."""
        return int(self.targets.size if self.mask is None else self.mask.sum())


class Task(Protocol):
    """A stream of training examples, a fixed held-out set, and the metrics of an evaluation on it.

    Losses are means over the targets that count.
    """

    name: str
    vocabulary: int  # token ids are below this
    sha256: str  # of the data; a checkpoint is only loaded with the data it was trained on
    held_out: Examples

    def batch(self, step: int, first: int, count: int) -> Examples:
        """Sequences `first` to `first + count` - 1 of the global batch of a 0-based step. Every call gives the same."""
        ...

    def metrics(self, loss: float) -> Mapping[str, float]:
        """Metrics by name, at least "loss", from the mean held-out loss in nats per target."""
        ...


@dataclass(frozen=True, kw_only=True)
class Generator(ABC):
    """The settings of a task whose sequences are generated, and the function that generates them.

    A subclass is a frozen dataclass in a file of its own, with the task's settings as fields. Its `examples` must be a
    function of the settings and of the draws alone. Every change of what it gives must raise `version`.
    """

    kind: ClassVar[str]  # the name of the task in sweep files
    version: ClassVar[int] = 1
    reads_last_token: ClassVar[bool] = False  # whether all targets are decoded from the state of the last token
    group_name: ClassVar[str | None] = None  # what `Examples.group` holds, such as "key_length"

    sequence_length: int
    vocabulary: int
    train_sequences: int | None = None  # different training sequences, seen again every epoch; None: always new ones
    held_out_sequences: int = 1280
    success_accuracy: float = 0.9  # a run with at least this accuracy over the held-out answers is a success
    # Held-out sets of these sequence lengths are evaluated as well, after the last step.
    evaluate_lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("sequence_length", "vocabulary", "train_sequences", "held_out_sequences"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < LARGEST_TOKENS:
                raise ValueError(f"{name} must be 1 to {LARGEST_TOKENS - 1}; got {value}; correct it")
        if not 0 < self.success_accuracy <= 1:
            raise ValueError(f"success_accuracy must be above 0 and at most 1; got {self.success_accuracy}; correct it")
        self.check()
        if any(getattr(self, name) for name in self._evaluations()):
            plain = self._plain()
            try:
                variants = self.variants(plain)
            except ValueError as error:
                raise ValueError(f"a further held-out set: {error}") from None
            for name, variant in variants.items():
                if variant == plain:
                    raise ValueError(f"a further held-out set at {name} is the task's own; remove it")

    @abstractmethod
    def check(self) -> None:
        """Raises ValueError if the settings do not fit each other, such as pairs that do not fit in a sequence."""

    @abstractmethod
    def examples(self, draws: Draws, held_out: bool) -> Examples:
        """`len(draws)` sequences, with a mask in which every sequence has a target that counts.

        The two differ where a task trains on other sequences, or on more targets, than it is evaluated on.
        """

    def variants(self, plain: Self) -> dict[str, Self]:
        """Name -> settings of the further held-out sets, such as "sequence_length=512".

        `plain` is this task without further sets.
        """
        return {f"sequence_length={length}": replace(plain, sequence_length=length) for length in self.evaluate_lengths}

    def further(self) -> dict[str, Self]:
        """Name -> settings of the further held-out sets."""
        return self.variants(self._plain())

    def at_lengths(self, lengths: Sequence[int]) -> Self:
        """This task with held-out sets of these sequence lengths as its only further ones.

        Raises ValueError for a length that the task cannot have, or that is its own.
        """
        return replace(self._plain(), evaluate_lengths=tuple(lengths))

    def _evaluations(self) -> list[str]:
        return [field.name for field in fields(self) if field.name.startswith(EVALUATE)]

    def _plain(self) -> Self:
        nothing: dict[str, Any] = dict.fromkeys(self._evaluations(), ())
        return replace(self, **nothing)

    def require(self, name: str, least: int, why: str) -> None:
        """Raises ValueError if the setting `name` is below `least`."""
        if getattr(self, name) < least:
            raise ValueError(f"{name} must be at least {least} ({why}); got {getattr(self, name)}; raise it")

    def facts(self) -> dict[str, Fact]:
        """The settings that a table may group by. The run prefixes their names with "task."."""
        values = {name: value for name, value in asdict(self).items() if not name.startswith(EVALUATE)}
        return {"kind": self.kind, **{name: value for name, value in values.items() if value is not None}}

    @property
    def sha256(self) -> str:
        """The identity of the data: the generator, its version, and the settings that are not their defaults."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        different = {f.name: given[f.name] for f in fields(self) if given[f.name] != f.default}
        content = {"kind": self.kind, "version": self.version, **different}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
