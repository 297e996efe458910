"""Language modelling: predict the next token at every position of a text."""

from collections.abc import Mapping

from experiments.data.batches import Batches, held_out
from experiments.data.dataset import Dataset
from experiments.design.train import TrainConfig
from experiments.tasks.base import Examples


class Text:
    """Shuffled windows of a dataset's training split, and the first windows of its validation split as held-out set."""

    name = "text"

    def __init__(self, dataset: Dataset, train: TrainConfig, seed: int) -> None:
        self.vocabulary, self.sha256 = dataset.vocabulary, dataset.sha256
        self._batches = Batches(
            dataset, sequence_length=train.sequence_length, batch_sequences=train.batch_sequences, seed=seed
        )
        self._held_out = held_out(dataset, sequence_length=train.sequence_length, sequences=train.held_out_sequences)
        self.held_out = Examples(self._held_out.inputs, self._held_out.targets)

    def batch(self, step: int, first: int, count: int) -> Examples:
        return Examples(*self._batches.batch(step, first, count))

    def metrics(self, loss: float) -> Mapping[str, float]:
        """The loss, and bits per UTF-8 byte of the text, which can be compared across tokenizers."""
        return {"loss": loss, "bits_per_byte": self._held_out.bits_per_byte(loss)}
