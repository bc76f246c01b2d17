"""Private API of graphs: what tracers leave on nodes and modules, and exported programs."""

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
"""What Dynamo leaves on a GraphModule beside its graph and metadata, and AOTAutograd reads."""


def carry_node_attributes(old: Any, new: Any) -> None:
    """Dynamo's ``_dynamo_source`` is lost by ``Graph.graph_copy``; AOTAutograd asserts that placeholders have it. Its
    ``grapharg``, a weak reference to the input, is for Dynamo alone, which takes it from its own graph after compilation: a
    parameter that is referred to so cannot be swapped, and a torchao weight not be moved."""
    if hasattr(old, "_dynamo_source"):
        new._dynamo_source = old._dynamo_source
    if is_inference_input(old):
        new.meta[_INFERENCE] = True
    new.meta.pop("grapharg", None)


_INFERENCE = "dorafx_inference"


def is_inference_input(node: Any) -> bool:
    """Whether a placeholder stands for a tensor that was made in inference mode, which Dynamo's fake tensors do not show. Dynamo compiles
    the graph again for one that was not."""
    if _INFERENCE in node.meta:
        return True
    example = getattr(node.meta.get("grapharg"), "_example", None)
    example = example() if callable(example) else example
    return isinstance(example, torch.Tensor) and example.is_inference()


def input_source(node: Any) -> str:
    """How Dynamo reached what a placeholder stands for, ``L['self']._parameters['weight']``; empty where it does not say."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "") if source is not None else ""
    return str(name() if callable(name) else name)  # a method in older releases


def tracer_class(graph: fx.Graph) -> type[fx.Tracer] | None:
    """The class of the tracer that made a graph; None where it is not said."""
    tracer: type[fx.Tracer] | None = getattr(graph, "_tracer_cls", None)
    return tracer


def codegen_of(graph: fx.Graph) -> Any:
    """How a graph's code is generated: what its inputs and outputs look like to a caller."""
    return graph._codegen


def mark_new_input(node: Any) -> None:
    """A placeholder that Dynamo did not make has no source; AOTAutograd accepts None, but not that nothing is said."""
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
