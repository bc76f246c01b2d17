"""Codegen: Inductor, the graph run eagerly, or any other Dynamo backend that the user names."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from dorafx._compat.dynamo import lookup_backend
from dorafx._compat.inductor import compile_with_inductor, has_cpp_compiler
from dorafx._compat.tensors import is_known
from dorafx.errors import DorafxWarning
from dorafx.graphs.tensors import tensor_of
from dorafx.graphs.writes import written_nodes
from dorafx.ops.register import DECOMPOSITIONS
from dorafx.options import Options

_warned_no_compiler = False


def check_name(name: str) -> None:
    """Raises:
    ValueError: no codegen has this name; the message names those there are.
    """
    if name not in ("inductor", "eager"):
        lookup_backend(name)


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    inductor_options: dict[str, Any],
    mode: str | None,
    backward_failed: Callable[[Exception], None] | None = None,
) -> Callable[..., Any]:
    """Compile a rewritten graph.

    Args:
        gm, example_inputs: the graph, and its inputs as Dynamo gives them.
        options, inductor_options, mode: dorafx's options, and what else the caller gave for Inductor.
        backward_failed: what to call if Inductor, at the first backward, fails on the graph of the backward; it is run operator by
            operator then. Without it the error is raised, as it is by other codegens.

    Raises:
        ValueError: ``dorafx.codegen`` names no registered backend.
    """
    name = options.codegen
    if name == "inductor" and not _needs_no_compiler(example_inputs) and not has_cpp_compiler():
        global _warned_no_compiler
        if not _warned_no_compiler:
            _warned_no_compiler = True
            warnings.warn(
                "no C++ compiler was found, which Inductor needs on a CPU: dorafx runs its rewritten graphs eagerly "
                "(install g++ or clang++, or set CXX)",
                DorafxWarning,
                stacklevel=2,
            )
        name = "eager"
    if name == "inductor" and _convolves_nothing(gm):
        name = "eager"
    if runs_as_it_stands(gm, name):
        return gm.forward
    if name == "eager":
        # Run without compilation, a checkpointed body would draw another dropout mask when it is recomputed: that both draw
        # the same one is AOTAutograd's task.
        name = "aot_eager"
    if name == "inductor":
        writes_inputs = any(node.op in ("placeholder", "get_attr") for node in written_nodes(gm.graph))
        compiled: Callable[..., Any] = compile_with_inductor(
            gm, example_inputs, mode, inductor_options, DECOMPOSITIONS, backward_failed, writes_inputs
        )
    else:
        compiled = lookup_backend(name)(gm, list(example_inputs))
    return compiled


def runs_as_it_stands(gm: fx.GraphModule, name: str) -> bool:
    """Whether a codegen of this name compiles nothing, and the graph's operators are called one by one."""
    has_bodies = any(isinstance(child, fx.GraphModule) for child in gm.children())  # of higher-order operators
    return name == "eager" and not has_bodies


def _needs_no_compiler(example_inputs: Sequence[Any]) -> bool:
    """Whether all inputs are on accelerators, for which Inductor generates Triton kernels."""
    kinds = {value.device.type for value in example_inputs if isinstance(value, torch.Tensor)}
    return bool(kinds) and "cpu" not in kinds


def _convolves_nothing(gm: fx.GraphModule) -> bool:
    """Whether a convolution's output is empty, as of an empty batch. Its gradients then have other strides than Inductor expects, and the
    backward of the frozen layer raises, too; a graph without elements gains nothing by being compiled."""
    outputs = [
        tensor_of(node)
        for node in gm.graph.nodes
        if node.op == "call_function" and "conv" in getattr(node.target, "__name__", "")
    ]
    return any(output is not None and any(is_known(size == 0) for size in output.shape) for output in outputs)
