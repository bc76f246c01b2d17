"""The plan of a measurement: from the command line's settings to a list of cases, as plain data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from dorafx.codegen import check_name
from dorafx.options import COMPOSE
from dorafx.scope import SCOPES

from . import work
from .models import Size
from .quantized import GROUPS, WEIGHTS, packed_bytes
from .shapes import PRESETS, Shape, parse_shape
from .work import Work

ANCHORS = {
    "peft": "stock PEFT, eager",
    "peft-inductor": "stock PEFT, compiled by Inductor",
    "dense": "the dense product B@A, eager",
    "chunked": "the factored norm over chunks of d_in (arXiv:2603.22276), eager",
    "lora": "plain LoRA, compiled by Inductor",
    "merged": "adapter merged into the weights, compiled by Inductor",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Suite:
    """What a suite measures, and the anchors that are allowed in it; ``why`` is the reason against the others."""

    measures: str
    allowed: tuple[str, ...]
    default: tuple[str, ...]
    why: str
    needs_peft: bool = True


_COMPOSE_ALONE = ("auto", "triton")
PASS_LAYERS = (8, 16, 32, 64)
HOST_LAYERS = 12
_EVERY = tuple(ANCHORS)
_TRAINED = "nothing is trained in merged weights"
SUITES = {
    "norm": Suite(
        "the row norm of W + s·B·A alone",
        ("peft", "peft-inductor", "dense", "chunked"),
        ("peft", "dense", "chunked"),
        "it has no norm",
        needs_peft=False,
    ),
    "compose": Suite(
        "the composition g ⊙ (base + s·lora) alone, forward and forward with backward",
        ("peft", "peft-inductor", "lora"),
        ("peft", "peft-inductor", "lora"),
        "its composition is another's or none",
        needs_peft=False,
    ),
    "layer": Suite("one DoRA linear, forward and training", _EVERY, ("peft", "peft-inductor", "lora", "merged"), ""),
    "model": Suite("a Llama-shaped PEFT model, prefill and training step", _EVERY, ("peft", "lora"), ""),
    "decode": Suite("one token with a filled key-value cache", _EVERY, ("peft", "lora", "merged"), ""),
    "generate": Suite(
        "HF generate(), one token after another, compiled an adapter layer at a time",
        ("peft", "dense", "chunked", "lora"),
        ("peft", "lora"),
        "its layers are not compiled one by one",
    ),
    "memory": Suite(
        "bytes that autograd saves, and peak memory of a training step",
        ("peft", "peft-inductor", "dense", "chunked", "lora"),
        ("peft", "lora"),
        _TRAINED,
    ),
    "compile": Suite(
        "a cold compilation of prefill and training step, and dorafx's share of it",
        ("peft-inductor", "lora"),
        ("peft-inductor", "lora"),
        "it compiles nothing, or not the training step",
    ),
    "host": Suite(
        "one token where the device waits for the host: one thread, hidden 64, as one graph and adapter layer by adapter layer",
        ("peft", "lora"),
        ("peft", "lora"),
        "what its step costs the host is another question",
    ),
    "pass": Suite(
        f"dorafx's pass alone over a model of {', '.join(map(str, PASS_LAYERS))} layers, as one graph",
        (),
        (),
        "it has no pass",
    ),
}
_COMPOSED = tuple(name for name in SUITES if name not in ("norm", "pass"))
_TRAINED_MODELS = ("model", "memory", "compile")
_SERVED = {
    # Suites that compile a whole model can also compile it in parts.
    "scope": ("model", "decode", "compile", "generate"),
    "compose": _COMPOSED,
    "codegen": _COMPOSED,
    "mode": tuple(name for name in SUITES if name != "pass"),
    "checkpointing": _TRAINED_MODELS,
    "micro_batches": _TRAINED_MODELS,
    "autocast": ("model", "decode"),
}
"""Option -> the suites in which it has an effect, for options without an effect in some suites."""
_DEFAULT_HIDDEN = {"norm": (1024, 2048, 4096, 8192)}
_DEFAULT_RANK = {"norm": (8, 64, 384)}


@dataclass(frozen=True)
class Settings:
    """The settings of the command line; empty tuples leave the choice to the suite.

    Raises:
        ValueError: a value is not allowed; the message names the allowed ones.
    """

    suites: tuple[str, ...]
    against: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    hidden: tuple[int, ...] = ()
    rank: tuple[int, ...] = ()
    tokens: int = 1024
    dtype: str = "float32"
    device: str = "cpu"
    layers: tuple[int, ...] = (4,)
    rounds: int = 2
    seconds: float = 0.5
    threads: int = 0
    checkpointing: bool = False
    micro_batches: int = 1
    autocast: bool = False
    mode: str = "default"
    codegen: str = "inductor"
    compose: str = "auto"
    scope: str = "model"
    weights: str = "dense"

    def __post_init__(self) -> None:
        if not self.suites:
            raise ValueError(f"bench: name a suite: {', '.join(SUITES)}")
        for suite in self.suites:
            _one_of("bench", suite, SUITES)
            anchors_of(suite, self.against)
        _one_of("--dtype", self.dtype, DTYPES)
        _one_of("--mode", self.mode, MODES)
        _one_of("--compose", self.compose, COMPOSE)
        if "compose" in self.suites and self.compose not in _COMPOSE_ALONE:
            raise ValueError(
                f"--compose {self.compose} makes no sense in the suite compose, which has no products; allowed are "
                f"{', '.join(_COMPOSE_ALONE)}"
            )
        for name in ("tokens", "rounds", "micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        for name in ("hidden", "rank", "layers"):
            for value in getattr(self, name):
                if value < 1:
                    raise ValueError(f"--{name} must be at least 1, not {value}")
        if self.hidden and self.shapes:
            raise ValueError("--hidden and --shapes both name sizes; give one of them")
        if self.threads < 0:
            raise ValueError(f"--threads must be at least 1, or 0 for torch's own choice, not {self.threads}")
        if not 0 <= self.seconds < float("inf"):
            raise ValueError(f"--seconds must be a number of seconds, not {self.seconds}")
        if self.mode != "default" and self.codegen != "inductor":
            raise ValueError(
                f"--mode is Inductor's, and --codegen {self.codegen} leaves Inductor out; give one of them"
            )
        check_name(self.codegen)
        _one_of("--scope", self.scope, SCOPES)
        defaults = {known.name: known.default for known in fields(self)}
        for name, served in _SERVED.items():
            unsupported = [suite for suite in self.suites if suite not in served]
            value = getattr(self, name)
            if unsupported and value != defaults[name]:
                option = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
                raise ValueError(f"{option} goes with the suites {', '.join(served)}, not with {unsupported[0]}")
        if self.autocast and DTYPES[self.dtype].itemsize != 2:
            raise ValueError(f"--autocast is for --dtype bfloat16 or float16, not {self.dtype}")
        _one_of("--weights", self.weights, WEIGHTS)
        if self.weights != "dense" and (self.suites != ("norm",) or self.dtype == "float64"):
            raise ValueError(
                f"--weights {self.weights} goes with the suite norm alone, and with a dtype other than float64"
            )
        check_device(self.device)
        kernel = self.compose in ("triton", "triton_linear")
        if kernel and (torch.device(self.device).type != "cuda" or self.dtype == "float64"):
            # Otherwise the composition without a kernel would be measured instead.
            raise ValueError(f"--compose {self.compose} needs a CUDA device and a dtype other than float64")


@dataclass(frozen=True)
class Case:
    """One case to measure for every implementation: ``parameters`` go to the worker; ``work`` is the least work of each metric that
    has a limit."""

    suite: str
    label: str
    parameters: dict[str, Any]
    work: dict[str, Work] = field(default_factory=dict)


def anchors_of(suite: str, against: Sequence[str]) -> tuple[str, ...]:
    """The anchors to measure in a suite: the requested ones (``("none",)``: dorafx alone), or the suite's default.

    Raises:
        ValueError: an unknown anchor, or one that makes no sense in the suite.
    """
    known = SUITES[suite]
    if tuple(against) == ("none",):
        return ()
    for name in against:
        _one_of("--against", name, ANCHORS)
        if name not in known.allowed:
            raise ValueError(
                f"--against {name} makes no sense in the suite {suite} ({known.why}); allowed are {', '.join(known.allowed) or 'none'}"
            )
    return tuple(dict.fromkeys(against)) or known.default


def cases_of(suite: str, settings: Settings) -> list[Case]:
    """The cases of one suite.

    Raises:
        ValueError: shapes or sizes that the suite cannot take.
    """
    itemsize = DTYPES[settings.dtype].itemsize
    tokens = settings.tokens
    if suite in ("norm", "compose", "layer"):
        shapes = _weights(suite, settings)
        return _distinct(_operator_case(suite, shape, tokens, itemsize, settings.weights) for shape in shapes)
    if suite == "pass":
        sizes = (Size(hidden=64, layers=layers, rank=8, tokens=16) for layers in PASS_LAYERS)
        return [Case(suite, f"{size.layers} layers", {"size": asdict(size)}) for size in sizes]
    if suite == "host":
        size = Size(hidden=64, layers=HOST_LAYERS, rank=8, tokens=1)
        return [
            Case(suite, f"{HOST_LAYERS} layers, {label}", {"size": asdict(size), "scope": scope})
            for scope, label in (
                ("model", "one graph"),
                ("blocks", "block by block"),
                ("modules", "adapter layer by adapter layer"),
            )
        ]
    cases = []
    for name, size in _models(suite, settings):
        label = f"{name}, {size.layers} layers, r{size.rank}, {size.tokens} tokens"
        metrics: dict[str, Work] = {}
        if suite == "model":
            metrics = work.model_work(size, itemsize, settings.checkpointing, settings.micro_batches)
        elif suite == "decode":
            metrics = work.decode_work(size, itemsize)
        elif suite == "memory":
            one = {"d_out": size.intermediate, "d_in": size.hidden, "rank": size.rank, "tokens": tokens}
            cases.append(Case(suite, f"{size.intermediate}x{size.hidden} r{size.rank}, {tokens} tokens", one))
        cases.append(Case(suite, label, {"size": asdict(size)}, metrics))
    return _distinct(cases)


def _distinct(cases: Iterable[Case]) -> list[Case]:
    """The cases without repetitions."""
    distinct: dict[str, Case] = {}
    for case in cases:
        distinct.setdefault(case.label, case)
    return list(distinct.values())


def _operator_case(suite: str, shape: Shape, tokens: int, itemsize: int, weights: str) -> Case:
    d_out, d_in, rank = shape.d_out, shape.d_in, shape.rank
    suffix = f" ({shape.label})" if shape.label else ""
    if suite == "compose":
        label = f"{tokens}x{d_out}{suffix}"
        return Case(suite, label, {"tokens": tokens, "d_out": d_out}, work.compose_work(tokens, d_out, itemsize))
    parameters = {"d_out": d_out, "d_in": d_in, "rank": rank}
    if suite == "norm":
        label = f"{d_out}x{d_in} r{rank}{suffix}"
        if weights == "dense":
            return Case(suite, label, parameters, {"time": work.norm_work(d_out, d_in, rank, itemsize)})
        if d_in % (GROUPS[weights] or 1):
            raise ValueError(
                f"--weights {weights} has groups of {GROUPS[weights]} in a row, which do not divide {d_in}"
            )
        metrics = {"time": work.norm_work(d_out, d_in, rank, itemsize, packed_bytes(weights, d_out, d_in, itemsize))}
        return Case(suite, f"{label}, {weights}", {**parameters, "weights": weights}, metrics)
    label = f"{d_out}x{d_in} r{rank}, {tokens} tokens{suffix}"
    return Case(suite, label, {**parameters, "tokens": tokens}, work.layer_work(tokens, d_out, d_in, rank, itemsize))


def _weights(suite: str, settings: Settings) -> list[Shape]:
    """The distinct weights, each at every rank unless it specifies one."""
    shapes: list[Shape] = []
    for text in settings.shapes:
        preset = PRESETS.get(text.lower())
        named = [Shape(s.d_out, s.d_in, label=f"{text.lower()} {s.label}") for s in preset.shapes()] if preset else []
        shapes += named or [parse_shape(text)]
    if not settings.shapes:
        shapes = [Shape(d, d) for d in settings.hidden or _DEFAULT_HIDDEN.get(suite, (1024,))]
    if suite == "compose":  # what a composition costs does not depend on d_in and rank
        return list({s.d_out: Shape(s.d_out, 1, 1, s.label) for s in reversed(shapes)}.values())[::-1]
    ranks = settings.rank or _DEFAULT_RANK.get(suite, (128,))
    return [Shape(s.d_out, s.d_in, r, s.label) for s in shapes for r in ((s.rank,) if s.rank else ranks)]


def _models(suite: str, settings: Settings) -> list[tuple[str, Size]]:
    models = []
    for layers, rank in itertools.product(settings.layers or (4,), settings.rank or (128,)):
        common = {"layers": layers, "rank": rank, "tokens": settings.tokens}
        for text in settings.shapes:
            _one_of(f"--shapes in the suite {suite}", text.lower(), PRESETS)
            preset = asdict(PRESETS[text.lower()])
            models.append((text.lower(), Size(**{**preset, **common})))
        if not settings.shapes:
            models += [(f"hidden {d}", Size(hidden=d, **common)) for d in settings.hidden or (1024,)]
    return models


def _one_of(what: str, value: str, known: Any) -> None:
    if value not in known:
        raise ValueError(f"{what}: {value!r} is not one of {', '.join(known)}")


def check_device(text: str) -> None:
    """Raises:
    ValueError: neither the CPU nor a CUDA device that there is.
    """
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: {text!r} is not cpu, cuda or cuda:NUMBER")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device: {text!r}: torch finds {torch.cuda.device_count()} CUDA devices here; cpu is allowed"
        )
