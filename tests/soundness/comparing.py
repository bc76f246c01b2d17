"""Runs a program as it is and as dorafx rewrites it, and compares everything that a caller can tell.

The part below the mark is also printed with a program that fails, so that it can be run by itself.
"""

# -- the harness
from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from typing import Any

import torch

import dorafx
from dorafx.observation import Observation, compare, observe


@dataclass
class Verdict:
    """What a comparison found.

    Attributes:
        wrong: what differs; empty where nothing does.
        void: why there was nothing to compare: the original fails itself.
        excused: why a difference is none of dorafx's.
        records: what dorafx logged.
    """

    wrong: str = ""
    void: str = ""
    excused: str = ""
    records: list[Any] = field(default_factory=list)

    def __str__(self) -> str:
        return self.wrong or self.excused or self.void


class Void(Exception):
    """The original program fails."""


class Run:
    """Calls a model as one capture of it, and writes down what each call showed.

    Args:
        target: ``"original"``, ``"rewritten"``, or ``"stock"``: compiled without dorafx.
        options: of dorafx.
    """

    def __init__(
        self, model: Any, target: str, capture: str, codegen: str, dynamic: bool, options: dict[str, Any]
    ) -> None:
        self.model, self.capture, self.codegen, self.dynamic = model, capture, codegen, dynamic
        self.target, self.options = target, options
        self.calls: list[Observation] = []
        self.function: Any = None

    def captured(self, inputs: tuple[Any, ...]) -> Any:
        """The model as it is called. Captures keep what they see: what they captured is what their rewrite is held to."""
        rewritten = self.target == "rewritten"
        if self.capture == "dynamo":
            if self.target == "original":
                return self.model
            torch._dynamo.reset()
            if self.target == "stock":
                return torch.compile(self.model, backend=self.codegen, fullgraph=True, dynamic=self.dynamic)
            options = {"dorafx.codegen": self.codegen, **self.options}
            return torch.compile(self.model, backend="dorafx", fullgraph=True, dynamic=self.dynamic, options=options)
        if self.capture == "export":
            with torch.inference_mode(False), torch.enable_grad():
                exported = torch.export.export(self.model, inputs)
            return (dorafx.rewrite(exported) if rewritten else exported).module()
        if self.capture == "symbolic_trace":
            traced = torch.fx.symbolic_trace(self.model)
            return dorafx.rewrite(traced, *inputs) if rewritten else traced
        from torch.fx.experimental.proxy_tensor import make_fx

        names = [n for n, _ in self.model.named_parameters()]

        def functional(*arguments: Any) -> Any:
            values, parameters = arguments[: len(inputs)], arguments[len(inputs) :]
            return torch.func.functional_call(self.model, dict(zip(names, parameters)), values)

        graph: Any = make_fx(functional, tracing_mode="fake")(*inputs, *self.model.parameters())
        graph = dorafx.rewrite(graph) if rewritten else graph
        return lambda *values: graph(*values, *self.model.parameters())

    def __call__(
        self, *inputs: Any, mode: str = "grad", autocast: bool = False, write: int | None = None, summed: bool = False
    ) -> None:
        """One call.

        Args:
            mode: ``"grad"`` (and a backward), ``"no_grad"`` or ``"inference"``.
            autocast: to bfloat16.
            write: which output its caller writes to in place.
            summed: its caller sums the outputs, so that a gradient of one number, expanded, comes in; the outputs are seen as well.
        """

        def called(*values: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                if self.function is None:
                    self.function = self.captured(values)
                    torch.manual_seed(7)
                result = self.function(*values)
            tensors = list(result) if isinstance(result, (tuple, list)) else [result]
            if write is not None and write < len(tensors):
                tensors[write].detach().mul_(2.0)
            return [t.sum() for t in tensors] + [t.detach().clone() for t in tensors] if summed else result

        leaves = dict(self.model.named_parameters())
        seen = observe(called, inputs, leaves, mode, seed=7)
        if seen.raised and self.target == "original":
            raise Void(f"{seen.raised}: {seen.message}")
        self.calls.append(seen)


def ran(space: dict[str, Any], target: str, how: dict[str, Any], options: dict[str, Any] | None = None) -> list[Any]:
    """What every call of a program showed."""
    model = space["Model"]()
    run = Run(model, target, **how, options=options or {})
    space["drive"](model, run)
    return run.calls


@contextlib.contextmanager
def sampled(samples: bool) -> Any:
    """Without samples a kept norm is watched as it is on a GPU."""
    from dorafx.runtime import watch

    previous = watch.is_read
    if not samples:
        watch.is_read = lambda tensor: False
    try:
        yield
    finally:
        watch.is_read = previous


@contextlib.contextmanager
def instead(space: dict[str, Any], name: str, other: Any) -> Any:
    """What a program calls by a name is another function."""
    plain = space[name]
    space[name] = other
    try:
        yield
    finally:
        space[name] = plain


def other_operands(space: dict[str, Any], eps: float = 0.0, exact: bool = False, seed: int = 5) -> Any:
    """Operands that differ by a relative ``eps`` (other ones for another ``seed``), or that are in fp64 whatever they are in."""
    plain = space["R"]

    def R(name: str, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        value = plain(name, *shape, dtype=dtype).double()
        noise = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
        return (value * (1 + 2 * eps * noise)).to(torch.float64 if exact else dtype)

    return instead(space, "R", R)


def no_checkpoint(space: dict[str, Any]) -> Any:
    """What is to be computed again is kept."""
    return instead(space, "checkpoint", lambda body, *arguments, use_reentrant=False: body(*arguments))


def differing(
    wanted: list[Any], actual: list[Any], tolerance: float, exact: list[Any] | None = None, gradients: float = 0.0
) -> dict[str, float]:
    """Sentences that say what differs, each with the largest error of its call.

    Args:
        tolerance: of values and gradients.
        exact: what the calls show in fp64, where both are held to that.
        gradients: a larger tolerance of gradients.
    """
    found: dict[str, float] = {}
    for k, (one, other) in enumerate(zip(wanted, actual)):
        comparison = compare(one, other, tolerance, exact[k] if exact else None)
        found |= {
            f"call {k}: {sentence}": comparison.error
            for sentence in comparison.differences
            if not _rounds(sentence, one, other, gradients, tolerance if tolerance < 1e-6 else 0.0)
        }
    return found


def _rounds(sentence: str, seen: Observation, other: Observation, tolerance: float, negligible: float) -> bool:
    """Whether gradients of a leaf differ by no more than sums that are made in its dtype do, or, where they are what remains of
    numbers that cancel, than the call's largest gradient is rounded by. Both may be nothing but rounding (a column of one number,
    over its norm, is 1 whatever it is): less than a part ``negligible`` of the largest."""
    match = re.match(r"the gradient of (\w+) (?:differs by|is) (\S+) o(?:f|ff) ", sentence)
    one, two = (of.gradients.get(match[1]) for of in (seen, other)) if match else (None, None)
    if match is None or one is None or two is None:
        return False
    eps = torch.finfo(one.dtype).eps
    if float(match[2]) <= max(8 * eps, tolerance):
        return True
    # Programs are made of numbers about one.
    gradients = [g.double().abs().nan_to_num(0.0, 0.0) for g in seen.gradients.values() if g is not None and g.numel()]
    largest = max(1.0, *(g.max().item() for g in gradients))
    if max(t.double().nan_to_num(0.0).abs().max().item() for t in (one, two)) <= negligible * largest:
        return True
    return (one.double() - two.double()).nan_to_num(0.0).abs().max().item() <= 64 * eps * largest


def compared(
    space: dict[str, Any],
    capture: str = "dynamo",
    codegen: str = "eager",
    dynamic: bool = False,
    norm: str = "auto",
    norm_reuse: str = "auto",
    compose: str = "auto",
    samples: bool = True,
    tolerance: float = 1e-9,
    gradients: float = 0.0,
) -> Verdict:
    """Run a program's original and its rewrite and compare them.

    Args:
        space: what the program's source defines: ``Model`` and ``drive``.
        capture, codegen, dynamic, norm, norm_reuse, compose, samples, tolerance, gradients: see ``How``.
    """
    how = {"capture": capture, "codegen": codegen, "dynamic": dynamic}
    options = {"dorafx.norm": norm, "dorafx.norm_reuse": norm_reuse, "dorafx.compose": compose}
    try:
        wanted = ran(space, "original", how)
    except Exception as error:  # the original fails, or what changes its parameters between calls
        return Verdict(void=str(error))
    dorafx.rewrite_log().clear()
    try:
        with sampled(samples):
            got = ran(space, "rewritten", how, options)
    except Exception as error:
        # What changes parameters between calls may fail for a graph of Dynamo's alone (``swap_tensors``, for its weak references).
        try:
            ran(space, "stock", how)
        except Exception as stock:
            if str(stock) == str(error):
                return Verdict(excused=f"{codegen} alone does the same")
        raise
    verdict = Verdict(records=list(dorafx.rewrite_log().records))
    different = differing(wanted, got, tolerance, gradients=gradients)
    if not different:
        return verdict
    if tolerance > 1e-5:
        with contextlib.suppress(Exception), other_operands(space, exact=True):
            different = differing(wanted, got, tolerance, ran(space, "original", how), gradients)
    verdict.wrong = "; ".join([*different][:5])
    rounding = all(" differs by " in sentence for sentence in different)
    numbers = all(" differs by " in sentence or " off in the root mean square" in sentence for sentence in different)
    if different and hasattr(space["Model"], "body"):
        # A checkpoint keeps autograd from seeing that a tensor which it has saved is written to: eager gradients are wrong then.
        with no_checkpoint(space):
            try:
                ran(space, "original", how)
            except Void as error:
                return Verdict(void=f"without a checkpoint: {error}")
    # What the same compiler does without dorafx is not dorafx's doing: Dynamo refuses some programs, and bodies of checkpoints go
    # through AOT autograd in either.
    raises = all(sentence.endswith(_RAISES) for sentence in different)
    through_aot = raises or hasattr(space["Model"], "body")
    for compiler in dict.fromkeys((codegen, "aot_eager") if through_aot else (codegen,)):
        if capture == "dynamo" and different:
            calls = ran(space, "stock", {**how, "codegen": compiler})
            alone = differing(wanted, calls, tolerance, gradients=gradients)
            subjects = set(map(_subject, alone))
            different = {sentence: by for sentence, by in different.items() if _subject(sentence) not in subjects}
            if not different:
                return Verdict(excused=f"{compiler} alone does the same", records=verdict.records)
            verdict.wrong = "; ".join([*different][:5])
            if compiler == "inductor" and numbers and max(different.values()) <= 4 * max(alone.values(), default=0.0):
                # It leaves out a rounding to half precision and back, or not, by what it computes together.
                with sampled(samples):
                    unfused = ran(space, "rewritten", {**how, "codegen": "aot_eager"}, options)
                if not differing(wanted, unfused, tolerance, gradients=gradients):
                    return Verdict(excused="inductor alone leaves out roundings", records=verdict.records)
    if rounding and different:
        # A program that makes the last digit of an operand one of its result's first.
        with contextlib.suppress(Exception), other_operands(space, 1e-4 * tolerance):
            moved = differing(wanted, ran(space, "original", how), 0.0)
            if max(different.values()) < 10 * max(moved.values(), default=0.0):
                return Verdict(excused="ill-conditioned", records=verdict.records)
    if numbers and different and tolerance > 1e-5:
        # A comparison (``y > 1``) of numbers that half precision rounds to one side or the other: the original itself, with operands
        # moved by a unit in the last place of it, comes as far.
        for seed in range(16):
            with contextlib.suppress(Exception), other_operands(space, tolerance / 16, seed=seed):
                moved = differing(wanted, ran(space, "original", how), 0.0)
                if max(different.values()) < 2 * max(moved.values(), default=0.0):
                    return Verdict(excused="ill-conditioned", records=verdict.records)
    return verdict


_RAISES = " where the original raises no error"


def _subject(sentence: str) -> str:
    """What a sentence is of. Of an error it is its kind, without the compiler's name."""
    if sentence.endswith(_RAISES):
        return re.sub(r"(BackendCompilerFailed): .*", r"\1", sentence.removesuffix(_RAISES))
    return re.split(r" differs by | is \S+ off in the root mean square", sentence)[0]
