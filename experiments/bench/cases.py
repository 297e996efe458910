"""The shapes that `dynconv bench kernels` times, and the implementations that it compares."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from analysis.errors import first_line

if TYPE_CHECKING:
    from torch import Tensor

OPS = ("static", "headwise", "lowrank")


@dataclass(frozen=True)
class Case:
    """A convolution at one shape."""

    op: str  # one of OPS
    B: int = 4  # batch
    T: int = 4096  # time
    D: int = 2048  # channels
    W: int = 4  # taps
    R: int | None = None  # rank, of low-rank only
    H: int | None = None  # heads of filters, of head-wise only
    dtype: str = "bfloat16"
    static: bool = False  # whether a static filter is added to the dynamic one
    segments: int = 1  # of low-rank only: Q, K and V in one launch are three segments

    def bytes(self, backward: bool) -> int:
        """The least memory traffic of a forward pass, or with `backward` of a forward and backward pass, in bytes.

        Every tensor is read or written once in each pass.
        """
        size = 4 if self.dtype == "float32" else 2
        tokens = self.B * self.T
        per_token = {"static": 0, "headwise": (self.H or 0) * self.W, "lowrank": (self.R or 0) * self.segments}
        x, generated = tokens * self.D * size, tokens * per_token[self.op] * size
        parameters = ((self.R or 0) + (self.static or self.op == "static")) * self.W * self.D * 4
        if not backward:
            return 2 * x + generated + parameters
        # Forward as above. Backward reads x, dy, z or the filters, and the parameters, and writes their gradients.
        return 5 * x + 3 * generated + 3 * parameters

    def __str__(self) -> str:
        size = {"static": "", "headwise": f" h={self.D // (self.H or 1)}", "lowrank": f" R={self.R}"}
        segments = f", {self.segments} segments" if self.segments > 1 else ""
        return f"{self.op}{size[self.op]}{' + static' if self.static else ''}{segments}"

    def inputs(self, device: str = "cuda") -> dict[str, Tensor]:
        """Random inputs by the names of the arguments. Parameters are in float32, as they are under autocast."""
        import torch

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device)

        dtype = getattr(torch, self.dtype)
        inputs = {"x": normal(self.B, self.T, self.D).to(dtype)}
        if self.op == "static":
            inputs["weight"] = normal(self.W, self.D)
        if self.op == "headwise":
            assert self.H is not None
            inputs["weight"] = normal(self.B, self.T, self.H, self.W).to(dtype)
        if self.op == "lowrank":
            assert self.R is not None
            inputs["z"] = normal(self.B, self.T, self.R * self.segments).to(dtype)
            inputs["U"] = normal(self.R, self.W * self.D) / self.R**0.5
        if self.static:
            inputs["static_w"] = normal(self.W, self.D)
        return {name: value.requires_grad_() for name, value in inputs.items()}

    def options(self) -> dict[str, Any]:
        """Keyword arguments in addition to the inputs."""
        split = {} if self.segments == 1 else {"segments": (self.D // self.segments,) * self.segments}
        return {"residual": True} | split


def cases(quick: bool) -> list[Case]:
    """Every convolution at the paper's shape; unless `quick`, also at other T, D and dtype, which may be slow."""
    paper = [Case("lowrank", R=16), Case("lowrank", R=15, static=True), Case("lowrank", R=16, static=True)]
    paper += [Case("headwise", H=2048 // h, static=static) for h in (1, 4, 16) for static in (False, True)]
    paper += [Case("static"), Case("lowrank", D=3 * 2048, R=16, static=True, segments=3)]
    if quick:
        return paper
    shapes: list[dict[str, Any]] = [
        {"T": 1024},
        {"T": 32768},
        {"D": 768},
        {"D": 1024},
        {"D": 4096},
        {"T": 1024, "D": 768},
    ]
    shapes += [{"dtype": "float16"}]
    others = [Case("lowrank", R=16, static=True, **shape) for shape in shapes]
    others += [Case("static", **shape) for shape in shapes]
    for shape in shapes:
        others.append(Case("headwise", H=shape.get("D", 2048) // 16, **shape))
    return paper + others


@dataclass(frozen=True)
class Provider:
    """One implementation: functions by op, with the arguments of dynconv's functions."""

    name: str
    functions: dict[str, Callable[..., Any]]
    taps_last: bool = False  # whether its static filter is [D, W] with the tap of the oldest input first

    def bind(self, case: Case, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], Tensor]]:
        """(inputs in this implementation's layout, a function without arguments that computes the output from them)."""
        if self.taps_last:
            inputs = inputs | {"weight": inputs["weight"].detach().flip(0).t().contiguous().requires_grad_()}
        return inputs, partial(self.functions[case.op], **inputs, **case.options())

    def error(self, case: Case, device: str = "cuda") -> float:
        """The largest relative RMS difference from the reference, over the output and all gradients; NaN if one is."""
        import torch

        given = case.inputs(device)
        dy = torch.randn_like(given["x"])

        def outcome(provider: Provider) -> list[Tensor]:
            inputs, call = provider.bind(case, given)
            y = call()
            gradients = dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), dy), strict=True))
            if provider.taps_last:
                gradients["weight"] = gradients["weight"].t().flip(0)
            return [y.detach(), *gradients.values()]

        pairs = zip(outcome(self), outcome(Provider("reference", {case.op: plain})), strict=True)
        errors = [(got.float() - want.float()).norm() / want.float().norm() for got, want in pairs]
        return float(torch.stack(errors).max())


def plain(
    x: Tensor,  # [B, T, D]
    weight: Tensor | None = None,  # [W, D]: static; [B, T, H, W]: head-wise
    z: Tensor | None = None,  # [B, T, G*R]
    U: Tensor | None = None,  # [R, W*D]
    static_w: Tensor | None = None,  # [W, D]
    residual: bool = False,
    segments: tuple[int, ...] = (),
) -> Tensor:  # [B, T, D]
    """The plain PyTorch reference, with the arguments of dynconv's functions."""
    from dynconv.ops import reference

    if weight is not None and weight.dim() == 2:
        return reference.convolve(x, None, None, weight, None, (), residual)
    return reference.convolve(x, z, weight if U is None else U, static_w, None, segments, residual)


def providers(compiled: bool, against: list[str]) -> list[Provider]:
    """dynconv, and then the implementations that it is compared with: torch.compile of the reference if `compiled`,
    installed packages, and the functions that `against` names."""
    import torch

    import dynconv

    functions = (
        dynconv.static_convolution,
        dynconv.headwise_dynamic_convolution,
        dynconv.lowrank_dynamic_convolution,
    )
    found = [Provider("dynconv", dict(zip(OPS, functions, strict=True)))]
    if compiled:
        found.append(Provider("torch.compile", dict.fromkeys(OPS, torch.compile(plain, dynamic=False, fullgraph=True))))
    found += _installed_peers()
    for target in against:
        found.append(_named(target))
    return found


def _named(target: str) -> Provider:
    """The function that the user names as MODULE:FUNCTION. Raises ValueError if it cannot be imported."""
    module, _, name = target.partition(":")
    op = next((op for op in OPS if op in name.replace("_", "")), None)
    if op is None or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"--against wants module:function whose name says {', '.join(OPS)}; got {target}")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a module may raise anything when it is imported
        raise ValueError(
            f"--against {target}: {first_line(error)}; correct {module}, or put its folder on PYTHONPATH"
        ) from error
    function = getattr(found, name, None)
    if not callable(function):
        raise ValueError(
            f"--against {target}: {module} has no function {name}; see {getattr(found, '__file__', None) or module}"
        )
    return Provider(target, {op: function})


# Static convolutions of other packages: (name to show, module, function, how to call it with x [B, T, D], weight [D, W]
# and `residual`). flash-linear-attention's CUDA backend calls causal-conv1d's kernels.
_Call = Callable[[Callable[..., Any], "Tensor", "Tensor", bool], Any]
_PEERS: list[tuple[str, str, str, _Call]] = [
    (
        "causal-conv1d",
        "causal_conv1d",
        "causal_conv1d_fn",
        lambda run, x, weight, residual: _added(run(x.transpose(1, 2), weight).transpose(1, 2), x, residual),
    ),
    (
        "flash-linear-attention",
        "fla.modules.convolution",
        "causal_conv1d",
        lambda run, x, weight, residual: run(x, weight, residual=x if residual else None)[0],
    ),
    (
        "flash-linear-attention, cuda",
        "fla.modules.convolution",
        "causal_conv1d",
        lambda run, x, weight, residual: run(x, weight, residual=x if residual else None, backend="cuda")[0],
    ),
    (
        "attention-gym",
        "attn_gym.linear.kda.short_conv",
        "causal_conv1d",
        # It takes x and weight only in the same dtype.
        lambda run, x, weight, residual: _added(run(x, weight.to(x.dtype)), x, residual),
    ),
]


def _added(y: Tensor, x: Tensor, residual: bool) -> Tensor:
    return y + x if residual else y


def _installed_peers() -> Iterator[Provider]:
    """The static convolutions of other packages that are installed. Standard error says which are not, or fail."""
    absent = []
    for name, module, function, call in _PEERS:
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            absent.append(name)
            continue
        try:
            run = getattr(importlib.import_module(module), function)
        except Exception as error:  # a module may raise anything when it is imported
            print(f"{name} is left out: {first_line(error)}", file=sys.stderr)
            continue
        yield Provider(name, {"static": partial(call, run)}, taps_last=True)
    if absent:
        print(f"not installed, so not compared: {'; '.join(absent)}", file=sys.stderr)
