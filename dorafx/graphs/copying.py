"""Copy a graph module so that Dynamo and AOTAutograd accept the copy in the original's place."""

from __future__ import annotations

import torch
from torch import fx

from dorafx._compat.graphs import GRAPH_MODULE_ATTRIBUTES, carry_node_attributes, codegen_of, tracer_class


def copy_graph_module(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A graph module of the same submodules and parameters (shared) with a copied graph, and original node -> copy."""
    graph, mapping = copy_graph(gm)
    return module_with_graph(gm, graph), mapping


def copy_graph(gm: fx.GraphModule) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of a module's graph, and original node -> copy.

    ``Graph.graph_copy`` leaves out the attributes that Dynamo puts on nodes besides ``meta``; they are copied here.
    """
    graph = fx.Graph(tracer_cls=tracer_class(gm.graph))
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, mapping)
    original = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    copied = graph.output(output)
    copied.meta = dict(original.meta)
    mapping[original] = copied
    for old, twin in mapping.items():
        carry_node_attributes(old, twin)
    graph.set_codegen(codegen_of(gm.graph))
    return graph, mapping


def module_with_graph(gm: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A module with a graph derived from that of ``gm``, and with everything else that ``gm`` has."""
    attributes: dict[str, object] = {}
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            value: object = gm
            for part in str(node.target).split("."):
                value = getattr(value, part)
            attributes[str(node.target)] = value
    root = torch.nn.Module()
    new = fx.GraphModule(attributes or root, graph, class_name=type(gm).__name__)
    new.train(gm.training)
    new.meta = dict(gm.meta)
    for key in GRAPH_MODULE_ATTRIBUTES:
        if key in gm.__dict__:
            new.__dict__[key] = gm.__dict__[key]
    return new
