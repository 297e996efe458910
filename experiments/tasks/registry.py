"""Every generated task that a sweep file can name. To add one, write its class in tasks/X.py and enter it below."""

from typing import Annotated

from experiments.tasks.base import Generator


def generators() -> tuple[type[Generator], ...]:
    """The classes, imported here and not above: `plan` of a sweep on text needs neither them nor numpy."""
    from experiments.tasks.compression import Compression
    from experiments.tasks.fuzzy_recall import FuzzyRecall
    from experiments.tasks.in_context_recall import InContextRecall, NoisyRecall
    from experiments.tasks.memorize import Memorize
    from experiments.tasks.mqar import MQAR
    from experiments.tasks.selective_copying import SelectiveCopying

    return (MQAR, InContextRecall, NoisyRecall, FuzzyRecall, SelectiveCopying, Compression, Memorize)


# The type of a field that holds a task of any kind: design/strict.py chooses the class by the key `kind`.
AnyTask = Annotated[Generator, generators]
