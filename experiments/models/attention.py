"""Causal self-attention with RoPE (arXiv 2104.09864), on the linear maps q, k, v and o.

Shapes: B batch, T time, D width, H heads of queries, K heads of keys and values, E head size.
Source: arXiv 2606.03825, section 4; "X <- X + conv(X)" on q, k and v comes before QK-norm and RoPE.
"""

import inspect
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.design.model import ModelConfig
from experiments.models.fused import rotated
from experiments.models.joined import kernels_fit, rotate, rotate_joined
from experiments.models.norm import RMSNorm
from experiments.models.packing import Documents, same_document
from experiments.models.short_convolution import ConvLinear, Maps, Outputs
from experiments.parts.attention import Attention

_QKV = ("q", "k", "v")
_TOKENS_A_DOCUMENT = 24  # with fewer, packed attention is faster with a mask: see `_few`


def build(part: Attention, model: ModelConfig) -> nn.Module:
    return AttentionModule(part, model)


class AttentionModule(nn.Module):
    """Attention. Its input is the normed residual stream."""

    into_residual = ("o",)  # sites whose initial weights are scaled down with the number of layers

    def __init__(self, part: Attention, model: ModelConfig) -> None:
        super().__init__()
        self.head_size = part.head_size(model.width)
        self.theta = part.rope_theta
        self.head_counts = part.head_counts()
        self.qk_norm = part.qk_norm
        self.maps = Maps(part, model)
        self.q_norm = RMSNorm(self.head_size, eps=model.norm_epsilon) if part.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_size, eps=model.norm_epsilon) if part.qk_norm else nn.Identity()
        self.rotation: tuple[Tensor, Tensor] | None = None  # cosines and sines of RoPE, set by `prepare`
        self.rotates_convolved = False  # whether RoPE and the convolutions before it are one kernel
        self.adds_stream = False
        self.frequencies: Tensor | None = None  # of RoPE, [E/2], set by `prepare` if it is fused

    def prepare(self, time: int, device: torch.device) -> None:
        """Set the table of RoPE. Compiled code would compute its sines again for every head in every layer."""
        self.rotation = _rotation(time, self.head_size, self.theta, device)
        if self.rotates_convolved:
            self.frequencies = _frequencies(self.head_size, self.theta, device)

    def fuse(self, kernels: bool) -> list[str]:
        """Compute RoPE and the convolutions of q, k and v in one kernel if they fit, else RoPE on one product.

        Returns what is one kernel then. Without `kernels` no convolution is part of one.
        """
        heads, kv_heads = self.head_counts
        plain = heads == kv_heads and not self.qk_norm
        self.maps.fused = kernels
        self.adds_stream = self.maps.fits(("o",), not self.maps.reads_part_input)
        self.rotates_convolved = plain and self.maps.takes_rope(_QKV, self.head_size)
        convolved = [site for site in _QKV if cast(ConvLinear, self.maps[site]).conv is not None]
        self.maps.in_one_product = plain and not convolved
        first = ["q, k, v, RoPE"] if self.rotates_convolved else ["q, k, v"] * self.maps.fits(_QKV)
        return first + ["o, residual stream"] * self.adds_stream

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        documents: Documents | None = None,
        stream: Tensor | None = None,  # [B, T, D]
    ) -> Tensor:  # [B, T, D]
        """Attention, added to `stream` if it is given."""
        q, k, v = self._inputs(x, documents)
        y = attend(q, k, v, documents).transpose(1, 2).flatten(2)
        if stream is not None:
            return self.maps.add_to(stream, y, "o", x, documents)
        (y,) = self.maps.apply_to(y, ("o",), x, documents)
        return y

    def _inputs(self, x: Tensor, documents: Documents | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, E], and keys and values [B, K, T, E]. Each document has its own positions."""
        if self.rotates_convolved and documents is None:
            assert self.frequencies is not None
            return rotated(*self.maps.weights_and_convolutions(_QKV), x, self.head_counts[0], self.frequencies)
        assert self.rotation is not None, "call prepare first"
        rotation = self.rotation
        outputs = self.maps.outputs(x, _QKV, x, documents)
        if documents is not None:
            rotation = rotation[0][documents.places], rotation[1][documents.places]  # [B, T, E] each
        if self._rotates_joined(outputs):
            assert outputs.joined is not None
            joined = outputs.joined
            if documents is None:
                return rotate_joined(joined, rotation, *self.head_counts)
            flat = [x.flatten(0, 1) for x in (joined, *rotation)]
            parts = rotate_joined(flat[0][None], (flat[1], flat[2]), *self.head_counts)  # [1, H or K, B*T, E]
            q, k, v = (part[0].unflatten(1, joined.shape[:2]).transpose(0, 1) for part in parts)
            return q, k, v
        if documents is not None:
            rotation = rotation[0][:, None], rotation[1][:, None]
        q, k, v = (self._heads(y) for y in outputs.apart)
        return rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation), v

    def decode(
        self,
        x: Tensor,  # [B, T, D]
        state: dict[str, Tensor],  # "keys" and "values" [B, K, tokens before x, E], and what the convolutions keep
    ) -> Tensor:  # [B, T, D]
        """As `forward`, for inputs that continue a sequence. An empty `state` begins one; it is updated in place."""
        q, k, v = (self._heads(y) for y in self.maps.decode(x, ("q", "k", "v"), x, state))
        before = state["keys"].shape[2] if "keys" in state else 0
        total = before + x.shape[1]
        # A table for the next power of two, so that few are made while a text grows.
        table = _rotation(1 << (total - 1).bit_length(), self.head_size, self.theta, x.device)
        cosine, sine = (values[before:total] for values in table)
        q, k = rotate(self.q_norm(q), (cosine, sine)), rotate(self.k_norm(k), (cosine, sine))
        if before:
            k, v = torch.cat([state["keys"], k], 2), torch.cat([state["values"], v], 2)
        state["keys"], state["values"] = k, v
        place = torch.arange(total, device=x.device)
        seen = place <= place[before:, None]  # [T, total]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1])
        (y,) = self.maps.decode(y.transpose(1, 2).flatten(2), ("o",), x, state)
        return y

    def _rotates_joined(self, outputs: Outputs) -> bool:
        channels = sum(y.shape[-1] for y in outputs.apart)
        whole = outputs.joined is not None and outputs.joined.shape[-1] == channels  # without padding
        return whole and not self.qk_norm and kernels_fit(self.head_size)

    def _heads(
        self,
        x: Tensor,  # [B, T, H*E]
    ) -> Tensor:  # [B, H, T, E]
        return x.unflatten(2, (-1, self.head_size)).transpose(1, 2)


def attend(
    q: Tensor,  # [B, H, T, E]
    k: Tensor,  # [B, K, T, E]
    v: Tensor,  # [B, K, T, E]
    documents: Documents | None,  # None: each sequence is one
) -> Tensor:  # [B, H, T, E]
    """Causal attention within each document."""
    grouped = q.shape[1] != k.shape[1]
    if documents is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    if not (_varlen_fits(q) and _few(documents)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=same_document(documents), enable_gqa=grouped)
    from torch.nn.attention.varlen import varlen_attn

    edges, batch, time = documents.cu_seqlens, len(q), q.shape[2]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B*T, H or K, E]
    if grouped and "enable_gqa" not in _varlen_keywords():
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        grouped = False
    options: dict[str, Any] = {"enable_gqa": True} if grouped else {}
    y = varlen_attn(q, k, v, edges, edges, time, time, window_size=(-1, 0), **options)
    return cast(Tensor, y).unflatten(0, (batch, time)).transpose(1, 2)


def _few(documents: Documents) -> bool:
    """Whether kernels for sequences of different lengths are faster than a mask of T x T, forward and backward.

    They have programs for T tokens of every document, also of the empty ones that make K of each sequence. On an H100
    (B T H E: ms with a mask; ms without one, by K):
        8 2048 16 64: 2.2; K=8 1.2, K=64 1.6, K=512 8.9
        8 4096 16 64: 8.3; K=8 2.7, K=64 3.3, K=512 17.0
        32 1024 8 64: 1.3; K=8 1.0, K=64 1.8, K=512 11.1
    Between these they are equal at about K = T/24. The mask then takes 2 to 3 bytes for each of B*T*T in a layer.
    """
    batch, time = documents.numbers.shape
    most = (documents.cu_seqlens.shape[0] - 1) // batch  # K
    return _TOKENS_A_DOCUMENT * most <= time


def _varlen_fits(q: Tensor) -> bool:
    """Whether FlashAttention's kernels for sequences of different lengths take these queries, and torch has them.

    They skip what a mask would only hide, and take no mask of T x T. torch 2.10 has them without `window_size`.
    """
    fits = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0
    return fits and "window_size" in _varlen_keywords()


@torch.compiler.assume_constant_result
def _varlen_keywords() -> tuple[str, ...]:
    """What torch's kernels can be told: torch 2.11 has no `enable_gqa`.

    Without functools.cache, of whose use torch.compile would warn in every compiled block.
    """
    from torch.nn.attention import varlen

    return tuple(inspect.signature(varlen.varlen_attn).parameters)


@lru_cache(maxsize=8)  # All layers share one table.
def _rotation(time: int, head_size: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE, [T, E] each, in float32."""
    with torch.inference_mode(False):  # A tensor made in inference mode cannot be used in training.
        steps = torch.arange(time, device=device, dtype=torch.float32)
        angle = torch.outer(steps, _frequencies(head_size, theta, device)).repeat(1, 2)
        return angle.cos(), angle.sin()


@lru_cache(maxsize=8)
def _frequencies(head_size: int, theta: float, device: torch.device) -> Tensor:
    """Radians a token of each pair of channels, [E/2], in float32."""
    with torch.inference_mode(False):
        return theta ** (-torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size)
