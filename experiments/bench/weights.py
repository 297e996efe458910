"""Weights for timing, whose exact values do not matter: made faster, and drawn anew after their memory was lent.

The time of a step depends on shapes and hardly on values, as long as these have a distribution as in training.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from experiments.training.parallel import local

_DRAWN = 2**16  # number of elements of a tensor that are drawn; the others repeat them
_DRAWS = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)


class RepeatedDraws(TorchFunctionMode):
    """A context in which `nn.init` draws the first rows of a large matrix and repeats them.

    Drawing all weights of a model of two billion parameters takes half a minute. Numbers are drawn on the host, so that
    the model's generator, which is there, works for a model on any device.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in _DRAWS:
            return func(*args, **kwargs)
        tensor = kwargs.pop("tensor") if "tensor" in kwargs else args[0]
        rows = len(tensor)
        if tensor.dim() == 2 and tensor.numel() > _DRAWN:
            rows = max(1, _DRAWN // tensor.shape[1])
        with torch.no_grad():
            drawn = func(torch.empty((rows, *tensor.shape[1:]), device="cpu"), *args[1:], **kwargs).to(tensor)
            for start in range(0, len(tensor), rows):
                part = tensor[start : start + rows]
                part.copy_(drawn[: len(part)])
        return tensor


class _Spread(NamedTuple):
    """A tensor and the distribution of its values."""

    tensor: Tensor  # fills its storage
    bytes: int  # of the storage
    mean: float
    deviation: float
    low: float
    high: float


class Lendable:
    """Tensors of a training state whose memory can be freed and allocated again."""

    def __init__(self) -> None:
        self._spreads: dict[int, _Spread] = {}  # by the address of the storage when it was added

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Add the floating-point tensors that are not added yet, except for scalars, which keep their memory.

        Of a sharded tensor, this process's part is added.
        """
        for each in tensors:
            tensor = local(each.detach())
            storage = tensor.untyped_storage()
            if tensor.numel() > 1 and tensor.is_floating_point() and storage.data_ptr() not in self._spreads:
                deviation, mean = torch.std_mean(tensor.float(), correction=0)
                low, high = tensor.aminmax()
                values = [float(value) for value in (mean, deviation, low, high)]
                self._spreads[storage.data_ptr()] = _Spread(tensor, storage.nbytes(), *values)

    def lend(self) -> None:
        """Free the memory. Until `take_back` nothing may read the tensors."""
        for spread in self._spreads.values():
            spread.tensor.untyped_storage().resize_(0)
        if self._spreads and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def take_back(self) -> None:
        """Allocate the memory again, and draw values of the same mean, deviation and range. Constants stay constant."""
        for spread in self._spreads.values():
            spread.tensor.untyped_storage().resize_(spread.bytes)
            spread.tensor.normal_(spread.mean, spread.deviation).clamp_(spread.low, spread.high)
