"""DoRA layers that run outside of every graph, and why.

What never reaches the backend has no record of a pass. So PEFT's DoRA layers say when Python calls them, which traced code does not:
of a model that dorafx serves, each layer gets a record with the cause.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from dorafx._compat.dynamo import (
    Outside,
    compiled_modules,
    is_traced,
    module_at,
    module_of_frame,
    note_other_backend,
    through_dynamo,
    why_outside,
    why_skipped,
)
from dorafx.errors import RewriteMissError
from dorafx.graphs.provenance import roots_named, roots_of
from dorafx.log import ReasonKind, Record, RewriteLog, rewrite_log
from dorafx.scope import adapted_modules

from .in_place import OPTIMIZED

_logger = logging.getLogger(__name__)  # TORCH_LOGS="+dorafx"


@dataclass(eq=False)
class _Served:
    """A model that dorafx serves.

    Attributes:
        model: the model, which may be deleted.
        strict: whether a layer outside of every graph raises.
        compile_added: compiles the model's adapter layers that are not compiled yet, and returns how many; None where all of the model is
            compiled by a caller.
        names: of its adapter layers, by the DoRA layers inside.
        next_search: when the model may be searched again for a layer that is not known.
    """

    model: weakref.ref[torch.nn.Module]
    strict: bool = False
    compile_added: Callable[[], int] | None = None
    names: weakref.WeakKeyDictionary[torch.nn.Module, str] = field(default_factory=weakref.WeakKeyDictionary)
    next_search: float = 0.0

    def name_of(self, layer: torch.nn.Module) -> str | None:
        """The name of the adapter layer that a DoRA layer is in; None if the model does not hold it."""
        model = self.model()
        if model is None:
            return None
        started = time.monotonic()
        if layer not in self.names and started >= self.next_search:
            for name, module in adapted_modules(model):
                self.names.update(dict.fromkeys(module.lora_magnitude_vector.children(), name))  # type: ignore[union-attr]
            # Layers of a large model beside this one shall not have it searched once for each of them.
            ended = time.monotonic()
            self.next_search = ended + 50 * (ended - started)
        return self.names.get(layer)


@dataclass
class _Noted:
    """What the log has of a layer.

    Attributes:
        generation: of the log.
        causes: those that have a record.
        looks: how often it was looked whether a model that dorafx compiles has it.
    """

    generation: int
    causes: set[str] = field(default_factory=set)
    looks: int = 0


_lock = threading.RLock()
_served: list[_Served] = []
_noted: weakref.WeakKeyDictionary[torch.nn.Module, _Noted] = weakref.WeakKeyDictionary()
# A layer of a model that dorafx has nothing to do with has no time for a look at the stack in every call.
_MOST_LOOKS = 32
_explaining = threading.local()
# Causes that are the caller's own will, so that `dorafx.strict` lets them pass. ``generate`` compiles its decoding steps alone.
_MEANT = ("stance", "switched off", "not compiled")


def serve(
    model: torch.nn.Module, strict: bool = False, compile_added: Callable[[], int] | None = None
) -> Callable[[], None]:
    """From now on record which DoRA layers of a model run outside of every graph.

    Args:
        model: held weakly.
        strict: raise instead, unless the caller wants it so: a stance, a method that is not compiled.
        compile_added: compiles adapter layers that were added meanwhile, and returns how many.

    Returns:
        What ends it.
    """
    served = _Served(weakref.ref(model), strict, compile_added)

    def end() -> None:
        with _lock, contextlib.suppress(ValueError):
            _served.remove(served)

    with _lock:
        _served[:] = [other for other in _served if (kept := other.model()) is not None and kept is not model]
        _served.append(served)
        # What was a stranger may be a layer of this model.
        for noted in _noted.values():
            noted.looks = 0
    return end


def serve_compiled() -> None:
    """As :func:`serve`, for the modules of the function that the backend compiles, or that was compiled with it and is being called, but
    not for those of a model that is served already."""
    modules, options = compiled_modules("dorafx")
    with _lock:
        known = {id(inner) for served in _served if (model := served.model()) is not None for inner in model.modules()}
    for module in modules:
        if id(module) not in known and adapted_modules(module):
            serve(module, options.get("dorafx.strict") is True)
            known.update(map(id, module.modules()))


def in_optimized_model(modules: Iterable[torch.nn.Module]) -> bool:
    """Whether some of these belong to a model that has been passed to ``optimize`` and not to ``restore`` since."""
    wanted = {id(module) for module in modules}
    with _lock:
        models = [model for served in _served if (model := served.model()) is not None]
    optimized = (model for model in models if model.__dict__.get(OPTIMIZED))
    return any(id(inner) in wanted for model in optimized for inner in model.modules())


@contextlib.contextmanager
def named_in_model(gm: fx.GraphModule) -> Iterator[str]:
    """Name the modules of a frame as the model does that is compiled, or explained in this thread. A frame may be any function that the
    model calls where its graph breaks.

    Returns:
        The name of the module whose method the frame is; empty for others, and for the model itself.
    """
    frame, roots = "", {}
    try:
        names = _names_in_models()
        method_of = module_of_frame()
        frame = names.get(id(method_of), "")

        def name_of(access: str) -> str:
            name = names.get(id(module_at(access)), "")
            return name.removeprefix(f"{frame}.") if not frame or name.startswith(f"{frame}.") else ""

        roots = roots_of(gm, name_of, method_of is not None)
    except Exception:  # a name must not stop a compilation
        _logger.debug("modules are named as the frame reaches them", exc_info=True)
    with roots_named(roots):
        yield frame


def _names_in_models() -> dict[int, str]:
    """The names of all modules of the models that are compiled, or explained in this thread, by their identities."""
    if hasattr(_explaining, "call"):
        models = [one.model() for one in _explaining.call[0]]
    else:
        with _lock:
            models = [one.model() for one in _served]
        models += compiled_modules("dorafx")[0]
    names: dict[int, str] = {}
    for model in {id(model): model for model in models}.values():
        for name, module in () if model is None else model.named_modules():
            names.setdefault(id(module), name)
    return names


@contextlib.contextmanager
def explained(model: Callable[..., Any], log: RewriteLog) -> Iterator[None]:
    """Record the same of one call of a model, or of a function that calls models, in a log of its own, in this thread."""
    _explaining.call = ([_Served(weakref.ref(model))] if isinstance(model, torch.nn.Module) else [], log, set())
    try:
        yield
    finally:
        del _explaining.call


def note_outside(layer: torch.nn.Module, args: tuple[Any, ...]) -> None:
    """Record that a DoRA layer of PEFT is about to run outside of every graph, if it is one of a model that dorafx serves.

    Raises:
        RewriteMissError: the model is served strictly.
    """
    _note(layer, args, why_outside)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def note_skipped(layer: torch.nn.Module, args: tuple[Any, ...]) -> None:
    """The same of a layer whose forward Dynamo left out."""
    if getattr(layer, "_is_fsdp_managed_module", False) and not getattr(layer, "_fsdp_use_orig_params", True):
        _note(layer, args, lambda module: Outside("FSDP1"))
    else:
        _note(layer, args, why_skipped)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def note_traced() -> bool:
    """Called where Dynamo traces a method of an adapter layer: record it if that is for another backend, and the layer's model is optimized.
    Dynamo goes past the compiled calls of modules.

    Returns:
        True: traced, this is a constant without a guard.
    """
    if not hasattr(_explaining, "call"):
        try:
            note_other_backend("dorafx", _note_other_backend)
        except Exception:  # must not stop the compilation of others
            _logger.debug("whether another backend compiles an optimized model is not known", exc_info=True)
    return True


def _note_other_backend(adapter: Any, backend: str) -> None:
    """
    Raises:
        RewriteMissError: the model is served strictly.
    """
    layers = list(getattr(adapter, "lora_magnitude_vector", torch.nn.ModuleDict()).children())
    served = _served_with(layers[0]) if layers else None
    model = None if served is None else served.model()
    if served is not None and model is not None and model.__dict__.get(OPTIMIZED):
        try:
            _record_once(served, layers[0], Outside("another backend", detail=backend))
        except RewriteMissError as error:
            raise through_dynamo(error) from None


def _note(layer: torch.nn.Module, args: tuple[Any, ...], find_out: Callable[[torch.nn.Module], Outside]) -> None:
    if not args or not isinstance(args[0], torch.Tensor) or is_traced(args[0]):
        return
    if hasattr(_explaining, "call"):
        explained, log, seen = _explaining.call
        if not explained:
            modules, _ = compiled_modules("dorafx")
            explained += [_Served(weakref.ref(module)) for module in modules if adapted_modules(module)]
        name = next((name for one in explained if (name := one.name_of(layer)) is not None), None)
        if name is not None and name not in seen:
            seen.add(name)
            log.add(_record(name, find_out(layer)))
        return
    noted = _noted_of(layer)
    served = _served_with(layer)
    if served is None:
        if noted.looks >= _MOST_LOOKS:
            return
        noted.looks += 1
        serve_compiled()  # nothing of the model may ever have reached the backend
        served = _served_with(layer)
    if served is None:
        return
    why = find_out(layer)
    if why.cause == "not compiled":
        if served.compile_added is not None:
            if not served.compile_added():
                return
            why = why._replace(cause="added")
        elif not _called_by_generate():
            return  # who calls a model past its compiled function does so on purpose
    _record_once(served, layer, why)


def _noted_of(layer: torch.nn.Module) -> _Noted:
    generation = rewrite_log().generation
    noted = _noted.get(layer)
    if noted is None or noted.generation != generation:
        noted = _noted[layer] = _Noted(generation)
    return noted


def _record_once(served: _Served, layer: torch.nn.Module, why: Outside) -> None:
    noted = _noted_of(layer)
    if why.cause in noted.causes:
        return
    record = _record(str(served.name_of(layer)), why)
    if served.strict and why.cause not in _MEANT:
        raise RewriteMissError(f"dorafx.strict: {record}")
    noted.causes.add(why.cause)
    rewrite_log().add(record)


def _served_with(layer: torch.nn.Module) -> _Served | None:
    with _lock:
        candidates = list(_served)
    return next((served for served in candidates if served.name_of(layer) is not None), None)


def _record(name: str, why: Outside) -> Record:
    kind, reason = {
        "limit": (
            ReasonKind.RECOMPILE_LIMIT,
            f"Dynamo has compiled {why.function} for as many kinds of inputs as torch._dynamo.config.recompile_limit allows, and what is "
            "different again runs as it is written",
        ),
        "disabled": (
            ReasonKind.COMPILER_DISABLED,
            f"torch.compiler.disable keeps {why.function}, which calls it, out of compiled code{f' ({why.detail})' if why.detail else ''}",
        ),
        "another backend": (
            ReasonKind.ANOTHER_BACKEND,
            f"torch.compile compiles it with the backend {why.detail!r}, and goes past what dorafx.optimize has compiled",
        ),
        "stance": (ReasonKind.STANCE, f"torch.compiler.set_stance({why.detail!r}) has it run as it is written"),
        "switched off": (ReasonKind.STANCE, "torch._dynamo.config.disable has it run as it is written"),
        "added": (
            ReasonKind.ADDED_LATER,
            "it was added to the model after dorafx.optimize, and was called for the first time",
        ),
        "FSDP1": (
            ReasonKind.NOT_TRACED,
            "Dynamo traces no module of FullyShardedDataParallel (FSDP1) with use_orig_params=False",
        ),
        "skipped": (
            ReasonKind.NOT_TRACED,
            f"Dynamo did not trace the layer's forward{f' ({why.detail})' if why.detail else ''}",
        ),
        "not compiled": (
            ReasonKind.NOT_COMPILED,
            "it was called past the function that torch.compile returned: generate calls the model as it was",
        ),
    }[why.cause]
    return Record("missed", site=name, reason=reason, kind=kind.value)


def _called_by_generate() -> bool:
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__") == "transformers.generation.utils":
            return True
        frame = frame.f_back
    return False
