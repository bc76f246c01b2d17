"""Translation validation: run what a rewrite replaces and its replacement on random data, in fp64, forward and backward.

The region of a rewrite reaches from the values that its term consists of (activations, parameters) to the rewritten node. Both
sides are computed from the same random values; every cast to a floating dtype becomes one to fp64, so that any difference is one
of the programs, not of rounding.

The whole graph as it was captured is compared too (:mod:`dorafx.graph_check`): only there do layouts, aliases, writes, random numbers
and dropped terms show. If the graph differs but no region does, each rewrite is applied alone, and those that then differ are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from dorafx._compat.autograd import below_autocast
from dorafx._compat.tensors import size_hint
from dorafx.graph_check import TOLERANCE, GraphCheck, Run, compare_calls, crosses_dtensors, in_double
from dorafx.graphs.inputs import is_leaf
from dorafx.graphs.operators import canonical_name
from dorafx.graphs.provenance import site_of
from dorafx.graphs.tensors import tensor_of
from dorafx.lift import leaves_of
from dorafx.lift.values import FLOAT_DTYPES
from dorafx.log import NormCounters
from dorafx.match import Matches, Reason, ReasonKind
from dorafx.observation import ERROR_FACTOR, distance, random_values
from dorafx.plan import CompositionPlan, NormPlan, RewritePlan
from dorafx.rewriter import CannotEmit, HoistedNorm, apply_plan
from dorafx.rewriter.hoist import DENSE, NORM
from dorafx.runtime import with_prologue
from dorafx.runtime.store import NormStore

_TO_DOUBLE = frozenset(("double", "float", "half", "bfloat16", "dequantize"))


@dataclass(frozen=True)
class Check:
    """The result of the validation of one rewrite.

    Attributes:
        site: the module's name; empty for a plain function.
        pattern: the canonical form, or ``"norm_only"``; ``"whole graph"`` for all rewrites of a graph together, and ``"norm
            prologue"`` for repeated calls with the norms taken before the graph.
        error: largest difference of outputs and gradients relative to the largest value, in fp64; inf if they could not be
            compared.
        reason: what is wrong; empty if nothing is.
        kind: of the reason; None if nothing is wrong.
    """

    site: str
    pattern: str
    error: float
    reason: str = ""
    kind: ReasonKind | None = None

    @property
    def passed(self) -> bool:
        return not self.reason


def _failed(site: str, pattern: str, error: float, why: Reason) -> Check:
    return Check(site, pattern, error, why.text, why.kind)


def _differs(what: str, node: fx.Node | None = None) -> Reason:
    return Reason(f"verification: {what}", node, kind=ReasonKind.VERIFICATION)


def _not_run(what: str, node: fx.Node | None = None) -> Reason:
    return Reason(f"not verified: {what}", node, kind=ReasonKind.NOT_VERIFIED)


class Validation:
    """Validates the rewrites of one graph, in the grad mode that is active.

    Args:
        gm: the graph as it was captured.
        checks: receives the results.
    """

    def __init__(self, gm: fx.GraphModule, checks: list[Check]) -> None:
        self.checks = checks
        self._graph = GraphCheck(gm)

    def failures(
        self,
        pure: fx.GraphModule,
        matches: Matches,
        plan: RewritePlan,
        new: fx.GraphModule,
        copied: dict[fx.Node, fx.Node],
    ) -> list[Reason]:
        """The reasons to refuse candidates, each with the node that identifies the candidate.

        Args:
            pure: the graph that was matched.
            matches, plan: its candidates, and the decisions about them.
            new: the rewritten graph.
            copied: node of ``pure`` -> the node that stands for it in ``new``.
        """
        failed: list[Reason] = []
        for node, pattern, terms in _regions(plan):
            if node not in copied:
                continue  # removed, as nothing reads it any more
            error, why = Region(node, copied[node], leaves_of(matches.lift, terms), copied).check()
            if why is None:
                self.checks.append(Check(site_of(node), pattern, error))
            else:
                self.checks.append(_failed(site_of(node), pattern, error, why))
                failed.append(why)
        failed = failed or self._imprecise_norms(matches, plan, new, copied)
        return failed or self._graph_failures(pure, matches, plan, new)

    def _imprecise_norms(
        self, matches: Matches, plan: RewritePlan, new: fx.GraphModule, copied: dict[fx.Node, fx.Node]
    ) -> list[Reason]:
        """Norms that are computed in lower precision than the original's. In outputs that are rounded themselves this error does not
        stand out, though it affects every token."""
        nodes = self._graph.gm.graph.nodes
        devices = {"cpu"} | {tensor.device.type for node in nodes if (tensor := tensor_of(node)) is not None}
        if any(torch.is_autocast_enabled(device) for device in devices - {"meta"}) or any(
            getattr(node.target, "__name__", "") == "_enter_autocast" for node in nodes
        ):
            return []  # regions are run without autocast, where the original is more precise than in the program
        failed: list[Reason] = []
        for node in new.graph.nodes:
            norm = plan.norms.get(node.meta.get(NORM))
            if norm is None or norm.packed is not None or not norm.factors.info.sites:
                continue
            info = norm.factors.info
            if info.expr is None:
                continue
            site = info.sites[0]
            region = Region(site, node, leaves_of(matches.lift, [info.expr]), copied, rounded=True)
            try:
                original_error, error = region.errors()
            except Exception:  # an operator does not support these dtypes; the check of the whole graph remains
                continue
            if error > ERROR_FACTOR * original_error:
                what = f"the norm is {error:.1e} off in its own dtypes, more than {ERROR_FACTOR} times the original's {original_error:.1e}"
                failed.append(_differs(what, site))
                self.checks.append(_failed(site_of(site), "norm_only", error, failed[-1]))
        return failed

    def _graph_failures(
        self, pure: fx.GraphModule, matches: Matches, plan: RewritePlan, new: fx.GraphModule
    ) -> list[Reason]:
        if any(DENSE in node.meta for node in new.graph.nodes):
            # A library may multiply by the codes, which do not belong to the random weight: only the regions are checked.
            self.checks.append(Check("", "whole graph (not run: quantised weights)", 0.0))
            return []
        if crosses_dtensors(self._graph.gm):
            self.checks.append(Check("", "whole graph (not run: DTensors)", 0.0))
            return []
        why, error, run = self._compared(new)
        if why is None:
            self.checks.append(Check("", "whole graph", error))
            return []
        candidates = _candidates(matches, plan)
        guilty: list[tuple[fx.Node, str, Reason]] = []
        for node, pattern, part in candidates if run is not None and len(candidates) > 1 else ():
            try:
                rewritten, _ = apply_plan(pure, matches, part)
            except CannotEmit as refused:
                guilty.append((node, pattern, refused.reason))
                continue
            reason, _, _ = self._compared(rewritten, [run] if run is not None else None)
            if reason is not None:
                guilty.append((node, pattern, reason))
        if any(pattern == "norm_only" for _, pattern, _ in guilty):
            # A composition reads its norm, so its difference may be the norm's. If it is wrong itself, the next round shows it.
            guilty = [g for g in guilty if g[1] == "norm_only"]
        guilty = guilty or [(node, pattern, why) for node, pattern, _ in candidates]
        self.checks.extend(_failed(site_of(node), pattern, error, why) for node, pattern, why in guilty)
        return [replace(why, node=node) for node, _, why in guilty]

    def _compared(self, new: fx.GraphModule, runs: list[Run] | None = None) -> tuple[Reason | None, float, Run | None]:
        """Why a graph may not replace the original (None if it may), the largest difference, and the run that differs."""
        try:
            comparison, run = self._graph.compare(new, runs)
        except Exception as failed:
            return _not_run(f"the graph cannot be run on random values: {_line(failed)}"), math.inf, None
        return (
            (_differs(f"{run}, {comparison.differences[0]}") if comparison.differences else None),
            comparison.error,
            run,
        )


def _regions(plan: RewritePlan) -> list[tuple[fx.Node, str, list[Any]]]:
    """End, pattern and terms of the region of each rewrite."""
    regions = [(c.match.node, c.match.pattern, [c.match.expr]) for c in plan.compositions]
    for norm in plan.norms.values():
        info = norm.factors.info
        regions += [(node, "norm_only", [info.expr]) for node in info.sites if info.expr is not None]
    return regions


def _candidates(matches: Matches, plan: RewritePlan) -> list[tuple[fx.Node, str, RewritePlan]]:
    """Each rewrite that can be refused: its node, its pattern, and a plan of it alone (of a composition, with its norms)."""

    def plan_of(norms: dict[int, NormPlan], compositions: list[CompositionPlan]) -> RewritePlan:
        return RewritePlan(norms, compositions, part=plan.part)

    candidates: list[tuple[fx.Node, str, RewritePlan]] = []
    for atom_id, norm in plan.norms.items():
        if norm.factors.info.sites:
            candidates.append((norm.factors.info.sites[0], "norm_only", plan_of({atom_id: norm}, [])))
    for c in plan.compositions:
        used = {atom.id for atom in matches.lift.norms_in(c.match.expr)} | {c.match.norm.atom.id}
        norms = {atom_id: norm for atom_id, norm in plan.norms.items() if atom_id in used}
        candidates.append((c.match.node, c.match.pattern, plan_of(norms, [c])))
    return candidates


def check_prologue(
    gm: fx.GraphModule, new: fx.GraphModule, norms: tuple[HoistedNorm, ...], reuse: str, few_tokens: bool
) -> Check:
    """Compare repeated calls of a program whose norms are computed before its graph with the original.

    Args:
        gm: the graph as it was captured.
        new: the rewritten one, whose last inputs are the norms.
        norms, reuse, few_tokens: as for :func:`dorafx.runtime.with_prologue`.
    """

    def run(*inputs: Any) -> Any:
        # Interpreted: a graph with bodies cannot be called directly.
        return fx.Interpreter(new).run(*inputs)

    if any(node.target is torch.ops.dorafx.row_norm_quantized.default for n in norms for node in n.graph.nodes):
        return Check("", "norm prologue (not run: quantised weights)", 0.0)
    if crosses_dtensors(gm):
        return Check("", "norm prologue (not run: DTensors)", 0.0)
    call = with_prologue(run, norms, reuse, few_tokens, NormStore(NormCounters()))
    try:
        difference, error = compare_calls(gm, call)
    except Exception as failed:
        why = _not_run(f"the graph cannot be run on random values: {_line(failed)}")
        return _failed("", "norm prologue", math.inf, why)
    return _failed("", "norm prologue", error, _differs(difference)) if difference else Check("", "norm prologue", 0.0)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


class Region:
    """The original region that ends in ``node``, and its replacement that ends in ``replacement``.

    Args:
        leaves: nodes of the original graph where the region begins; it also begins at the graph's inputs.
        copied: original node -> the node of the new graph that stands for it.
        rounded: whether the random values are rounded to the leaves' dtypes.
    """

    def __init__(
        self,
        node: fx.Node,
        replacement: fx.Node,
        leaves: set[fx.Node],
        copied: dict[fx.Node, fx.Node],
        rounded: bool = False,
    ) -> None:
        self.rounded = rounded
        self.native = False
        self.node = node
        self.replacement = replacement
        self.leaves = leaves - {node}
        self.originals = {copy: original for original, copy in copied.items()}
        self._values: dict[fx.Node, Any] = {}
        self._generator = torch.Generator().manual_seed(0)

    def check(self) -> tuple[float, Reason | None]:
        """The largest difference of outputs and gradients, and the reason to refuse the rewrite, if there is one."""
        try:
            with torch.random.fork_rng(), torch.enable_grad(), below_autocast():
                expected = self._run(self.node, lambda n: n)
                actual = self._run(self.replacement, self.originals.get)
                error, what = self._compare(expected, actual)
        except Exception as failed:
            return math.inf, _not_run(_line(failed), self.node)
        if error <= TOLERANCE:
            return error, None
        by = "" if math.isinf(error) else f" by {error:.1e}"
        return error, _differs(f"{what} differ{by} from the original's in fp64", self.node)

    def errors(self) -> tuple[float, float]:
        """The errors of the original and of the replacement: each in its own dtypes compared with itself in fp64, as relative root mean
        squares; a unit in the last place of its dtype is added to the original's."""
        with torch.random.fork_rng(), torch.no_grad(), below_autocast():
            ends = ((self.node, lambda n: n), (self.replacement, self.originals.get))
            exact = [self._run(*end) for end in ends]
            self.native = True
            original, replacement = (self._run(*end) for end in ends)
        rounding = torch.finfo(original.dtype).eps
        return distance(original.double(), exact[0]) + rounding, distance(replacement.double(), exact[1])

    def _compare(self, expected: torch.Tensor, actual: torch.Tensor) -> tuple[float, str]:
        if expected.shape != actual.shape:
            return math.inf, f"shapes ({tuple(actual.shape)} and {tuple(expected.shape)})"
        worst = (_difference(actual, expected), "outputs")
        trained = [v for v in self._values.values() if isinstance(v, torch.Tensor) and v.requires_grad]
        if expected.requires_grad != actual.requires_grad:
            return math.inf, "gradient flows"
        if not expected.requires_grad:
            return worst
        weights = torch.randn(expected.shape, dtype=torch.float64, generator=self._generator).to(expected.device)
        gradients = [
            torch.autograd.grad((side * weights).sum(), trained, allow_unused=True) for side in (expected, actual)
        ]
        for one, other in zip(*gradients):
            if (one is None) != (other is None):
                return math.inf, "gradient flows"
            if one is not None:
                worst = max(worst, (_difference(other, one), "gradients"))
        return worst

    # -- running a region ---------------------------------------------------------------------------------------------

    def _run(self, end: fx.Node, original: Callable[[fx.Node], fx.Node | None]) -> torch.Tensor:
        needed = self._needed(end, original)
        values: dict[fx.Node, Any] = {}
        modes = [True]
        for node in end.graph.nodes:
            modes = _grad_modes(node, modes)
            if node not in needed:
                continue
            source = original(node)
            if is_leaf(node) or (source is not None and source in self.leaves):
                assert source is not None
                value = self._value(source)
                values[node] = value.to(_dtype_of(source)) if self.native and isinstance(value, torch.Tensor) else value
                continue
            with torch.set_grad_enabled(modes[-1]):
                values[node] = (
                    self._quantized_norm(node, values) if DENSE in node.meta else _call(node, values, self.native)
                )
            if node is end:
                break
        result: torch.Tensor = values[end]
        return result

    def _quantized_norm(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """The norm of a quantised weight, computed from the random value that stands for its dequantisation: there are no codes for
        random values in fp64. Whether blocks are dequantised as the library does is not checked here."""
        left, right = (values[factor] for factor in _factors(node))
        weight = self._value(next(n for n in self.node.graph.nodes if n.name == node.meta[DENSE]))
        return torch.ops.dorafx.row_norm.default(weight, left, right, node.args[5])

    def _needed(self, end: fx.Node, original: Callable[[fx.Node], fx.Node | None]) -> set[fx.Node]:
        needed: set[fx.Node] = set()
        stack = [end]
        while stack:
            node = stack.pop()
            if node in needed:
                continue
            needed.add(node)
            if original(node) not in self.leaves:
                stack.extend(_factors(node) if DENSE in node.meta else node.all_input_nodes)
        return needed

    def _value(self, node: fx.Node) -> Any:
        """The value of a leaf: random where it is a floating tensor, as traced where it is a number."""
        if node not in self._values:
            traced = node.meta.get("example_value", node.meta.get("val"))
            self._values[node] = self._random(traced) if isinstance(traced, torch.Tensor) else size_hint(traced)
        return self._values[node]

    def _random(self, traced: torch.Tensor) -> torch.Tensor:
        shape = [size_hint(size) for size in traced.shape]
        if traced.dtype not in FLOAT_DTYPES:
            return torch.zeros(shape, dtype=traced.dtype, device=traced.device)
        value = random_values(shape, self._generator).to(traced.device)
        if self.rounded:
            value = value.to(traced.dtype).double()
        return value.requires_grad_(traced.requires_grad)


def _factors(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    left, right = node.args[3:5]
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    return left, right


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if not expected.numel():
        return 0.0
    error = (actual - expected).abs().max().item() / max(expected.abs().max().item(), 1e-30)
    return math.inf if math.isnan(error) else error


def _grad_modes(node: fx.Node, modes: list[bool]) -> list[bool]:
    name = canonical_name(node)
    if name == "set_grad_enabled":
        return [*modes[:-1], bool(node.args[0])]
    if name == "enter_inference_mode":
        return [*modes, modes[-1] and not node.args[0]]
    if name == "exit_inference_mode" and len(modes) > 1:
        return modes[:-1]
    return modes


def _dtype_of(node: fx.Node) -> torch.dtype:
    tensor = tensor_of(node)
    assert tensor is not None
    return tensor.dtype


def _call(node: fx.Node, values: dict[fx.Node, Any], native: bool) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    if not native:
        args, kwargs = in_double(args), in_double(kwargs)
    if node.op == "call_method":
        name = "double" if node.target in _TO_DOUBLE and not native else str(node.target)
        return getattr(args[0], name)(*args[1:], **kwargs)
    if node.op != "call_function":
        raise TypeError(f"a region with a {node.op}")
    return node.target(*args, **kwargs)  # type: ignore[operator]
