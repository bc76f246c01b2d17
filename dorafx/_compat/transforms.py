"""Function transforms in graphs: ``torch.func`` and forward-mode differentiation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

_ENTERS = {
    "_vmap_increment_nesting": "vmap",
    "_grad_increment_nesting": "grad",
    "_jvp_increment_nesting": "jvp",
    "_func_increment_nesting": "functionalize",
    "_enter_dual_level": "forward-mode differentiation",
    "enter_dual_level": "forward-mode differentiation",
}
_LEAVES = {
    "_vmap_decrement_nesting",
    "_grad_decrement_nesting",
    "_jvp_decrement_nesting",
    "_func_decrement_nesting",
    "_exit_dual_level",
    "exit_dual_level",
}
_PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "mv", "einsum", "tensordot", "embedding")


def transform_around_products(gm: fx.GraphModule) -> tuple[str, bool] | None:
    """The function transform of a Dynamo graph (its bodies included) under which products of tensors are formed.

    Inside a transform, a node's value is a wrapper (of a batch, of a tangent) without storage, and its shape is not the one that the
    operator works on. A transform without products does not matter: Transformers makes attention masks with ``vmap``.

    Returns:
        None if there is no such transform, else its name as in ``torch.func`` and whether anything in the graph might be a norm.
    """
    transform, norms = None, False
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        open_transforms: list[str] = []
        for name in _names(module.graph):
            norms = norms or "norm" in name or "sqrt" in name or "pow" in name
            if name in _ENTERS:
                open_transforms.append(_ENTERS[name])
            elif name in _LEAVES and open_transforms:
                open_transforms.pop()
            elif open_transforms and _is_product(name) and transform is None:
                transform = open_transforms[0]
    return None if transform is None else (transform, norms)


def _is_product(name: str) -> bool:
    return name.startswith("conv") or name in _PRODUCTS


def _names(graph: fx.Graph) -> Iterator[str]:
    for node in graph.nodes:
        if node.op == "call_function":
            target: Any = node.target
            packet = getattr(target, "overloadpacket", target)  # aten.mm of aten.mm.default
            yield getattr(packet, "__name__", "")
        elif node.op == "call_method":
            yield str(node.target)
