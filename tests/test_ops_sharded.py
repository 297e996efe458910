"""The convolutions of DTensors on two processes, and of other tensors that wrap tensors."""

import itertools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from convolutions import BOUND, FUNCTIONS, GPU, Case, kernels, relative_error
from torch import Tensor, nn
from torch import multiprocessing as mp
from torch.testing._internal.two_tensor import TwoTensor

from dynconv.layers import (
    FusedLowRankConv,
    HeadwiseDynamicConv,
    LowRankDynamicConv,
    StaticShortConv,
    project_together,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch raises its own on import
CLOSE = 2 * BOUND[torch.float32]
VARIETIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "state, silu": {"state": True, "activation": "silu"},
    "packed": {"batch": 1, "documents": (2, 26, 0, 9), "state": True},
}


def placed(case: Case, inputs: dict[str, Tensor], mesh: Any, x_dim: int | None) -> dict[str, Any]:
    """The inputs as DTensors: what has a time is placed as x is. Parameters are sharded along their first dimension, as
    fully_shard has them, which is no way to convolve, so that they have to be moved."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def place(name: str, value: Tensor) -> Any:
        per_token = name in case.per_token | {"initial_state"}
        dim = 0 if not per_token else None if name == "z" and x_dim == 2 else x_dim
        placement = Replicate() if dim is None else Shard(dim)
        return distribute_tensor(value.detach(), mesh, [placement]).requires_grad_()

    return {name: place(name, value) for name, value in inputs.items()}


def check_case(case: Case, mesh: Any, x_dim: int | None) -> None:
    inputs = case.inputs()
    sharded = placed(case, inputs, mesh, x_dim)
    results = []
    for given in (inputs, sharded):
        y, state = case.run(given, return_final_state=True)
        loss = (y.square().sum() + state.square().sum()) / 2
        results.append([y, state, *torch.autograd.grad(loss, list(given.values()))])
    want, got = results
    assert got[0].placements == got[1].placements == sharded["x"].placements
    for name, g, w in zip(["y", "state", *inputs], got, want, strict=True):
        assert relative_error(g.full_tensor(), w.double()) < CLOSE, (case, x_dim, name)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 24, bias=False)
        self.first, self.second = HeadwiseDynamicConv(24, 24, head_size=8), LowRankDynamicConv(24, 24, rank=3)
        self.third = StaticShortConv(24)

    def forward(self, x: Tensor) -> Tensor:
        y, first, second = project_together(self.linear.weight, [self.first, self.second], x)
        return self.third(self.second(self.first(y, generated=first), generated=second))


def check_fully_sharded(mesh: Any) -> None:
    """A model by fully_shard computes what it computes by itself: in forward, its parameters are whole."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model, alone = Model(), Model()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    alone.load_state_dict(model.state_dict())
    fully_shard(model, mesh=mesh)
    x = torch.randn(4, 9, 24)
    alone(x).square().sum().backward()
    model(x.chunk(2)[dist.get_rank()]).square().sum().backward()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert relative_error(2 * ours.grad.full_tensor(), theirs.grad.double()) < CLOSE  # the mean of two


def check_refusals(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor

    def tensor(*shape: int, placement: Any = Replicate()) -> Any:  # noqa: B008 - a constant
        return distribute_tensor(torch.randn(*shape), mesh, [placement])

    x, z, up, static = torch.randn(2, 5, 6), tensor(2, 5, 3), tensor(3, 24), tensor(4, 6)
    whole = tensor(2, 5, 6)
    convolve, lowrank = FUNCTIONS["static"], FUNCTIONS["lowrank"]
    module = distribute_module(HeadwiseDynamicConv(6, 6, head_size=3), mesh)
    for call, message in (
        (lambda: convolve(x, static), "must be DTensors, or none; got weight as one and x as a plain tensor; use"),
        (lambda: lowrank(whole, z, up, torch.randn(4, 6)), "got x as one and static_w as a plain tensor"),
        (lambda: lowrank(x, z, up), "got z as one and x as a plain tensor"),
        (lambda: module(x, x), "got the generator's weight as one and generator_input as a plain tensor"),
        (lambda: module(x, whole), "got weight as one and x as a plain tensor"),
        (lambda: module(whole, x), "got the generator's weight as one and generator_input as a plain"),
        (
            lambda: project_together(torch.randn(6, 6), [module], x),
            "takes no DTensors; got one; apply each",
        ),
        (lambda: convolve(tensor(2, 6, 6, placement=Shard(1)), static), r"or channels; got S\(1\); redistribute it"),
        (lambda: convolve(DTensor.from_local(x, mesh, [Partial()]), static), r"or channels; got P.*; redistribute it"),
        (lambda: convolve(tensor(3, 5, 6, placement=Shard(0)), static), "B must be a multiple .*; got 3 in 2; repl"),
        (lambda: convolve(tensor(2, 5, 9, placement=Shard(2)), tensor(4, 9)), "D must be a multiple"),
        (
            lambda: FUNCTIONS["headwise"](tensor(2, 5, 6, placement=Shard(2)), tensor(2, 5, 3, 4)),
            "H must be a multiple of its shards; got 3 in 2",
        ),
        (
            lambda: lowrank(tensor(2, 5, 6, placement=Shard(2)), tensor(2, 5, 6), up, segments=(4, 2)),
            r"channels of one segment can be sharded; got segments \(4, 2\)",
        ),
        (
            lambda: convolve(tensor(1, 5, 6, placement=Shard(2)), static, initial_state=torch.ones(1, 3, 6)),
            "got x as one and initial_state as a plain tensor",
        ),
        (
            lambda: convolve(tensor(1, 5, 6), static, cu_seqlens=distribute_tensor(torch.tensor([0, 5]), mesh)),
            "cu_seqlens must be a plain tensor, .*; got a DTensor; use full_tensor",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def check_modules_in_columns(mesh: Any) -> None:
    """As tensor parallelism has them: a projection by columns, and each device's channels and heads."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(0)
    x, generator_input = torch.randn(2, 5, 24), torch.randn(2, 5, 7)
    modules = [StaticShortConv(24), HeadwiseDynamicConv(24, 7, head_size=3), LowRankDynamicConv(24, 7, rank=3)]
    modules.append(FusedLowRankConv((24,), 7, rank=7))
    for module in modules:
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        fused = isinstance(module, FusedLowRankConv)
        arguments = (torch.cat([x, generator_input], 2),) if fused else (x, generator_input)
        want = module(*arguments)
        columns = {"generator.weight": 0, "static_filter": 1}
        for name, parameter in list(module.named_parameters()):
            placement = Shard(columns[name]) if name in columns else Replicate()
            owner = module.get_submodule(name.rpartition(".")[0])
            shard = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement]))
            setattr(owner, name.rpartition(".")[2], shard)
        places = [[Replicate() if fused else Shard(2)], [Replicate()]]
        got = module(*(distribute_tensor(a, mesh, p) for a, p in zip(arguments, places, strict=False)))
        assert relative_error(got.full_tensor(), want.double()) < CLOSE
        got.sum().backward()


def check_rows_of_documents(mesh: Any) -> None:
    """By seq_idx, which is no DTensor: every device has all tokens of its channels."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    seq_idx = torch.tensor([[0] * 4 + [1] * 3 + [-1] * 2, [-1] * 2 + [5] * 7])
    for kind in FUNCTIONS:
        case = Case(kind, heads=4, time=9)
        inputs = case.inputs()
        want = case.run(inputs, seq_idx=seq_idx)
        got = case.run(placed(case, inputs, mesh, 2), seq_idx=seq_idx)
        assert relative_error(got.full_tensor(), want.double()) < CLOSE, kind
        with pytest.raises(ValueError, match="got x sharded by batch; shard it by channels"):
            case.run(placed(case, inputs, mesh, 0), seq_idx=seq_idx)
        with pytest.raises(ValueError, match=r"seq_idx must be a plain tensor, .*; got a DTensor; use full_tensor"):
            case.run(placed(case, inputs, mesh, 2), seq_idx=distribute_tensor(seq_idx, mesh, [Replicate()]))


def check_padding_with_a_bias(mesh: Any) -> None:
    """A bias and the residual of another tensor are added after the kernels, where padding is to stay zero."""
    from torch.distributed.tensor import Shard, distribute_tensor

    seq_idx = torch.tensor([[0] * 4 + [1] * 3 + [-1] * 2])
    for kind, options in itertools.product(FUNCTIONS, ({"seq_idx": seq_idx}, {"cu_seqlens": torch.tensor([0, 4, 7])})):
        case = Case(kind, batch=1, heads=4, time=9)
        inputs = case.inputs()
        more = {"bias": torch.randn(case.channels), "residual": torch.randn_like(inputs["x"])}
        more = {name: value.requires_grad_() for name, value in more.items()}
        sharded = {name: distribute_tensor(v.detach(), mesh, [Shard(v.dim() - 1)]) for name, v in more.items()}
        sharded = placed(case, inputs, mesh, 2) | {name: v.requires_grad_() for name, v in sharded.items()}
        results = []
        for given in (inputs | more, sharded):
            y = FUNCTIONS[kind](**given, **options)
            results.append([y, *torch.autograd.grad(y.square().sum(), list(given.values()))])
        for got, want in zip(*reversed(results), strict=True):
            assert relative_error(got.full_tensor(), want.double()) < CLOSE, kind


def check_compiled(mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    case = Case("static", heads=4, time=9)
    inputs = case.inputs()
    want = case.run(inputs)
    sharded = {name: distribute_tensor(v, mesh, [Shard(v.dim() - 1)]) for name, v in inputs.items()}
    got = torch.compile(FUNCTIONS["static"], backend="aot_eager", fullgraph=True)(**sharded, residual=True)
    assert relative_error(got.full_tensor(), want.double()) < CLOSE


def process(rank: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    with kernels():  # first, for torch.compile imports Triton, too
        for kind in FUNCTIONS:
            check_case(Case(kind, heads=2, time=5), mesh, 2)
    for variety in VARIETIES.values():
        for kind in FUNCTIONS:
            case = replace(Case(kind, heads=4, time=9 if "batch" not in variety else 37), **variety)
            for x_dim in (None, 2) if case.documents else (None, 0, 2):
                check_case(case, mesh, x_dim)
    check_case(Case(segments=(16, 8), time=9), mesh, 0)
    check_modules_in_columns(mesh)
    check_rows_of_documents(mesh)
    check_padding_with_a_bias(mesh)
    check_fully_sharded(mesh)
    check_refusals(mesh)
    check_compiled(mesh)
    dist.barrier()
    # Leave at once: at the interpreter's end, a thread of the process group that is still running aborts the process
    # ("terminate called without an active exception"), which was seen once.
    os._exit(0)


@pytest.mark.skipif(GPU, reason="the processes run on CPUs")
def test_shards_are_as_the_whole(tmp_path: Path) -> None:
    mp.spawn(process, (tmp_path,), nprocs=2)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("wrapped", [("x", "weight"), ("x",), ("weight",)], ids=str)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_tensors_that_wrap_two_are_convolved_as_the_two(kind: str, wrapped: tuple[str, ...]) -> None:
    """A wrapper's own address is not its data's: beside a plain x it was an illegal memory access."""
    case = Case(kind, time=9)
    first, second = ({name: v.detach() for name, v in case.inputs().items()} for _ in range(2))
    names = [{"weight": "U"}.get(name, name) if kind == "lowrank" else name for name in wrapped]
    second |= {name: torch.randn_like(first[name]) for name in names}
    both = first | {name: TwoTensor(first[name].clone(), second[name]).requires_grad_() for name in names}
    y = case.run(both)
    gradients = torch.autograd.grad(y.square().sum(), [both[name] for name in names])
    for half, plain in (("a", first), ("b", second)):
        alone = plain | {name: plain[name].clone().requires_grad_() for name in names}
        want = case.run(alone)
        assert relative_error(getattr(y, half), want.double()) < CLOSE
        exact = torch.autograd.grad(want.square().sum(), [alone[name] for name in names])
        for got, expected in zip(gradients, exact, strict=True):
            assert relative_error(getattr(got, half), expected.double()) < CLOSE


def test_nested_tensors_are_refused() -> None:
    nested = torch.nested.nested_tensor([torch.ones(3, 6), torch.ones(5, 6)], layout=torch.jagged)
    with pytest.raises(ValueError, match=r"x must be dense; got a nested tensor; pass values\(\)\[None\]"):
        FUNCTIONS["static"](nested, torch.ones(4, 6))
