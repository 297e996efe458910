"""Softmax cross-entropy and its gradient in Triton: each row of logits is read twice and overwritten once.

Shapes: n tokens, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _softmax(logits, targets, losses, vocabulary, IGNORED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    columns = tl.arange(0, BLOCK)
    highest = -float("inf")
    total = 0.0
    for first in range(0, vocabulary, BLOCK):
        x = tl.load(logits + first + columns, mask=first + columns < vocabulary, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), 0)
        highest = higher
    normaliser = highest + tl.log(total)
    target = tl.load(targets + row)
    counted = target != IGNORED
    known = (target >= 0) & (target < vocabulary)
    correct = tl.load(logits + tl.where(known, target, 0)).to(tl.float32)
    loss = tl.where(known, normaliser - correct, float("nan"))
    tl.store(losses + row, tl.where(counted, loss, 0.0))
    weight = tl.where(counted, 1.0, 0.0)
    tl.debug_barrier()  # No thread may overwrite the logits before all have read `correct`.
    for first in range(0, vocabulary, BLOCK):
        ok = first + columns < vocabulary
        x = tl.load(logits + first + columns, mask=ok, other=0.0).to(tl.float32)
        gradient = tl.exp(x - normaliser) - tl.where(first + columns == target, 1.0, 0.0)
        tl.store(logits + first + columns, (gradient * weight).to(logits.dtype.element_ty), mask=ok)


def loss_and_gradient(
    logits: Tensor,  # [n, V], contiguous; overwritten by the gradient of the loss
    targets: Tensor,  # [n]
    ignored: int,
) -> Tensor:  # []
    """The summed cross-entropy of the rows, in float32; NaN where a target is outside the vocabulary."""
    assert logits.is_contiguous()
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, device=logits.device)
    block = min(4096, triton.next_power_of_2(vocabulary))
    _softmax[(rows,)](logits, targets, losses, vocabulary, IGNORED=ignored, BLOCK=block, num_warps=max(4, block // 512))
    return losses.sum()
