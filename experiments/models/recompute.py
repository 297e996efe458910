"""Activation checkpointing: blocks compute part of their activations again in the backward pass, to save memory.

Policies: "block" keeps nothing but a block's input. "attention-kept" also keeps the results of attention and of
convolutions, which take the most time to compute again for their size (arXiv 2205.05198 calls this selective).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from experiments.models.packing import Documents

Policy = Literal["block", "attention-kept"]
# Attention on a CPU, and in the order in which a GPU prefers its implementations; dynconv's operators.
_KEPT = {
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "torch_attn::_varlen_attn",
    "dynconv::convolve",
    "dynconv::joined",
    "dynconv::gated",
}


def recomputing(run: Callable[..., Any], policy: Policy) -> Callable[..., Any]:
    """`run(module, x, documents)`, whose activations are computed again in the backward pass, but for those kept."""
    # No random numbers are drawn in a block, and a CUDA graph could not save the generator's state.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if policy == "attention-kept":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def again(module: nn.Module, x: Tensor, documents: Documents | None) -> Any:
        if not torch.is_grad_enabled():
            return run(module, x, documents)
        # torch.compile chooses kernels once, where it traces the forward pass.
        computed = run if torch.compiler.is_compiling() else _with_the_same_attention(run)
        return checkpoint(computed, module, x, documents, **options)

    return again


def _with_the_same_attention(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, whose further calls choose among implementations of attention as the first one could.

    A backward pass is outside of the context in which the trainer prefers cuDNN's (training/precision.py), and torch
    restores autocast for what is computed again, but not this preference. Another implementation keeps other tensors,
    which torch refuses.
    """
    preferred: list[SDPBackend] = []

    def computed(*args: Any) -> Any:
        if preferred:
            with sdpa_kernel(preferred, set_priority=True):
                return run(*args)
        y = run(*args)
        # Read it afterwards: torch may set its own order when a process first computes attention.
        preferred.extend(_cur_sdpa_kernel_backends(with_priority=True))
        return y

    return computed


def _policy(_: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:  # noqa: ARG001
    name = operator.name().partition(".")[0] if hasattr(operator, "name") else ""
    return CheckpointPolicy.MUST_SAVE if name in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
