"""Private torch API, and nothing else: one place to look when a torch release moves something.

:mod:`.operators` is about what operators write to, :mod:`.tensors` about the identity of tensors, :mod:`.autograd` about its engine,
:mod:`.compilers` about what compilers are told and say, :mod:`.distributed` about programs of several processes."""

from __future__ import annotations

import contextlib
import functools
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

_group_numbers = itertools.count()

# -- operators and storages (used by lift) ----------------------------------------------------------------------------


def aten_name(target: Any) -> str | None:
    """``"add"`` for ``aten.add.Tensor``; None for what is not an aten overload."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    return str(target._schema.name.split("::")[1])


def is_overload(target: Any) -> bool:
    """Whether a call target is an ``OpOverload`` of any namespace."""
    return isinstance(target, torch._ops.OpOverload)


def storage_id(tensor: torch.Tensor) -> int:
    """A number that tensors of one storage share. Fake tensors have no data pointer, so the storage object's is taken; the
    wrappers of ``torch.func``'s transforms have no storage but that of what they wrap."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return int(tensor.untyped_storage()._cdata)


# -- graphs (used by rewrite) -----------------------------------------------------------------------------------------

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
    new.meta.pop("grapharg", None)


def input_source(node: Any) -> str:
    """How Dynamo reached what a placeholder stands for, ``L['self']._parameters['weight']``; empty where it does not say."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "") if source is not None else ""
    return str(name() if callable(name) else name)  # a method in older releases


def mark_new_input(node: Any) -> None:
    """A placeholder that Dynamo did not make has no source; AOTAutograd accepts None, but not that nothing is said."""
    node._dynamo_source = None


def takes_operands_for_body(target: Any) -> bool:
    """Whether a call target is a higher-order operator whose body takes one more input for one more operand."""
    return target in (torch.ops.higher_order.tag_activation_checkpoint, torch.ops.higher_order.invoke_subgraph)


def body_operands_start(target: Any) -> int:
    """Where the body's operands begin among the operator's arguments: ``invoke_subgraph`` has a name before them."""
    return 2 if target is torch.ops.higher_order.invoke_subgraph else 1


# -- compilers (used by codegen and the public API) -------------------------------------------------------------------


def compile_with_inductor(gm: Any, example_inputs: Any, mode: str | None, options: dict[str, Any]) -> Any:
    """What ``torch.compile(backend="inductor")`` does with a graph, with a key of our own in the cache keys: the caches
    do not see that an operator's backward or decomposition changed (pytorch issue 144344)."""
    _register_decompositions()
    wrapper = torch._TorchCompileInductorWrapper(mode, options, None)  # type: ignore[no-untyped-call]
    # The tag reaches what is compiled now, which is the forward. A backward is compiled at its first call, under
    # Inductor's options alone: for its key the digest must be in one of them.
    option = "post_grad_custom_post_pass"
    wrapper.config[option] = _keyed_pass(wrapper.config.get(option) or getattr(torch._inductor.config, option))
    with torch.compiler.config.patch(cache_key_tag=f"{torch.compiler.config.cache_key_tag}dorafx-{source_hash()}"):  # type: ignore[attr-defined]
        return wrapper(gm, example_inputs)


def _keyed_pass(inner: Any) -> Any:
    """A graph pass that does what ``inner`` does (nothing if None) and puts dorafx's digest into the cache keys."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    if inner is not None and not isinstance(inner, CustomGraphPass):
        return inner  # Inductor caches nothing then

    class KeyedPass(CustomGraphPass):
        def __call__(self, graph: Any) -> None:
            if inner is not None:
                inner(graph)

        def uuid(self) -> Any:
            own = inner.uuid() if inner is not None else ""
            return None if own is None else f"dorafx-{source_hash()}-{own}"

    return KeyedPass()


@functools.cache
def _register_decompositions() -> None:
    from torch._inductor.decomposition import register_decomposition

    from dorafx.ops.register import DECOMPOSITIONS

    for operator, decomposition in DECOMPOSITIONS.items():
        register_decomposition([operator])(decomposition)


def lookup_backend(name: str) -> Any:
    """A registered Dynamo backend by name.

    Raises:
        ValueError: no such backend; the message names the ones there are.
    """
    from torch._dynamo.backends.registry import lookup_backend as lookup
    from torch._dynamo.exc import InvalidBackend

    try:
        return lookup(name)
    except InvalidBackend as error:
        known = ", ".join(sorted({"inductor", "eager", *torch.compiler.list_backends(exclude_tags=None)}))
        raise ValueError(f"dorafx.codegen: unknown backend {name!r}; known are {known}") from error


@functools.cache
def source_hash() -> str:
    """A digest of dorafx's sources, so that an edited installation never meets artefacts of the old one."""
    import hashlib
    import pathlib

    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def has_cpp_compiler() -> bool:
    """Whether Inductor will find the C++ compiler that it needs for a CPU, by Inductor's own search."""
    import subprocess

    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except (RuntimeError, OSError, subprocess.SubprocessError):
        # InvalidCxxCompiler is a RuntimeError, and on Windows a bare one is raised; a CXX that is no program is an OSError.
        return False
    return True


def group_compiler(backend: Any, dynamic: bool | None) -> Callable[..., Any]:
    """A compiled function that calls a module, with a code object of its own.

    Dynamo keeps compiled graphs, and counts recompilations against its limit, per code object. ``Module._call_impl`` is
    one code object for every module of a process, so with more shapes than the limit (8) it would fall back to eager
    for good. A code object for each group of equal modules gives each group a cache and a limit of its own.
    """

    def call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    own = types.FunctionType(
        call.__code__.replace(co_name=f"dorafx_group_{next(_group_numbers)}"), call.__globals__, "dorafx_group"
    )
    return _compiled(own, backend, dynamic)


def _compiled(function: Callable[..., Any], backend: Any, dynamic: bool | None = None) -> Callable[..., Any]:
    """``torch.compile(function, backend=backend)`` with a callable that Dynamo takes for a registered backend. After compiling by
    one of those, Dynamo drops its weak references to the inputs; by any other, it leaves them to a fake mode that lives as
    long as the compiled code, and ``torch.utils.swap_tensors``, with it ``.to()`` of torchao's parameters, refuses what
    somebody refers to."""
    compiled: Callable[..., Any] = torch._dynamo.optimize(backend=_Known(backend), dynamic=dynamic)(function)
    return compiled


class _Known(torch._TorchCompileWrapper):
    """What ``torch.compile`` makes of a backend: Dynamo goes by its ``compiler_name`` (to 2.13) or ``compiler_fn`` (since)."""

    def __init__(self, backend: Any) -> None:
        super().__init__("eager", None, None, None)  # type: ignore[no-untyped-call]
        self.compiler_name = "dorafx"
        self._backend = backend

    def __call__(self, model_: Any, inputs_: Any) -> Any:
        return self._backend(model_, inputs_)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__


def set_compiled_call(module: torch.nn.Module, compiled: Callable[..., Any]) -> Any:
    """Make ``module(...)`` call ``compiled(module, ...)``, the way ``Module.compile`` does; returns what was there."""
    previous = module._compiled_call_impl
    module._compiled_call_impl = functools.partial(compiled, module)
    return previous


def restore_compiled_call(module: torch.nn.Module, previous: Any) -> None:
    """Undo :func:`set_compiled_call`."""
    if previous is None:
        # The class's default; the instance had no such attribute.
        module.__dict__.pop("_compiled_call_impl", None)
    else:
        module._compiled_call_impl = previous


def fresh_compile(model: Callable[..., Any], backend: Any) -> Callable[..., Any]:
    """``torch.compile`` of a call of ``model`` under a code object that nothing was compiled for yet, so that earlier
    compilations neither answer nor count."""
    compiled = group_compiler(backend, None) if isinstance(model, torch.nn.Module) else None
    if compiled is not None:
        return functools.partial(compiled, model)
    return _compiled(model, backend)


def whole_graphs() -> Any:
    """A context in which Dynamo does not split graphs at the buckets of DistributedDataParallel."""
    import torch._dynamo.config as config

    return config.patch(optimize_ddp=False)


@contextlib.contextmanager
def graph_breaks() -> Iterator[list[tuple[str, Any]]]:
    """The graph breaks that happen inside: of each Dynamo's reason and the user's stack (``FrameSummary``, innermost
    last). Dynamo traces again what it has broken, so one break may come several times."""
    from torch._dynamo.utils import graph_break_reasons

    before = len(graph_break_reasons)
    found: list[tuple[str, Any]] = []
    try:
        yield found
    finally:
        found.extend((cause.reason, list(cause.user_stack)) for cause in graph_break_reasons[before:])


def trace_artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """A file of the graph being compiled in what ``TORCH_TRACE`` collects and tlparse shows; ``payload`` is not called
    where nobody collects."""
    from torch._logging._internal import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=payload)


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


# -- dispatch (used by ops) -------------------------------------------------------------------------------------------


def below_autograd() -> Any:
    """A context in which operators skip their autograd kernels: how an autograd kernel calls its own forward."""
    return torch._C._AutoDispatchBelowAutograd()


def below_autocast() -> Any:
    """A context in which no operator is autocast, whatever region the caller is in. Unlike ``torch.autocast(enabled=
    False)`` it leaves the region's settings and its cache of cast weights alone, and costs one thread-local flag."""
    return torch._C._DisableAutocast()


def forward_mode() -> bool:
    """Whether forward-mode differentiation is going on (``torch.autograd.forward_ad.dual_level``, ``torch.func.jvp``)."""
    return int(torch.autograd.forward_ad._current_level) >= 0


def is_known(condition: Any) -> bool:
    """Whether a condition holds; where sizes that only running tells decide about it, no. Other symbolic sizes are guarded."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return bool(guard_or_false(condition))


def graph_statistics() -> tuple[int, int]:
    """Graphs captured and graph breaks met in this process so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"]), int(sum(counters["graph_break"].values()))


def allow_recompilations(limit: int) -> None:
    """Let Dynamo compile up to ``limit`` variants of one code object. Beyond its limit (8) it runs that code eagerly for
    good, which a measurement of compiled code must not meet."""
    import torch._dynamo.config as config

    config.recompile_limit = limit


def quiet_tracing_errors() -> None:
    """Keep torch from logging the traceback of a failed shape computation; the exception itself still arrives."""
    import logging

    logging.getLogger("torch._subclasses").setLevel(logging.CRITICAL)


def through_dynamo(error: ValueError) -> ValueError:
    """The error as one that Dynamo hands to the user as it is. What a backend raises it wraps in a
    ``BackendCompilerFailed`` otherwise, which is no ``ValueError``; its own kind of exceptions it lets through."""
    return _UserValueError(*error.args)


def _user_value_error() -> type[ValueError]:
    try:
        from torch._dynamo.exc import ShortenTraceback
    except ImportError:
        return ValueError

    class UserValueError(ValueError, ShortenTraceback):
        def __init__(self, *args: object) -> None:
            ShortenTraceback.__init__(self, *args, first_useful_frame=None)

    UserValueError.__name__ = UserValueError.__qualname__ = "ValueError"
    return UserValueError


_UserValueError = _user_value_error()


# -- tracing (used by capture) ----------------------------------------------------------------------------------------


def trace_instead(original: Callable[..., Any], substitute: Callable[..., Any]) -> bool:
    """Have Dynamo trace ``substitute`` where it would inline ``original``; calls outside of tracing do not change.

    ``torch.compiler.substitute_in_graph`` is for functions; for methods Dynamo knows no substitutes, but it does trace
    what ``_torchdynamo_inline`` names, a mark that ``torch.compile`` leaves on the functions it returns.

    Returns:
        Whether this torch heeds the mark; if it does not, nothing is changed.
    """
    from torch._dynamo.variables import UserFunctionVariable

    original._torchdynamo_inline = substitute  # type: ignore[attr-defined]
    if UserFunctionVariable(original).fn is substitute:  # type: ignore[arg-type]
        return True
    del original._torchdynamo_inline  # type: ignore[attr-defined]
    return False


# -- values (used by validation) --------------------------------------------------------------------------------------


def size_hint(value: Any) -> Any:
    """The number that a symbolic size or scalar had when it was traced, without a guard on it; anything else as it is."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.hint if value.node.has_hint() else 3
    return value


def fake_mode() -> Any:
    """A mode in which operators compute shapes only; ``from_tensor`` brings a tensor into it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


@contextlib.contextmanager
def under(mode: Any) -> Iterator[None]:
    """Run operators on fake tensors in their mode; on tensors as they are where there is None. Sizes that are symbols are for the
    Python dispatcher alone in some versions (2.11: "Cannot call numel() on tensor with symbolic sizes")."""
    if mode is None:
        yield
        return
    from torch._dispatch.python import enable_python_dispatcher

    with mode, enable_python_dispatcher():
        yield


def needs_values(error: Exception) -> bool:
    """Whether an operator cannot be run on fake tensors: what it does depends on a tensor's numbers, or nobody wrote a fake kernel."""
    from torch._subclasses import fake_tensor as fake

    return isinstance(
        error, (fake.DataDependentOutputException, fake.DynamicOutputShapeException, fake.UnsupportedOperatorException)
    )


def fake_mode_of(value: Any) -> Any:
    """The mode of a fake tensor, or of the fake tensors inside a tensor subclass; None for anything else."""
    from torch._subclasses.fake_tensor import maybe_get_fake_mode

    return maybe_get_fake_mode(value)


# -- measuring (used by bench) ----------------------------------------------------------------------------------------


def memory_events(profile: Any, device_type: str) -> list[int]:
    """Sizes in bytes of the allocations (positive) and frees (negative) that a finished ``torch.profiler.profile`` with
    ``profile_memory=True`` saw on a kind of device, in the order of time. The public event list leaves out those that
    happened inside an operator."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    wanted = getattr(torch._C._autograd.DeviceType, device_type.upper())
    events.sort(key=lambda e: e.start_ns())
    return [int(e.nbytes()) for e in events if e.device_type() == wanted]


def load_inductor() -> None:
    """Import all of Inductor now, so that a compilation timed later does not pay for it."""
    import torch._inductor.compile_fx
    import torch._inductor.utils  # noqa: F401
