"""The ``dorafx.*`` options of ``torch.compile(options={…})``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

_PREFIX = "dorafx."
COMPOSE = ("auto", "accumulated", "epilogue", "triton", "triton_linear")
_CHOICES = {
    "norm": ("auto", "tiled", "factored"),
    "compose": COMPOSE,
    "norm_reuse": ("auto", "never", "step"),
    "zero_rows": ("peft", "finite"),
}


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
            dorafx computes, a norm of zero, in the dtype that it is divided in, counts as infinite. Layers that are not
            rewritten stay as they are.
        verify: when a graph is compiled, run every rewritten region, the whole graph, and their replacements on several draws of
            random data, forward and backward, compare all that a caller can see, and leave alone what differs.
        strict: raise where something is not rewritten or dorafx fails, instead of falling back.
    """

    codegen: str = "inductor"
    norm: str = "auto"
    compose: str = "auto"
    norm_reuse: str = "auto"
    zero_rows: str = "peft"
    verify: bool = False
    strict: bool = False

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
            values[name] = value
        return Options(**values), rest


def _check(key: str, name: str, value: Any) -> None:
    if name in _CHOICES and value not in _CHOICES[name]:
        raise ValueError(f"{key}: {value!r} is not one of {', '.join(map(repr, _CHOICES[name]))}")
    if name in ("strict", "verify") and not isinstance(value, bool):
        raise ValueError(f"{key}: {value!r} is not True or False")
    if name == "codegen" and (not isinstance(value, str) or not value):
        raise ValueError(f"{key}: {value!r} is not 'inductor', 'eager' or the name of a Dynamo backend")
