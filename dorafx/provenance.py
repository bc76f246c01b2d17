"""Where a node comes from: the module it was traced in, by the name that ``named_modules()`` gives it."""

from __future__ import annotations

import re

from torch import fx

__all__ = ["module_path", "site_of"]

# What a compiled frame calls its module; after a graph break in it, the module is a value on the resumed frame's stack.
_ROOT = re.compile(r"^(?:L\['(?:self|fn|mod|module|___stack\d+)'\]|self(?!\w))")
_DICT_ACCESS = re.compile(r"\.(?:__dict__\['_modules'\]|_modules)\['([^']+)'\]")
_ATTRIBUTE = re.compile(r"getattr\(([^,]+), '([^']+)'\)")
_INDEX = re.compile(r"\[(?:'([^']+)'|\"([^\"]+)\"|(\d+))\]")


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
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for access, _cls in stack.values():
        path = module_path(str(access))
    return path
