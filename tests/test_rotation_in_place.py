"""Compiled programs, in which q and k are rotated inside of the product that they come from."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx import Graph
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.models.attention import _rotation, attend
from experiments.models.joined import rotate, rotate_joined
from experiments.models.passes import compile_options
from experiments.models.recompute import Policy, recomputing
from experiments.models.rotation_in_place import ROTATION_IN_PLACE, RotationInPlace
from experiments.training.precision import mixed_precision

pytestmark = pytest.mark.filterwarnings("default")  # torch's compiler warns about itself
TIME, WIDTH, SIZE = 7, 12, 4
OPTIONS = compile_options([ROTATION_IN_PLACE])
SHAPES = pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2)])


@pytest.fixture(autouse=True)
def _compiler() -> None:
    torch.compiler.reset()


def table() -> tuple[Tensor, Tensor]:
    cosine, sine = _rotation(TIME, SIZE, 10_000.0, torch.device("cpu"))
    return cosine.double(), sine.double()


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def leaves(heads: int, kv_heads: int) -> list[Tensor]:
    """x [B, T, D] and the weight of q, k and v."""
    return [drawn(2, TIME, WIDTH).requires_grad_(), drawn((heads + 2 * kv_heads) * SIZE, WIDTH).requires_grad_()]


def composed(x: Tensor, weight: Tensor, heads: int, kv_heads: int) -> list[Tensor]:
    parts = F.linear(x, weight).split([heads * SIZE, kv_heads * SIZE, kv_heads * SIZE], 2)
    q, k, v = (part.unflatten(2, (-1, SIZE)).transpose(1, 2) for part in parts)
    return [rotate(q, table()), rotate(k, table()), v]


@torch.compile(dynamic=False, options=OPTIONS)
def compiled(x: Tensor, weight: Tensor, turn: tuple[Tensor, Tensor], heads: int, kv_heads: int) -> tuple[Tensor, ...]:
    return rotate_joined(F.linear(x, weight), turn, heads, kv_heads)


@torch.compile(dynamic=False, options=OPTIONS)
def compiled_with_product(
    x: Tensor, weight: Tensor, turn: tuple[Tensor, Tensor], heads: int, kv_heads: int
) -> tuple[Tensor, ...]:
    joined = F.linear(x, weight)
    return *rotate_joined(joined, turn, heads, kv_heads), joined


def agree(got: tuple[Tensor, ...], want: list[Tensor], at: list[Tensor]) -> None:
    """To the last bits, with their gradients."""
    gradients = [drawn(*part.shape) for part in want]
    found, expected = (torch.autograd.grad(parts, at, gradients) for parts in (got, want))
    for one, other in zip([*got, *found], [*want, *expected], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@SHAPES
def test_values_share_the_memory_of_the_product(heads: int, kv_heads: int) -> None:
    """Both passes in float64 against the composition of torch's operators."""
    at = leaves(heads, kv_heads)
    got = compiled(*at, table(), heads, kv_heads)
    memory = got[0].data_ptr()
    assert {part.untyped_storage().data_ptr() for part in got} == {memory}
    assert got[0].untyped_storage().nbytes() == 8 * 2 * TIME * len(at[1])  # nothing but the product
    offsets = [(part.data_ptr() - memory) // 8 for part in got]
    assert offsets == [0, heads * SIZE, (heads + kv_heads) * SIZE]
    agree(got, composed(*at, heads, kv_heads), at)


@SHAPES
def test_a_product_with_another_reader_is_left_alone(heads: int, kv_heads: int) -> None:
    at = leaves(heads, kv_heads)
    got = compiled_with_product(*at, table(), heads, kv_heads)
    assert len({part.untyped_storage().data_ptr() for part in got}) == 4
    agree(got, [*composed(*at, heads, kv_heads), F.linear(*at)], at)


@pytest.mark.parametrize("policy", ["block", "attention-kept"])
@SHAPES
def test_a_product_that_is_computed_again_is_rotated_once(
    heads: int, kv_heads: int, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under activation checkpointing the backward pass has a product and its rotation, too."""
    left: list[int] = []
    change = RotationInPlace.__call__

    def counted(self: RotationInPlace, graph: Graph) -> None:
        found = len(graph.find_nodes(op="call_function", target=torch.ops.experiments.rotate.default))
        change(self, graph)
        left.append(found - len(graph.find_nodes(op="call_function", target=torch.ops.experiments.rotate.default)))

    monkeypatch.setattr(RotationInPlace, "__call__", counted)
    monkeypatch.setattr(RotationInPlace, "uuid", lambda _: None)  # not to be found in torch's cache

    at, turn = leaves(heads, kv_heads), table()

    def attention(linear: nn.Linear, x: Tensor, _: None) -> Tensor:
        return attend(*rotate_joined(F.linear(x, linear.weight), turn, heads, kv_heads), None)

    linear = nn.Linear(WIDTH, len(at[1]), bias=False)
    linear.weight = at[1] = nn.Parameter(at[1].detach())
    recomputed = torch.compile(recomputing(attention, policy), dynamic=False, options=OPTIONS)
    # torch 2.11 cannot compile the gradients of fused attention in float64 on a CPU.
    with sdpa_kernel(SDPBackend.MATH):
        y = recomputed(linear, at[0], None)
        expected = attend(*composed(*at, heads, kv_heads), None)
    agree((y,), [expected], at)
    assert left == [1, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_attention_reads_such_views_on_a_gpu() -> None:
    """With its gradients in bfloat16, against float64 of the same rounded numbers. A result is rounded a few times."""

    @torch.compile(dynamic=False, options=OPTIONS)
    def attention(x: Tensor, weight: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        q, k, v = rotate_joined(F.linear(x, weight), turn, 2, 2)
        return attend(q, k, v, None), v

    cuda = torch.device("cuda")
    at = [drawn(2, 256, 128).to(cuda, torch.bfloat16), 0.1 * drawn(384, 128).to(cuda, torch.bfloat16)]
    turn = _rotation(256, 64, 10_000.0, cuda)
    found, expected = (
        [each.detach().to(dtype).requires_grad_() for each in at] for dtype in (torch.bfloat16, torch.float64)
    )
    with mixed_precision(cuda):
        y, v = attention(*found, turn)
    assert v.untyped_storage().nbytes() == 2 * 2 * 256 * 384
    parts = [part.unflatten(2, (2, 64)).transpose(1, 2) for part in F.linear(*expected).chunk(3, 2)]
    wide = (turn[0].double(), turn[1].double())
    exact = F.scaled_dot_product_attention(rotate(parts[0], wide), rotate(parts[1], wide), parts[2], is_causal=True)
    dy = drawn(*exact.shape).to(cuda)
    y.backward(dy.to(torch.bfloat16))
    exact.backward(dy.to(torch.bfloat16).double())
    for got, want in ((y, exact), *zip([x.grad for x in found], [x.grad for x in expected], strict=True)):
        assert ((got.double() - want).norm() / want.norm()).item() < 2e-2


def test_a_second_process_would_find_the_program_compiled() -> None:
    """Both torch's cache of traced programs and that of generated code know this pass."""
    at = leaves(3, 3)
    for attempt in ("first", "second"):
        torch.compiler.reset()
        counters.clear()
        got = compiled(*at, table(), 3, 3)
        torch.autograd.grad(got, at, [torch.ones_like(part) for part in got])
        if attempt == "second":
            assert counters["aot_autograd"]["autograd_cache_hit"] == 1
            assert counters["inductor"]["fxgraph_cache_hit"] == 2
        assert not counters["aot_autograd"]["autograd_cache_bypass"]
