"""RoPE in place on the product that q, k and v come from, for programs of torch.compile: their values are not copied.

An operator's outputs cannot be views of its input, so `experiments::rotate` copies the values: a third of its memory
traffic. An autograd function could return views, but it would keep both the product and rotated copies of q and k for
the backward pass. Here q, k and v become views of the product where torch.compile has separated the forward pass from
the backward pass; the gradients are still written side by side by the operator that autograd recorded.
"""

import operator
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.fx.node import map_arg

import experiments.models.joined  # noqa: F401 - registers the operators

_ROTATE = torch.ops.experiments.rotate.default
_IN_PLACE = torch.ops.experiments.rotate_in_place.default
_SLICE, _RESHAPE = torch.ops.aten.slice.Tensor, torch.ops.aten.reshape.default
_OTHER_SHAPE = (_RESHAPE, torch.ops.aten.view.default, torch.ops.aten.unsqueeze.default)


class RotationInPlace(CustomGraphPass):
    """Rotates q and k inside of a matrix product that nothing else reads, and has q, k and v be views of it."""

    def __call__(self, graph: Graph) -> None:
        for rotation in graph.find_nodes(op="call_function", target=_ROTATE):
            if _is_unshared_product(rotation.args[0]):
                with graph.inserting_before(rotation):
                    parts = _views_after_rotation(graph, *rotation.args)
                for output in list(rotation.users):
                    output.replace_all_uses_with(parts[output.args[1]])
                    graph.erase_node(output)
                graph.erase_node(rotation)

    def uuid(self) -> Any:
        """Identifies this pass in torch's cache of compiled programs."""
        return get_hash_for_files((__file__,))


def _is_unshared_product(node: Any) -> bool:
    """Whether a node is, perhaps in another shape, a matrix product that has no other reader."""
    while isinstance(node, Node) and len(node.users) == 1:
        if node.target == torch.ops.aten.mm.default:
            return True
        if node.target not in _OTHER_SHAPE:
            return False
        node = node.args[0]
    return False


def _views_after_rotation(
    graph: Graph,
    joined: Node,  # [B, T, (H + 2 K) * E]
    cosine: Node,  # [T, E]
    sine: Node,  # [T, E]
    heads: int,  # H
    kv_heads: int,  # K
) -> list[Node]:  # [B, T, H, E], [B, T, K, E], [B, T, K, E]
    # The graph must stay functional. torch turns this node into a call that writes into `joined` where nothing reads
    # `joined` afterwards, and else into one that writes into a copy of it.
    call = graph.call_function(
        auto_functionalized,
        (_IN_PLACE,),
        {"joined": joined, "cosine": cosine, "sine": sine, "heads": heads, "kv_heads": kv_heads},
    )
    rotated = graph.call_function(operator.getitem, (call, 1))  # The first output is the operator's own: None.
    rotated.meta["val"] = joined.meta["val"].clone()
    call.meta["val"] = (None, rotated.meta["val"])
    batch, time, _ = joined.meta["val"].shape
    size = cosine.meta["val"].shape[1]
    parts, start = [], 0
    for many in (heads, kv_heads, kv_heads):
        part = _call(graph, _SLICE, rotated, 2, start, start + many * size)
        parts.append(_call(graph, _RESHAPE, part, [batch, time, many, size]))
        start += many * size
    return parts


def _call(graph: Graph, target: Any, *args: Any) -> Node:
    """A new node, with what torch.compile has to know of its output."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*map_arg(args, lambda arg: arg.meta["val"]))
    return node


def rotate_in_place() -> None:
    """Have torch.compile apply this to all programs that it compiles from now on in this process."""
    if inductor_config.post_grad_custom_pre_pass is None:
        inductor_config.post_grad_custom_pre_pass = RotationInPlace()
