"""A digest of a function's syntax tree, which does not depend on comments, docstrings and layout."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

_IGNORED = frozenset({"annotation", "returns", "type_comment", "type_params", "kind", "ctx"})
"""Fields that do not change what a function does, or that only some Python versions have."""


def fingerprint(fn: Callable[..., Any]) -> str:
    """Sixteen hex digits, equal on every Python version. Empty if the function's source is not available (interactive or frozen
    definitions), or if the function wraps another, whose source would be returned instead."""
    code = getattr(fn, "__code__", None)
    # A function made by ``exec``: Python 3.13 would return the source of ``python -c`` for it.
    if hasattr(fn, "__wrapped__") or getattr(code, "co_filename", "") == "<string>":
        return ""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(fn)))
    except (OSError, TypeError, SyntaxError):
        return ""
    return hashlib.sha256(_canonical(tree.body).encode()).hexdigest()[:16]


def _canonical(node: object) -> str:
    # Neither ast.unparse nor ast.dump, whose output differs between Python versions.
    if isinstance(node, list):
        return f"[{','.join(map(_canonical, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            value = node.body[_has_docstring(node) :]
        if name not in _IGNORED and value is not None and value != []:
            fields.append(f"{name}={_canonical(value)}")
    return f"{type(node).__name__}({','.join(fields)})"


def _has_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    first = node.body[0]
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
