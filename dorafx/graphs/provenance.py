"""Where a node comes from: the module in which it was traced (as ``named_modules()`` names it), the line of user code, and a readable
name of the operator."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar

from torch import fx

from dorafx._compat.graphs import input_source

# The names of the module in a compiled frame: a method's ``self``, or the first of the arguments that a decorator passes on. After a
# graph break, the module is a value on the resumed frame's stack.
_ROOT = re.compile(r"^(?:L\['(?:self|fn|mod|module|___stack\d+)'\]|L\['args'\]\[0\]|self(?!\w))")
_DICT_ACCESS = re.compile(r"\.(?:__dict__\['_modules'\]|_modules)\['([^']+)'\]")
_ATTRIBUTE = re.compile(r"getattr\(([^,]+), '([^']+)'\)")
_OWNED = re.compile(r"\._(?:parameters|buffers)\['\w+'\]$")
_INDEX = re.compile(r"\[(?:'([^']+)'|\"([^\"]+)\"|(\d+))\]")


_known_roots: ContextVar[dict[str, str] | None] = ContextVar("_known_roots", default=None)
"""Names of the modules that a frame reaches, by how Dynamo reaches them; that of "" is the module whose method no node's stack names."""


@functools.lru_cache(maxsize=8192)
def module_path(access: str) -> str:
    """``L['self']._modules['layers'].0.q_proj`` -> ``layers.0.q_proj``: how Dynamo reached a module, as a module name."""
    path = _DICT_ACCESS.sub(r".\1", access)
    while _ATTRIBUTE.search(path):
        path = _ATTRIBUTE.sub(r"\1.\2", path)
    path, roots = _ROOT.subn("", path)
    if not roots:
        path = re.sub(r"^[LG]\['([^']+)'\]", r"\1", path)
    path = _INDEX.sub(lambda m: "." + next(g for g in m.groups() if g is not None), path)
    return path.strip(".")


def site_of(node: fx.Node) -> str:
    """The innermost module whose forward computes a node, relative to the module or function that was compiled."""
    stack = node.meta.get("nn_module_stack")
    return _named(str(next(reversed(stack.values()))[0]) if stack else "")


def _named(access: str) -> str:
    """``module_path``, also below of a known root."""
    for root, name in (_known_roots.get() or {}).items():
        rest = access.removeprefix(root)
        if root == access or (root and rest != access and not rest[:1].isidentifier()):
            return f"{name}.{module_path(f'self{rest}')}".strip(".")
    return module_path(access)


@contextlib.contextmanager
def roots_named(gm: fx.GraphModule, name: Callable[[str], str], of_method: bool) -> Iterator[None]:
    """Name modules as a whole model does where the frame reaches them by another variable than its ``self``: as an argument, through a
    closure, a partial or a value on the stack of a resumed frame.

    Args:
        gm: the frame's graph, with the bodies of its higher-order operators.
        name: of how Dynamo reached a module, its name relative to the frame's own; empty for others, and for that itself.
        of_method: the frame is known to be a method of a module.
    """
    graphs = [inner.graph for inner in gm.modules() if isinstance(inner, fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    stacks = [node.meta.get("nn_module_stack") for node in nodes]
    asked: dict[str, str] = {}
    for stack in filter(None, stacks):
        for (
            entry
        ) in stack.values():  # from the outermost on: one that the model does not have may hold others that it has
            access = str(entry[0])
            if access not in asked:
                asked[access] = name(access)
            if asked[access]:
                break
    known = {access: found for access, found in asked.items() if found}
    if not of_method and not all(stacks):
        # The frame is a method whose module has another name: its parameters say which.
        owners = {_OWNED.sub("", input_source(node)) for node in gm.graph.nodes if _OWNED.search(input_source(node))}
        outer = [
            owner for owner in owners - asked.keys() if not any(owner.startswith((f"{o}.", f"{o}[")) for o in owners)
        ]
        if len(outer) == 1 and (found := name(outer[0])):
            known[""] = known[outer[0]] = found
    token = _known_roots.set(known)
    try:
        yield
    finally:
        _known_roots.reset(token)


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
    path = f".{_named(access)}" if access else ""
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
