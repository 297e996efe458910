"""The convolution functions on CPU tensors, where the reference runs: their meaning and their errors."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dynconv.ops import (
    headwise_dynamic_convolution,
    lowrank_dynamic_convolution,
    static_convolution,
    static_convolution_step,
)

X = torch.randn(2, 5, 6)


def test_tap_zero_is_the_current_token() -> None:
    x = torch.arange(4.0).reshape(1, 4, 1)
    assert static_convolution(x, torch.tensor([[1.0], [0.0]])).flatten().tolist() == [0, 1, 2, 3]
    assert static_convolution(x, torch.tensor([[0.0], [1.0]])).flatten().tolist() == [0, 0, 1, 2]
    assert static_convolution(x, torch.tensor([[0.0], [10.0]]), residual=True).flatten().tolist() == [
        0,
        1,
        12,
        23,
    ]


def test_headwise_coefficients_are_shared_by_consecutive_channels() -> None:
    weight = torch.zeros(2, 5, 3, 2)
    weight[:, :, 1, 0] = 2.0
    y = headwise_dynamic_convolution(X, weight)
    assert torch.equal(y[..., 2:4], 2 * X[..., 2:4])
    assert not y[..., :2].any()
    assert not y[..., 4:].any()


def test_low_rank_with_one_hot_z_picks_a_filter() -> None:
    up = torch.randn(3, 2 * 6)
    z = torch.nn.functional.one_hot(torch.full((2, 5), 1), 3).float()
    got = lowrank_dynamic_convolution(X, z, up)
    torch.testing.assert_close(got, static_convolution(X, up[1].view(2, 6)))


def test_mixed_dtypes_as_autocast_makes_them_give_the_inputs_dtype() -> None:
    z, up = torch.randn(2, 5, 3), torch.randn(3, 2 * 6)
    y = lowrank_dynamic_convolution(X.bfloat16(), z.bfloat16(), up, torch.randn(2, 6))
    assert y.dtype == torch.bfloat16


def test_segments_are_separate_convolutions_side_by_side() -> None:
    z, up = torch.randn(2, 5, 2 * 3), torch.randn(3, 2, 6)
    got = lowrank_dynamic_convolution(X, z, up.flatten(1), segments=(4, 2))
    first = lowrank_dynamic_convolution(X[..., :4], z[..., :3], up[..., :4].flatten(1))
    second = lowrank_dynamic_convolution(X[..., 4:], z[..., 3:], up[..., 4:].flatten(1))
    torch.testing.assert_close(got, torch.cat([first, second], 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: static_convolution(X[0], X), r"x must be \[B, T, D\]; got"),
        (lambda: static_convolution(X.long(), torch.ones(4, 6)), "x must be bfloat16, .*; got torch.int64; convert it"),
        (
            lambda: static_convolution(X, torch.ones(4, 7)),
            r"weight must be \[W, D\] = .*6\]; got \[4, 7\]; reshape",
        ),
        (lambda: static_convolution(X, torch.ones(4, 6).long()), "weight must be bfloat16, .*; got torch.int64"),
        (
            lambda: static_convolution(X, torch.ones(4, 6, device="meta")),
            "weight must be on cpu like x; got meta",
        ),
        (
            lambda: headwise_dynamic_convolution(X, torch.ones(2, 5, 4, 4)),
            "H must divide D; got H = 4 and D = 6",
        ),
        (lambda: headwise_dynamic_convolution(X, torch.ones(2, 4, 3, 4)), r"weight must be \[B, T, H, W\]"),
        (
            lambda: headwise_dynamic_convolution(X, torch.ones(2, 5, 3, 4), torch.ones(3, 6)),
            r"static_w must be \[W, D\] = \[4, 6\]; got \[3, 6\]",
        ),
        (
            lambda: lowrank_dynamic_convolution(X, torch.ones(2, 5, 3), torch.ones(3, 8)),
            r"U must be \[R, W\*D\]",
        ),
        (
            lambda: lowrank_dynamic_convolution(X[..., :0], torch.ones(2, 5, 3), torch.ones(3, 8)),
            r"U must be \[R, W\*D\] with D = 0",
        ),
        (lambda: static_convolution(X, torch.ones(0, 6)), "W must be at least 1"),
        (lambda: static_convolution_step(X, None, torch.ones(4, 6)), "state must be a tensor; got None"),
        (
            lambda: static_convolution_step(X, torch.ones(2, 2, 6), torch.ones(4, 6)),
            r"initial_state \(of a step: state\) must be \[N, W-1, D\] = \[2, 3, 6\]; got \[2, 2, 6\]; reshape",
        ),
        (lambda: headwise_dynamic_convolution(X, torch.ones(2, 5, 3, 0)), "W must be at least 1"),
        (
            lambda: lowrank_dynamic_convolution(X, torch.ones(2, 5, 2), torch.ones(3, 12)),
            r"z must be \[B, T, G\*R\]",
        ),
        (
            lambda: lowrank_dynamic_convolution(X, torch.ones(2, 5, 3), torch.ones(3, 12), segments=(4, 1)),
            "segments must be positive and add up to D = 6; got",
        ),
        (
            lambda: static_convolution(X, torch.ones(4, 6), cu_seqlens=torch.tensor([0, 5])),
            "cu_seqlens needs B = 1; got B = 2",
        ),
        (
            lambda: static_convolution(X[:1], torch.ones(4, 6), cu_seqlens=torch.tensor([0, 3, 2, 5])),
            "cu_seqlens must rise from 0 to T = 5 at most; got",
        ),
        (
            lambda: static_convolution(X[:1], torch.ones(4, 6), cu_seqlens=torch.tensor([0, 3, 6])),
            r"rise from 0 to T = 5 at most; got \[0, 3, 6\]; pass the starts and the last one's end",
        ),
        (
            lambda: static_convolution(X[:1], torch.ones(4, 6), cu_seqlens=torch.tensor([3, 5])),
            r"rise from 0 to T = 5 at most; got \[3, 5\]",
        ),
        (
            lambda: static_convolution(X[:1], torch.ones(4, 6), cu_seqlens=torch.tensor([0])),
            r"cu_seqlens must be \[N \+ 1\] int32 or int64; got \[1\]",
        ),
        (
            lambda: static_convolution(X[:1], torch.ones(4, 6), cu_seqlens=torch.arange(100)),
            "got 100 values from 0 to 99; pass",
        ),
        (
            lambda: static_convolution(X[:1], torch.ones(4, 6), cu_seqlens=torch.tensor([0, 1, 1, 1, 4, 3, 5, 5, 5])),
            "got 9 values from 0 to 5, 3 after 4; pass",
        ),
        (
            lambda: static_convolution(X[:1], torch.ones(4, 6), cu_seqlens=[0, 5]),
            "cu_seqlens must be a tensor; got a list",
        ),
        (lambda: static_convolution(X.tolist(), torch.ones(4, 6)), "x must be a tensor; got a list"),
        (
            lambda: static_convolution(X.to(torch.float8_e4m3fn), torch.ones(4, 6)),
            "x must be bfloat16, .*; got torch.float8",
        ),
        (
            lambda: lowrank_dynamic_convolution(X, torch.ones(2, 5, 3), torch.ones(3, 12), True),
            "static_w must be a tensor; got a bool",
        ),
        (
            lambda: static_convolution(X, torch.ones(4, 6), torch.ones(4, 6)),
            r"residual \(True, False or a tensor\) must be \[B, T, D\] = \[2, 5, 6\]; got \[4, 6\]",
        ),
        (
            lambda: static_convolution(X, torch.ones(4, 6), bias=torch.ones(1, 6)),
            r"bias must be \[D\] = \[6\]; got \[1, 6\]",
        ),
        (lambda: static_convolution(X, torch.ones(4, 6), return_final_state=X), "return_final_state must be True or"),
        (lambda: static_convolution(X, torch.ones(4, 6), "no"), "residual must be True or False; got 'no'"),
        (lambda: static_convolution(X, torch.ones(4, 6), 0.5), "residual must be True or False; got 0.5"),
        (lambda: static_convolution(X, torch.ones(4, 6), 3), "residual must be True or False; got 3"),
        (lambda: static_convolution(X, torch.ones(4, 6), [0.5]), "residual must be True or False; got a list"),
        (lambda: static_convolution(X, torch.ones(4, 6), X.numpy()), "residual must be True or False; got a ndarray"),
        (lambda: static_convolution(X, torch.ones(4, 6), activation="relu"), "got 'relu'; apply another one to"),
        (lambda: static_convolution(X, torch.ones(4, 6), activation=X), "got a Tensor; apply another one to"),
        (
            lambda: lowrank_dynamic_convolution(X, torch.ones(2, 5, 3), torch.ones(3, 12), segments=6),
            "segments must be whole numbers; got 6; pass a tuple of widths",
        ),
        (
            lambda: lowrank_dynamic_convolution(X, torch.ones(2, 5, 3), torch.ones(3, 12), segments=(2.0, 4.0)),
            r"segments must be whole numbers; got \(2.0, 4.0\)",
        ),
        (
            lambda: lowrank_dynamic_convolution(X, torch.ones(2, 5, 0), torch.ones(0, 12)),
            "choose R and W of at least 1",
        ),
        (
            lambda: static_convolution(X[:1], torch.ones(4, 6), cu_seqlens=torch.tensor([0.0, 5.0])),
            r"cu_seqlens must be \[N \+ 1\] int32 or int64",
        ),
    ],
)
def test_errors_say_got_wanted_and_remedy(call, message: str) -> None:  # type: ignore[no-untyped-def]  # a lambda
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("without", ["triton", ""])
def test_the_kernels_run_where_the_variable_says_so_and_triton_is(without: str) -> None:
    """In a process of its own, for both are read once. Without Triton the reference runs, by the same call."""
    script = f"""
import sys
without = {without!r}
if without:
    import importlib.util
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == without else find(name, *rest)
import torch, dynconv
x = torch.arange(24.0).reshape(1, 4, 6)
print(dynconv.static_convolution(x, torch.ones(2, 6)).sum().item(), "dynconv.ops.operator" in sys.modules)
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    x = torch.arange(24.0).reshape(1, 4, 6)
    expected = float(x.sum() + x[:, :-1].sum())
    assert done.stdout.split() == [str(expected), str(not without and has_triton())]


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def test_widths_and_flags_may_be_of_other_whole_types() -> None:
    z, basis = torch.randn(2, 5, 6), torch.randn(3, 12)
    want = lowrank_dynamic_convolution(X, z, basis, residual=True, segments=(2, 4))
    for segments in ([2, 4], torch.Size([2, 4]), np.array([2, 4]), torch.tensor([2, 4]), iter((2, 4))):
        assert torch.equal(lowrank_dynamic_convolution(X, z, basis, residual=np.bool_(True), segments=segments), want)


def test_widths_and_flags_may_be_symbols() -> None:
    def run(q: Tensor, k: Tensor, z: Tensor, basis: Tensor) -> Tensor:
        x = torch.cat([q, k], 2)
        return lowrank_dynamic_convolution(x, z, basis, residual=q.shape[1] > 2, segments=(q.shape[2], k.shape[2]))

    inputs = torch.randn(2, 5, 2), torch.randn(2, 5, 4), torch.randn(2, 5, 6), torch.randn(3, 12)
    assert torch.allclose(make_fx(run, tracing_mode="symbolic")(*inputs)(*inputs), run(*inputs))
