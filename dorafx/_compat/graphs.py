"""Private API of graphs: attributes that tracers set on nodes and modules, and exported programs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

GRAPH_MODULE_ATTRIBUTES = (
    "shape_env",
    "compile_subgraph_reason",
    "_param_name_to_source",
    "_source_to_user_stacks",
    "_backend_id",
)
"""Attributes of a GraphModule that Dynamo sets and AOTAutograd reads, besides the graph and its metadata."""


def carry_node_attributes(old: Any, new: Any) -> None:
    """Copy the attributes that ``Graph.graph_copy`` loses: AOTAutograd asserts that placeholders have Dynamo's ``_dynamo_source``.
    Remove ``grapharg``, a weak reference to the input that only Dynamo needs, and takes from its own graph after compilation: a
    parameter with a weak reference cannot be swapped, and a torchao weight not be moved."""
    if hasattr(old, "_dynamo_source"):
        new._dynamo_source = old._dynamo_source
    if is_inference_input(old):
        new.meta[_INFERENCE] = True
    new.meta.pop("grapharg", None)


_INFERENCE = "dorafx_inference"


def is_inference_input(node: Any) -> bool:
    """Whether a placeholder stands for a tensor that was made in inference mode, which Dynamo's fake tensors do not show. Dynamo
    recompiles the graph for an ordinary tensor."""
    if _INFERENCE in node.meta:
        return True
    example = getattr(node.meta.get("grapharg"), "_example", None)
    example = example() if callable(example) else example
    return isinstance(example, torch.Tensor) and example.is_inference()


def input_source(node: Any) -> str:
    """Dynamo's source of a placeholder, ``L['self']._parameters['weight']``; empty if it has none."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "") if source is not None else ""
    return str(name() if callable(name) else name)  # a method in older releases


def tracer_class(graph: fx.Graph) -> type[fx.Tracer] | None:
    """The class of the tracer that made a graph; None if it is not recorded."""
    tracer: type[fx.Tracer] | None = getattr(graph, "_tracer_cls", None)
    return tracer


def codegen_of(graph: fx.Graph) -> Any:
    """A graph's code generator, which determines the structure of inputs and outputs for a caller."""
    return graph._codegen


def mark_new_input(node: Any) -> None:
    """Give a placeholder that Dynamo did not make the source None, as AOTAutograd does not accept a missing attribute."""
    node._dynamo_source = None


def exported_program_with_graph(program: Any, gm: Any) -> Any:
    """An ExportedProgram with another graph of the same inputs and outputs."""
    import copy

    from torch.export.graph_signature import TensorArgument

    signature = copy.deepcopy(program.graph_signature)
    outputs = next(n for n in reversed(gm.graph.nodes) if n.op == "output").args[0]
    for spec, node in zip(signature.output_specs, outputs):
        if isinstance(spec.arg, TensorArgument):
            spec.arg = TensorArgument(name=node.name)
    return program._update(gm, signature) if hasattr(program, "_update") else _rebuilt(program, gm, signature)


def _rebuilt(program: Any, gm: Any, signature: Any) -> Any:
    return torch.export.ExportedProgram(
        root=gm,
        graph=gm.graph,
        graph_signature=signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )
