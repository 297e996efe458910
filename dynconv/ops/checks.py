"""Checks of the convolution functions' arguments. An error says what it got, what it wanted, and the remedy."""

import operator
from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def kind_of(value: object) -> str:
    """The name of a value's type for an error message."""
    return "None" if value is None else f"a {type(value).__name__}"


def shown(value: object) -> str:
    """A value for an error message, which is a single line: of a tensor, only its type."""
    return kind_of(value) if isinstance(value, Tensor) else repr(value)


def as_segments(segments: Any, channels: int) -> tuple[int, ...]:
    """The widths as a tuple of integers. Raises ValueError unless they are positive and add up to the channels."""
    try:
        widths: tuple[Any, ...] = tuple(
            n if isinstance(n, (int, torch.SymInt)) else operator.index(n) for n in segments
        )
    except TypeError:
        raise ValueError(f"segments must be whole numbers; got {segments!r}; pass a tuple of widths") from None
    if sum(widths) != channels or min(widths) < 1:
        raise ValueError(f"segments must be positive and add up to D = {channels}; got {widths}; pass all the widths")
    return widths


def check_input(x: Tensor) -> None:
    """Raise ValueError unless x is a floating tensor [B, T, D]."""
    check_floating(x, "x")
    if x.dim() != 3:
        raise ValueError(f"x must be [B, T, D]; got {list(x.shape)}; add or merge dimensions")


def check_floating(tensor: Tensor, name: str) -> None:
    """Raise ValueError unless the argument is a dense tensor of a supported floating dtype."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor; got {kind_of(tensor)}; mind the order of the arguments")
    if tensor.is_nested:
        raise ValueError(f"{name} must be dense; got a nested tensor; pass values()[None], and offsets() as cu_seqlens")
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name} must be bfloat16, float16, float32 or float64; got {tensor.dtype}; convert it")


def check(
    tensor: Tensor,
    shape: tuple[int | None, ...],  # None for a dimension of any size
    name: str,  # the argument's name, for the error message
    letters: str,  # the shape in the documentation's letters, for the error message
    x: Tensor,
) -> None:
    """Raise ValueError unless the argument is a floating tensor of this shape on x's device."""
    check_floating(tensor, name)
    fits = tensor.dim() == len(shape)
    if fits:
        for got, wanted in zip(tensor.shape, shape, strict=True):  # `all` over a generator takes twice the host time.
            fits = fits and (wanted is None or got == wanted)
    if not fits:
        want = [n if n is not None else "any" for n in shape]
        raise ValueError(f"{name} must be {letters} = {want}; got {list(tensor.shape)}; reshape or transpose it")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like x; got {tensor.device}; move it")


def check_sizes(**sizes: Any) -> None:
    """Raise ValueError unless each of these arguments, by name, is a whole number of at least 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)) or size < 1:
            raise ValueError(f"{name} must be a whole number of at least 1; got {shown(size)}; pass an int")


def check_switches(**switches: Any) -> None:
    """Raise ValueError unless each of these arguments, by name, is True or False.

    Or one of their equals: None, 0, 1, NumPy's and torch's symbolic booleans. Others have a truth value, too, but a
    residual of 0.5 would add all of x, not half of it.
    """
    for name, value in switches.items():
        of_two = isinstance(value, (bool, torch.SymBool)) or value is None or type(value).__name__ in ("bool", "bool_")
        if not of_two and not (isinstance(value, int) and value in (0, 1)):
            got = repr(value) if isinstance(value, (str, int, float)) else kind_of(value)
            raise ValueError(f"{name} must be True or False; got {got}; pass one of them")


def check_flags(**flags: Any) -> None:
    """Raise ValueError unless each of these arguments, by name, is True or False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            remedy = "pass one of them"
            if name == "residual" and isinstance(flag, Tensor):
                remedy = "add it to the result, or pass it as `added` where there is one"
            raise ValueError(f"{name} must be True or False; got {shown(flag)}; {remedy}")


def check_options(
    x: Tensor,  # [B, T, D]
    width: int,  # W
    residual: bool | Tensor,  # or [B, T, D]
    return_final_state: bool,
    activation: str | None,
) -> None:
    """Raise ValueError for options that no convolution takes."""
    if isinstance(residual, Tensor):
        check(residual, tuple(x.shape), "residual (True, False or a tensor)", "[B, T, D]", x)
    if isinstance(return_final_state, Tensor):
        raise ValueError("return_final_state must be True or False; got a tensor; pass tensors by their names")
    check_switches(residual=isinstance(residual, Tensor) or residual, return_final_state=return_final_state)
    if activation not in (None, "silu"):
        got = repr(activation) if isinstance(activation, str) else kind_of(activation)
        raise ValueError(f'activation must be None or "silu"; got {got}; apply another one to the result')
    if width == 0:
        raise ValueError("W must be at least 1; got filters of no taps; pass tap 0, the current token's, at least")
