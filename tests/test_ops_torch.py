"""The convolutions amid PyTorch's machinery: torch.compile, opcheck, autocast, checkpointing, double backward."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from convolutions import BOUND, DEVICE, FUNCTIONS, GPU, Case, relative_error
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from dynconv.layers import (
    FusedHeadwiseConv,
    FusedLowRankConv,
    HeadwiseDynamicConv,
    LowRankDynamicConv,
    StaticShortConv,
)

pytestmark = [
    pytest.mark.usefixtures("implementation", "fresh_compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's compiler raises its own on import
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # advice: the tests want float32
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),  # torch's own, which makes a memory pool
]
BACKEND = "inductor" if GPU else "aot_eager"
KINDS = {kind: Case(kind) for kind in FUNCTIONS} | {"segments": Case(segments=(8, 16))}
VARIETIES: dict[str, dict[str, Any]] = {
    "state, silu": {"state": True, "activation": "silu"},
    "packed": {"batch": 1, "documents": (2, 26, 0, 9)},
    "packed, state": {"batch": 1, "documents": (2, 26, 0, 9), "state": True},
}


@pytest.fixture
def fresh_compiler() -> None:
    torch.compiler.reset()  # else one test's compilations count against the next one's limit


@pytest.mark.parametrize("variety", VARIETIES)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_equals_eager(kind: str, variety: str) -> None:
    case = replace(KINDS[kind], **VARIETIES[variety])
    inputs, options = case.inputs(), case.options() | {"return_final_state": True}

    def run(inputs: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        y, state = FUNCTIONS[case.kind](**inputs, **options)
        return y.sin(), state

    outcomes = []
    for function in (torch.compile(run, fullgraph=True, backend=BACKEND), run):
        y, state = function(inputs, options)
        gradients = torch.autograd.grad([y.sum(), state.square().sum()], list(inputs.values()))
        outcomes.append([y, state, *gradients])
    for got, want in zip(*outcomes, strict=True):
        assert got.dtype == want.dtype
        assert relative_error(got, want.double()) < BOUND[torch.float32]


@pytest.mark.parametrize(("kind", "wanted"), [(kind, name) for kind in FUNCTIONS for name in Case(kind).inputs()])
def test_a_compiled_gradient_needs_no_other(kind: str, wanted: str) -> None:
    case = Case(kind)
    inputs = {name: value.detach().requires_grad_(name == wanted) for name, value in case.inputs().items()}
    outcomes = []
    for run in (torch.compile(FUNCTIONS[kind], fullgraph=True, backend=BACKEND), FUNCTIONS[kind]):
        (gradient,) = torch.autograd.grad(run(**inputs).square().sum(), [inputs[wanted]])
        outcomes.append(gradient)
    assert relative_error(outcomes[0], outcomes[1].double()) < BOUND[torch.float32]


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_other_lengths_do_not_compile_anew(kind: str) -> None:
    compiled = 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal compiled
        compiled += 1
        return graph.forward

    function = torch.compile(FUNCTIONS[kind], fullgraph=True, backend=backend, dynamic=True)
    for time in (37, 41, 64, 200):
        case = Case(kind, time=time)
        inputs = {name: value.detach() for name, value in case.inputs().items()}
        assert relative_error(function(**inputs, residual=True), case.run(inputs).double()) < BOUND[torch.float32]
    assert compiled == 1


def custom_op_calls(case: Case) -> list[tuple[Any, tuple[Any, ...]]]:
    """The custom ops, with their arguments, that compiling the case's forward and backward comes to."""
    calls = []

    class Recorder(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if str(target).startswith("dynconv."):
                calls.append((target, args))
            return super().call_function(target, args, kwargs)

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        def run(values: list[Tensor]) -> Any:
            result = Recorder(graph).run(*values)
            values.clear()
            return result

        run._boxed_call = True  # type: ignore[attr-defined]  # how a backend says that it takes a list
        return run

    inputs, options = case.inputs(), case.options()
    compiled = torch.compile(FUNCTIONS[case.kind], fullgraph=True, backend=aot_autograd(fw_compiler=record))
    compiled(**inputs, **options).sum().backward()
    return calls


@pytest.mark.parametrize("implementation", ["kernels"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_the_custom_ops_pass_opcheck(kind: str) -> None:
    case = replace(KINDS[kind], **VARIETIES["packed"], static=kind != "segments")
    for (op, arguments), differentiable in zip(custom_op_calls(case), (True, False), strict=True):
        leaves = tuple(value.detach() if isinstance(value, Tensor) else value for value in arguments)
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                leaf.requires_grad_(differentiable)
        torch.library.opcheck(op, leaves)


@pytest.mark.parametrize("implementation", ["kernels"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_no_tokens_are_contiguous_as_torch_compile_takes_them_to_be(kind: str) -> None:
    inputs = {name: value.detach() for name, value in replace(KINDS[kind], batch=0).inputs().items()}
    filters = [inputs.get(name) for name in ("z", "weight" if kind == "headwise" else "U", "static_w")]
    filters = [f if f is None or f.dim() > 2 else f.t().contiguous().t() for f in filters]
    needs = [True, *(f is not None for f in filters)]
    arguments = (inputs["x"], inputs["x"], *filters, None, KINDS[kind].segments, True, False, needs)
    torch.library.opcheck(torch.ops.dynconv.convolve_backward.default, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize("kind", KINDS)
def test_fake_tensors_get_fake_results(kind: str) -> None:
    case = KINDS[kind]
    with FakeTensorMode():
        inputs = case.inputs()
        y = case.run(inputs)
        gradients = torch.autograd.grad(y.sum(), list(inputs.values()))
    assert y.shape == inputs["x"].shape
    assert [g.shape for g in gradients] == [value.shape for value in inputs.values()]


class Prefill(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, generator_input: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.conv.prefill(x, generator_input, state)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_one_exported_prefill_serves_every_length(kind: str, with_state: bool) -> None:
    conv = projected(kind)[0].conv

    def inputs(time: int) -> tuple[Tensor, Tensor, Tensor | None]:
        state = torch.randn(2, 3, 24, device=DEVICE) if with_state else None
        return torch.randn(2, time, 24, device=DEVICE), torch.randn(2, time, 16, device=DEVICE), state

    time = torch.export.Dim("time", min=1)
    shapes = ({1: time}, {1: time}, None)
    with torch.no_grad():
        exported = torch.export.export(Prefill(conv), inputs(20), dynamic_shapes=shapes)
        for length in (1, 2, 3, 8, 9, 50):
            given = inputs(length)
            for got, want in zip(exported.module()(*given), conv.prefill(*given), strict=True):
                assert relative_error(got, want.double()) < BOUND[torch.float32], length


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_one_exported_prefill_serves_any_number_of_packed_documents(kind: str, with_state: bool) -> None:
    conv = projected(kind)[0].conv

    class Packed(nn.Module):
        def forward(self, x: Tensor, generator_input: Tensor, edges: Tensor, state: Tensor | None) -> Any:
            return conv.prefill(x, generator_input, state, cu_seqlens=edges)

    def inputs(edges: list[int], padding: int) -> tuple[Tensor | None, ...]:
        time = edges[-1] + padding
        state = torch.randn(len(edges) - 1, 3, 24, device=DEVICE) if with_state else None
        x, generator_input = (torch.randn(1, time, width, device=DEVICE) for width in (24, 16))
        return x, generator_input, torch.tensor(edges, device=DEVICE), state

    # PyTorch takes a slice of one for a special case; the state's own size tells it that there is none.
    time, count = torch.export.Dim("time", min=1), torch.export.Dim("count", min=1 if with_state else 2)
    shapes = ({1: time}, {1: time}, {0: count + 1}, {0: count} if with_state else None)
    with torch.no_grad():
        exported = torch.export.export(Packed(), inputs([0, 4, 11], 2), dynamic_shapes=shapes).module()
        for edges in ([0, 1, 1], [0, 9, 11], [0, 0, 3, 20], [0, 1, 2, 7, 9, 30], *([[0, 7]] if with_state else [])):
            given = inputs(edges, edges[-1] % 2)
            for got, want in zip(exported(*given), Packed()(*given), strict=True):
                assert relative_error(got, want.double()) < BOUND[torch.float32], edges


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_an_exported_program_takes_rows_of_documents_of_every_length(kind: str) -> None:
    conv = projected(kind)[0].conv

    class Rows(nn.Module):
        def forward(self, x: Tensor, generator_input: Tensor, seq_idx: Tensor) -> Tensor:
            return conv(x, generator_input, seq_idx=seq_idx)

    def inputs(batch: int, time: int) -> tuple[Tensor, ...]:
        x, generator_input = (torch.randn(batch, time, width, device=DEVICE) for width in (24, 16))
        return x, generator_input, torch.randint(-1, 3, (batch, time), device=DEVICE)

    shape = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("time", min=1)}
    with torch.no_grad():
        exported = torch.export.export(Rows(), inputs(2, 20), dynamic_shapes=(shape,) * 3).module()
        for batch, time in ((2, 1), (1, 2), (3, 3), (1, 50)):
            given = inputs(batch, time)
            assert relative_error(exported(*given), Rows()(*given).double()) < BOUND[torch.float32], time


class Projected(nn.Module):
    """A convolution after the linear map that it is used with."""

    def __init__(self, conv: nn.Module, channels: int) -> None:
        super().__init__()
        self.projection = nn.Linear(16, channels, bias=not hasattr(conv, "project"))
        self.conv = conv
        for parameter in conv.parameters():  # none at zero, so that every path shows
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 16] -> [B, T, D]
        if hasattr(self.conv, "project"):
            return self.conv(self.conv.project(self.projection.weight, x))
        return self.conv(self.projection(x), x)


def projected(kind: str, channels: int = 24) -> tuple[Projected, Tensor]:
    torch.manual_seed(0)
    conv = {
        "static": lambda: StaticShortConv(channels),
        "headwise": lambda: HeadwiseDynamicConv(channels, 16, head_size=8),
        "lowrank": lambda: LowRankDynamicConv(channels, 16, rank=5),
        "fused headwise": lambda: FusedHeadwiseConv(channels, 16, head_size=8),
        "fused lowrank": lambda: FusedLowRankConv((channels // 3 * 2, channels // 3), 16, rank=5),
    }[kind]()
    return Projected(conv, channels).to(DEVICE), torch.randn(2, 37, 16, device=DEVICE, requires_grad=True)


def outcome(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, autocast: bool) -> dict[str, Tensor]:
    """The output, and the gradients of its squares' sum as backward() accumulates them."""
    leaves = {"x": x} | dict(model.named_parameters())
    for leaf in leaves.values():
        leaf.grad = None
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        y = run(x)
    y.float().square().sum().backward()
    return {"y": y} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


MODULES = ["static", "headwise", "lowrank", "fused headwise", "fused lowrank"]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", MODULES)
def test_autocast(kind: str, compiled: bool) -> None:
    model, x = projected(kind)
    run = torch.compile(model, fullgraph=True, backend=BACKEND) if compiled else model
    exact = outcome(model, model, x, autocast=False)
    got = outcome(run, model, x, autocast=True)
    assert got.keys() == exact.keys() == {"y", "x", *dict(model.named_parameters())}
    for name, value in got.items():
        assert value.dtype == (torch.bfloat16 if name == "y" else torch.float32), name
        # the linear maps round their inputs, weights and outputs, too: measured up to 0.8e-2
        assert relative_error(value, exact[name].double()) < 2e-2, name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", MODULES)
def test_checkpointing_under_autocast_gives_the_same_bits(kind: str, reentrant: bool) -> None:
    model, x = projected(kind)
    want = outcome(model, model, x, autocast=True)
    got = outcome(lambda x: checkpoint(model, x, use_reentrant=reentrant), model, x, autocast=True)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("implementation", ["kernels"], indirect=True)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_double_backward_says_that_there_is_none(kind: str, compiled: bool) -> None:
    """Whether the output's gradient wants one itself or not: there, the second derivative was zero without a word."""
    case = Case(kind, activation="silu")
    inputs, function = case.inputs(), FUNCTIONS[kind]
    run = torch.compile(function, fullgraph=True, backend=BACKEND) if compiled else function
    message = "double backward" if compiled else "first derivatives only; got a backward through .* float64"
    for loss in (Tensor.sum, lambda y: y.square().sum()):
        for wanted in inputs.values():
            (first,) = torch.autograd.grad(loss(run(**inputs)), [wanted], create_graph=True)
            assert first.requires_grad
            with pytest.raises(RuntimeError, match=message):
                torch.autograd.grad(first.sum(), list(inputs.values()), allow_unused=True)
            with pytest.raises(RuntimeError, match=message):
                (first.sum() + wanted.sum()).backward()


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_second_derivatives_of_float64(kind: str) -> None:
    """As the message has it: there the reference runs."""
    case = Case(kind, time=3, heads=1, head_size=2, rank=1, activation="silu", dtype=torch.float64)
    inputs = case.inputs()
    assert torch.autograd.gradgradcheck(lambda *v: case.run(dict(zip(inputs, v, strict=True))), tuple(inputs.values()))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MODULES)
def test_cuda_graphs_of_a_compiled_model(kind: str, dtype: torch.dtype) -> None:
    """Steps by a CUDA graph give what eager ones do, and take no more memory from one to the next."""
    model, x = projected(kind, channels=384)  # which the Gluon kernels take, in 16 bits
    model = model.to(dtype)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    counters["inductor"].clear()
    allocated = []
    for _ in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn_like(x).to(dtype).requires_grad_()
        got = outcome(compiled, model, x, autocast=False)
        got = {name: value.detach().clone() for name, value in got.items()}
        want = outcome(model, model, x, autocast=False)
        measured = {name: relative_error(value, want[name].double()) for name, value in got.items()}
        assert all(error < 2 * BOUND[dtype] for error in measured.values()), measured
        assert got.keys() == {"y", "x", *dict(model.named_parameters())}
        del got, want
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[3:] == allocated[3:4] * 3
    assert counters["inductor"]["cudagraph_skips"] == 0
