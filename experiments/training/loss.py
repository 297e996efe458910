"""The cross-entropy of a linear map's logits, made a few thousand tokens at a time: they never stand in memory whole.

Shapes: N tokens, D width, V vocabulary.
"""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # the target of a position that takes no part in the loss
CHUNK = (
    8192  # tokens; from 4096 to 32768 a 300M model's step took the same time within noise, and 5 GiB more at the end
)


def linear_cross_entropy(
    x: Tensor,  # [N, D]: what the LM head reads
    weight: Tensor,  # [V, D]: the LM head's, of x's dtype or wider
    targets: Tensor,  # [N], IGNORED where there is none
    chunk: int = CHUNK,  # tokens whose logits exist at a time
) -> Tensor:  # []
    """The summed cross-entropy of softmax(x weight^T) in nats, computed in float32 (float64 for float64 inputs).

    Products are of x's dtype, and so are the gradients of the logits. Under no_grad it is the forward pass alone, a
    third of the work. A target outside the vocabulary is an IndexError on a CPU; on a GPU, where raising would cost a
    synchronisation, it makes the loss NaN.
    """
    assert x.dim() == 2
    assert targets.shape == x.shape[:1]
    with torch.autocast(x.device.type, enabled=False):
        if torch.is_grad_enabled():
            loss: Tensor = _LinearCrossEntropy.apply(x, weight, targets, chunk)
            return loss
        matrix = weight.to(x.dtype)
        chunks = zip(x.split(chunk), targets.split(chunk), strict=True)
        return torch.stack([_loss_and_gradient(rows @ matrix.T, wanted) for rows, wanted in chunks]).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradients are made in the forward pass, chunk by chunk, from logits that are dropped at once.

    As in Liger-Kernel's fused linear cross-entropy (arXiv 2410.10989, section 3.2).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        targets: Tensor,  # [N]
        chunk: int,
    ) -> Tensor:  # []
        matrix = weight.to(x.dtype)
        dx = torch.empty_like(x)
        dweight: Tensor | None = None
        losses = []
        for rows, wanted, into in zip(x.split(chunk), targets.split(chunk), dx.split(chunk), strict=True):
            logits = rows @ matrix.T
            losses.append(_loss_and_gradient(logits, wanted))
            torch.mm(logits, matrix, out=into)
            dweight = _add_product(dweight, logits.T, rows, weight.dtype)
            del logits  # before the next chunk's are made
        assert dweight is not None
        ctx.save_for_backward(dx, dweight.to(weight.dtype))
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        return dx * gradient.to(dx.dtype), dweight * gradient.to(dweight.dtype), None, None


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a @ b, summed over chunks in a wide type: 16-bit sums would be rounded at every chunk."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        # torch.addmm(out_dtype=...) would copy the total, which is as large as the LM head.
        summed: Tensor = torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
        return summed
    product = (a @ b).to(dtype)
    return product if total is None else total.add_(product)


def _loss_and_gradient(
    logits: Tensor,  # [n, V], contiguous; overwritten by the gradient of the loss
    targets: Tensor,  # [n]
) -> Tensor:  # []
    """The summed cross-entropy of the rows."""
    if logits.is_cuda and importlib.util.find_spec("triton"):
        from experiments.training.loss_kernel import loss_and_gradient

        return loss_and_gradient(logits, targets, IGNORED)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="sum")
    counted = targets != IGNORED
    gradient = wide.softmax(1)
    gradient[counted.nonzero().squeeze(1), targets[counted]] -= 1
    logits.copy_(gradient * counted[:, None])
    return loss
