"""Private API of Inductor: compiling a graph, with dorafx's digest in the cache keys."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.graph import _BoxedCodeGen

from .dynamo import restarts_tracing
from .partitioner import recompute_from_read


def compile_with_inductor(
    gm: Any,
    example_inputs: Any,
    mode: str | None,
    options: dict[str, Any],
    decompositions: Mapping[Any, Any],
    backward_failed: Callable[[Exception], None] | None = None,
    writes_inputs: bool = True,
) -> Any:
    """Compile a graph as ``torch.compile(backend="inductor")`` does, with dorafx's digest in the cache keys: the caches do not notice
    that an operator's backward or decomposition changed (pytorch issue 144344).

    Args:
        gm, example_inputs, mode, options: as Inductor takes them.
        decompositions: of dorafx's operators.
        backward_failed: what to call if Inductor fails on a backward, which then runs operator by operator; without it the error is raised.
        writes_inputs: whether the graph may write to its inputs; then the partitioner alone decides what the backward computes again.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    _register(decompositions)
    wrapper = torch._TorchCompileInductorWrapper(mode, options, None)  # type: ignore[no-untyped-call]
    # The tag covers what is compiled now, which is the forward. A backward is compiled at its first call with only Inductor's
    # options, so one of them must hold the digest too.
    passes: dict[str, Callable[[fx.Graph], None]] = {"post_grad_custom_pre_pass": split_scaled_sums}
    if not writes_inputs:
        passes["joint_custom_post_pass"] = recompute_from_read
    for option, own in passes.items():
        wrapper.config[option] = _keyed_pass(own, wrapper.config.get(option) or getattr(torch._inductor.config, option))
    with torch.compiler.config.patch(cache_key_tag=f"{torch.compiler.config.cache_key_tag}dorafx-{source_hash()}"):  # type: ignore[attr-defined]
        inner = compile_fx_inner if backward_failed is None else with_way_back(compile_fx_inner, backward_failed)
        return compile_fx(gm, example_inputs, inner_compile=inner, config_patches=wrapper.config)


def with_way_back(
    compile_inner: Callable[..., Any], backward_failed: Callable[[Exception], None]
) -> Callable[..., Any]:
    """``compile_inner`` for forwards; for a backward on which it fails, the backward's graph as it came.

    A backward is compiled at its first call, long after the forward: what it is called with are the forward's saved tensors, so that by
    then only this very graph can be run.
    """

    def compile_or_run(gm: fx.GraphModule, inputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        original = None
        # A cache of whole programs stores what is returned here, and cannot store a plain callable.
        if kwargs.get("is_backward") and not torch._functorch.config.bundled_autograd_cache:
            with contextlib.suppress(Exception):  # some constant cannot be copied
                original = copy.deepcopy(gm)  # Inductor changes the graph in place
        try:
            return compile_inner(gm, inputs, *args, **kwargs)
        except Exception as error:
            if original is None or restarts_tracing(error):
                raise
            backward_failed(error)
        return _run_by_operators(original)

    return compile_or_run


def _run_by_operators(gm: fx.GraphModule) -> Callable[[list[Any]], Any]:
    """A backward's graph as AOTAutograd calls it: with a list of arguments, which is emptied, so that each is freed after its last use."""
    # Tensors that a compiled forward saved may have other strides than when the graph was traced, with which a view is no view.
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    gm.graph.set_codegen(_BoxedCodeGen())
    gm.recompile()

    def run(arguments: list[Any]) -> Any:
        return gm.forward(arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _keyed_pass(own: Callable[[fx.Graph], None], inner: Any) -> Any:
    """A graph pass that runs dorafx's ``own`` and ``inner`` (if not None), and adds dorafx's digest to the cache keys."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    if inner is not None and not isinstance(inner, CustomGraphPass):
        return inner  # Inductor caches nothing then

    class KeyedPass(CustomGraphPass):
        def __call__(self, graph: Any) -> None:
            own(graph)
            if inner is not None:
                inner(graph)

        def uuid(self) -> Any:
            inner_key = inner.uuid() if inner is not None else ""
            return None if inner_key is None else f"dorafx-{source_hash()}-{inner_key}"

    return KeyedPass()


def _register(decompositions: Mapping[Any, Any]) -> None:
    from torch._inductor.decomposition import decompositions as known
    from torch._inductor.decomposition import register_decomposition

    for operator, decomposition in decompositions.items():
        if operator not in known:
            register_decomposition([operator])(decomposition)


@functools.cache
def source_hash() -> str:
    """A digest of dorafx's sources, so that an edited installation does not reuse artefacts of the old one."""
    import hashlib
    import pathlib

    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def has_cpp_compiler() -> bool:
    """Whether Inductor's search finds the C++ compiler that it needs for a CPU."""
    import subprocess

    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except (RuntimeError, OSError, subprocess.SubprocessError):
        # InvalidCxxCompiler is a RuntimeError, and on Windows a bare one is raised; a CXX that is no program is an OSError.
        return False
    return True


def load_inductor() -> None:
    """Import all of Inductor now, so that the time of a later compilation does not include it."""
    import torch._inductor.compile_fx
    import torch._inductor.utils  # noqa: F401


def inductor_backend(mode: str | None) -> Callable[..., Any]:
    """Inductor as a Dynamo backend, as ``torch.compile(mode=mode)`` makes it."""
    backend: Callable[..., Any] = torch._TorchCompileInductorWrapper(mode or "default", None, None)  # type: ignore[no-untyped-call]
    return backend


def mode_options(mode: str) -> dict[str, Any]:
    """Inductor's options that a mode of ``torch.compile`` stands for."""
    return dict(torch._inductor.list_mode_options(mode))


def limit_compile_threads(threads: int) -> None:
    """Set the number of processes in which Inductor compiles kernels; 1 is this one. To be called before anything is compiled."""
    import torch._inductor.config as config

    config.compile_threads = threads


def split_scaled_sums(graph: fx.Graph) -> None:
    """Write ``add(x, y, alpha=c)`` as a product with ``c`` and a sum, in a graph of ATen's operators.

    If ``y`` is a matrix product, Inductor (torch 2.11 to 2.13) drops the factor when it fuses the sum to ``addmm``, which it does unless
    all readers of the sum are pointwise. In a rewritten program other readers may remain. Inductor computes both forms alike.
    """
    aten = torch.ops.aten
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        factor, term = node.kwargs.get("alpha", 1), node.args[1]
        value = term.meta.get("val") if isinstance(term, fx.Node) else None
        if factor == 1 or not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
            continue
        with graph.inserting_before(node):
            scaled = graph.call_function(aten.mul.Tensor, (term, factor))
        scaled.meta["val"] = value.new_empty_strided(value.shape, value.stride())
        node.args = (node.args[0], scaled)
        node.kwargs = {}
