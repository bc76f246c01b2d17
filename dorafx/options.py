"""The ``dorafx.*`` options of ``torch.compile(options={…})``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dorafx.selection import Selection

_PREFIX = "dorafx."
COMPOSE = ("auto", "accumulated", "epilogue", "triton", "triton_linear")
_CHOICES = {
    "norm": ("auto", "tiled", "factored"),
    "compose": COMPOSE,
    "norm_reuse": ("auto", "never", "step"),
    "zero_rows": ("peft", "finite"),
}
EXPLAIN_SUFFIXES = (".txt", ".html", ".json")


@dataclass(frozen=True)
class Options:
    """What a user can set: the options ``dorafx.*`` of ``torch.compile``, and arguments of :func:`dorafx.optimize`.

    Attributes:
        codegen: what compiles the rewritten graph: ``"inductor"``, ``"eager"``, or the name of another Dynamo backend.
        norm: how the row norm is computed: ``"auto"``, ``"tiled"`` or ``"factored"``.
        compose: where the low-rank product is added to the base product. ``"accumulated"``: inside the GEMM, whose result (the sum
            that ``g`` scales) a half-precision model rounds to half precision. ``"epilogue"``: after it, in fp32. ``"triton"``: the
            same by a Triton kernel of its own in compiled programs too (with eager codegen on a CUDA device it always is).
            ``"triton_linear"``: both products and the epilogue are one Triton kernel. What the kernels do not support (a CPU, fp64)
            is computed as by ``"epilogue"``, and the log says why. ``"auto"`` chooses.
        norm_reuse: when a kept norm is used again. ``"auto"``: where the bytes are the same that it was computed from, if comparing
            them costs less than the norm. ``"never"``: it is computed at every forward. ``"step"`` is another
            name of ``"auto"``.
        zero_rows: what a row of the adapted weight with a norm of zero gives. ``"peft"``: what the program computes, ``m / 0``, which
            is NaN or an infinity. ``"finite"``: 0 (and the bias), with gradients of 0: wherever something is divided by a norm that
            dorafx computes, a norm of zero, in the dtype that it is divided in, counts as infinite. Whatever the program does with
            the quotient sees 0. Norms are followed through moves of data, casts, powers, products of norms, checkpoints and
            ``torch.cond``. A norm that goes elsewhere (a logarithm, a sum, a custom ``autograd.Function``, another graph) is read
            there as it is, and the record's ``decision`` says so. Layers that are not rewritten stay as they are.
        verify: when a graph is compiled, run every rewritten region, the whole graph, and their replacements on several draws of
            random data, forward and backward, compare all that a caller can see, and leave alone what differs.
        strict: raise where something is not rewritten or dorafx fails, instead of falling back. What ``skip`` and ``only`` leave alone
            is no reason to raise.
        skip: modules whose DoRA computations are left as they are: patterns such as ``"lm_head"`` or ``"*.down_proj"``, a list or a text
            with commas. A pattern matches the name of a module, the end of it from any dot on, and all that is inside of the module.
        only: the same for the only modules whose DoRA computations are rewritten; empty for all.
        explain: a file that receives what was compiled so far, whenever a graph is compiled, and so after the first forward
            has all of it: ``".txt"`` the table, ``".html"`` the report, ``".json"`` the log.
    """

    codegen: str = "inductor"
    norm: str = "auto"
    compose: str = "auto"
    norm_reuse: str = "auto"
    zero_rows: str = "peft"
    verify: bool = False
    strict: bool = False
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    explain: str = ""

    @property
    def selection(self) -> Selection:
        """``skip`` and ``only``."""
        return Selection(self.skip, self.only)

    @staticmethod
    def split(options: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
        """dorafx's options, and the rest, which go to Inductor.

        Raises:
            ValueError: an unknown ``dorafx.*`` key, or a value that is not allowed; the message names what is.
        """
        names = [f.name for f in fields(Options)]
        values: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        for key, value in (options or {}).items():
            if not str(key).startswith(_PREFIX):
                rest[key] = value
                continue
            name = key[len(_PREFIX) :]
            if name not in names:
                raise ValueError(f"unknown option {key!r}; valid ones are {', '.join(_PREFIX + n for n in names)}")
            _check(key, name, value)
            if name in ("skip", "only"):
                value = _patterns(key, value)
            elif name == "explain":
                value = _explanation_path(key, value)
            values[name] = value
        return Options(**values), rest


def _check(key: str, name: str, value: Any) -> None:
    if name in _CHOICES and value not in _CHOICES[name]:
        raise ValueError(f"{key}: {value!r} is not one of {', '.join(map(repr, _CHOICES[name]))}")
    if name in ("strict", "verify") and not isinstance(value, bool):
        raise ValueError(f"{key}: {value!r} is not True or False")
    if name == "codegen" and (not isinstance(value, str) or not value):
        raise ValueError(f"{key}: {value!r} is not 'inductor', 'eager' or the name of a Dynamo backend")


def _patterns(key: str, value: Any) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if value is None or value == "":
        return ()
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) and part.strip() for part in parts):
        raise ValueError(
            f"{key}: {value!r} is not a list of patterns of module names, such as ['lm_head', '*.down_proj'], nor a text of them "
            "with commas between"
        )
    return tuple(part.strip() for part in parts)


def _explanation_path(key: str, value: Any) -> str:
    if value is None or value == "":
        return ""
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"{key}: {value!r} is not the path of a file")
    path = os.fspath(value)
    if not isinstance(path, str) or os.path.splitext(path)[1].lower() not in EXPLAIN_SUFFIXES:
        raise ValueError(
            f"{key}: {value!r} does not end in {', '.join(EXPLAIN_SUFFIXES[:-1])} or {EXPLAIN_SUFFIXES[-1]}"
        )
    return os.path.abspath(path)  # the process may change its folder before the first forward
