"""Attention of packed documents: the kernels of a GPU are told where they begin, or are given a mask."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from stepping import on_a_gpu
from test_decoder import randomised
from test_packing import LENGTHS, MODELS, MOST, TIME, TOKENS, starts_of
from torch import Tensor

from experiments.models import attention
from experiments.models.attention import attend
from experiments.models.packing import Documents, documents_of


def varlen_by_definition(
    q: Tensor,  # [B*T, H, E]
    k: Tensor,  # [B*T, K, E]
    v: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """What torch documents of its kernels, which need a GPU: causal for a window of (-1, 0)."""
    assert cu_seq_q is cu_seq_k
    assert cu_seq_q.dtype == torch.int32
    assert window_size == (-1, 0)
    assert max_q == max_k >= int(cu_seq_q.diff().max())
    parts = []
    for low, high in pairwise(cu_seq_q.tolist()):
        own = [x[None, low:high].transpose(1, 2) for x in (q, k, v)]
        y = torch.nn.functional.scaled_dot_product_attention(*own, is_causal=True, enable_gqa=enable_gqa)
        parts.append(y[0].transpose(0, 1))
    return torch.cat(parts)


def varlen_of_torch_2_11(*arguments: Any, window_size: tuple[int, int]) -> Tensor:
    """It knows no heads that several queries share."""
    q, k, v, *_ = arguments
    assert q.shape == k.shape == v.shape
    return varlen_by_definition(*arguments, window_size=window_size)


@pytest.mark.parametrize("varlen", [varlen_by_definition, varlen_of_torch_2_11])
@pytest.mark.parametrize("name", ["attention, lowrank", "grouped queries, QK-norm"])
def test_attention_of_a_gpu_is_given_the_documents(
    name: str, varlen: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomised(MODELS[name], 0.2)
    masked = model(TOKENS, None, starts_of(LENGTHS)).logits
    monkeypatch.setattr(attention, "_varlen_fits", lambda _: True)
    monkeypatch.setattr(attention, "_TOKENS_A_DOCUMENT", TIME // MOST)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    torch.testing.assert_close(model(TOKENS, None, starts_of(LENGTHS)).logits, masked, rtol=1e-11, atol=1e-12)


def test_attention_of_many_documents_on_a_gpu_is_given_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for sequences of different lengths would have programs for every document, and most are empty."""
    used = []

    def varlen(*given: Any, **options: Any) -> Tensor:
        used.append(len(given[3]) - 1)
        return varlen_by_definition(*given, **options)

    monkeypatch.setattr(attention, "_varlen_fits", lambda _: True)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    q = torch.randn(2, 1, 96, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for most in (2, 4, 5, 96):
        starts = torch.full((2, most), 96)
        starts[:, :2] = torch.tensor([[0, 30], [0, 95]])
        found.append(attend(q, q, q, documents_of(starts, 96)))
    assert used == [2 * 2, 2 * 4]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-11, atol=1e-12)


def test_attention_of_a_gpu_compiles_into_one_graph_without_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without values, for which torch's operator says shapes alone."""
    torch.compiler.reset()
    monkeypatch.setattr(attention, "_varlen_fits", lambda _: "window_size" in attention._varlen_keywords())
    monkeypatch.setattr(attention, "_TOKENS_A_DOCUMENT", TIME // MOST)
    documents = Documents(*(part.to("meta") for part in documents_of(starts_of(LENGTHS), TIME)))
    shape, dtype = (len(LENGTHS), 4, TIME, 16), torch.bfloat16
    q = torch.empty(shape, device="meta", dtype=dtype, requires_grad=True)
    k, v = (torch.empty(len(LENGTHS), 2, TIME, 16, device="meta", dtype=dtype, requires_grad=True) for _ in range(2))
    y = torch.compile(attend, backend="aot_eager", fullgraph=True)(q, k, v, documents)
    y.backward(torch.empty_like(y))
    assert (y.shape, y.dtype) == (shape, dtype)
    assert k.grad is not None
    assert k.grad.shape == k.shape


@on_a_gpu
@pytest.mark.parametrize("tokens_a_document", [0, TIME])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_attention_of_a_gpu_is_that_of_a_mask(
    heads: tuple[int, int], tokens_a_document: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and gradients in bfloat16, of few documents and many, beside float32 with a mask of T x T."""
    monkeypatch.setattr(attention, "_TOKENS_A_DOCUMENT", tokens_a_document)
    generator = torch.Generator("cuda").manual_seed(1)
    wide = [torch.randn(4, count, TIME, 32, device="cuda", generator=generator) for count in (heads[0], *2 * heads[1:])]
    documents = documents_of(starts_of(LENGTHS).cuda(), TIME)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (x.to(dtype).requires_grad_() for x in wide)
        y = attend(q, k, v, documents)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), (q, k, v))])
    for want, got in zip(*found, strict=True):
        assert (got.float() - want).norm() < 2e-2 * want.norm()
