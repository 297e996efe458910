"""The tensor-core kernels of the low-rank convolution on a CPU, in the interpreter of gluon_interpreter.py.

tests/test_ops_gpu.py and the others run the same kernels where there is a GPU.
"""

import pytest
import torch
from convolutions import BOUND, GPU, Case, relative_error

pytest.importorskip("triton")
if GPU:
    pytest.skip("the other tests run these kernels on the GPU", allow_module_level=True)

from gluon_interpreter import interpreted

CASES = [
    Case(batch=2, time=150, segments=(128,), rank=16),
    Case(batch=1, time=70, segments=(128, 256), rank=5, activation="silu"),
    Case(batch=3, time=20, segments=(128,), rank=40, residual=False, dtype=torch.float16),
    Case(batch=1, time=45, segments=(128,), rank=16, static=False, width=2),
    Case(batch=5, time=3, segments=(128,), rank=3, width=3),  # joined into one sequence of documents
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_agree_with_the_oracle(case: Case) -> None:
    case = case if case.dtype == torch.float16 else Case(**(vars(case) | {"dtype": torch.bfloat16}))
    inputs = case.inputs()
    x, z, up = (inputs[name].detach() for name in ("x", "z", "U"))
    static = inputs["static_w"].detach() if case.static else None
    options = (case.segments, case.residual, case.activation == "silu")
    dy = torch.randn_like(x)
    with interpreted() as modules:
        mma = modules.lowrank_mma
        y = mma.forward(x, z, up, static, None, *options, x.dtype)
        needs = (True, True, True, case.static)
        gradients = mma.backward(dy, x, z, up, static, None, *options, needs)
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    want = case.oracle(exact)
    expected = dict(zip(exact, torch.autograd.grad(want, list(exact.values()), dy.double()), strict=True))
    assert relative_error(y, want) < BOUND[x.dtype]
    for name, gradient in zip(("x", "z", "U", "static_w"), gradients, strict=True):
        if name in expected:
            assert relative_error(gradient, expected[name]) < BOUND[x.dtype], name
