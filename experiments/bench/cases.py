"""What `dynconv bench kernels` times: which convolutions at which shapes, and whose implementations of them."""

from __future__ import annotations

import importlib
import importlib.util
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
    op: str
    B: int = 4
    T: int = 4096
    D: int = 2048
    W: int = 4
    R: int | None = None  # low-rank: rank
    H: int | None = None  # head-wise: heads
    dtype: str = "bfloat16"
    static: bool = False  # beside the dynamic filter
    segments: int = 1  # low-rank: Q, K and V in one launch are three

    def bytes(self, backward: bool) -> int:
        """What must move: forward, or forward and backward."""
        size = 4 if self.dtype == "float32" else 2
        tokens = self.B * self.T
        per_token = {"static": 0, "headwise": (self.H or 0) * self.W, "lowrank": (self.R or 0) * self.segments}
        x, made = tokens * self.D * size, tokens * per_token[self.op] * size
        parameters = ((self.R or 0) + (self.static or self.op == "static")) * self.W * self.D * 4
        if not backward:
            return 2 * x + made + parameters
        return 5 * x + 3 * made + 3 * parameters

    def __str__(self) -> str:
        size = {"static": "", "headwise": f" h={self.D // (self.H or 1)}", "lowrank": f" R={self.R}"}
        segments = f", {self.segments} segments" if self.segments > 1 else ""
        return f"{self.op}{size[self.op]}{' + static' if self.static else ''}{segments}"

    def inputs(self, device: str = "cuda") -> dict[str, Tensor]:
        """Random inputs by argument; parameters in float32, as autocast leaves them."""
        import torch

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device)

        dtype = getattr(torch, self.dtype)
        made = {"x": normal(self.B, self.T, self.D).to(dtype)}
        if self.op == "static":
            made["weight"] = normal(self.W, self.D)
        if self.op == "headwise":
            assert self.H is not None
            made["weight"] = normal(self.B, self.T, self.H, self.W).to(dtype)
        if self.op == "lowrank":
            assert self.R is not None
            made["z"] = normal(self.B, self.T, self.R * self.segments).to(dtype)
            made["U"] = normal(self.R, self.W * self.D) / self.R**0.5
        if self.static:
            made["static_w"] = normal(self.W, self.D)
        return {name: value.requires_grad_() for name, value in made.items()}

    def options(self) -> dict[str, Any]:
        split = {} if self.segments == 1 else {"segments": (self.D // self.segments,) * self.segments}
        return {"residual": True} | split


def cases(quick: bool) -> list[Case]:
    """The shapes with a bar, and, unless quick, those that look for cliffs in T, D and dtype."""
    barred = [Case("lowrank", R=16), Case("lowrank", R=15, static=True), Case("lowrank", R=16, static=True)]
    barred += [Case("headwise", H=2048 // h, static=static) for h in (1, 4, 16) for static in (False, True)]
    barred += [Case("static"), Case("lowrank", D=3 * 2048, R=16, static=True, segments=3)]
    if quick:
        return barred
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
    return barred + others


@dataclass(frozen=True)
class Provider:
    """Functions of one origin, by op, that take our arguments."""

    name: str
    functions: dict[str, Callable[..., Any]]
    taps_last: bool = False  # but they want the static filter as [D, W], the oldest input's tap first

    def bind(self, case: Case, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], Tensor]]:
        """The case's inputs as its function wants them, and the call on them."""
        if self.taps_last:
            inputs = inputs | {"weight": inputs["weight"].detach().flip(0).t().contiguous().requires_grad_()}
        return inputs, partial(self.functions[case.op], **inputs, **case.options())

    def error(self, case: Case, device: str = "cuda") -> float:
        """How far its result and gradients are from the reference's: the largest relative root mean square."""
        import torch

        made = case.inputs(device)
        dy = torch.randn_like(made["x"])

        def outcome(provider: Provider) -> list[Tensor]:
            inputs, call = provider.bind(case, made)
            y = call()
            gradients = dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), dy), strict=True))
            if provider.taps_last:
                gradients["weight"] = gradients["weight"].t().flip(0)
            return [y.detach(), *gradients.values()]

        pairs = zip(outcome(self), outcome(Provider("reference", {case.op: plain})), strict=True)
        errors = [(got.float() - want.float()).norm() / want.float().norm() for got, want in pairs]
        return float(torch.stack(errors).max())  # NaN where one is


def plain(
    x: Tensor,  # [B, T, D]
    weight: Tensor | None = None,  # [W, D]: static; [B, T, H, W]: head-wise
    z: Tensor | None = None,  # [B, T, G*R]
    U: Tensor | None = None,  # [R, W*D]
    static_w: Tensor | None = None,  # [W, D]
    residual: bool = False,
    segments: tuple[int, ...] = (),
) -> Tensor:  # [B, T, D]
    """The reference, by the arguments of our functions."""
    from dynconv.ops import reference

    if weight is not None and weight.dim() == 2:
        return reference.convolve(x, None, None, weight, None, (), residual)
    return reference.convolve(x, z, weight if U is None else U, static_w, None, segments, residual)


def providers(compiled: bool, against: list[str]) -> list[Provider]:
    """Ours, then what it is compared with."""
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
    """module:function of a user."""
    module, _, name = target.partition(":")
    op = next((op for op in OPS if op in name.replace("_", "")), None)
    if op is None or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"--against wants module:function whose name says {', '.join(OPS)}; got {target}")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a module may raise anything when it is imported
        raise ValueError(
            f"--against {target}: {first_line(error)}; mend {module}, or put its folder on PYTHONPATH"
        ) from error
    function = getattr(found, name, None)
    if not callable(function):
        raise ValueError(
            f"--against {target}: {module} has no function {name}; see {getattr(found, '__file__', None) or module}"
        )
    return Provider(target, {op: function})


def _installed_peers() -> Iterator[Provider]:
    """The published static convolutions, where installed."""
    if importlib.util.find_spec("causal_conv1d"):
        from causal_conv1d import causal_conv1d_fn  # type: ignore[import-not-found]  # not a dependency

        def channels_first(x: Tensor, weight: Tensor, residual: bool) -> Tensor:
            y: Tensor = causal_conv1d_fn(x.transpose(1, 2), weight).transpose(1, 2)
            return y + x if residual else y

        yield Provider("causal-conv1d", {"static": channels_first}, taps_last=True)
    if importlib.util.find_spec("fla"):
        from fla.modules.convolution import causal_conv1d  # type: ignore[import-not-found]  # not a dependency

        def channels_last(x: Tensor, weight: Tensor, residual: bool) -> Tensor:
            y: Tensor = causal_conv1d(x, weight, residual=x if residual else None)[0]
            return y

        yield Provider("flash-linear-attention", {"static": channels_last}, taps_last=True)
