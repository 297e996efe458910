"""Optimiser steps on a device that never wait for the host: it launches many, then reads all their losses at once.

Shapes: L steps of a window, M micro-batches of a step, B sequences of a micro-batch, T sequence length.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from experiments.tasks.base import Examples
from experiments.training.loss import IGNORED
from experiments.training.parallel import World, without_averaging

LONGEST_WINDOW = 64  # steps: at 1.6 ms each the host then looks in ten times a second
WINDOW_TOKENS = 2**21  # of this process: 16 bytes each on the device
_WARM_UPS = 3  # a captured step must not be the first to compile, to tune or to allocate its scratch


class Losses(Protocol):
    """A micro-batch's summed loss in nats, and its auxiliary losses by name."""

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]: ...


class Shape(NamedTuple):
    steps: int  # L
    micro_batches: int  # M
    sequences: int  # B
    time: int  # T


def window_shape(micro_batches: int, sequences: int, time: int) -> Shape:
    """Of windows as long as their tokens may take memory."""
    steps = WINDOW_TOKENS // (micro_batches * sequences * time)
    return Shape(max(1, min(LONGEST_WINDOW, steps)), micro_batches, sequences, time)


def padded(examples: Examples, sequences: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # [B, T] each
    """Inputs and targets with rows up to a whole micro-batch, so that compiled code meets one shape. Targets that do
    not count are IGNORED."""
    padding = ((0, sequences - len(examples.inputs)), (0, 0))
    targets = examples.targets if examples.mask is None else np.where(examples.mask, examples.targets, IGNORED)
    return np.pad(examples.inputs, padding), np.pad(targets, padding, constant_values=IGNORED)


def add_gradients(
    model: nn.Module,  # replicated, where there are several processes
    losses: Losses,
    micro_batches: Sequence[
        tuple[Tensor, Tensor, Tensor | float]
    ],  # inputs, targets, share of the global batch's tokens
    positions: Tensor,  # []: targets of the global batch that count
    world: World,
) -> Tensor:  # []
    """Add the gradients of the mean loss over a global batch; that loss, auxiliary losses left out."""
    total = torch.zeros((), device=world.device)
    for number, (inputs, targets, share) in enumerate(micro_batches, start=1):
        last = number == len(micro_batches)  # the only one whose gradients are averaged over the processes
        with contextlib.nullcontext() if last else without_averaging(model):
            loss, auxiliary = losses(inputs, targets)
            loss = loss / positions
            total += loss.detach()
            for own in auxiliary.values():  # means over a micro-batch's tokens
                loss = loss + own * share
            # DDP averages gradients over the processes; our loss is a sum over them, so scale by their number.
            (loss * world.size).backward()
    return world.sum(total)


class _Window:
    """What steps read, in host or device memory."""

    def __init__(self, shape: Shape, device: torch.device, pinned: bool = False) -> None:
        def zeros(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device, pin_memory=pinned)

        self.inputs = zeros(*shape, dtype=torch.int64)
        self.targets = zeros(*shape, dtype=torch.int64)
        self.positions = zeros(shape.steps, dtype=torch.int64)  # targets that count, in all processes
        self.shares = zeros(*shape[:2], dtype=torch.float32)  # each micro-batch's part of the global batch's tokens
        self.rates = zeros(shape.steps, dtype=torch.float32)  # of learning

    def copy(self, source: "_Window", steps: int) -> None:
        for name, tensor in vars(self).items():
            tensor[:steps].copy_(vars(source)[name][:steps], non_blocking=True)


class Engine:
    """Forward, backward, clipping and AdamW of whole steps, as one CUDA graph if `capture` is called.

    From the first step whose loss or gradient norm is not finite on, nothing is updated any more, neither parameters
    nor moments nor AdamW's step count: the state stays what it was before that step.
    """

    def __init__(
        self,
        model: nn.Module,  # replicated, where there are several processes
        losses: Losses,
        optimizer: torch.optim.AdamW,  # fused
        world: World,
        shape: Shape,
        clip_norm: float,
    ) -> None:
        self._model, self._losses, self._optimizer, self._world = model, losses, optimizer, world
        self._clip_norm, self.shape = clip_norm, shape
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        cuda = world.device.type == "cuda"
        self._host = _Window(shape, torch.device("cpu"), pinned=cuda)
        self._window = _Window(shape, world.device)
        self._results = torch.zeros(2, shape.steps, device=world.device)  # losses and gradient norms
        self._place = torch.zeros(1, dtype=torch.int64, device=world.device)  # of the next step in the window
        self._stopped = torch.zeros((), device=world.device)  # 1: a step was not finite
        self._rate = torch.zeros((), device=world.device)
        for group in optimizer.param_groups:
            group["lr"] = self._rate
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream() if cuda else None
        self._uploaded = torch.cuda.Event() if cuda else None

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def fill(self, place: int, micro_batches: Iterable[Examples], tokens: int, rate: float) -> None:
        """Put a step's batch, of `tokens` in all processes, into the next window, once this one is uploaded."""
        if self._uploaded is not None:
            self._uploaded.synchronize()
        host = self._host
        host.inputs[place].zero_()
        host.targets[place].fill_(IGNORED)
        host.shares[place].zero_()
        host.positions[place] = 0
        host.rates[place] = rate
        for number, examples in enumerate(micro_batches):
            inputs, targets = padded(examples, self.shape.sequences)
            host.inputs[place, number] = torch.from_numpy(inputs)
            host.targets[place, number] = torch.from_numpy(targets)
            host.shares[place, number] = examples.inputs.size / tokens
            host.positions[place] += examples.positions

    def launch(self, steps: int) -> None:
        """Upload the window and run its first `steps`, without waiting for them."""
        self._window.copy(self._host, steps)
        if self._uploaded is not None:
            self._uploaded.record()
        self._world.sum(self._window.positions[:steps])
        self._place.zero_()
        for _ in range(steps):
            if self._graph is None:
                self._step()
                self._release_gradients()
            else:
                self._graph.replay()

    def read(self, steps: int) -> list[tuple[float, float]]:
        """Mean loss and gradient norm of each step launched, once all are done."""
        losses, norms = self._results[:, :steps].tolist()
        return list(zip(losses, norms, strict=True))

    def warm_up(self, capture: bool) -> None:
        """Compile and allocate without advancing, and with `capture` record the step as one CUDA graph."""
        self._stopped.fill_(1.0)
        self._window.positions.fill_(1)
        with self._own_stream() if capture else contextlib.nullcontext():
            for _ in range(_WARM_UPS if capture else 1):
                self._place.zero_()
                self._step()
                self._release_gradients()
        if capture:
            self._graph = torch.cuda.CUDAGraph()
            # On a stream of its own: cuBLAS keeps one workspace a stream, and graphs captured on one stream would
            # share it, and corrupt each other's products when replayed at the same time.
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._step()
            self._release_gradients()  # the graph keeps their memory
        self._stopped.zero_()

    @contextlib.contextmanager
    def _own_stream(self) -> Iterator[None]:
        """What the block launches runs after what was launched before it, and before what will be."""
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def _step(self) -> None:
        """One step on the batch at `_place`. Leaves the gradients, clipped."""
        window, at = self._window, self._place
        self._rate.copy_(window.rates.index_select(0, at)[0])
        inputs, targets, shares, positions = (
            tensor.index_select(0, at)[0] for tensor in (window.inputs, window.targets, window.shares, window.positions)
        )
        micro_batches = list(zip(inputs, targets, shares, strict=True))
        loss = add_gradients(self._model, self._losses, micro_batches, positions, self._world)
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        self._stopped.logical_or_(~(loss + norm).isfinite())
        # Fused AdamW divides gradients by grad_scale, and does nothing at all where found_inf is 1.
        scale = ((norm + 1e-6) / self._clip_norm).clamp(min=1.0)
        self._optimizer.grad_scale, self._optimizer.found_inf = scale, self._stopped  # type: ignore[attr-defined]
        self._optimizer.step()
        self._results.index_copy_(1, at, torch.stack([loss, norm])[:, None])
        self._place += 1

    def _release_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
