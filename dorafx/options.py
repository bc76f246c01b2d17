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
}


@dataclass(frozen=True)
class Options:
    """What a user can set.

    Attributes:
        codegen: ``"inductor"``, ``"eager"``, or the name of another Dynamo backend, which receives the rewritten graph.
        norm: ``"auto"``, ``"tiled"`` or ``"factored"``: the algorithm of the row norm.
        compose: where the low-rank product is added. ``"auto"``; ``"accumulated"``: inside the GEMM, whose result (the sum that
            ``g`` scales) a half-precision model rounds to half precision; ``"epilogue"``: after it in fp32; ``"triton"``: the
            epilogue is a Triton kernel of its own in compiled programs too (with eager codegen on a CUDA device it always is);
            ``"triton_linear"``: both products and the epilogue are one Triton kernel. What the kernels do not support (a CPU,
            fp64) is computed as by ``"epilogue"``, and the log says why.
        norm_reuse: ``"auto"``: a norm is reused in forwards of few tokens that record no gradients; ``"never"``; ``"step"``:
            also in training, until the optimizer steps (gradient accumulation).
        verify: run every region that is rewritten and its replacement on random data in fp64, forward and backward, when
            the graph is compiled, and leave alone what differs.
        strict: a miss or an internal failure raises instead of falling back.
    """

    codegen: str = "inductor"
    norm: str = "auto"
    compose: str = "auto"
    norm_reuse: str = "auto"
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
