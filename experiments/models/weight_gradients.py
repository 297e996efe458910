"""Gradients of weights in float32 straight from their matrix products, for programs of torch.compile on a GPU.

Under autocast such a product is rounded to 16 bits, and a kernel of its own then widens it for the float32 parameter: 8
bytes of memory traffic a weight instead of 4, and a launch for every matrix. The product is summed in float32 anyway.
"""

from typing import Any

import torch
from torch.fx import Graph, Node

from experiments.models.passes import Pass

_MM = torch.ops.aten.mm
_CAST = torch.ops.prims.convert_element_type.default


class WideProducts(Pass):
    """Has a product of 16-bit matrices that is only cast to float32 written in float32.

    Only where more numbers are summed than either side of the result has, as tokens are in a weight's gradient: an
    activation is better written in 16 bits, and widened by the kernel that reads it.
    """

    place = "post_grad_custom_post_pass"

    def __call__(self, graph: Graph) -> None:
        for cast in graph.find_nodes(op="call_function", target=_CAST):
            product = cast.args[0]
            if cast.args[1] == torch.float32 and _sums_tokens(product):
                with graph.inserting_before(cast):
                    wide = graph.call_function(_MM.dtype, (*product.args, torch.float32))
                wide.meta.update(cast.meta)
                cast.replace_all_uses_with(wide)
                graph.erase_node(cast)
                graph.erase_node(product)


def _sums_tokens(node: Any) -> bool:
    """Whether a node is such a product, read by nothing but the cast."""
    if not isinstance(node, Node) or node.target != _MM.default or len(node.users) != 1:
        return False
    result, left = node.meta["val"], node.args[0].meta["val"]  # type: ignore[union-attr]
    on_gpu = result.device.type == "cuda" and result.dtype in (torch.bfloat16, torch.float16)
    return bool(on_gpu and left.shape[1] > max(result.shape))


WIDE_PRODUCTS = WideProducts()
