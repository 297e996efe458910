"""The losses of a model. Cross-entropy is computed for a few thousand tokens at a time, to save memory for logits.

Shapes: B sequences, T sequence length, K packed documents; N tokens, D width, V vocabulary.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from experiments.training.precision import mixed_precision

IGNORED = -100  # the target of positions that are left out of the loss
# Tokens whose logits are computed at a time. From 4096 to 32768 a 300M model's step took the same time within noise;
# with 32768 it took 5 GiB more than with 4096.
CHUNK = 8192
CHUNK_LOGITS = CHUNK * 100_352  # Smaller vocabularies take more tokens at a time, to save kernel launches (`_chunk`).


def losses_of(
    model: nn.Module,
    device: torch.device,
    inputs: Tensor,  # [B, T]
    targets: Tensor,  # [B, T]
    starts: Tensor | None = None,  # [B, K]: of packed documents
    *,
    divisor: Tensor | None = None,  # []: divides the sum; None: 1
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of cross-entropies in nats, computed in float32 from the logits, and auxiliary losses [] by name.

    Any factor of the sum must be in `divisor`, not applied to the result: see `linear_cross_entropy`.

    Auxiliary losses are means over sequences, leaving out those that pad a micro-batch, which have no target that
    counts. Without gradients, as in an evaluation, the second result also has the model's measures [n] by name, which
    are means over the same sequences.
    """
    packing = {} if starts is None else {"starts": starts}
    if device.type == "cuda":
        with mixed_precision(device):
            loss, auxiliary, measures = model(
                inputs,
                lambda x, head: linear_cross_entropy(x.flatten(0, 1), head, targets.flatten(), divisor=divisor),
                **packing,
            )
    else:
        logits, auxiliary, measures = model(inputs, **packing)
        logits = logits.float().flatten(0, 1)
        loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
        loss = loss if divisor is None else loss / divisor
    if not torch.is_grad_enabled():
        auxiliary = auxiliary | measures
    return loss, means_over_sequences(auxiliary, targets)


def means_over_sequences(
    values: Mapping[str, Tensor],  # [B, ...] each, by name
    targets: Tensor,  # [B, T]
) -> dict[str, Tensor]:  # [...] each
    """Means over the sequences with a target that counts. The others pad a micro-batch. Zero if all are padding."""
    real = (targets != IGNORED).any(1).float()
    weights = real / real.sum().clamp(min=1.0)
    return {name: torch.tensordot(weights.to(value), value, 1) for name, value in values.items()}


def linear_cross_entropy(
    x: Tensor,  # [N, D]: inputs of the LM head
    weight: Tensor,  # [V, D]: of the LM head, in the dtype of x or a wider one
    targets: Tensor,  # [N]: IGNORED where no target counts
    chunk: int | None = None,  # tokens whose logits are computed at a time; None: as many as fit in CHUNK_LOGITS
    divisor: Tensor | None = None,  # []: divides the sum, in float32 (float64 for float64 inputs); None: 1
) -> Tensor:  # []
    """The summed cross-entropy of softmax(x weight^T) in nats, computed in float32 (float64 for float64 inputs).

    The forward pass already computes the gradients, so any factor of the loss must be in `divisor`. A factor applied to
    the result would cost another pass over the gradients (0.8 GB for a 300M model's LM head); the backward pass raises
    RuntimeError if it finds one, on a GPU as an asynchronous CUDA error.

    Matrix products and the gradients of logits are in the dtype of x. Under no_grad only the loss is computed, which is
    a third of the work. A target outside the vocabulary raises IndexError on a CPU; on a GPU, where raising would take
    a synchronisation, it makes the loss NaN.
    """
    assert x.dim() == 2
    assert targets.shape == x.shape[:1]
    chunk = _chunk(len(weight)) if chunk is None else chunk
    divisor = torch.ones((), device=x.device) if divisor is None else divisor
    with torch.autocast(x.device.type, enabled=False):
        if torch.is_grad_enabled():
            loss: Tensor = _LinearCrossEntropy.apply(x, weight, targets, chunk, divisor)
            return loss
        matrix = weight.to(x.dtype)
        chunks = zip(x.split(chunk), targets.split(chunk), strict=True)
        losses = [_loss_and_gradient(rows @ matrix.T, wanted, divisor) for rows, wanted in chunks]
        return torch.stack(losses).sum() / divisor


def _chunk(vocabulary: int) -> int:
    """The multiple of CHUNK whose logits take as much memory as those of CHUNK tokens in the paper's vocabulary."""
    return CHUNK * max(1, CHUNK_LOGITS // (CHUNK * vocabulary))


class _LinearCrossEntropy(torch.autograd.Function):
    """The forward pass also computes the gradients, chunk by chunk, so that no logits are kept for the backward pass.

    This is the method of Liger-Kernel's fused linear cross-entropy (arXiv 2410.10989, section 3.2).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        targets: Tensor,  # [N]
        chunk: int,
        divisor: Tensor,  # []
    ) -> Tensor:  # []
        matrix = weight.to(x.dtype)
        dx = torch.empty_like(x)
        dweight: Tensor | None = None
        losses = []
        for rows, wanted, into in zip(x.split(chunk), targets.split(chunk), dx.split(chunk), strict=True):
            logits = rows @ matrix.T
            losses.append(_loss_and_gradient(logits, wanted, divisor))
            torch.mm(logits, matrix, out=into)
            dweight = _add_product(dweight, logits.T, rows, weight.dtype)
            del logits  # Free this memory before the next chunk allocates its logits.
        assert dweight is not None
        ctx.save_for_backward(dx, dweight.to(weight.dtype))
        return torch.stack(losses).sum() / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        torch._assert_async(gradient == 1, "the loss was multiplied by a number; give it as `divisor` instead")
        return *ctx.saved_tensors, None, None, None


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a @ b, accumulated in float32 or wider: in 16 bits the sum would be rounded after every chunk."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        # torch.addmm(out_dtype=...) would copy the total, which is as large as the LM head.
        summed: Tensor = torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
        return summed
    product = (a @ b).to(dtype)
    return product if total is None else total.add_(product)


def _loss_and_gradient(
    logits: Tensor,  # [n, V], contiguous; overwritten by the gradient of the loss over `divisor`
    targets: Tensor,  # [n]
    divisor: Tensor,  # []: divides the gradient, but not the loss
) -> Tensor:  # []
    """The summed cross-entropy of the rows, in nats. Overwrites `logits` by its gradient."""
    if logits.is_cuda and importlib.util.find_spec("triton"):
        from experiments.training.loss_kernel import loss_and_gradient

        return loss_and_gradient(logits, targets, divisor, IGNORED)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="sum")
    counted = targets != IGNORED
    gradient = wide.softmax(1)
    gradient[counted.nonzero().squeeze(1), targets[counted]] -= 1
    logits.copy_(gradient * counted[:, None] / divisor)
    return loss
