"""Evaluate a model on the held-out sets of its task, over all processes.

Shapes: n sequences of a held-out set, T sequence length.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from experiments.tasks.base import Examples, Task
from experiments.tasks.stream import GeneratedTask
from experiments.training.engine import Losses, on_device
from experiments.training.held_out import HeldOutLoss
from experiments.training.parallel import World
from experiments.training.scoring import answers_of


class Evaluator:
    """Computes the task's metrics of a model on its held-out sets, each process on its share of the sequences."""

    def __init__(
        self,
        model: nn.Module,  # replicated, if there are several processes
        losses: Losses,
        task: Task,
        world: World,
        micro_batch: int,  # sequences
        group: int,  # neighbouring sequences that read one another, and share a micro-batch
    ) -> None:
        self.model, self.task, self.world = model, task, world
        self.micro_batch, self.group = micro_batch, group
        self._loss: HeldOutLoss | None = None
        if not isinstance(task, GeneratedTask):
            held_out = self._grouped(task.held_out)
            self._loss = HeldOutLoss(
                losses, held_out, list(self._micro_batch_bounds(held_out)), micro_batch, world.device
            )

    @torch.no_grad()
    def warm_up(self, stream: torch.cuda.Stream | None) -> None:
        """Compile by a pass whose result is discarded. With a stream, also capture it as a CUDA graph.

        Passes of a generated task are not captured, because the number of targets that count differs between them.
        """
        if self._loss is None:
            examples = self._grouped(self.task.held_out).rows(0, self.micro_batch)
            answers_of(self.model, self.world.device, *on_device(examples, self.micro_batch, self.world.device))
        else:
            self._loss.warm_up(stream)

    def compare_with_eager(self) -> tuple[float, float] | None:
        """(captured, uncompiled) loss of `HeldOutLoss.compare_with_eager`; None if no pass was captured."""
        return self._loss.compare_with_eager() if self._loss is not None and self._loss.captured else None

    @torch.no_grad()
    def metrics(self, finished: bool, interrupted: Callable[[], bool]) -> dict[str, float] | None:
        """Metrics by name: the task's, and auxiliary losses of the model.

        A generated task's further held-out sets are evaluated only if training is `finished`. Returns None if
        `interrupted`, called on the way, returned True.
        """
        if not isinstance(self.task, GeneratedTask):
            return self._metrics_of_loss(interrupted)
        metrics = self._metrics_of_answers(self.task, "", interrupted)
        if metrics is None or not finished:
            return metrics
        more = self.further_metrics(interrupted)
        return None if more is None else metrics | more

    @torch.no_grad()
    def further_metrics(self, interrupted: Callable[[], bool]) -> dict[str, float] | None:
        """As `metrics`, but only on the further held-out sets of a generated task, such as longer sequences."""
        assert isinstance(self.task, GeneratedTask)
        metrics: dict[str, float] = {}
        for at in self.task.further:
            # These sets have other sequence lengths, for which compiling would take longer than the evaluation.
            with torch.compiler.set_stance("force_eager"):
                more = self._metrics_of_answers(self.task, at, interrupted)
            if more is None:
                return None
            metrics |= more
        return metrics

    def _metrics_of_loss(self, interrupted: Callable[[], bool]) -> dict[str, float] | None:
        assert self._loss is not None
        sums = self._loss.sums(interrupted)
        if sums is None:
            return None
        total, auxiliary = sums
        mean = self.world.sum(total).item() / self._loss.positions
        return dict(self.task.metrics(mean)) | _means(auxiliary, self.world)

    def _metrics_of_answers(
        self, task: GeneratedTask, at: str, interrupted: Callable[[], bool]
    ) -> dict[str, float] | None:
        """The scores of a generated task on its held-out set, if `at` is "", or on the further set of that name."""
        held_out = self._grouped(task.further_held_out(at) if at else task.held_out)
        device = self.world.device
        losses = torch.zeros(held_out.inputs.shape, dtype=torch.float64, device=device)
        correct = torch.zeros(held_out.inputs.shape, dtype=torch.int32, device=device)
        auxiliary: dict[str, Tensor] = {}
        for low, high in self._micro_batch_bounds(held_out):
            if interrupted():
                return None
            examples = held_out.rows(low, high)
            answers = answers_of(self.model, device, *on_device(examples, self.micro_batch, device))
            losses[low:high], correct[low:high] = answers.losses[: high - low], answers.correct[: high - low]
            _add(auxiliary, answers.auxiliary, examples.inputs.size / held_out.inputs.size)
        # Each process has filled in only its own sequences, so the sum over processes puts the parts together.
        all_losses, all_correct = (self.world.sum(each).cpu().numpy() for each in (losses, correct))
        return task.scores(held_out, all_losses, all_correct > 0, at) | ({} if at else _means(auxiliary, self.world))

    def _grouped(self, held_out: Examples) -> Examples:
        return held_out if self.group == 1 else held_out.in_pairs()

    def _micro_batch_bounds(self, held_out: Examples) -> Iterator[tuple[int, int]]:
        """(first, end) of this process's micro-batches of a held-out set.

        Every process gets the same number, some perhaps empty: gathering sharded weights takes all processes.
        """
        sequences = len(held_out.inputs)
        first, count = self.world.share(sequences, self.group)
        largest_share = self.world.largest_share(sequences, self.group)
        for i in range(math.ceil(largest_share / self.micro_batch)):
            low, high = (first + min(n * self.micro_batch, count) for n in (i, i + 1))
            yield low, high


def _add(sums: dict[str, Tensor], values: Mapping[str, Tensor], share: float) -> None:
    """Add to `sums` the auxiliary losses and measures of a micro-batch, weighted by its share of the set's tokens."""
    for name, value in values.items():
        part = value.double() * share
        sums[name] = sums[name] + part if name in sums else part


def _means(sums: Mapping[str, Tensor], world: World) -> dict[str, float]:
    """The means over a held-out set, from the weighted sums of all processes. A vector gives "NAME.0", "NAME.1", ..."""
    found: dict[str, float] = {}
    for name, own in sums.items():
        values = world.sum(own)
        names = [f"{name}.{index}" for index in range(len(values))] if values.dim() else [name]
        found |= dict(zip(names, values.flatten().tolist(), strict=True))
    return found
