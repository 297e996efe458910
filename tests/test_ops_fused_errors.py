"""What the fused functions refuse: ValueErrors of one line, with what was got, what was wanted, and what to do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dynconv import ops
from dynconv.ops import (
    headwise_joined_convolution,
    headwise_rotary_convolution,
    interleaved,
    lowrank_joined_convolution,
    lowrank_rotary_convolution,
    static_gated_convolution,
    static_joined_convolution,
    static_rotary_convolution,
)

JOINED, PAIRS = torch.zeros(1, 4, 48), torch.ones(2)
CALLS: dict[str, dict[str, Any]] = {
    "lowrank_joined_convolution": {"U": torch.ones(2, 8), "static_w": None, "channels": 8, "padded": False},
    "static_joined_convolution": {"static_w": torch.ones(2, 16), "channels": 8, "parts": 2},
    "headwise_joined_convolution": {"static_w": None, "channels": 8, "head_size": 4, "width": 2, "parts": 2},
    "lowrank_gated_convolution": {"U": torch.ones(2, 16), "static_w": None, "channels": 8, "padded": False},
    "static_gated_convolution": {"static_w": torch.ones(2, 16), "channels": 8},
    "lowrank_rotary_convolution": {"U": torch.ones(2, 24), "static_w": None, "frequencies": PAIRS, "heads": 2},
    "static_rotary_convolution": {"static_w": torch.ones(2, 24), "frequencies": PAIRS, "heads": 2, "halves": True},
    "headwise_rotary_convolution": {
        "static_w": None, "frequencies": PAIRS, "heads": 2, "head_size": 4, "width": 2, "halves": False,
    },
}  # fmt: skip
SIZES = ("channels", "parts", "heads", "head_size", "width")
WRONG_SIZES = {16.0: "16.0", 0: "0", -1: "-1", "8": "'8'", None: "None", True: "True"}


@pytest.mark.parametrize("name", CALLS)
def test_sizes_are_whole_numbers_and_flags_true_or_false(name: str) -> None:
    function: Callable[..., Any] = getattr(ops, name)
    right = CALLS[name] | {"residual": True}
    function(JOINED, **right)
    for argument in right.keys() & set(SIZES):
        for size, got in [*WRONG_SIZES.items(), (torch.ones(2), "a Tensor")]:
            message = f"^{argument} must be a whole number of at least 1; got {got}; pass an int$"
            with pytest.raises(ValueError, match=message):
                function(JOINED, **right | {argument: size})
    for argument in right.keys() & {"residual", "halves", "padded"}:
        for flag, got in (("no", "'no'"), (0.5, "0.5"), (None, "None"), (torch.ones(1, 4, 8), "a Tensor")):
            with pytest.raises(ValueError, match=f"^{argument} must be True or False; got {got}; .*$"):
                function(JOINED, **right | {argument: flag})


def test_a_residual_tensor_has_another_name() -> None:
    message = (
        "residual must be True or False; got a Tensor; add it to the result, or pass it as `added` where there is one"
    )
    with pytest.raises(ValueError, match=message):
        static_joined_convolution(JOINED, torch.ones(2, 8), 8, torch.ones(1, 4, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(24, 3), 5), "dim 0 must hold 5 heads of an even number of channels; got 24 channels; pass"),
        ((torch.ones(24, 3), 8), "dim 0 must hold 8 heads of an even number of channels; got 24 channels; pass"),
        ((torch.ones(2, 24), 5, -1), "dim -1 must hold 5 heads"),
        ((torch.ones(24, 3), 2.0), "heads must be a whole number of at least 1; got 2.0"),
        ((torch.ones(24, 3), 2, 2), "dim must be one of 2 dimensions; got 2; pass that of the channels"),
        (([1.0], 2), "tensor must be a tensor; got a list"),
    ],
)
def test_interleaved_of_other_heads(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interleaved(*arguments)


def test_tensors_that_do_not_fit_lowrank_functions() -> None:
    joined, up, frequencies = torch.zeros(1, 4, 30), torch.zeros(2, 24), torch.zeros(2)
    for arguments, message in (
        ((joined[0], up, None, frequencies, 2), r"joined must be \[B, T, C\]; got \[4, 30\]"),
        (
            (joined, up[:, :20], None, frequencies, 2),
            r"U must be \[R, W\*P\*D\] with P = 3 parts of D = 8 .* got \[2, 20\]",
        ),
        ((joined[..., :29], up, None, frequencies, 2), r"at least P \* \(D \+ R\) = 30 columns; got 29"),
        ((joined, up, torch.zeros(2, 24), frequencies, 2), r"static_w must be \[W, P\*D\] = \[1, 24\]; got \[2, 24\]"),
        ((joined, up, None, frequencies[None], 2), r"frequencies must be \[E/2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            lowrank_rotary_convolution(*arguments)
    with pytest.raises(ValueError, match="added goes with one part; got 3 parts"):
        lowrank_joined_convolution(joined, up, None, 8, parts=3, added=torch.zeros(1, 4, 8))
    with pytest.raises(ValueError, match=r"added must be \[B, T, D\] = \[1, 4, 8\]; got \[1, 4, 9\]"):
        lowrank_joined_convolution(joined, up[:, :8], None, 8, added=torch.zeros(1, 4, 9))


def test_tensors_that_do_not_fit_static_and_headwise_functions() -> None:
    joined, static, frequencies = torch.zeros(1, 4, 24), torch.zeros(2, 24), torch.zeros(2)
    for function, arguments, message in (
        (static_rotary_convolution, (joined[0], static, frequencies, 2), r"joined must be \[B, T, C\]; got \[4, 24\]"),
        (
            static_rotary_convolution,
            (joined, static[:, :8], frequencies, 2),
            r"static_w must be \[W, P\*D\] = \['any', 24\]; got \[2, 8\]",
        ),
        (static_rotary_convolution, (joined, None, frequencies, 2), "static_w must be a tensor; got None"),
        (
            static_rotary_convolution,
            (joined, static[:0], frequencies, 2),
            "W must be at least 1; got .* no taps",
        ),
        (
            static_rotary_convolution,
            (joined[..., :23], static, frequencies, 2),
            r"at least P \* D = 24 columns; got 23",
        ),
        (static_gated_convolution, (joined, static, 8), r"static_w must be \[W, P\*D\] = \['any', 16\]"),
        (headwise_rotary_convolution, (joined, None, frequencies, 2, 3, 2), "head_size must divide D = 8; got 3"),
        (
            headwise_rotary_convolution,
            (joined, None, frequencies, 2, 4, 2),
            r"at least P \* \(D \+ D/head_size \* W\) = 36 columns; got 24",
        ),
        (headwise_joined_convolution, (joined, static, 8, 4, 2), r"static_w must be \[W, P\*D\] = \[2, 8\]"),
        (headwise_joined_convolution, (joined, None, 8, 4, 0), "width must be a whole number of at least 1; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            function(*arguments)
    with pytest.raises(ValueError, match="added goes with one part; got 3 parts"):
        static_joined_convolution(joined, static, 8, parts=3, added=torch.zeros(1, 4, 8))
