"""Compares what a CUDA graph computes with the same model uncompiled, on one batch.

A wrongly compiled program would train to a wrong loss without an error. The tolerances allow for two correct programs
in bfloat16, which round differently. Kernels written by hand (convolutions, RoPE and SwiGLU on one product, the loss)
are part of both programs, so only the tests against float64 can find an error in them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

LOSS_TOLERANCE = 0.02  # relative, for the loss of a training batch
NORM_TOLERANCE = 0.2  # relative, for the norm of all gradients together
# (relative to the norm of the parameter's own gradient, relative to the norm of all gradients together): the sum of the
# two is the tolerance of a parameter's gradient, so that gradients that are a small part of all are not judged.
# Before the first step, gradients in bfloat16 were off by at most .104 of their norm on an H200 (models with experts;
# Mamba-2 .077, dense ones .019), and by .10 on a CPU in batches of 512 tokens. This holds for every parameter of 30
# arms of the mini sweeps, down to those whose gradient is 2e-5 of all. After 12 steps, gradients below 1e-4 of all were
# off by up to 1.7 of their norm, and in the warm-up of models with experts, where experts are empty, by .5. After 120
# steps on an H200, a gradient of .02 of all was off by 1.1 of its norm.
FIRST_STEP_TOLERANCES = (0.4, 1e-6)
LATER_STEP_TOLERANCES = (0.5, 0.1)
# For a held-out loss per target: relative, or in nats if the loss is below 1. Correct programs differed by less than
# 3e-4 on an H100 and less than 1e-4 on an H200.
HELD_OUT_TOLERANCE = 5e-3


class StepComparison(NamedTuple):
    """The results of one training step, computed by the CUDA graph and uncompiled."""

    loss: float  # of the CUDA graph
    norm: float  # of the CUDA graph: the norm of all gradients together
    plain_loss: float  # uncompiled
    plain_norm: float  # uncompiled
    norms: list[float]  # uncompiled: of each parameter's gradient
    deviations: list[float]  # norm of the difference between each parameter's two gradients


def disagreement(step: StepComparison, names: Sequence[str], first: bool) -> str | None:
    """How the captured step differs from the uncompiled one by more than rounding explains; None if it does not.

    `names` are the parameters' in the order of `step.norms`. `first` says that the model is still at its initial
    values, where rounding errors are smaller than later in training.
    """
    if not (math.isfinite(step.plain_loss) and math.isfinite(step.plain_norm)):
        return None  # The run diverged; training reports that itself.
    if not (_agree(step.loss, step.plain_loss, LOSS_TOLERANCE) and _agree(step.norm, step.plain_norm, NORM_TOLERANCE)):
        return (
            f"the compiled step has loss {step.loss:.4g} and gradient norm {step.norm:.4g} where the same model "
            f"uncompiled has {step.plain_loss:.4g} and {step.plain_norm:.4g}"
        )
    share, floor = FIRST_STEP_TOLERANCES if first else LATER_STEP_TOLERANCES
    excess = [
        deviation / (share * norm + floor * step.plain_norm + 1e-12) if math.isfinite(deviation) else math.inf
        for norm, deviation in zip(step.norms, step.deviations, strict=True)
    ]
    worst = max(range(len(names)), key=excess.__getitem__)
    if excess[worst] <= 1:
        return None
    return (
        f"in the compiled step the gradient of {names[worst]} differs by {step.deviations[worst]:.4g} from that of the "
        f"same model uncompiled, whose norm is {step.norms[worst]:.4g}"
    )


def held_out_disagreement(loss: float, plain_loss: float) -> str | None:
    """As `disagreement`, for the mean held-out loss per target in nats, captured and uncompiled."""
    if abs(loss - plain_loss) <= HELD_OUT_TOLERANCE * max(1.0, abs(plain_loss)) or not math.isfinite(plain_loss):
        return None
    return (
        f"the compiled evaluation has loss {loss:.6g} on the first held-out sequences where the same model uncompiled "
        f"has {plain_loss:.6g}"
    )


def _agree(captured: float, plain: float, share: float) -> bool:
    """Whether two losses or norms agree within a relative tolerance plus 0.01: gradients near zero are mostly rounding.

    The norms of correct programs differed by .3% before the first step, and by 11% in a diverged run (no table was
    kept); those of wrong programs by factors above 400 (results/measured/h100/README.md).
    """
    return abs(captured - plain) <= share * abs(plain) + 1e-2
