"""The paper's decoder: RMSNorm, SwiGLU, RoPE, pre-norm, with a short convolution after any linear layer.

Shapes: B batch, T time, D width, H heads, K heads of keys and values, E head size, F hidden, V vocabulary.
Source: arXiv 2606.03825, section 4; "X <- X + conv(X)" on q, k and v comes before QK-norm and RoPE.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynconv.layers import HeadwiseDynamicConv, LowRankDynamicConv, StaticShortConv, project_together
from experiments.design.config import SITES, ConvConfig, ModelConfig


class Transformer(nn.Module):
    """Token ids to logits. The weights are a function of (config, seed) alone.

    Arms of one seed share the initial values of all weights that they have in common, which takes that part of
    the seed's noise out of their difference.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the convolutions draw their own initial values
            self.embedding = nn.Embedding(config.vocabulary, config.width)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
            self.norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
            self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self._initialise(seed)

    def forward(
        self,
        tokens: Tensor,  # [B, T]
    ) -> Tensor:  # [B, T, V]
        rotation = _rotation(tokens.shape[1], self.config, tokens.device)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, rotation)
        return self.head(self.norm(x))

    def _initialise(self, seed: int) -> None:
        """Normal at init_std; the maps back into the residual stream smaller by sqrt(2 layers)."""
        generator = torch.Generator().manual_seed(seed)
        std = self.config.init_std
        nn.init.normal_(self.embedding.weight, std=std, generator=generator)
        for name, module in self.blocks.named_modules():
            if isinstance(module, ConvLinear):
                back = name.endswith((".o", ".down"))
                scale = (2 * self.config.layers) ** -0.5 if back else 1.0
                nn.init.normal_(module.linear.weight, std=std * scale, generator=generator)
        if not self.config.tied:
            nn.init.normal_(self.head.weight, std=std, generator=generator)


class Block(nn.Module):
    """Attention and SwiGLU, each on a normed copy of the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.linears = nn.ModuleDict({site: ConvLinear(config, site) for site in SITES})
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.ffn_norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_epsilon) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_epsilon) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        rotation: tuple[Tensor, Tensor],  # [T, E] each
    ) -> Tensor:  # [B, T, D]
        x = x + self._attend(self.attention_norm(x), rotation)
        gate, up = self._maps(("gate", "up"), self.ffn_norm(x))
        (y,) = self._maps(("down",), F.silu(gate) * up)
        return x + y

    def _attend(
        self,
        x: Tensor,  # [B, T, D]
        rotation: tuple[Tensor, Tensor],
    ) -> Tensor:  # [B, T, D]
        q, k, v = (self._heads(y) for y in self._maps(("q", "k", "v"), x))
        q, k = _rotate(self.q_norm(q), rotation), _rotate(self.k_norm(k), rotation)
        grouped = self.config.kv_heads != self.config.heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)  # [B, H, T, E]
        (y,) = self._maps(("o",), y.transpose(1, 2).flatten(2))
        return y

    def _maps(
        self,
        sites: Sequence[str],
        x: Tensor,  # [B, T, inputs]
    ) -> list[Tensor]:  # [B, T, outputs] each
        """Maps of one input, whose convolutions' generators may ride in the product of the first map that has one."""
        linears: dict[str, Any] = {site: self.linears[site] for site in sites}  # ConvLinear each
        dynamic = {s: m for s, m in linears.items() if isinstance(m.conv, HeadwiseDynamicConv | LowRankDynamicConv)}
        if not dynamic or not _shares_products(x):
            return [linear(x) for linear in linears.values()]
        first = next(iter(dynamic))
        y, *made = project_together(dynamic[first].linear.weight, [m.conv for m in dynamic.values()], x)
        generated = dict(zip(dynamic, made, strict=True))
        return [m.convolve(y if s == first else m.linear(x), x, generated.get(s)) for s, m in linears.items()]

    def _heads(
        self,
        x: Tensor,  # [B, T, H*E]
    ) -> Tensor:  # [B, H, T, E]
        return x.unflatten(2, (-1, self.config.head_dim)).transpose(1, 2)


class ConvLinear(nn.Module):
    """A linear map and, where the config names this site, a convolution whose generator reads the map's input."""

    def __init__(self, config: ModelConfig, site: str) -> None:
        super().__init__()
        inputs, outputs = config.linear_shape(site)
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.conv = _convolution(config.conv, inputs, outputs) if site in config.conv.sites else None

    def forward(
        self,
        x: Tensor,  # [B, T, inputs]
    ) -> Tensor:  # [B, T, outputs]
        return self.convolve(self.linear(x), x)

    def convolve(
        self,
        y: Tensor,  # [B, T, outputs]: what the map makes of x
        x: Tensor,  # [B, T, inputs]
        generated: Tensor | None = None,  # [B, T, columns]: what the convolution's generator makes of x, if known
    ) -> Tensor:  # [B, T, outputs]
        return y if self.conv is None else self.conv(y, x, generated=generated)


def _convolution(conv: ConvConfig, inputs: int, outputs: int) -> nn.Module:
    if conv.kind == "static":
        return StaticShortConv(outputs, conv.width, conv.residual)
    if conv.kind == "headwise":
        return HeadwiseDynamicConv(outputs, inputs, conv.width, conv.head_size, conv.residual, conv.static_filter)
    return LowRankDynamicConv(outputs, inputs, conv.width, conv.rank, conv.residual, conv.static_filter)


def _shares_products(x: Tensor) -> bool:
    """On a CPU each generator has its own product: sums in another order would change the last bits of a loss."""
    return x.is_cuda


def _rotation(time: int, config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE (arXiv 2104.09864), [T, E] each, in float32."""
    frequency = config.rope_theta ** (
        -torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    )
    angle = torch.outer(torch.arange(time, device=device, dtype=torch.float32), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def _rotate(
    x: Tensor,  # [B, H, T, E]
    rotation: tuple[Tensor, Tensor],  # [T, E] each
) -> Tensor:  # [B, H, T, E]
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    return (x * cosine + torch.cat((-second, first), dim=-1) * sine).to(x.dtype)
