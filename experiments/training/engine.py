"""Optimizer steps on a device that do not wait for the host, which launches many and then reads all their losses.

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
from experiments.training.parallel import World
from experiments.training.rehearsal import Rehearsal

LONGEST_WINDOW = 64  # steps; with steps of 1.6 ms the host reads results ten times a second
WINDOW_TOKENS = 2**21  # of one process; each takes 16 bytes on the device
_WARM_UPS = 3  # steps before the capture, during which nothing may be compiled, tuned or allocated for the first time


class Losses(Protocol):
    """A function that gives the summed loss of a micro-batch in nats, divided, and its auxiliary losses by name.

    Its arguments are the tensors of a micro-batch, as `on_device` gives them, and the divisor [] of the summed loss.
    """

    def __call__(
        self, inputs: Tensor, targets: Tensor, starts: Tensor | None = None, *, divisor: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


class Shape(NamedTuple):
    """The shape of a window, which holds the batches of the steps that are launched together."""

    steps: int  # L
    micro_batches: int  # M
    sequences: int  # B
    time: int  # T
    documents: int | None = None  # K, the most packed documents of a sequence; None: each sequence is one


def window_shape(micro_batches: int, sequences: int, time: int, documents: int | None = None) -> Shape:
    """The shape of the longest window whose tokens fit in WINDOW_TOKENS."""
    steps = WINDOW_TOKENS // (micro_batches * sequences * time)
    return Shape(max(1, min(LONGEST_WINDOW, steps)), micro_batches, sequences, time, documents)


def padded(examples: Examples, sequences: int) -> tuple[NDArray[np.int64], ...]:  # [B, T], [B, T], perhaps [B, K]
    """Inputs, targets, with IGNORED where none counts, and the starts of packed documents, if there are any.

    They are padded to whole micro-batches, so that the compiled model is always called with the same shape.
    """
    padding = ((0, sequences - len(examples.inputs)), (0, 0))
    targets = examples.targets if examples.mask is None else np.where(examples.mask, examples.targets, IGNORED)
    found = np.pad(examples.inputs, padding), np.pad(targets, padding, constant_values=IGNORED)
    if examples.starts is None:
        return found
    starts = np.pad(examples.starts, padding, constant_values=examples.inputs.shape[1])
    starts[:, 0] = 0
    return *found, starts


def on_device(examples: Examples, sequences: int, device: torch.device) -> tuple[Tensor, ...]:
    """What `padded` gives, on the device."""
    return tuple(torch.from_numpy(array).to(device) for array in padded(examples, sequences))


def add_gradients(
    model: nn.Module,  # replicated or sharded, if there are several processes
    losses: Losses,
    # the tensors that `losses` takes, and the share of the global batch's tokens
    micro_batches: Sequence[tuple[Sequence[Tensor], Tensor | float]],
    positions: Tensor,  # []: number of targets of the global batch that count
    world: World,
) -> Tensor:  # []
    """Accumulate gradients of the mean loss over a global batch. Returns that loss without auxiliary losses."""
    total = torch.zeros((), device=world.device)
    # Gradients are averaged over the processes; our loss is a sum over them, so scale by their number. Without a target
    # that counts the loss is 0, not NaN.
    divisor = positions.clamp(min=1) / world.size
    for number, (tensors, share) in enumerate(micro_batches, start=1):
        last = number == len(micro_batches)  # Only its backward pass averages the accumulated gradients.
        with contextlib.nullcontext() if last else world.without_averaging(model):
            loss, auxiliary = losses(*tensors, divisor=divisor)
            total += loss.detach()
            for auxiliary_loss in auxiliary.values():  # Each is a mean over the sequences of this micro-batch.
                loss = loss + auxiliary_loss * (share * world.size)
            loss.backward()
    world.average_whole(model)
    return world.sum(total) / world.size


class _Window:
    """The inputs of the steps that are launched together, in host or device memory."""

    def __init__(self, shape: Shape, device: torch.device, pinned: bool = False) -> None:
        def zeros(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device, pin_memory=pinned)

        size = (shape.steps, shape.micro_batches, shape.sequences)
        inputs, targets = (zeros(*size, shape.time, dtype=torch.int64) for _ in range(2))
        # what `padded` gives for each micro-batch
        self.batches = [inputs, targets]
        if shape.documents is not None:
            self.batches.append(zeros(*size, shape.documents, dtype=torch.int64))
        self.positions = zeros(shape.steps, dtype=torch.int64)  # number of targets that count, over all processes
        # share of each micro-batch in the tokens of the global batch
        self.shares = zeros(*shape[:2], dtype=torch.float32)
        self.rates = zeros(shape.steps, dtype=torch.float32)  # learning rates

    def copy(self, source: "_Window", steps: int) -> None:
        for into, tensor in zip(self._tensors(), source._tensors(), strict=True):
            into[:steps].copy_(tensor[:steps], non_blocking=True)

    def _tensors(self) -> list[Tensor]:
        return [*self.batches, self.positions, self.shares, self.rates]


class Engine:
    """Whole optimizer steps: forward, backward, clipping and update. `warm_up` can capture them as one CUDA graph.

    If the loss or the gradient norm of a step is not finite, this step and all later ones update nothing, neither
    parameters nor the optimizers' state, such as AdamW's step count: all stays as it was before that step.
    """

    def __init__(
        self,
        model: nn.Module,  # replicated or sharded, if there are several processes
        losses: Losses,
        optimizers: Sequence[torch.optim.Optimizer],  # which heed `grad_scale` and `found_inf`
        world: World,
        shape: Shape,
        clip_norm: float,
    ) -> None:
        self._model, self._losses, self._optimizers, self._world = model, losses, optimizers, world
        self._clip_norm, self.shape = clip_norm, shape
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        cuda = world.device.type == "cuda"
        self._host = _Window(shape, torch.device("cpu"), pinned=cuda)
        self._window = _Window(shape, world.device)
        self._results = torch.zeros(2, shape.steps, device=world.device)  # losses and gradient norms
        self._place = torch.zeros(1, dtype=torch.int64, device=world.device)  # index of the next step in the window
        self._stopped = torch.zeros((), device=world.device)  # 1 after a step that was not finite, else 0
        self._rate = torch.zeros((), device=world.device)
        for group in groups:
            group["lr"] = self._rate
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured_gradients: list[Tensor | None] = []  # what the graph writes, until it was rehearsed
        self.stream = torch.cuda.Stream() if cuda else None  # for captures
        self._uploaded = torch.cuda.Event() if cuda else None
        # A process that waits for this one sleeps. With many runs on a machine, cores that wait busily are missed.
        self._finished = torch.cuda.Event(blocking=True) if cuda else None

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def fill(self, place: int, micro_batches: Iterable[Examples], tokens: int, rate: float) -> None:
        """Write a step's batch into the next window, after the upload of the current one.

        `tokens` is the size of the global batch.
        """
        if self._uploaded is not None:
            self._uploaded.synchronize()
        host = self._host
        inputs, targets, *_ = host.batches
        inputs[place].zero_()
        targets[place].fill_(IGNORED)
        host.shares[place].zero_()
        host.positions[place] = 0
        host.rates[place] = rate
        for number, examples in enumerate(micro_batches):
            for into, array in zip(host.batches, padded(examples, self.shape.sequences), strict=True):
                into[place, number] = torch.from_numpy(array)
            host.shares[place, number] = examples.inputs.size / tokens
            host.positions[place] += examples.positions

    def launch(self, steps: int) -> None:
        """Upload the window and launch its first `steps`, without waiting for their results."""
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
        if self._finished is not None:
            self._finished.record()

    def read(self, steps: int) -> list[tuple[float, float]]:
        """Wait for the launched steps. Returns (mean loss, gradient norm) of each."""
        if self._finished is not None:
            self._finished.synchronize()
        losses, norms = self._results[:, :steps].tolist()
        return list(zip(losses, norms, strict=True))

    def warm_up(self, capture: bool) -> None:
        """Compile and allocate without updating anything. With `capture`, also record the step as one CUDA graph."""
        self._stopped.fill_(1.0)
        self._window.positions.fill_(1)
        with self._own_stream() if capture else contextlib.nullcontext():
            for _ in range(_WARM_UPS if capture else 1):
                self._place.zero_()
                self._step()
                self._release_gradients()
        if capture:
            self._graph = torch.cuda.CUDAGraph()
            # Capture on a separate stream. cuBLAS has one workspace per stream: graphs that were captured on the same
            # stream would share it, and corrupt each other's products if they are replayed at the same time.
            with torch.cuda.graph(self._graph, stream=self.stream):
                self._step()
            self._captured_gradients = [parameter.grad for parameter in self._parameters]
            self._release_gradients()  # Their memory belongs to the graph.
        self._stopped.zero_()

    def rehearse(self) -> Rehearsal:
        """The first filled step, as the graph has it and uncompiled. Updates nothing. Call it once a capture."""
        self._stopped.fill_(1.0)
        try:
            self.launch(1)
            ((loss, norm),) = self.read(1)
            self._place.zero_()
            with torch.compiler.set_stance("force_eager"):
                self._step()
            plain_loss, plain_norm = self._results[:, 0].tolist()
            captured, plain = (
                [torch.zeros_like(p) if g is None else g for p, g in zip(self._parameters, gradients, strict=True)]
                for gradients in (self._captured_gradients, [p.grad for p in self._parameters])
            )
            norms = torch.stack(torch._foreach_norm(plain)).tolist()
            torch._foreach_sub_(plain, captured)
            return Rehearsal(
                loss, norm, plain_loss, plain_norm, norms, torch.stack(torch._foreach_norm(plain)).tolist()
            )
        finally:  # memory may be too small for a step that is not compiled
            self._captured_gradients = []
            self._release_gradients()
            self._stopped.zero_()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters in the order of a rehearsal's gradients."""
        return self._parameters

    @contextlib.contextmanager
    def _own_stream(self) -> Iterator[None]:
        """Launch on the engine's stream, after all earlier work of the current stream and before all later work."""
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def _step(self) -> None:
        """One step on the batch at index `_place` of the window. The gradients are not released."""
        window, at = self._window, self._place
        self._rate.copy_(window.rates.index_select(0, at)[0])
        *batches, shares, positions = (
            tensor.index_select(0, at)[0] for tensor in (*window.batches, window.shares, window.positions)
        )
        micro_batches = list(zip(zip(*batches, strict=True), shares, strict=True))
        loss = add_gradients(self._model, self._losses, micro_batches, positions, self._world)
        norm = self._world.total_norm([p.grad for p in self._parameters if p.grad is not None])
        self._stopped.logical_or_(~(loss + norm).isfinite())
        # The optimizers divide gradients by grad_scale, which clips them, and update nothing if found_inf is 1.
        scale = ((norm + 1e-6) / self._clip_norm).clamp(min=1.0)
        for optimizer in self._optimizers:
            optimizer.grad_scale, optimizer.found_inf = scale, self._stopped  # type: ignore[attr-defined]
            optimizer.step()
        self._results.index_copy_(1, at, torch.stack([loss, norm])[:, None])
        self._place += 1

    def _release_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
