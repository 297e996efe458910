"""The loss on a held-out set whose sequences stay on the device, where the losses are summed without the host.

Shapes: P micro-batches of this process, B sequences of a micro-batch, T sequence length.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from experiments.tasks.base import Examples
from experiments.training.engine import Losses, padded

_LOOK_EVERY = 8  # micro-batches that the host launches on a GPU before it waits and looks for an interruption


class HeldOutLoss:
    """The losses of this process's share of the held-out set. Some of its micro-batches may hold only padding."""

    def __init__(
        self,
        losses: Losses,
        examples: Examples,
        bounds: Sequence[tuple[int, int]],  # P: (first, end) of each micro-batch in the held-out set's sequences
        sequences: int,  # B
        device: torch.device,
    ) -> None:
        self._losses, self._device, self._passes = losses, device, len(bounds)
        self.positions = examples.positions  # number of targets that count, in the whole set
        parts = [examples.rows(low, high) for low, high in bounds]
        self._first_positions = parts[0].positions
        self._batches = [  # [P, B, ...] each: the arrays of `padded` for each micro-batch
            torch.stack([torch.from_numpy(array) for array in arrays]).to(device)
            for arrays in zip(*(padded(part, sequences) for part in parts), strict=True)
        ]
        shares = [part.inputs.size / examples.inputs.size for part in parts]
        self._shares = torch.tensor(shares, dtype=torch.float64, device=device)  # [P]
        self._next = torch.zeros(1, dtype=torch.int64, device=device)  # index of the next micro-batch
        self._total = torch.zeros((), dtype=torch.float64, device=device)
        self._auxiliary: dict[str, Tensor] = {}
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def warm_up(self, stream: torch.cuda.Stream | None) -> None:
        """Compile by a pass whose result is discarded. With a stream, also capture the pass on it as a CUDA graph."""
        self._pass()
        if stream is not None:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            self._next.zero_()
            with torch.cuda.graph(graph, stream=stream):
                self._pass()
            self._graph = graph

    @property
    def captured(self) -> bool:
        """Whether the pass is a CUDA graph."""
        return self._graph is not None

    @torch.no_grad()
    def compare_with_eager(self) -> tuple[float, float]:
        """The mean loss per target of the first micro-batch, in nats: (of the CUDA graph, uncompiled)."""
        assert self._graph is not None
        found = []
        for replays in (True, False):
            self._next.zero_()
            self._total.zero_()
            if replays:
                self._graph.replay()
            else:
                with torch.compiler.set_stance("force_eager"):
                    self._pass()
            found.append(self._total.item() / max(1, self._first_positions))
        return found[0], found[1]

    @torch.no_grad()
    def sums(self, interrupted: Callable[[], bool]) -> tuple[Tensor, dict[str, Tensor]] | None:
        """This process's part of the summed loss in nats, and of the mean of each auxiliary loss, in float64.

        None if `interrupted` returned True. It is called before each micro-batch on a CPU, and before every eighth on
        a GPU.
        """
        self._next.zero_()
        for each in (self._total, *self._auxiliary.values()):
            each.zero_()
        cuda = self._device.type == "cuda"
        for number in range(self._passes):
            if not cuda or number % _LOOK_EVERY == 0:
                if cuda:
                    torch.cuda.synchronize()
                if interrupted():
                    return None
            if self._graph is None:
                self._pass()
            else:
                self._graph.replay()
        return self._total.clone(), {name: value.clone() for name, value in self._auxiliary.items()}

    def _pass(self) -> None:
        """Add the losses of the micro-batch at index `_next` to the sums."""
        *tensors, share = (tensor.index_select(0, self._next)[0] for tensor in (*self._batches, self._shares))
        loss, auxiliary = self._losses(*tensors)
        self._total += loss.double()
        for name, value in auxiliary.items():
            if name not in self._auxiliary:
                self._auxiliary[name] = torch.zeros_like(value, dtype=torch.float64)
            self._auxiliary[name] += value.double() * share
        self._next += 1
