"""Products that compiled programs write in float32, because a weight's gradient is cast to it."""

from types import SimpleNamespace

import pytest
import torch
from torch.fx import Graph

from experiments.models.passes import compile_options
from experiments.models.weight_gradients import WIDE_PRODUCTS

MM, CAST = torch.ops.aten.mm, torch.ops.prims.convert_element_type.default


def product_and_cast(rows: int, summed: int, columns: int, device: str, users: int, to: torch.dtype) -> Graph:
    """A graph as torch.compile makes it, with what the pass reads of its tensors."""

    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> SimpleNamespace:
        return SimpleNamespace(shape=shape, dtype=dtype, device=torch.device(device))

    graph = Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    a.meta["val"], b.meta["val"] = tensor(rows, summed), tensor(summed, columns)
    product = graph.call_function(MM.default, (a, b))
    product.meta["val"] = tensor(rows, columns)
    cast = graph.call_function(CAST, (product, to))
    cast.meta["val"] = tensor(rows, columns, dtype=to)
    graph.output((cast, *[product] * (users - 1)))
    WIDE_PRODUCTS(graph)
    graph.lint()
    return graph


@pytest.mark.parametrize(
    ("rows", "summed", "columns", "device", "users", "to", "wide"),
    [
        (24, 512, 16, "cuda", 1, torch.float32, True),
        (24, 512, 16, "cuda", 2, torch.float32, False),  # read in 16 bits, too
        (512, 24, 16, "cuda", 1, torch.float32, False),  # an activation
        (24, 512, 512, "cuda", 1, torch.float32, False),
        (24, 512, 16, "cpu", 1, torch.float32, False),  # no such product there
        (24, 512, 16, "cuda", 1, torch.float64, False),
    ],
)
def test_products_that_are_changed(
    rows: int, summed: int, columns: int, device: str, users: int, to: torch.dtype, wide: bool
) -> None:
    graph = product_and_cast(rows, summed, columns, device, users, to)
    calls = [node for node in graph.nodes if node.op == "call_function"]
    if wide:
        (call,) = calls
        assert call.target == MM.dtype
        assert [str(arg) for arg in call.args] == ["a", "b", "torch.float32"]
        assert call.meta["val"].dtype == torch.float32
    else:
        assert [call.target for call in calls] == [MM.default, CAST]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_compiled_gradients_are_no_longer_rounded_to_16_bits() -> None:
    """Held against float64 of the same rounded inputs: bfloat16 alone would be off by 1.7e-3."""
    torch.compiler.reset()
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(4096, 192, device="cuda", generator=generator).bfloat16()
    weight = torch.randn(128, 192, device="cuda", generator=generator).requires_grad_()
    dy = torch.randn(4096, 128, device="cuda", generator=generator).bfloat16()

    @torch.compile(dynamic=False, options=compile_options([WIDE_PRODUCTS]))
    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return torch.nn.functional.linear(x, weight)

    product(x, weight).backward(dy)
    want = dy.double().T @ x.double()
    assert weight.grad is not None
    assert ((weight.grad - want).norm() / want.norm()).item() < 1e-5
