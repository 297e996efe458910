"""The trainer advances a model and its optimizers through a task, one step at a time.

Shapes: B sequences of a batch or micro-batch, T sequence length, V vocabulary.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.design.config import Execution
from experiments.design.train import TrainConfig
from experiments.tasks.base import Examples, Task
from experiments.training.optimizers import Optimizers
from experiments.training.parallel import World, without_averaging

IGNORED = -100  # the target of positions that are left out of the loss
MICRO_BATCH_TOKENS = 32_768  # if no micro-batch is set; at a vocabulary of 100k the logits take about 30 GB


class NonFiniteLoss(ArithmeticError):
    """Training diverged; the message says what was not finite."""


@dataclass(frozen=True)
class Step:
    """One optimizer step as it is logged: the loss in nats per target, the time in seconds."""

    step: int
    tokens: int
    loss: float
    gradient_norm: float
    learning_rate: float
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """One pass over the held-out set as it is logged."""

    step: int
    tokens: int
    task: str
    metrics: Mapping[str, float]  # by name: those of the task, and auxiliary losses of the model
    seconds: float


class Trainer:
    """The state of one training run. On a CPU the same arguments give the same results, bit for bit."""

    def __init__(
        self,
        model: nn.Module,  # tokens [B, T] -> (logits [B, T, V], auxiliary losses by name)
        task: Task,
        optimizers: Optimizers,
        config: TrainConfig,
        execution: Execution,
        world: World,
        identity: Mapping[str, str],  # stored in checkpoints to tell to which run they belong
    ) -> None:
        self.model = model
        self.task = task
        self.config = config
        self.world = world
        self.steps_done = 0
        self.evaluated_at = 0  # the step after which the last evaluation took place
        self._identity = {**identity, "data_sha256": task.sha256}
        self._optimizers = optimizers
        self._cuda = world.device.type == "cuda"
        share = math.ceil(config.batch_sequences / world.size)
        fitting = max(1, MICRO_BATCH_TOKENS // config.sequence_length)
        self._micro_batch = min(share, execution.micro_batch or fitting)
        self._replicas = world.replicate(model)
        self._forward = torch.compile(self._replicas) if execution.compile and self._cuda else self._replicas

    @property
    def finished(self) -> bool:
        return self.steps_done == self.config.steps

    @property
    def evaluation_due(self) -> bool:
        """Whether to evaluate: after the last step, and wherever a multiple of `evaluate_every` tokens is reached."""
        if self.steps_done == self.evaluated_at:
            return False
        before = self._tokens(self.steps_done - 1) // self.config.evaluate_every
        return self.finished or self._tokens(self.steps_done) // self.config.evaluate_every > before

    def warm_up(self) -> None:
        """Compile the model and load kernels by a training and an evaluation pass whose results are discarded."""
        inputs, targets = self._to_device(next(self._micro_batches(0)))
        loss, _ = self._losses(inputs, targets)
        loss.backward()
        with torch.no_grad():
            self._losses(inputs, targets)
        self._zero_grad()
        torch.cuda.synchronize()

    def step(self) -> Step:
        """One optimizer step on the next global batch. Raises NonFiniteLoss, and then updates nothing."""
        start = time.perf_counter()
        total = self._backward(self.steps_done)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        loss_value, norm_value = total.item(), norm.item()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise NonFiniteLoss(self._cause(loss_value, norm_value))
        nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.clip_norm, norm)
        rate = self.config.learning_rate_at(self.steps_done)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self._zero_grad()
        if self._cuda:
            torch.cuda.synchronize()
        self.steps_done += 1
        seconds = time.perf_counter() - start
        return Step(self.steps_done, self._tokens(self.steps_done), loss_value, norm_value, rate, seconds)

    def _backward(self, index: int) -> Tensor:
        """Accumulate gradients of the mean loss over a global batch. Returns that loss without auxiliary losses."""
        micro_batches = list(self._micro_batches(index))
        counted = torch.tensor(sum(each.positions for each in micro_batches), device=self.world.device)
        positions = int(self.world.sum(counted).item())
        total = torch.zeros((), device=self.world.device)
        for number, examples in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)  # Only its backward pass averages the accumulated gradients.
            with contextlib.nullcontext() if last else without_averaging(self._replicas):
                loss, auxiliary = self._losses(*self._to_device(examples))
                loss = loss / positions
                total += loss.detach()
                for own in auxiliary.values():  # Each is a mean over the tokens of this micro-batch.
                    loss = loss + own * (examples.inputs.size / self._tokens_of(index))
                # DDP averages gradients over the processes; our loss is a sum over them, so scale by their number.
                (loss * self.world.size).backward()
        return self.world.sum(total)

    @torch.no_grad()
    def evaluate(self, interrupted: Callable[[], bool]) -> Evaluation | None:
        """The task's metrics on its held-out set. None if `interrupted`, called before each micro-batch, is True."""
        start = time.perf_counter()
        held_out = self.task.held_out
        first, count = self.world.share(len(held_out.inputs))
        largest_share = math.ceil(len(held_out.inputs) / self.world.size)
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        auxiliary: dict[str, Tensor] = {}
        for i in range(math.ceil(largest_share / self._micro_batch)):
            if interrupted():
                return None
            low, high = (first + min(n * self._micro_batch, count) for n in (i, i + 1))
            if high > low:
                examples = held_out.rows(low, high)
                loss, own = self._losses(*self._to_device(examples))
                total += loss.double()
                for name, value in own.items():
                    share = value.double() * (examples.inputs.size / held_out.inputs.size)
                    auxiliary[name] = auxiliary[name] + share if name in auxiliary else share
        mean = self.world.sum(total).item() / held_out.positions
        if not math.isfinite(mean):
            raise NonFiniteLoss(f"held-out loss {mean}")
        metrics = dict(self.task.metrics(mean)) | {n: self.world.sum(value).item() for n, value in auxiliary.items()}
        self.evaluated_at = self.steps_done
        seconds = time.perf_counter() - start
        return Evaluation(self.steps_done, self._tokens(self.steps_done), self.task.name, metrics, seconds)

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to resume the run, as tensors, numbers and strings."""
        return {
            **self._identity,
            "steps_done": self.steps_done,
            "evaluated_at": self.evaluated_at,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint. Raises ValueError if it was trained on other data."""
        data_sha256 = self._identity["data_sha256"]
        if state["data_sha256"] != data_sha256:
            raise ValueError(
                f"the checkpoint was trained on data {state['data_sha256'][:12]}; this run has "
                f"{data_sha256[:12]}; restore the data it began with or start the run anew"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, own in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        self.steps_done, self.evaluated_at = state["steps_done"], state["evaluated_at"]

    def _tokens(self, steps: int) -> int:
        sequences = min(steps * self.config.batch_sequences, self.config.sequences)
        return sequences * self.config.sequence_length

    def _tokens_of(self, index: int) -> int:
        """Tokens of the global batch `index`."""
        return self._tokens(index + 1) - self._tokens(index)

    def _micro_batches(self, index: int) -> Iterator[Examples]:
        """This process's share of global batch `index`, in micro-batches.

        There is at least one, even if it is empty, because every process must take part in averaging gradients.
        """
        first, share = self.world.share(self._tokens_of(index) // self.config.sequence_length)
        for low in range(0, max(share, 1), self._micro_batch):
            yield self.task.batch(index, first + low, min(self._micro_batch, share - low))

    def _to_device(self, examples: Examples) -> tuple[Tensor, Tensor]:
        """Inputs and targets on the device, with IGNORED as target where none counts.

        They are padded to whole micro-batches, so that the compiled model is always called with the same shape.
        """
        padding = ((0, self._micro_batch - len(examples.inputs)), (0, 0))
        targets = examples.targets if examples.mask is None else np.where(examples.mask, examples.targets, IGNORED)
        arrays = np.pad(examples.inputs, padding), np.pad(targets, padding, constant_values=IGNORED)
        inputs_, targets_ = (torch.from_numpy(array).to(self.world.device) for array in arrays)
        return inputs_, targets_

    def _losses(
        self,
        inputs: Tensor,  # [B, T]
        targets: Tensor,  # [B, T]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of cross-entropies in nats, computed in float32 from the logits, and auxiliary losses by name."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self._cuda):
            logits, auxiliary = self._forward(inputs)  # [B, T, V]
        logits = logits.float().flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum"), auxiliary

    def _zero_grad(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _cause(self, loss: float, norm: float) -> str:
        names = [name for name, _ in self.model.named_parameters()]
        broken = [n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        where = f", first in {broken[0]} ({len(broken)} of {len(names)} parameters)" if broken else ""
        rate = self.config.learning_rate_at(self.steps_done)
        return f"loss {loss}, gradient norm {norm}{where}, learning rate {rate:.3g}"
