"""Softmax cross-entropy and its gradient in Triton: each row of logits is read twice and overwritten once.

Shapes: n tokens, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynconv.ops.tiles import multiprocessors

_BLOCK = 8192  # logits that a program reads at a time
_LANE = 8  # neighbouring ones that one thread reads at a time, 16 bytes of bfloat16
# The rows that all programs are at together take at most so many bytes, so that a row is still in the L2 cache, 50 MB
# on an H100, when it is read for the second time; and a multiprocessor has at most so many programs.
_CACHED_BYTES = 2**25
_PROGRAMS = 16


@triton.jit
def _softmax(logits, targets, losses, rows, vocabulary, IGNORED: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr):
    LOG2_E: tl.constexpr = 1.4426950408889634
    columns = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        own = logits + row * tl.cast(vocabulary, tl.int64)
        # Each lane has a highest logit and a sum of its own, so that threads wait for each other once a row only.
        highest = tl.full((BLOCK // LANE,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK // LANE,), tl.float32)
        for first in range(0, vocabulary, BLOCK):
            ok = first + columns < vocabulary
            x = tl.load(own + first + columns, mask=ok, other=-float("inf"), eviction_policy="evict_last")
            x = tl.reshape(x.to(tl.float32) * LOG2_E, (BLOCK // LANE, LANE))
            higher = tl.maximum(highest, tl.max(x, 1))
            finite = tl.where(higher == -float("inf"), 0.0, higher)  # of a lane without a logit yet
            total = total * tl.exp2(highest - finite) + tl.sum(tl.exp2(x - finite[:, None]), 1)
            highest = higher
        top = tl.max(highest, 0)
        normaliser = top + tl.log2(tl.sum(total * tl.exp2(highest - top), 0))
        target = tl.load(targets + row)
        counted = target != IGNORED
        known = (target >= 0) & (target < vocabulary)
        correct = tl.load(own + tl.where(known, target, 0)).to(tl.float32)
        loss = tl.where(known, normaliser / LOG2_E - correct, float("nan"))
        tl.store(losses + row, tl.where(counted, loss, 0.0))
        weight = tl.where(counted, 1.0, 0.0)
        tl.debug_barrier()  # No thread may overwrite the logits before all have read `correct`.
        for first in range(0, vocabulary, BLOCK):
            ok = first + columns < vocabulary
            x = tl.load(own + first + columns, mask=ok, other=-float("inf"), eviction_policy="evict_first")
            gradient = tl.exp2(x.to(tl.float32) * LOG2_E - normaliser) - tl.where(first + columns == target, 1.0, 0.0)
            gradient = (gradient * weight).to(logits.dtype.element_ty)
            tl.store(own + first + columns, gradient, mask=ok, eviction_policy="evict_first")


def loss_and_gradient(
    logits: Tensor,  # [n, V], contiguous; overwritten by the gradient of the loss
    targets: Tensor,  # [n]
    ignored: int,
) -> Tensor:  # []
    """The summed cross-entropy of the rows, in float32; NaN where a target is outside the vocabulary."""
    assert logits.is_contiguous()
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, device=logits.device)
    block = max(_LANE, min(_BLOCK, triton.next_power_of_2(vocabulary)))
    at_once = _CACHED_BYTES // (multiprocessors(logits) * vocabulary * logits.element_size())
    programs = min(rows, multiprocessors(logits) * max(1, min(_PROGRAMS, at_once)))
    _softmax[(programs,)](
        logits, targets, losses, rows, vocabulary,
        IGNORED=ignored, BLOCK=block, LANE=_LANE, num_warps=max(4, block // 512),
    )  # fmt: skip
    return losses.sum()
