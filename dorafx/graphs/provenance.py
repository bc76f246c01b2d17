"""Where a node comes from: the module in which it was traced (as ``named_modules()`` names it), the line of user code, and a readable
name of the operator."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar

from torch import fx

from dorafx._compat.graphs import input_source

# The names of the module in a compiled frame: a method's ``self``, or the first of the arguments that a decorator passes on. After a
# graph break, the module is a value on the resumed frame's stack.
_ROOT = re.compile(r"^(?:L\['(?:self|fn|mod|module|___stack\d+)'\]|L\['args'\]\[0\]|self(?!\w))")
_DICT_ACCESS = re.compile(r"\.(?:__dict__\['_modules'\]|_modules)\['([^']+)'\]")
_ATTRIBUTE = re.compile(r"getattr\(([^,]+), '([^']+)'\)")
_OWNED = re.compile(r"\._(?:parameters|buffers)\['\w+'\]$")
# Dynamo may trace what `dorafx.optimize` calls a module by, up to the module that this object calls.
_COMPILED_CALL = re.compile(r"\._compiled_call_impl\.module(?!\w)")
_PART = re.compile(r"[.\[]")
_INDEX = re.compile(r"\[(?:'([^']+)'|\"([^\"]+)\"|(\d+))\]")


@functools.lru_cache(maxsize=8192)
def module_path(access: str) -> str:
    """``L['self']._modules['layers'].0.q_proj`` -> ``layers.0.q_proj``: how Dynamo reached a module, as a module name."""
    path = _DICT_ACCESS.sub(r".\1", access)
    while _ATTRIBUTE.search(path):
        path = _ATTRIBUTE.sub(r"\1.\2", path)
    path, roots = _ROOT.subn("", _COMPILED_CALL.sub("", path))
    if not roots:
        path = re.sub(r"^[LG]\['([^']+)'\]", r"\1", path)
    path = _INDEX.sub(lambda m: "." + next(g for g in m.groups() if g is not None), path)
    return path.strip(".")


_path_of: ContextVar[Callable[[str], str]] = ContextVar("_path_of", default=module_path)
"""The module's name of how Dynamo reached it; of "" where no node's stack names the module."""


def site_of(node: fx.Node) -> str:
    """The innermost module whose forward computes a node, relative to the module or function that was compiled."""
    stack = node.meta.get("nn_module_stack")
    return _path_of.get()(str(next(reversed(stack.values()))[0]) if stack else "")


def roots_of(gm: fx.GraphModule, name: Callable[[str], str], of_method: bool) -> dict[str, str]:
    """The names of modules that a frame reaches by another variable than its ``self``: as an argument, through a closure, a partial or a
    value on the stack of a resumed frame. For :func:`roots_named`.

    Args:
        gm: the frame's graph, with the bodies of its higher-order operators.
        name: of how Dynamo reached a module, its name relative to the frame's own; empty for others, and for that itself.
        of_method: the frame is known to be a method of a module.

    Returns:
        The name of each by how Dynamo reached it; by "", that of the module whose method the frame is, if no node's stack has it. Not
        those that :func:`module_path` names as well.
    """
    graphs = [inner.graph for inner in gm.modules() if isinstance(inner, fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    stacks = [node.meta.get("nn_module_stack") for node in nodes]
    asked: dict[str, str] = {}
    for stack in filter(None, stacks):
        # From the outermost on: one that the model does not have may hold others that it has.
        for access in (str(entry[0]) for entry in stack.values()):
            if access not in asked:
                asked[access] = name(access)
            if asked[access]:
                break
    roots = {access: found for access, found in asked.items() if found and found != module_path(access)}
    if not of_method and not all(stacks):
        # The frame is a method whose module has another name: its parameters say which.
        owners = {_OWNED.sub("", input_source(node)) for node in gm.graph.nodes if _OWNED.search(input_source(node))}
        outer = [
            owner for owner in owners - asked.keys() if not any(owner.startswith((f"{o}.", f"{o}[")) for o in owners)
        ]
        if len(outer) == 1 and (found := name(outer[0])):
            roots[""] = roots[outer[0]] = found
    return roots


@contextlib.contextmanager
def roots_named(roots: Mapping[str, str]) -> Iterator[None]:
    """Name modules as a whole model does, by the names of those that a frame reaches (:func:`roots_of`)."""
    token = _path_of.set(functools.cache(functools.partial(_path_below, roots)) if roots else module_path)
    try:
        yield
    finally:
        _path_of.reset(token)


def _path_below(roots: Mapping[str, str], access: str) -> str:
    """``module_path``, also below of a root."""
    if access in roots:
        return roots[access]
    for part in _PART.finditer(access):  # from the outermost on
        if (name := roots.get(access[: part.start()])) and part.start():
            return f"{name}.{module_path(f'self{access[part.start() :]}')}".strip(".")
    return module_path(access)


def frame_path(graph: fx.Graph, modules: Collection[str]) -> str:
    """Where in a compiled module a graph's frame is: after a graph break Dynamo compiles the forwards of inner modules by themselves, and
    names what is in them relative to these.

    Args:
        graph: one graph of the compiled module.
        modules: the names of all modules in it.

    Returns:
        The name of the inner module; empty for the compiled module itself, and where several modules have what the graph names.
    """
    sites = {site_of(node) for node in graph.nodes} - {""}
    if sites <= set(modules):
        return ""
    paths = [path for path in modules if all(f"{path}.{site}" in modules for site in sites)]
    return paths[0] if len(paths) == 1 else ""


def input_path(node: fx.Node) -> str:
    """Where an input or an attribute of the graph comes from, as ``named_parameters()`` names it; empty if the graph does not tell."""
    if node.op == "get_attr":
        return str(node.target)
    access = input_source(node) if node.op == "placeholder" else ""
    # A dot in front, so that what belongs to the compiled module itself is like the rest.
    path = f".{_path_of.get()(access)}" if access else ""
    return path.replace("._parameters.", ".").replace("._buffers.", ".").removeprefix(".")


def source_of(node: fx.Node) -> str:
    """``file:line`` of the innermost user frame that a node's stack trace names; empty where there is none."""
    trace = node.meta.get("stack_trace") or ""
    for line in reversed(trace.splitlines()):
        stripped = line.strip()
        if stripped.startswith('File "'):
            path, _, rest = stripped[6:].partition('"')
            return f"{path}:{rest.split('line ')[1].split(',')[0]}" if "line " in rest else path
    return ""


def operator_name(node: fx.Node) -> str:
    """A readable name of a node's operator."""
    return str(getattr(node.target, "__name__", node.target))
