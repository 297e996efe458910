"""Language modelling: predict the next token at every position of a text."""

from collections.abc import Mapping
from typing import Any

from experiments.data.batches import Batches, held_out, most_documents
from experiments.data.dataset import Dataset
from experiments.design.data import text_sha256
from experiments.design.train import TrainConfig
from experiments.tasks.base import Examples


class Text:
    """Shuffled windows of a dataset's training split, and the first windows of its validation split as held-out set.

    If `packed`, the documents of a window do not see one another, as data/packing.py defines it.
    """

    name = "text"

    def __init__(self, dataset: Dataset, train: TrainConfig, seed: int, packed: bool = False) -> None:
        self.vocabulary, self.sha256 = dataset.vocabulary, text_sha256(dataset.sha256, packed)
        most = most_documents(dataset, train.sequence_length) if packed else None
        options: dict[str, Any] = {"sequence_length": train.sequence_length, "most_documents": most}
        self._batches = Batches(dataset, batch_sequences=train.batch_sequences, seed=seed, **options)
        self._held_out = held_out(dataset, sequences=train.held_out_sequences, **options)
        self.held_out = self._held_out.examples

    def batch(self, step: int, first: int, count: int) -> Examples:
        return self._batches.batch(step, first, count)

    def metrics(self, loss: float) -> Mapping[str, float]:
        """The loss, and bits per UTF-8 byte of the text, which can be compared across tokenizers."""
        return {"loss": loss, "bits_per_byte": self._held_out.bits_per_byte(loss)}
