"""Private API of Dynamo: compiled calls, its counters and messages, and substitutes for functions that it traces."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import itertools
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

E = TypeVar("E", bound=Exception)

_is_jit_tracing = torch._C._is_tracing
_innermost_transform = torch._C._functorch.peek_interpreter_stack
_group_numbers = itertools.count()
# Graphs of a function: training or not, with gradients or not, few tokens or many, one length or any, with and without a cache, and all
# of it for each adapter, and for none. Dynamo's default is reached by a prompt, tokens, and `disable_adapter`.
_VARIANTS = 32
_DYNAMO_VARIANTS = 8


def lookup_backend(name: str) -> Any:
    """A registered Dynamo backend by name.

    Raises:
        ValueError: no such backend; the message names the registered ones.
    """
    from torch._dynamo.backends.registry import lookup_backend as lookup
    from torch._dynamo.exc import InvalidBackend

    try:
        return lookup(name)
    except InvalidBackend as error:
        known = ", ".join(sorted({"inductor", "eager", *torch.compiler.list_backends(exclude_tags=None)}))
        raise ValueError(f"dorafx.codegen: unknown backend {name!r}; known are {known}") from error


def group_compiler(backend: Any, dynamic: bool | None) -> Callable[..., Any]:
    """A compiled function that calls a module, with a code object of its own.

    Dynamo caches compiled graphs, and counts recompilations against its limit, per code object. ``Module._call_impl`` is one code
    object for all modules of a process, so with more shapes than the limit (8) it would fall back to eager permanently. A code
    object for each group of equal modules gives each group its own cache and limit.
    """
    context = torch._dynamo.optimize(backend=KnownBackend(backend), dynamic=dynamic)
    compiled: Callable[..., Any] = _with_variants(context, numbers=False)(_new_call("group"))
    return compiled


def block_compiler(backend: Any, dynamic: bool | None) -> Callable[..., Any]:
    """As :func:`group_compiler`, for blocks of a model, which read their own number (``layer_idx``) where they fill a cache.

    An integer of a module is a constant for Dynamo, so that each layer would be compiled by itself; here it is a variable. And what the
    blocks call may be compiled in parts, where a graph breaks: from torch 2.13 on the parts have a cache and a limit of their own, too.
    """
    from torch._dynamo.eval_frame import _optimize

    isolated = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(_optimize).parameters else {}
    context = torch._dynamo.optimize(backend=KnownBackend(backend), dynamic=dynamic, **isolated)
    compiled: Callable[..., Any] = _with_variants(context, numbers=True)(_new_call("blocks"))
    return compiled


def _with_variants(context: Any, numbers: bool) -> Any:
    """A compiler of Dynamo's that makes more graphs of one function; with ``numbers`` also with integers of modules as variables."""
    from torch._dynamo.eval_frame import OptimizeContext

    if isinstance(context, OptimizeContext):  # it is not where compilation is switched off
        callback: Any = context.callback
        callback.__class__ = _callback_class(callback.__class__, numbers)
    return context


@functools.cache
def _callback_class(kind: Any, numbers: bool) -> Any:
    """The class of Dynamo's callback that compiles a frame, with other settings. These are process-wide, so they are made while a frame is
    compiled only; a limit that the user has set stays."""

    class Callback(kind):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            settings: dict[str, Any] = {"allow_unspec_int_on_nn_module": True} if numbers else {}
            if torch._dynamo.config.recompile_limit == _DYNAMO_VARIANTS:
                settings["recompile_limit"] = _VARIANTS
            with torch._dynamo.config.patch(**settings) if settings else contextlib.nullcontext():
                return super().__call__(*args, **kwargs)

    Callback.has_variants = True
    return Callback


def allow_variants() -> None:
    """While Dynamo compiles a function that a user passed to ``torch.compile``: let it have more graphs than Dynamo's default. Beyond the
    limit all of a model would run as it is written."""
    from torch._dynamo.convert_frame import CatchErrorsWrapper

    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and isinstance(
            callback := frame.f_locals.get("self"), CatchErrorsWrapper
        ):
            kind: Any = type(callback)
            if not hasattr(kind, "has_variants"):
                callback.__class__ = _callback_class(kind, False)
            return
        frame = frame.f_back


def _new_call(name: str) -> Callable[..., Any]:
    """:func:`call_as_it_is` with a code object of its own."""
    code = call_as_it_is.__code__.replace(co_name=f"dorafx_{name}_{next(_group_numbers)}")
    return types.FunctionType(code, call_as_it_is.__globals__, f"dorafx_{name}")


def _compiled(function: Callable[..., Any], backend: Any, dynamic: bool | None = None) -> Callable[..., Any]:
    """``torch.compile(function, backend=backend)`` with a callable that Dynamo takes for a registered backend. After compiling with a
    registered backend, Dynamo drops its weak references to the inputs. Otherwise a fake mode holds them as long as the compiled
    code lives, and ``torch.utils.swap_tensors``, which ``.to()`` of torchao's parameters uses, refuses tensors with weak references."""
    compiled: Callable[..., Any] = torch._dynamo.optimize(backend=KnownBackend(backend), dynamic=dynamic)(function)
    return compiled


class KnownBackend(torch._TorchCompileWrapper):
    """``torch.compile``'s wrapper of a backend, which Dynamo identifies by its ``compiler_name`` (to 2.13) or ``compiler_fn`` (since)."""

    def __init__(self, backend: Any) -> None:
        # Any name but "eager", with which Dynamo would compile inside the transforms of torch.func instead of leaving them alone.
        super().__init__("aot_eager", None, None, None)  # type: ignore[no-untyped-call]
        self.compiler_name = "dorafx"
        self.backend = backend

    def __call__(self, model_: Any, inputs_: Any) -> Any:
        return self.backend(model_, inputs_)

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__


class _CompiledCall:
    """What a module whose call is compiled is called by. Of a class of its own, so that it is known among those of others."""

    __slots__ = ("compiled", "module")

    def __init__(self, module: torch.nn.Module, compiled: Callable[..., Any]) -> None:
        self.module = module
        self.compiled = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # What recorders of calls record is the module's own code; of compiled code Dynamo refuses it. Inside of a transform of torch.func
        # Dynamo runs the original code, too, but would never again compile what it met there first.
        if not torch.compiler.is_compiling() and (
            _is_jit_tracing() or is_fx_symbolic_tracing() or _innermost_transform() is not None
        ):
            return call_as_it_is(self.module, *args, **kwargs)
        return self.compiled(self.module, *args, **kwargs)


def set_compiled_call(module: torch.nn.Module, compiled: Callable[..., Any]) -> Any:
    """Make ``module(...)`` call ``compiled(module, ...)``, the way ``Module.compile`` does; returns the previous value.

    While ``torch.jit.trace``, ``fx.symbolic_trace`` or ``make_fx`` records the call, inside of the transforms of ``torch.func``, and in
    the replicas that ``nn.DataParallel`` makes of the module, it is called as if it were not compiled.
    """
    _replicate_without_compiled_calls()
    previous = module._compiled_call_impl
    module._compiled_call_impl = _CompiledCall(module, compiled)
    return previous


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether calls of a module go through a compiled function of its own."""
    return module._compiled_call_impl is not None


def watch_native_calls(
    kind: type[torch.nn.Module],
    watcher: Callable[[torch.nn.Module, tuple[Any, ...]], None],
    after_skipping: Callable[[torch.nn.Module, tuple[Any, ...]], None],
) -> bool:
    """Watch modules of a class where Python calls them. What Dynamo traces is not seen: it goes straight to what a call does, past the
    attribute that ``Module.compile`` sets.

    Args:
        kind: the class.
        watcher: called with a module and its arguments before it runs as it is written, outside of all compiled code.
        after_skipping: the same after a call whose forward Dynamo could have compiled, and did not.

    Returns:
        Whether this torch has the attribute, and nobody else uses it.
    """
    if getattr(kind, "_compiled_call_impl", False) is not None:
        return False

    from torch._dynamo.eval_frame import skip_code

    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        # Under global hooks Dynamo traces this function, too.
        if torch.compiler.is_compiling():
            return module._call_impl(*args, **kwargs)
        # With a callback Dynamo is about to compile what this function calls.
        compiles = callable(torch._C._dynamo.eval_frame.get_eval_frame_callback())
        if not compiles:
            watcher(module, args)
        result = module._call_impl(*args, **kwargs)
        if compiles and not _has_graphs(type(module).forward.__code__):
            after_skipping(module, args)
        return result

    # Not the function itself, but what it calls. `torch.compiler.disable(recursive=False)` does that too, and refuses to be exported.
    skip_code(call.__code__)
    kind._compiled_call_impl = call
    return True


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _has_graphs(code: types.CodeType) -> bool:
    return bool(torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code))


class Outside(NamedTuple):
    """Why a function runs outside of compiled code.

    Attributes:
        cause: ``"stance"``, ``"switched off"``, ``"limit"``, ``"disabled"``, ``"skipped"``, ``"not compiled"``; of the package's own: ``"added"``,
            ``"FSDP1"``, ``"another backend"``.
        function: the name of the function that is concerned.
        detail: the stance, the reason that whoever disabled it gave, or the backend.
    """

    cause: str
    function: str = ""
    detail: str = ""


def why_outside(module: torch.nn.Module) -> Outside:
    """Why a module, which is about to run, does so outside of compiled code."""
    from torch._dynamo import eval_frame

    stance = str(eval_frame._stance.stance)
    if torch._dynamo.config.disable:
        return Outside("switched off")
    calls = list(_compiled_calls(sys._getframe(1)))
    if not calls:
        return Outside("not compiled")
    innermost = calls[0]
    if isinstance(innermost["self"], eval_frame.OptimizeContext):
        return Outside("limit" if stance == "default" else "stance", _called(innermost), stance)
    owner = getattr(innermost.get("fn"), "__self__", None)
    within = any(isinstance(values["self"], eval_frame.OptimizeContext) for values in calls)
    if within or (isinstance(owner, torch.nn.Module) and any(inner is module for inner in owner.modules())):
        return Outside("disabled", _called(innermost), str(getattr(innermost["self"], "msg", None) or ""))
    # torch disables functions of its own, such as an optimizer's step; whatever calls a model in these does not compile it.
    return Outside("not compiled")


def why_skipped(module: torch.nn.Module) -> Outside:
    """Why Dynamo left a module out that it could have compiled, as far as its last graph break says."""
    from torch._dynamo.utils import graph_break_reasons

    reason = str(graph_break_reasons[-1].reason) if graph_break_reasons else ""
    return Outside("skipped", detail=next((line.strip() for line in reason.splitlines() if line.strip()), ""))


def _compiled_calls(frame: types.FrameType | None) -> Iterator[dict[str, Any]]:
    """The variables of Dynamo's frames that call a compiled or a disabled function, innermost first."""
    from torch._dynamo import eval_frame

    contexts = (eval_frame.OptimizeContext, eval_frame.DisableContext)
    while frame is not None:
        if frame.f_code.co_filename == eval_frame.__file__ and frame.f_code.co_name in ("_fn", "compile_wrapper"):
            values = frame.f_locals
            if isinstance(values.get("self"), contexts):
                yield values
        frame = frame.f_back


def _called(values: dict[str, Any]) -> str:
    """The name of the function that such a frame calls: of a module's call, its class."""
    function = values.get("fn")
    name = str(getattr(function, "__qualname__", "") or type(function).__name__)
    owner = getattr(function, "__self__", None)
    if owner is None and name == call_as_it_is.__qualname__ and values.get("args"):
        owner = values["args"][0]
    if owner is None:
        return name
    last = name.rpartition(".")[2]
    calls_all = last in ("_call_impl", "_wrapped_call_impl", call_as_it_is.__qualname__)
    return type(owner).__name__ if calls_all else f"{type(owner).__name__}.{last}"


def compiled_modules(package: str) -> tuple[list[torch.nn.Module], dict[str, Any]]:
    """What is being compiled, or called, by a backend of a package.

    Returns:
        The modules that the outermost function that it compiles is a method of, that it was called with, or that it names, and the options
        that ``torch.compile`` was given for it.
    """
    from torch._dynamo.eval_frame import DisableContext, innermost_backend

    outermost: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for variables in _compiled_calls(sys._getframe(1)):
        callback = variables["self"].callback
        if isinstance(variables["self"], DisableContext) or not callable(callback):
            continue
        wrapper: Any = innermost_backend(callback)
        if _package_of(wrapper) == package:
            outermost, options = variables, getattr(wrapper, "kwargs", {}).get("options") or {}
    function = outermost.get("fn")
    values = [getattr(function, "__self__", None), *outermost.get("args", ()), *outermost.get("kwargs", {}).values()]
    code = getattr(function, "__code__", None)
    values += [getattr(function, "__globals__", {}).get(name) for name in getattr(code, "co_names", ())]
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty cell
            values.append(cell.cell_contents)
    values += [getattr(value, "__self__", None) for value in values]
    return [value for value in values if isinstance(value, torch.nn.Module)], options


def _package_of(wrapper: Any) -> str:
    """The package that a backend is from; ``wrapper`` may be one of ``torch.compile``'s."""
    backend = wrapper.backend if isinstance(wrapper, KnownBackend) else getattr(wrapper, "compiler_fn", wrapper)
    backend = getattr(backend, "func", backend)  # of a functools.partial
    module = getattr(backend, "__module__", None) or type(backend).__module__
    return str(module).partition(".")[0]


def note_other_backend(package: str, note: Callable[[Any, str], None]) -> None:
    """Where Dynamo traces a method for another backend than those of a package: call ``note`` once that backend is about to get the graph, with
    the object that the method is of and the backend's name. Not of what Dynamo traces and then leaves out, where the graph breaks, nor
    while it exports."""
    from torch._dynamo.eval_frame import OptimizeContext, innermost_backend
    from torch._dynamo.symbolic_convert import InstructionTranslator, tls

    if getattr(tls, "current_tx", None) is None:
        return
    output = InstructionTranslator.current_tx().output
    calls = (v["self"] for v in _compiled_calls(sys._getframe(1)) if isinstance(v["self"], OptimizeContext))
    context = next(calls, None)
    if output.export or context is None or not callable(context.callback):
        return
    wrapper: Any = innermost_backend(context.callback)
    if _package_of(wrapper) == package:
        return
    name = getattr(wrapper, "compiler_name", None) or getattr(wrapper, "__name__", None) or type(wrapper).__name__
    variable: Any = output.current_tx.symbolic_locals.get("self")
    realize = getattr(variable, "realize", None)  # of one that nothing has looked at yet
    value = getattr(variable if realize is None else realize(), "value", None)
    output.add_graph_finalizer(lambda gm: note(value, str(name)))


def _compiled_frame() -> Any:
    """The frame that Dynamo compiles now, with its variables; None outside of a compilation."""
    from torch._dynamo.symbolic_convert import InstructionTranslator, tls

    if getattr(tls, "current_tx", None) is None:
        return None
    return InstructionTranslator.current_tx().output.root_tx


def module_of_frame() -> torch.nn.Module | None:
    """While Dynamo compiles a frame: the module whose method it is."""
    frame = _compiled_frame()
    if frame is None:
        return None
    variables: dict[str, Any] = frame.f_locals
    candidates = [variables.get(name) for name in ("self", "module", "mod", "fn")]
    args = variables.get("args")
    candidates += args[:1] if isinstance(args, tuple) else ()
    return next((value for value in candidates if isinstance(value, torch.nn.Module)), None)


def module_at(access: str) -> torch.nn.Module | None:
    """While Dynamo compiles a frame: the module that it reaches in a way such as ``L['layer']`` or ``L['f'].func.__self__``."""
    frame = _compiled_frame()
    if frame is None:
        return None
    try:
        found = _reached(access, {"L": frame.f_locals, "G": frame.f_globals})
    except Exception:
        return None
    return found if isinstance(found, torch.nn.Module) else None


_TEXT = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_VARIABLE = re.compile(rf"([LG])\[({_TEXT})\]")
_STEP = re.compile(rf"\.(\w+)(?=[.\[]|$)|\[({_TEXT}|\d+)\]")
_BY_FUNCTION = re.compile(rf"getattr\((.+), ({_TEXT})\)")


def _reached(access: str, variables: dict[str, Any]) -> Any:
    """What a path of attributes and entries leads to. Not by ``eval``: Dynamo writes names of modules as they are, and they may be any
    text."""
    if by_function := _BY_FUNCTION.match(access):
        value = getattr(_reached(by_function[1], variables), ast.literal_eval(by_function[2]))
        rest = access[by_function.end() :]
    elif variable := _VARIABLE.match(access):
        value = variables[variable[1]][ast.literal_eval(variable[2])]
        rest = access[variable.end() :]
    else:
        raise ValueError(f"not a path from a variable: {access}")
    while rest:
        step = _STEP.match(rest)
        if step is None:  # a name that is no identifier
            name = max((name for name in value._modules if rest.startswith(f".{name}")), key=len)
            value, rest = value._modules[name], rest[len(name) + 1 :]
            continue
        if step[2]:
            value = value[ast.literal_eval(step[2])]
        else:
            value = value._modules[step[1]] if step[1].isdigit() else getattr(value, step[1])
        rest = rest[step.end() :]
    return value


def is_traced(value: torch.Tensor) -> bool:
    """Whether a call with this tensor is traced, or watched by a mode that sees every operator, not simply run."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._is_functional_tensor(value)
        or isinstance(value, torch._subclasses.fake_tensor.FakeTensor)
    )


@functools.cache
def _replicate_without_compiled_calls() -> None:
    """``nn.DataParallel`` copies a module's attributes into each replica. A compiled call among them would run the original module, with
    its parameters on its device."""
    original: Any = torch.nn.Module._replicate_for_data_parallel

    @functools.wraps(original)
    def replicate(self: torch.nn.Module) -> Any:
        replica = original(self)
        if isinstance(replica.__dict__.get("_compiled_call_impl"), _CompiledCall):
            del replica.__dict__["_compiled_call_impl"]
        return replica

    torch.nn.Module._replicate_for_data_parallel = replicate  # type: ignore[method-assign]


def restore_compiled_call(module: torch.nn.Module, previous: Any) -> None:
    """Undo :func:`set_compiled_call`."""
    if previous is None:
        # The class's default; the instance had no such attribute.
        module.__dict__.pop("_compiled_call_impl", None)
    else:
        module._compiled_call_impl = previous


def call_as_it_is(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A call of a module, with its hooks, as if it were not compiled."""
    return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


def fresh_compile(model: Callable[..., Any], backend: Any) -> Callable[..., Any]:
    """``torch.compile`` of a call of ``model`` with a new code object, so that earlier compilations are neither reused nor counted."""
    if isinstance(model, torch.nn.Module):
        return functools.partial(group_compiler(backend, None), model)
    return _compiled(model, backend)


def whole_graphs() -> Any:
    """A context in which Dynamo does not split graphs at the buckets of DistributedDataParallel."""
    import torch._dynamo.config as config

    return config.patch(optimize_ddp=False)


@contextlib.contextmanager
def graph_breaks() -> Iterator[list[tuple[str, Any]]]:
    """Collect the graph breaks that happen inside: Dynamo's reason and the user's stack (``FrameSummary``, innermost last) of each.
    One break may be reported several times, as Dynamo traces a broken frame again."""
    from torch._dynamo.utils import graph_break_reasons

    before = len(graph_break_reasons)
    breaks: list[tuple[str, Any]] = []
    try:
        yield breaks
    finally:
        breaks.extend((cause.reason, list(cause.user_stack)) for cause in graph_break_reasons[before:])


def graph_breaks_so_far() -> list[tuple[str, Any]]:
    """All graph breaks of this process that Dynamo still knows, as :func:`graph_breaks` collects them."""
    from torch._dynamo.utils import graph_break_reasons

    return [(cause.reason, list(cause.user_stack)) for cause in list(graph_break_reasons)]


def ends_in_a_break(gm: Any) -> bool:
    """Whether Dynamo captured a graph only up to a graph break, which is the last of :func:`graph_breaks_so_far` then."""
    return bool(getattr(getattr(gm, "compile_subgraph_reason", None), "graph_break", False))


def trace_artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """Add a file about the graph being compiled to the trace that ``TORCH_TRACE`` collects and tlparse shows. ``payload`` is called
    only if a trace is collected."""
    from torch._logging._internal import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=payload)


def graph_statistics() -> tuple[int, int]:
    """Graphs captured and graph breaks met in this process so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"]), int(sum(counters["graph_break"].values()))


def allow_recompilations(limit: int) -> None:
    """Let Dynamo compile up to ``limit`` variants of one code object. Beyond its default limit (8) it runs that code eagerly, which
    must not happen in a measurement of compiled code."""
    import torch._dynamo.config as config

    config.recompile_limit = limit


def quiet_tracing_errors() -> None:
    """Keep torch from logging the traceback of a failed shape computation; the exception itself still arrives."""
    import logging

    logging.getLogger("torch._subclasses").setLevel(logging.CRITICAL)


def restarts_tracing(error: Exception) -> bool:
    """Whether what a compiler raised is no failure, but tells Dynamo to trace anew or not at all."""
    from torch._dynamo.exc import RestartAnalysis, SkipFrame

    return isinstance(error, (RestartAnalysis, SkipFrame))


def through_dynamo(error: E) -> E:
    """The error as one that Dynamo passes to the user unchanged. Dynamo wraps other exceptions of a backend in a
    ``BackendCompilerFailed``, and those of tracing in an ``InternalTorchDynamoError``, but not exceptions of its own kind."""
    kind: Any = type(error)
    return _passed_on(kind)(*error.args)  # type: ignore[no-any-return]


@functools.cache
def _passed_on(kind: type[Exception]) -> Any:
    try:
        from torch._dynamo.exc import ShortenTraceback
    except ImportError:
        return kind

    class Error(kind, ShortenTraceback):  # type: ignore[valid-type, misc]
        def __init__(self, *args: object) -> None:
            ShortenTraceback.__init__(self, *args, first_useful_frame=None)

    Error.__name__ = Error.__qualname__ = kind.__name__
    return Error


def trace_instead(original: Callable[..., Any], substitute: Callable[..., Any]) -> bool:
    """Make Dynamo trace ``substitute`` where it would inline ``original``; calls outside of tracing do not change.

    ``torch.compiler.substitute_in_graph`` works for functions, not for methods. For these Dynamo traces the function in the
    attribute ``_torchdynamo_inline``, which ``torch.compile`` sets on the functions it returns.

    Returns:
        Whether this torch uses the attribute; if it does not, nothing is changed.
    """
    from torch._dynamo.variables import UserFunctionVariable

    original._torchdynamo_inline = substitute  # type: ignore[attr-defined]
    if UserFunctionVariable(original).fn is substitute:  # type: ignore[arg-type]
        return True
    del original._torchdynamo_inline  # type: ignore[attr-defined]
    return False
