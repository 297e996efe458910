"""A dropless mixture of experts: tokens are sorted by expert, so that all experts are one grouped matrix product.

Shapes: B batch, T time, D width, E experts, K experts of a token, F hidden width of an expert, N = B*T*K rows, one for
each choice of an expert by a token.
Sources: router and load-balancing loss, arXiv 2101.03961; router z-loss, arXiv 2202.08906; dropless experts,
arXiv 2211.15841.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from experiments.design.model import ModelConfig
from experiments.models.packing import Documents
from experiments.models.short_convolution import Maps
from experiments.parts.moe import MoE


def build(part: MoE, model: ModelConfig) -> nn.Module:
    return MoEModule(part, model)


class MoEModule(nn.Module):
    """The shared expert on the linear maps gate, up and down, plus the experts that the router chose."""

    into_residual = ("down",)

    def __init__(self, part: MoE, model: ModelConfig) -> None:
        super().__init__()
        assert part.hidden is not None
        self.top_k, self.experts = part.top_k, part.experts
        self.balance_weight, self.router_z_weight = part.balance_weight, part.router_z_weight
        self.maps = Maps(part, model)
        self.router = nn.Linear(model.width, part.experts, bias=False)
        self.gate = nn.Parameter(torch.empty(part.experts, model.width, part.hidden))
        self.up = nn.Parameter(torch.empty(part.experts, model.width, part.hidden))
        self.down = nn.Parameter(torch.empty(part.experts, part.hidden, model.width))

    def initialise(self, generator: torch.Generator, std: float, residual_std: float) -> None:
        """Draw the weights of router and experts; the maps are the decoder's to draw."""
        for weight in (self.router.weight, self.gate, self.up):
            nn.init.normal_(weight, std=std, generator=generator)
        nn.init.normal_(self.down, std=residual_std, generator=generator)

    def waits_for_host(self, device: torch.device) -> bool:
        """Whether the host has to know how many tokens chose each expert, which a CUDA graph cannot tell it.

        torch has one kernel for all experts on NVIDIA GPUs of compute capability 9.x and 10.x. On others its
        `_grouped_mm_cuda` copies the ends of the experts' rows to the host, and launches a product for each expert.
        """
        return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] not in (9, 10)

    def in_float32(self) -> list[nn.Parameter]:
        """The parameters that must not be rounded to 16 bits, as sharding rounds matrices."""
        return list(self.router.parameters())

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        documents: Documents | None = None,  # experts are balanced over a sequence, also where it holds several
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:  # [B, T, D]; losses [B] by name; measures [B, E] by name
        gate, up = self.maps.apply_to(x, ("gate", "up"), x, documents)
        (shared,) = self.maps.apply_to(F.silu(gate) * up, ("down",), x, documents)
        routed, losses, load = self._route(x)
        return shared + routed, losses, {"expert_load": load}

    def decode(
        self,
        x: Tensor,  # [B, T, D]
        state: dict[str, Tensor],
    ) -> Tensor:  # [B, T, D]
        """As `forward`, for inputs that continue a sequence. `state` keeps the convolutions' last inputs."""
        gate, up = self.maps.decode(x, ("gate", "up"), x, state)
        (shared,) = self.maps.decode(F.silu(gate) * up, ("down",), x, state)
        return shared + self._route(x)[0]

    def _route(
        self,
        x: Tensor,  # [B, T, D]
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:  # [B, T, D]; losses [B] by name; [B, E]
        """The weighted sum of the chosen experts' outputs, the auxiliary losses, and each expert's load."""
        logits = self._router_logits(x)
        probabilities = logits.softmax(-1)
        weights, chosen = probabilities.topk(self.top_k)  # [B, T, K] each
        if self.top_k > 1:  # A single weight of 1 would give the router no gradient.
            weights = weights / weights.sum(-1, keepdim=True)
        counts = torch.zeros_like(logits[:, 0]).scatter_add_(
            1, chosen.flatten(1), torch.ones_like(weights).flatten(1)
        )  # [B, E]: tokens of each sequence that chose an expert
        routed = self._experts(x.flatten(0, 1), chosen.flatten(0, 1), counts.sum(0))  # [B*T, K, D]
        y = (routed * weights.flatten(0, 1)[..., None].to(routed.dtype)).sum(1)  # Autocast sums in float32.
        return y.to(routed.dtype).view_as(x), *self._losses(logits, probabilities, counts)

    def _router_logits(
        self,
        x: Tensor,  # [B, T, D]
    ) -> Tensor:  # [B, T, E]
        """In float32: rounded to 16 bits, close logits would choose other experts (arXiv 2101.03961, section 2.4)."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.router.weight.dtype), self.router.weight)

    def _experts(
        self,
        x: Tensor,  # [B*T, D]
        chosen: Tensor,  # [B*T, K]
        counts: Tensor,  # [E]: rows of each expert
    ) -> Tensor:  # [B*T, K, D]
        order = chosen.flatten().argsort(stable=True)  # [N]: rows by expert
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        rows = x[:, None].expand(-1, self.top_k, -1).flatten(0, 1)  # [N, D]
        rows = _Permuted.apply(rows, order, inverse)
        ends = counts.to(torch.int32).cumsum(0, dtype=torch.int32)  # Floats would be rounded above 2**24 rows.
        gate, up = (_grouped_product(rows, weight, ends) for weight in (self.gate, self.up))
        y = _grouped_product(F.silu(gate) * up, self.down, ends)
        y = _Permuted.apply(y, inverse, order)
        return y.unflatten(0, (-1, self.top_k))

    def _losses(
        self,
        logits: Tensor,  # [B, T, E]
        probabilities: Tensor,  # [B, T, E]
        counts: Tensor,  # [B, E]
    ) -> tuple[dict[str, Tensor], Tensor]:  # [B] each; [B, E]
        """The weighted auxiliary losses of each sequence, and each expert's load over the mean load.

        The load is balanced within each sequence, as in arXiv 2405.04434, section 2.1.3. A balance over the whole batch
        is a product of two means, which would depend on how the batch is split into micro-batches and processes.
        """
        load = counts * (self.experts / counts.sum(-1, keepdim=True))
        balance = (load * probabilities.mean(1)).sum(-1)  # 1 if the load is even
        z = logits.logsumexp(-1).square().mean(1)
        return {"balance_loss": self.balance_weight * balance, "router_z_loss": self.router_z_weight * z}, load


class _Permuted(torch.autograd.Function):
    """Rows in another order. The gradient is gathered, not added atomically: this is faster and deterministic."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [N, D]
        order: Tensor,  # [N]
        inverse: Tensor,  # [N]: order[inverse] counts from 0
    ) -> Tensor:  # [N, D]
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient[inverse], None, None


def _grouped_product(
    x: Tensor,  # [N, I]: the rows of the first expert, then those of the second, ...
    weight: Tensor,  # [E, I, O]
    ends: Tensor,  # [E], int32: the row after each expert's last
) -> Tensor:  # [N, O]
    """Each row times the matrix of its expert, in the dtype of x."""
    weight = weight.to(x.dtype)
    if _has_grouped_kernels(x):
        return F.grouped_mm(x, weight, offs=ends)
    sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    return torch.cat([rows @ matrix for rows, matrix in zip(x.split(sizes), weight, strict=True)])


def _has_grouped_kernels(x: Tensor) -> bool:
    """Whether torch has a product of all groups: in bfloat16 on a GPU. It may wait for the host: `waits_for_host`."""
    return x.is_cuda and x.dtype == torch.bfloat16
