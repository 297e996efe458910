"""Muon (arXiv 2502.16982) for many matrices of few shapes: matrices of one shape are orthogonalised together.

Shapes: n matrices of one shape, A rows, B columns, A <= B.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from experiments.training.parallel import is_sharded, local

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration: https://kellerjordan.github.io/posts/muon
_ITERATIONS = 5
_EPSILON = 1e-7
_LARGEST_STACK = 2**26  # parameters that are updated together, which takes 20 bytes for each of them


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon(adjust_lr_fn="match_rms_adamw") with the same state, but no synchronisation with the device.

    Like torch's fused AdamW, a step divides gradients by `grad_scale` and changes nothing if `found_inf` is 1.
    """

    grad_scale: Tensor | None = None  # []
    found_inf: Tensor | None = None  # []

    def __init__(self, parameters: Any, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # it takes no closure
        """Update every parameter that has a gradient. `lr` of a group may be a number or a tensor on the device."""
        assert closure is None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            for alike in _stacks(parameters):
                self._update(alike, group)

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Update matrices that have one shape, up to transposition."""
        device = parameters[0].device
        stopped = torch.zeros((), device=device) if self.found_inf is None else self.found_inf
        scale = torch.ones((), device=device) if self.grad_scale is None else self.grad_scale
        moves = 1 - stopped
        rate = group["lr"] * moves
        averages = [_wide(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        gradients = torch.stack([_wide(p.grad) for p in parameters if p.grad is not None]) / scale
        # A gradient that is not finite must not enter the average, not even with weight 0.
        gradients = torch.where(stopped > 0, torch.zeros_like(stopped), gradients)
        average = torch.stack(averages).lerp_(gradients, (1 - group["momentum"]) * moves)
        torch._foreach_copy_(averages, average.unbind())
        nesterov = gradients.lerp_(average, group["momentum"])
        update = _orthogonalised_like(parameters[0], nesterov)
        # The factor makes the root mean square of an update that of AdamW's (arXiv 2502.16982, section 2.2).
        factor = rate * (0.2 * max(parameters[0].shape) ** 0.5)
        matrices = [_wide(parameter) for parameter in parameters]
        torch._foreach_mul_(matrices, 1 - rate * group["weight_decay"])
        torch._foreach_sub_(matrices, (update.float() * factor).unbind())


def _orthogonalised_like(
    parameter: nn.Parameter,
    matrices: Tensor,  # [n, A, B], or this process's part of them if `parameter` is sharded
) -> Tensor:  # as `matrices`
    """The orthogonalised matrices, with the sharding of `parameter`, which `matrices` also have."""
    if not is_sharded(parameter):
        return orthogonalised(matrices)
    from torch.distributed.tensor import DTensor, Replicate, Shard  # takes seconds to import

    sharded, transposed = cast(DTensor, parameter), parameter.shape[0] > parameter.shape[1]
    mesh = sharded.device_mesh
    placements = [
        Shard(2 - each.dim if transposed else 1 + each.dim) if isinstance(each, Shard) else each
        for each in sharded.placements
    ]
    shape = torch.Size([len(matrices), min(parameter.shape), max(parameter.shape)])
    stride = (shape[1] * shape[2], shape[2], 1)
    # One all-gather gives every process the whole matrices. It orthogonalises all of them and keeps its part.
    whole = DTensor.from_local(matrices.contiguous(), mesh, placements, shape=shape, stride=stride).full_tensor()
    result = DTensor.from_local(orthogonalised(whole), mesh, [Replicate()] * mesh.ndim)
    return result.redistribute(placements=placements).to_local()


def orthogonalised(
    matrices: Tensor,  # [n, A, B]
) -> Tensor:  # [n, A, B] in bfloat16
    """Each matrix with its singular values moved to between about 0.7 and 1.2, by Newton-Schulz iterations."""
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_EPSILON)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _wide(matrix: Tensor) -> Tensor:  # [A, B], or this process's part of it
    """The matrix, or its transpose if it has more rows than columns."""
    own = local(matrix)
    return own.mT if matrix.shape[0] > matrix.shape[1] else own


def _stacks(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Lists of matrices that have one shape up to transposition, of at most _LARGEST_STACK parameters together.

    Sharded matrices are not stacked with unsharded ones, nor with their transposes, which are sharded along another
    dimension.
    """
    by_shape: dict[tuple[torch.Size, bool, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        sharded = is_sharded(parameter)
        key = (torch.Size(sorted(parameter.shape)), sharded, sharded and parameter.shape[0] > parameter.shape[1])
        by_shape.setdefault(key, []).append(parameter)
    for (shape, _, _), alike in by_shape.items():
        many = max(1, _LARGEST_STACK // shape.numel())
        yield from (alike[low : low + many] for low in range(0, len(alike), many))
