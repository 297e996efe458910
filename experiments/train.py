"""The trainer: one run's model, optimiser and place in its data, advanced a step at a time.

Shapes: B sequences of a batch or micro-batch, T sequence length, V vocabulary.
Source of the recipe: arXiv 2606.03825, section 4 (AdamW, weight decay 0.1, warm-up, cosine to zero, bf16).
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dynconv.layers import optimizer_groups
from experiments.config import Execution, RunConfig, TrainConfig
from experiments.data.batches import Batches, held_out
from experiments.data.dataset import Dataset
from experiments.models.transformer import Transformer

IGNORED = -100  # the target of padding, which takes no part in the loss
MICRO_BATCH_TOKENS = 32_768  # where none is set: at a vocabulary of 100k the logits then take some 30 GB


class NonFiniteLoss(ArithmeticError):
    """Training diverged; the message says at which step and what was not finite."""


@dataclass(frozen=True)
class Step:
    """One optimiser step as it is logged. Loss in nats a token, seconds of wall clock."""

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
    loss: float
    bits_per_byte: float
    seconds: float


@dataclass(frozen=True)
class World:
    """The processes that share a run, one a device."""

    rank: int
    size: int
    device: torch.device

    def share(self, count: int) -> tuple[int, int]:
        """This process's part of `count` sequences: (first, how many)."""
        first = count * self.rank // self.size
        return first, count * (self.rank + 1) // self.size - first

    def sum(self, tensor: Tensor) -> Tensor:
        """In place, over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, number: int) -> bool:
        """Whether all processes have the same number. Where they do not, at least one of them gets False."""
        return self.sum(torch.tensor(float(number), device=self.device)).item() == number * self.size

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process: all processes get the same answer."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag), device=self.device)).item())


class Trainer:
    """State of one training run. Its course depends on the run's config and data alone: on a CPU, bit for bit."""

    def __init__(self, run: RunConfig, dataset: Dataset, execution: Execution, world: World) -> None:
        self.config = run.train
        self.world = world
        self.steps_done = 0
        self.evaluated_at = 0  # the step after which the held-out set was last read
        self._run_id = run.run_id
        self._data_sha256 = dataset.sha256
        self._cuda = world.device.type == "cuda"
        share = math.ceil(run.train.batch_sequences / world.size)
        fitting = max(1, MICRO_BATCH_TOKENS // run.train.sequence_length)
        self._micro_batch = min(share, execution.micro_batch or fitting)
        self._batches = Batches(
            dataset,
            sequence_length=run.train.sequence_length,
            batch_sequences=run.train.batch_sequences,
            seed=run.seed,
        )
        self._held_out = held_out(
            dataset, sequence_length=run.train.sequence_length, sequences=run.train.held_out_sequences
        )
        self.model = Transformer(run.model, run.seed).to(world.device)
        self._replicas = DistributedDataParallel(self.model) if world.size > 1 else None
        forward = self._replicas or self.model
        self._forward = torch.compile(forward) if execution.compile and self._cuda else forward
        self._optimizer = torch.optim.AdamW(
            parameter_groups(self.model, run.train.weight_decay),
            lr=run.train.learning_rate,
            betas=(run.train.beta1, run.train.beta2),
            eps=run.train.epsilon,
            fused=True,
        )

    @property
    def finished(self) -> bool:
        return self.steps_done == self.config.steps

    @property
    def evaluation_due(self) -> bool:
        """After the last step and after each step that reaches a multiple of `evaluate_every` tokens."""
        if self.steps_done == self.evaluated_at:
            return False
        before = self._tokens(self.steps_done - 1) // self.config.evaluate_every
        return self.finished or self._tokens(self.steps_done) // self.config.evaluate_every > before

    def warm_up(self) -> None:
        """Compile and load what a GPU needs, without advancing: one forward and backward, one evaluation pass."""
        inputs, targets = next(self._micro_batches(0))
        self._loss(inputs, targets).backward()
        with torch.no_grad():
            self._loss(inputs, targets)
        self._optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()

    def step(self) -> Step:
        """One optimiser step on the next global batch. Raises NonFiniteLoss before anything is updated."""
        start = time.perf_counter()
        config, index = self.config, self.steps_done
        tokens = self._tokens(index + 1) - self._tokens(index)
        total = torch.zeros((), device=self.world.device)
        micro_batches = list(self._micro_batches(index))
        for number, (inputs, targets) in enumerate(micro_batches, start=1):
            with self._without_exchange(number < len(micro_batches)):
                loss = self._loss(inputs, targets) / tokens
                (loss * self.world.size).backward()  # the exchange takes the mean over processes, the loss is a sum
            total += loss.detach()
        self.world.sum(total)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        loss_value, norm_value = total.item(), norm.item()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise NonFiniteLoss(self._cause(loss_value, norm_value))
        nn.utils.clip_grads_with_norm_(self.model.parameters(), config.clip_norm, norm)
        rate = learning_rate(index, config)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._cuda:
            torch.cuda.synchronize()
        self.steps_done += 1
        seconds = time.perf_counter() - start
        return Step(self.steps_done, self._tokens(self.steps_done), loss_value, norm_value, rate, seconds)

    @torch.no_grad()
    def evaluate(self, interrupted: Callable[[], bool]) -> Evaluation | None:
        """Mean loss on the held-out set; None if `interrupted` (asked before every micro-batch) says so."""
        start = time.perf_counter()
        inputs, targets = self._held_out.inputs, self._held_out.targets
        first, count = self.world.share(len(inputs))
        largest_share = math.ceil(len(inputs) / self.world.size)
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for i in range(math.ceil(largest_share / self._micro_batch)):
            if interrupted():
                return None
            low, high = (first + min(n * self._micro_batch, count) for n in (i, i + 1))
            if high > low:
                total += self._loss(*self._to_device(inputs[low:high], targets[low:high])).double()
        loss = self.world.sum(total).item() / inputs.size
        if not math.isfinite(loss):
            raise NonFiniteLoss(f"held-out loss {loss}")
        bits_per_byte = self._held_out.bits_per_byte(loss)
        self.evaluated_at = self.steps_done
        seconds = time.perf_counter() - start
        return Evaluation(self.steps_done, self._tokens(self.steps_done), loss, bits_per_byte, seconds)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as tensors and plain numbers."""
        return {
            "run_id": self._run_id,
            "data_sha256": self._data_sha256,
            "steps_done": self.steps_done,
            "evaluated_at": self.evaluated_at,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint. Raises ValueError where it was trained on other data."""
        if state["data_sha256"] != self._data_sha256:
            raise ValueError(
                f"the checkpoint was trained on data {state['data_sha256'][:12]}; this run has "
                f"{self._data_sha256[:12]}; restore the data it began with or start the run anew"
            )
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.steps_done, self.evaluated_at = state["steps_done"], state["evaluated_at"]

    def _tokens(self, steps: int) -> int:
        sequences = min(steps * self.config.batch_sequences, self.config.sequences)
        return sequences * self.config.sequence_length

    def _micro_batches(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of global batch `index`; at least one, so that every process has gradients."""
        batch_sequences = self.config.batch_sequences
        count = min(batch_sequences, self.config.sequences - index * batch_sequences)
        first, share = self.world.share(count)
        for low in range(0, max(share, 1), self._micro_batch):
            size = min(self._micro_batch, share - low)
            yield self._to_device(*self._batches.batch(index, first + low, size))

    def _to_device(self, inputs: np.ndarray, targets: np.ndarray) -> tuple[Tensor, Tensor]:
        """Padded to whole micro-batches with ignored targets, so that compiled code meets one shape."""
        padding = ((0, self._micro_batch - len(inputs)), (0, 0))
        arrays = np.pad(inputs, padding), np.pad(targets, padding, constant_values=IGNORED)
        inputs_, targets_ = (torch.from_numpy(array).to(self.world.device) for array in arrays)
        return inputs_, targets_

    def _loss(
        self,
        inputs: Tensor,  # [B, T]
        targets: Tensor,  # [B, T]
    ) -> Tensor:
        """Summed cross-entropy in nats, in float32 from the logits on."""
        with torch.autocast("cuda", torch.bfloat16, enabled=self._cuda):
            logits = self._forward(inputs)  # [B, T, V]
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")

    def _without_exchange(self, accumulating: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are exchanged between processes once a step, with its last micro-batch."""
        return self._replicas.no_sync() if self._replicas and accumulating else contextlib.nullcontext()

    def _cause(self, loss: float, norm: float) -> str:
        names = [name for name, _ in self.model.named_parameters()]
        broken = [n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        where = f", first in {broken[0]} ({len(broken)} of {len(names)} parameters)" if broken else ""
        rate = learning_rate(self.steps_done, self.config)
        return f"loss {loss}, gradient norm {norm}{where}, learning rate {rate:.3g}"


def learning_rate(index: int, config: TrainConfig) -> float:
    """Rate of the 0-based step `index`: linear warm-up over `warmup_fraction` of the steps, then cosine to zero."""
    warmup = max(1, round(config.warmup_fraction * config.steps))
    if index < warmup:
        return config.learning_rate * (index + 1) / warmup
    progress = (index - warmup) / (config.steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices of linear maps and embeddings decay. Gains do not, nor do the parameters of a short convolution."""
    undecayed = optimizer_groups(model)["undecayed"]
    decayed = [p for name, p in model.named_parameters() if name not in undecayed]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": list(undecayed.values()), "weight_decay": 0.0},
    ]
