"""Optimizer steps on a GPU that the host launches a window at a time, without waiting for the loss of each step.

Shapes: L steps of a window, M micro-batches of a step, B sequences of a micro-batch, T sequence length, K packed
documents of a sequence.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from experiments.tasks.base import Examples
from experiments.training.compiled_check import StepComparison
from experiments.training.loss import IGNORED
from experiments.training.parallel import World

LONGEST_WINDOW = 64  # steps; with steps of 1.6 ms the host reads results ten times a second
WINDOW_TOKENS = 2**21  # tokens of one process in a window; each takes 16 bytes on the device
_WARM_UPS = 3  # Steps before a capture. Nothing may be compiled, tuned or allocated for the first time in a capture.


class Losses(Protocol):
    """A function of a micro-batch that returns its summed loss in nats over `divisor`, and auxiliary losses by name.

    The positional arguments are the tensors that `on_device` returns; `divisor` is a scalar tensor, or None for 1.
    """

    def __call__(
        self, inputs: Tensor, targets: Tensor, starts: Tensor | None = None, *, divisor: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


class WindowShape(NamedTuple):
    """The shape of a window, which holds the batches of the steps that are launched together."""

    steps: int  # L
    micro_batches: int  # M
    sequences: int  # B
    time: int  # T
    documents: int | None = None  # K, the most packed documents of a sequence; None: each sequence is one


def window_shape(micro_batches: int, sequences: int, time: int, documents: int | None = None) -> WindowShape:
    """The shape of the longest window whose tokens fit in WINDOW_TOKENS."""
    steps = WINDOW_TOKENS // (micro_batches * sequences * time)
    return WindowShape(max(1, min(LONGEST_WINDOW, steps)), micro_batches, sequences, time, documents)


def padded(examples: Examples, sequences: int) -> tuple[NDArray[np.int64], ...]:  # [B, T], [B, T], perhaps [B, K]
    """The arrays of a micro-batch of `sequences` sequences: inputs, targets, and starts if documents are packed.

    Targets that do not count are IGNORED. Fewer sequences are padded, so that the compiled model always gets one shape.
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
    """The arrays of `padded`, as tensors on the device."""
    return tuple(torch.from_numpy(array).to(device) for array in padded(examples, sequences))


def add_gradients(
    model: nn.Module,  # replicated or sharded, if there are several processes
    losses: Losses,
    # of each: the tensors that `losses` takes, and its share of the global batch's tokens
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
    world.average_unsharded(model)
    return world.sum(total) / world.size


class _Window:
    """The inputs of the steps that are launched together, in host or device memory."""

    def __init__(self, shape: WindowShape, device: torch.device, pinned: bool = False) -> None:
        def zeros(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device, pin_memory=pinned)

        size = (shape.steps, shape.micro_batches, shape.sequences)
        inputs, targets = (zeros(*size, shape.time, dtype=torch.int64) for _ in range(2))
        self.batches = [inputs, targets]  # [L, M, B, ...] each: the arrays of `padded` for each micro-batch
        if shape.documents is not None:
            self.batches.append(zeros(*size, shape.documents, dtype=torch.int64))
        self.positions = zeros(shape.steps, dtype=torch.int64)  # [L]: number of targets that count
        self.shares = zeros(*shape[:2], dtype=torch.float32)  # [L, M]: each micro-batch's share of the global batch
        self.rates = zeros(shape.steps, dtype=torch.float32)  # [L]: learning rates

    def copy(self, source: "_Window", steps: int) -> None:
        """Copy the first `steps` of another window, without waiting for the copy."""
        for into, tensor in zip(self._tensors(), source._tensors(), strict=True):
            into[:steps].copy_(tensor[:steps], non_blocking=True)

    def _tensors(self) -> list[Tensor]:
        return [*self.batches, self.positions, self.shares, self.rates]


class Engine:
    """Whole optimizer steps: forward, backward, clipping and update. `warm_up` can capture them as one CUDA graph.

    If the loss or the gradient norm of a step is not finite, this step and all later ones change neither the parameters
    nor the optimizers' state, such as AdamW's step count.
    """

    def __init__(
        self,
        model: nn.Module,  # replicated or sharded, if there are several processes
        losses: Losses,
        optimizers: Sequence[torch.optim.Optimizer],  # must support `grad_scale` and `found_inf`
        world: World,
        shape: WindowShape,
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
        self._next = torch.zeros(1, dtype=torch.int64, device=world.device)  # index of the next step in the window
        self._stopped = torch.zeros((), device=world.device)  # 1 after a step that was not finite, else 0
        self._rate = torch.zeros((), device=world.device)
        for group in groups:
            group["lr"] = self._rate
        self._graph: torch.cuda.CUDAGraph | None = None
        # The gradients that the graph writes, kept until `compare_with_eager` reads them
        self._captured_gradients: list[Tensor | None] = []
        self.stream = torch.cuda.Stream() if cuda else None  # for captures
        self._uploaded = torch.cuda.Event() if cuda else None
        # blocking=True: wait for this event asleep. A busy wait would take a core from the machine's other runs.
        self._finished = torch.cuda.Event(blocking=True) if cuda else None

    @property
    def captured(self) -> bool:
        """Whether a step is a CUDA graph."""
        return self._graph is not None

    def fill(self, index: int, micro_batches: Iterable[Examples], tokens: int, rate: float) -> None:
        """Write the batch of step `index` of the next window, once the current window is on the device.

        `tokens` is the size of the global batch, `rate` the step's learning rate.
        """
        if self._uploaded is not None:
            self._uploaded.synchronize()
        host = self._host
        inputs, targets, *_ = host.batches
        inputs[index].zero_()
        targets[index].fill_(IGNORED)
        host.shares[index].zero_()
        host.positions[index] = 0
        host.rates[index] = rate
        for number, examples in enumerate(micro_batches):
            for into, array in zip(host.batches, padded(examples, self.shape.sequences), strict=True):
                into[index, number] = torch.from_numpy(array)
            host.shares[index, number] = examples.inputs.size / tokens
            host.positions[index] += examples.positions

    def launch(self, steps: int) -> None:
        """Upload the window and launch its first `steps`, without waiting for their results."""
        self._window.copy(self._host, steps)
        if self._uploaded is not None:
            self._uploaded.record()
        self._world.sum(self._window.positions[:steps])
        self._next.zero_()
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
                self._next.zero_()
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

    def compare_with_eager(self) -> StepComparison:
        """Compute the window's first step by the CUDA graph and again uncompiled, without updating anything.

        Call it at most once after a capture: it drops the references to the graph's gradients.
        """
        self._stopped.fill_(1.0)
        try:
            self.launch(1)
            ((loss, norm),) = self.read(1)
            self._next.zero_()
            with torch.compiler.set_stance("force_eager"):
                self._step()
            plain_loss, plain_norm = self._results[:, 0].tolist()
            captured, plain = (
                [torch.zeros_like(p) if g is None else g for p, g in zip(self._parameters, gradients, strict=True)]
                for gradients in (self._captured_gradients, [p.grad for p in self._parameters])
            )
            norms = torch.stack(torch._foreach_norm(plain)).tolist()
            torch._foreach_sub_(plain, captured)
            return StepComparison(
                loss, norm, plain_loss, plain_norm, norms, torch.stack(torch._foreach_norm(plain)).tolist()
            )
        finally:  # An uncompiled step needs more memory, and may have failed for want of it.
            self._captured_gradients = []
            self._release_gradients()
            self._stopped.zero_()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters, in the order of `StepComparison.norms`."""
        return self._parameters

    @contextlib.contextmanager
    def _own_stream(self) -> Iterator[None]:
        """Launch work on the engine's stream, ordered after earlier and before later work of the current stream."""
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def _step(self) -> None:
        """One step on the batch at index `_next` of the window. It does not release the gradients."""
        window, at = self._window, self._next
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
        self._next += 1

    def _release_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
