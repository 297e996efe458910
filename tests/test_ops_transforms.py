"""The convolutions under torch.func, tracers, and modes that count operators or decide what a checkpoint keeps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from convolutions import BOUND, DEVICE, FUNCTIONS, Case, relative_error
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

pytestmark = [
    pytest.mark.usefixtures("implementation"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
CLOSE = 2 * BOUND[torch.float32]
EACH_KIND = pytest.mark.parametrize("kind", FUNCTIONS)
EACH_ACTIVATION = pytest.mark.parametrize("activation", [None, "silu"])
PACKED = {"batch": 1, "documents": (1, 0, 2, 4), "state": True}  # all but the last are shorter than W - 1


def small(kind: str, **changes: Any) -> Case:
    return Case(kind, **({"time": 7, "heads": 2, "head_size": 3, "rank": 2} | changes))


def detached(case: Case) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in case.inputs().items()}


def loss(case: Case, inputs: dict[str, Tensor]) -> Tensor:
    return case.run(inputs).square().sum()


def gradients(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    return dict(zip(leaves, torch.autograd.grad(loss(case, leaves), list(leaves.values())), strict=True))


def assert_all_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert relative_error(value, want[name].double()) < CLOSE, name


@EACH_ACTIVATION
@EACH_KIND
def test_grad(kind: str, activation: str | None) -> None:
    case = small(kind, activation=activation)
    inputs = detached(case)
    assert_all_close(torch.func.grad(partial(loss, case))(inputs), gradients(case, inputs))


@EACH_KIND
def test_per_sample_gradients(kind: str) -> None:
    """Of what samples share, too: each has its own."""
    case = small(kind, batch=3)
    inputs = detached(case)
    dims = {name: 0 if name in case.per_token else None for name in inputs}

    def one(inputs: dict[str, Tensor]) -> Tensor:
        return loss(case, {name: v[None] if name in case.per_token else v for name, v in inputs.items()})

    got = torch.func.vmap(torch.func.grad(one), in_dims=(dims,))(inputs)
    for sample in range(3):
        alone = {n: v[sample : sample + 1] if n in case.per_token else v for n, v in inputs.items()}
        want = gradients(case, alone)
        assert_all_close({name: value[sample].view_as(want[name]) for name, value in got.items()}, want)


@EACH_KIND
def test_vmap_over_models(kind: str) -> None:
    """An ensemble: filters are stacked, and the input is one."""
    case = small(kind)
    inputs = detached(case)
    x = inputs.pop("x")
    stacked = {name: torch.stack([value, 2 * value, -value], 1) for name, value in inputs.items()}
    got = torch.func.vmap(lambda own: case.run(own | {"x": x}), in_dims=1)(stacked)
    for index in range(3):
        own = {name: value.select(1, index) for name, value in stacked.items()}
        assert relative_error(got[index], case.run(own | {"x": x}).double()) < CLOSE


@EACH_KIND
def test_vmap_over_states(kind: str) -> None:
    """Of packed documents: the outputs that the states do not reach are shared."""
    case = small(kind, **PACKED)
    inputs = detached(case)
    states = torch.stack([inputs.pop("initial_state"), torch.randn(4, 3, 6, device=DEVICE)])
    got = torch.func.vmap(lambda state: case.run(inputs | {"initial_state": state}))(states)
    for index in range(2):
        assert relative_error(got[index], case.run(inputs | {"initial_state": states[index]}).double()) < CLOSE


@pytest.mark.parametrize("implementation", ["reference"], indirect=True)
def test_vmap_over_states_can_be_compiled() -> None:
    case = small("static", **PACKED)
    inputs = detached(case)
    states = torch.stack([inputs.pop("initial_state"), torch.randn(4, 3, 6, device=DEVICE)])
    over_states = torch.func.vmap(lambda state: case.run(inputs | {"initial_state": state}))
    assert torch.equal(torch.compile(over_states, backend="aot_eager")(states), over_states(states))


@EACH_KIND
def test_several_gradients_of_one_output_at_once(kind: str) -> None:
    """As `torch.autograd.functional.jacobian` asks for them with `vectorize`."""
    case = small(kind, activation="silu")
    inputs = case.inputs()
    y = case.run(inputs)
    dys = torch.randn(3, *y.shape, device=DEVICE)
    got = torch.autograd.grad(y, list(inputs.values()), dys, is_grads_batched=True, retain_graph=True)
    for index in range(3):
        want = torch.autograd.grad(y, list(inputs.values()), dys[index], retain_graph=True)
        assert_all_close(
            {name: g[index] for name, g in zip(inputs, got, strict=True)}, dict(zip(inputs, want, strict=True))
        )


@pytest.mark.parametrize("packing", [{}, PACKED], ids=["rows", "packed"])
@EACH_ACTIVATION
@EACH_KIND
def test_forward_mode(kind: str, activation: str | None, packing: dict[str, Any]) -> None:
    """Against the difference of two outputs, in float64."""
    case = small(kind, activation=activation, **packing)
    inputs = detached(case)
    tangents = {name: torch.randn_like(value) for name, value in inputs.items()}
    y, got = torch.func.jvp(case.run, (inputs,), (tangents,))
    assert relative_error(y, case.run(inputs).double()) < CLOSE
    step = 1e-5
    ahead, behind = (
        case.oracle({n: v.double() + sign * step * tangents[n].double() for n, v in inputs.items()}) for sign in (1, -1)
    )
    assert relative_error(got, (ahead - behind) / (2 * step)) < 1e-5


@pytest.mark.parametrize("implementation", ["kernels"], indirect=True)
@EACH_KIND
def test_forward_mode_through_a_backward_pass_is_refused(kind: str) -> None:
    """Kernels that took such a gradient would leave its tangent out."""
    case = small(kind)
    inputs = case.inputs()
    y = case.run(inputs)
    with torch.autograd.forward_ad.dual_level():
        dy = torch.autograd.forward_ad.make_dual(torch.randn_like(y), torch.randn_like(y))
        with pytest.raises(NotImplementedError, match="forward mode AD"):
            torch.autograd.grad(y, list(inputs.values()), dy)


def test_a_hessian() -> None:
    """Forward over reverse: by the reference, as kernels have first derivatives only."""
    case = small("static", activation="silu", time=3)
    inputs = detached(case)
    hessian = torch.func.hessian(lambda weight: loss(case, inputs | {"weight": weight}))(inputs["weight"])
    exact = {name: value.double() for name, value in inputs.items()}
    want = torch.autograd.functional.hessian(
        lambda weight: case.oracle(exact | {"weight": weight}).square().sum(), exact["weight"]
    )
    assert relative_error(hessian, want) < CLOSE


@pytest.mark.parametrize("implementation", ["kernels"], indirect=True)
def test_reverse_over_reverse_is_refused() -> None:
    case = small("static")
    inputs = detached(case)
    first = torch.func.grad(lambda weight: loss(case, inputs | {"weight": weight}))
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.func.grad(lambda weight: first(weight).sum())(inputs["weight"])


def by_make_fx(function: Callable[..., Any], arguments: tuple[Tensor, ...]) -> Callable[..., Any]:
    return make_fx(function)(*arguments)


def by_jit_trace(function: Callable[..., Any], arguments: tuple[Tensor, ...]) -> Callable[..., Any]:
    return torch.jit.trace(function, arguments, check_trace=False)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("trace", [by_make_fx, by_jit_trace])
@EACH_KIND
def test_a_traced_graph_computes_with_what_it_is_given(kind: str, trace: Callable[..., Any]) -> None:
    """Not with what it was traced on."""
    case = small(kind)
    inputs = detached(case)
    names = list(inputs)

    def run(*values: Tensor) -> Tensor:
        return case.run(dict(zip(names, values, strict=True)))

    traced = trace(run, tuple(inputs.values()))
    others = {name: torch.randn_like(value) for name, value in inputs.items()}
    assert relative_error(traced(*others.values()), case.run(others).double()) < CLOSE


@pytest.mark.parametrize("implementation", ["kernels"], indirect=True)
def test_flops_are_counted() -> None:
    """A multiply-add counts as two. A gradient is as many as the output; so are filters that are made again."""
    batch, time, channels, width, rank = 2, 7, 6, 4, 2
    convolution = 2 * batch * time * channels * width
    generation = convolution * rank
    for kind, forward, backward in (
        ("static", convolution, 2 * convolution),
        ("headwise", convolution, 2 * convolution),
        ("lowrank", convolution + generation, 2 * convolution + 3 * generation),
    ):
        case = small(kind, static=False)
        inputs = case.inputs()
        with FlopCounterMode(display=False) as counter:
            y = case.run(inputs)
            assert counter.get_total_flops() == forward, kind
            y.sum().backward()
        assert counter.get_total_flops() == forward + backward, kind
        y = case.run(inputs)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == backward, kind


@pytest.mark.parametrize("implementation", ["kernels"], indirect=True)
@EACH_KIND
def test_selective_checkpointing_sees_the_operator(kind: str) -> None:
    case = small(kind)
    inputs = case.inputs()
    want = gradients(case, inputs)
    seen: list[tuple[Any, bool]] = []

    def policy(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        seen.append((op, context.is_recompute))
        ours = op is torch.ops.dynconv.convolve.default
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy)

    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    total = checkpoint(partial(loss, case), leaves, use_reentrant=False, context_fn=contexts)
    got = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    assert_all_close(got, want)
    assert (torch.ops.dynconv.convolve.default, False) in seen
