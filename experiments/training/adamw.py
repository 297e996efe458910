"""AdamW (arXiv 1711.05101, algorithm 2) for large models on a GPU: one Triton kernel launch for each parameter tensor.

A step reads and writes 28 bytes per parameter. The fused AdamW of torch moves 36 when it clips, because it also writes
the clipped gradient back: for the 2B model that is 5 ms of a step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from experiments.training.parallel import local

_BLOCK = 2048


@triton.jit
def _adamw(
    parameter, gradient, average, square,  # each [size]
    rate, scale, stopped, corrections,  # [], [], [], [2]
    size, decay, beta1, beta2, epsilon,
    BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(stopped) == 0.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        ok = at < size
        g = tl.load(gradient + at, mask=ok, other=0.0).to(tl.float32) / tl.load(scale)
        m = tl.load(average + at, mask=ok, other=0.0)
        v = tl.load(square + at, mask=ok, other=0.0)
        p = tl.load(parameter + at, mask=ok, other=0.0)
        lr = tl.load(rate)
        m += (1.0 - beta1) * (g - m)
        v = beta2 * v + (1.0 - beta2) * g * g
        p -= lr * decay * p
        p -= lr / tl.load(corrections) * m / (tl.sqrt(v / tl.load(corrections + 1)) + epsilon)
        tl.store(average + at, m, mask=ok)
        tl.store(square + at, v, mask=ok)
        tl.store(parameter + at, p, mask=ok)


class LargeAdamW(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True, capturable=True) for float32 parameters, with the same state and results.

    Like the original it divides gradients by `grad_scale` and does nothing if `found_inf` is 1; but it leaves the
    gradients as they are.
    """

    grad_scale: Tensor | None = None  # []
    found_inf: Tensor | None = None  # []

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # it takes no closure
        """Update every parameter that has a gradient. `lr` of a group may be a number or a tensor on the device."""
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            states = [self._state(p) for p in parameters]
            device = parameters[0].device
            stopped = torch.zeros((), device=device) if self.found_inf is None else self.found_inf
            scale = torch.ones((), device=device) if self.grad_scale is None else self.grad_scale
            rate = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
            torch._foreach_add_([state["step"] for state in states], [1 - stopped] * len(states))
            logarithms = torch.tensor(group["betas"], dtype=torch.float64).log().tolist()
            # 1 - beta^step; all parameters of a group have done the same number of steps.
            step = states[0]["step"].double()
            corrections = torch.stack([-torch.expm1(step * logarithm) for logarithm in logarithms]).float()
            for parameter, state in zip(parameters, states, strict=True):
                tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                own = [local(tensor) for tensor in tensors]
                if not own[0].numel():
                    continue
                assert all(tensor.is_contiguous() for tensor in own)
                _adamw[(triton.cdiv(own[0].numel(), _BLOCK),)](
                    *own, rate, scale, stopped, corrections,
                    own[0].numel(), group["weight_decay"], *group["betas"], group["eps"],
                    BLOCK=_BLOCK, num_warps=8,
                )  # fmt: skip

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        return state
