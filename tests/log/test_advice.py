"""Every kind of reason that the sources can give has advice of its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import dorafx
from dorafx import Record
from dorafx.log.advice import UNKNOWN, advice_for, is_known

ROOT = Path(dorafx.__file__).parent


def texts(node: ast.expr) -> list[str]:
    """The texts that an expression can be, with an x in the place of every value."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        return ["".join(v.value if isinstance(v, ast.Constant) else "x" for v in node.values)]
    if isinstance(node, ast.IfExp):
        return texts(node.body) + texts(node.orelse)
    return []


def reasons() -> Iterator[tuple[str, str]]:
    """(file, text) of every reason that is written out in the sources."""
    for path in [*ROOT.rglob("*.py"), *(ROOT.parent / "patterns").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Reason", "CannotEmit") and node.args:
                for text in texts(node.args[0]):
                    yield path.name, text
            if isinstance(node, ast.FunctionDef) and node.name == "_what_norm":
                for part in ast.walk(node):
                    if isinstance(part, ast.Return) and part.value is not None:
                        yield from ((path.name, text) for text in texts(part.value))


def test_every_reason_has_advice() -> None:
    found = list(reasons())
    assert len(found) > 30
    lacking = [f"{file}: {text}" for file, text in found if not is_known(text)]
    assert not lacking, "reasons without a kind in dorafx/log/advice.py: " + "; ".join(lacking)


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("operator tanh at model.py:14 stands between the low-rank product and the norm", "no low-rank product"),
        ("only the norm is rewritten: operator erf at m.py:3 stands between the norm and what it scales", "is known"),
        ("the norm at model.py:3 is of order 1: DoRA's is the 2-norm", "`ord`"),
        ("verification: outputs differ by 1e-3 from the original's in fp64", "refused"),
        ("internal failure, graph left as it was: KeyError: 'x' (emit.py:3)", "defect of dorafx"),
        ("something nobody thought of", UNKNOWN),
        ("", ""),
    ],
)
def test_advice(reason: str, advice: str) -> None:
    found = advice_for(reason)
    assert advice in found
    assert found[:1].isupper() or not found
    assert Record("missed", reason=reason).advice == found
