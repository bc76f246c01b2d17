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

    ``examples/guide/options.md`` is made of this text: a table of the first sentences, and a section for each option.

    Attributes:
        codegen: what compiles the rewritten graph.

            - ``"inductor"``: Inductor, as ``torch.compile`` does by itself.
            - ``"eager"``: nothing; the operators run one by one. It starts at once, and is for tests and for debugging.
            - Any other text is the name of another Dynamo backend.
        norm: how the norms of the weight's rows are computed.

            - ``"tiled"``: block by block of ``W + s·B·A``, which is never held as a whole.
            - ``"factored"``: from ``W·Aᵀ``, ``A·Aᵀ`` and the kept norms of ``W``. It saves time on a CPU where the rank is small.
            - ``"auto"``: the faster of the two, as estimated from shapes, dtype and device.
        compose: where the low-rank product is added to the base product.

            - ``"accumulated"``: inside the base's matrix product. In half precision the sum is rounded to half precision before the
              magnitude scales it.
            - ``"epilogue"``: after it, in fp32.
            - ``"triton"``: as ``"epilogue"``, by a Triton kernel. With ``codegen="eager"`` on a CUDA device this is always so.
            - ``"triton_linear"``: both products and the sum are one Triton kernel.
            - ``"auto"``: ``"accumulated"`` in full precision with more than a few tokens, else ``"epilogue"``; the latter too, on a CPU,
              where the base has a bias. There the base's product keeps it, so that a new adapter gives what the frozen layer gives, to
              the bit; a compiled training keeps one more ``[tokens, d_out]`` tensor for it.

            Where a Triton kernel cannot be used (a CPU, fp64), ``"epilogue"`` takes its place, and the log says why.
        norm_reuse: when a norm of an earlier forward is used again.

            - ``"auto"``: where the parameters have the same bytes as then, if comparing them costs less than the norm.
            - ``"never"``: every forward computes every norm.
            - ``"step"``: another name of ``"auto"``.
        zero_rows: what a row of the adapted weight with a norm of zero gives.

            - ``"peft"``: what the program computes, ``m / 0``, which is NaN or an infinity.
            - ``"finite"``: zero (plus the bias), with gradients of zero.

            ``"finite"`` counts a norm of zero as infinite wherever something is divided by it, in the dtype of that division. What the
            program does with the quotient then sees 0. The norm is followed through moves of data, casts, powers, products of norms,
            checkpoints and ``torch.cond``.

            A norm that goes elsewhere is read there as it is: into a logarithm, a sum, a custom ``autograd.Function``, another graph.
            The record's ``decision`` says so. Layers that are not rewritten stay as they are.
        verify: check every rewrite when its graph is compiled, and undo what differs.

            Each rewritten region and the whole graph run beside their replacements on several draws of random data, forward and
            backward. All that a caller can see is compared. Compiling takes longer; later calls do not.
        strict: raise an error where a DoRA layer is not rewritten or dorafx fails, instead of running it as it was.

            What ``skip`` and ``only`` leave alone is no reason to raise.
        skip: modules whose DoRA layers are left as they are.

            A list of patterns such as ``"lm_head"`` or ``"*.down_proj"``, or a text with commas. A pattern matches the name of a module,
            or the end of it from any dot on, and with it all that is inside of the module.
        only: the only modules whose DoRA layers are rewritten.

            Patterns as for ``skip``; empty for all modules. With both options ``skip`` goes first.
        explain: a file that says what was compiled so far.

            It is written whenever a graph is compiled, so after the first forward it has everything. The suffix says what is written:
            ``".txt"`` the table, ``".html"`` the report, ``".json"`` the log.
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
