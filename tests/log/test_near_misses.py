"""For each kind of reason a program that nearly has it, and of which the log says something else: what it says is what is the case."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import outside_programs
import pytest
import torch
import torch.nn.functional as F
from negative_programs import NEGATIVES
from programs import Layer, S, lora
from subclasses import Casting
from test_kinds import (
    _FAILED,
    Patch,
    Scaled,
    adapted,
    captured,
    compiled,
    drawn,
    fails,
    layer,
    norm_of_shards,
    with_own_pattern,
)
from torch import fx

import dorafx
from dorafx import rewrite_log
from dorafx.backend import dorafx as backend
from dorafx.match import ReasonKind, registry

WHOLE = "whole"
"""What is said of a layer that is rewritten without a reason."""
Run = Callable[[Patch], None]
NEAR: dict[ReasonKind, tuple[Run, set[str]]] = {}


def instead(kind: ReasonKind, *said: str) -> Callable[[Run], Run]:
    """Register what nearly has a reason of a kind, and the kinds that the log has instead, or :data:`WHOLE`."""

    def register(run: Run) -> Run:
        NEAR[kind] = run, set(said)
        return run

    return register


def near(kind: ReasonKind, *said: str) -> Callable[[Any], Any]:
    """The same of what is compiled as it is."""

    def register(program: Any) -> Any:
        NEAR[kind] = (lambda patch: compiled(program)), set(said)
        return program

    return register


def scaled(p: Layer, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    return p.m / n * (F.linear(x, p.W) + S * lora(p, x))


@near(ReasonKind.OTHER_NORM, WHOLE)
def the_second_order_by_name(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return scaled(p, x, torch.linalg.vector_norm(adapted(p), ord=2, dim=1))


@near(ReasonKind.UNKNOWN_NORM, WHOLE)
def a_root_of_a_mean(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return scaled(p, x, adapted(p).square().mean(1).sqrt())


@near(ReasonKind.SQUARES_READ, WHOLE)
def squares_with_an_epsilon(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return scaled(p, x, (adapted(p).square().sum(1) + 1e-6).sqrt())


@near(ReasonKind.SCALED_WEIGHT, WHOLE)
def a_weight_scaled_by_a_number(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return p.m / (2 * p.W + S * p.B @ p.A).norm(dim=1) * (2 * F.linear(x, p.W) + S * lora(p, x))


@near(ReasonKind.OTHER_SUMMANDS, WHOLE)
def the_same_weight_twice(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return scaled(p, x, (0.25 * p.W + S * p.B @ p.A + 0.75 * p.W).norm(dim=1))


@near(ReasonKind.BATCHED_WEIGHTS, "unknown-consumer")
def one_expert(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return scaled(p, x, (p.W[None] + S * (p.B[None] @ p.A[None])).norm(dim=-1)[0])


@instead(ReasonKind.SYMBOLIC_SHAPE, WHOLE)
def _(patch: Patch) -> None:
    p = Layer()
    options = {"dorafx.codegen": "eager"}
    torch.compile(lambda x: layer(p, x), backend=backend, dynamic=True, options=options)(drawn(2, 5, 12))


@near(ReasonKind.NORM_IN_OPERATOR, WHOLE)
def one_norm_in_an_operator(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p.m_column * F.normalize(adapted(p), dim=1))


@near(ReasonKind.HIDDEN_DELTA, WHOLE)
def a_delta_that_is_moved(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return scaled(p, x, (p.W + S * (p.A.t() @ p.B.t()).t().contiguous().reshape(p.W.shape)).norm(dim=1))


@near(ReasonKind.GROUPED_CONVOLUTION, "hidden-delta")
def rows_that_are_rolled(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return scaled(p, x, (p.W + S * (p.B @ p.A).roll(1, 0)).norm(dim=1))


@near(ReasonKind.ROUNDED_PRODUCT, WHOLE)
def factors_that_are_rounded(p: Layer, x: torch.Tensor) -> torch.Tensor:
    a = p.A.bfloat16().double()
    return p.m / (p.W + S * p.B @ a).norm(dim=1) * (F.linear(x, p.W) + S * F.linear(F.linear(x, a), p.B))


@near(ReasonKind.UNKNOWN_DELTA, WHOLE)
def a_kronecker_product_that_is_one_of_factors(p: Layer, x: torch.Tensor) -> torch.Tensor:
    """Of a column and a row."""
    column, row = p.B[:, :1], p.A[:1]
    v = p.W + column * row
    return p.m / v.norm(dim=1) * (F.linear(x, p.W) + F.linear(F.linear(x, row), column))


@near(ReasonKind.DELTA_PER_TOKEN, "hidden-delta")
def a_delta_for_all_tokens(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return scaled(p, x, (p.W + S * (p.B @ p.A)).expand(3, -1, -1)[0].norm(dim=1))


@instead(ReasonKind.MIXED_DTYPES, WHOLE)
def _(patch: Patch) -> None:
    """The factors are cast before they are multiplied."""
    compiled(lambda p, x: scaled(p, x, (p.W + S * (p.B.float() @ p.A.float()).double()).norm(dim=1)))


@near(ReasonKind.VANISHING_TERM, WHOLE)
def a_small_term(p: Layer, x: torch.Tensor) -> torch.Tensor:
    v = adapted(p) + 1e-9 * (p.B2 @ p.A2)
    return p.m / v.norm(dim=1) * (F.linear(x, p.W) + S * lora(p, x) + 1e-9 * F.linear(F.linear(x, p.A2), p.B2))


@near(ReasonKind.SCALES_NOTHING, "norm-is-output")
def a_norm_alone(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return adapted(p).norm(dim=1)


@near(ReasonKind.NORM_IS_OUTPUT, WHOLE)
def a_norm_beside_the_layer(p: Layer, x: torch.Tensor) -> Any:
    n = adapted(p).norm(dim=1)
    return scaled(p, x, n), n


@near(ReasonKind.UNKNOWN_CONSUMER, WHOLE)
def a_bound_on_the_norm(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return scaled(p, x, adapted(p).norm(dim=1).clamp(1e-6, 1e6))


@near(ReasonKind.NO_PRODUCT, WHOLE)
def the_weight_by_way_of_a_view(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return p.m / adapted(p).norm(dim=1) * (F.linear(x, p.W.t().contiguous().t()) + S * lora(p, x))


@near(ReasonKind.UNEQUAL_SCALING, WHOLE)
def the_same_scaling_apart(p: Layer, x: torch.Tensor) -> torch.Tensor:
    g = p.m / adapted(p).norm(dim=1)
    return g * F.linear(x, p.W) + lora(p, x) * (S * g)


@near(ReasonKind.OTHER_PARTS, WHOLE)
def all_parts_and_a_bias(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return scaled(p, x, adapted(p).norm(dim=1)) + p.bias


@instead(ReasonKind.FORM, WHOLE)
def _(patch: Patch) -> None:
    """A pattern of one's own has nothing to say where another form knows the layer."""
    with_own_pattern(patch)
    compiled(layer)


@near(ReasonKind.NOTHING_ELSE, WHOLE)
def the_right_axis(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p.m_column * adapted(p) / adapted(p).norm(dim=1, keepdim=True))


@instead(ReasonKind.MERGED_CHEAPER, WHOLE)
def _(patch: Patch) -> None:
    """Of few tokens."""
    with torch.no_grad():
        compiled(lambda p, x: F.linear(x, p.m_column * F.normalize(adapted(p), dim=1)), torch.randn(3, 12).double())


@instead(ReasonKind.MERGED_ROUNDS_ONCE, WHOLE)
def _(patch: Patch) -> None:
    """All in one dtype."""

    def program(p: Layer, x: torch.Tensor) -> torch.Tensor:
        v = p.W.float() + p.B.float() @ p.A.float()
        return F.linear(x.float(), p.m.float()[:, None] * (v / v.norm(dim=1, keepdim=True)))

    compiled(program)


@near(ReasonKind.WRITTEN_IN_PLACE, WHOLE)
def a_result_that_is_written(p: Layer, x: torch.Tensor) -> torch.Tensor:
    y = F.linear(x, p.W) + S * lora(p, x)
    y *= p.m / adapted(p).norm(dim=1)
    return y


@instead(ReasonKind.INFERENCE_TENSOR, WHOLE)
def _(patch: Patch) -> None:
    """A weight that was made in inference mode, and no gradient is needed."""
    p = Layer()
    usual = p.W.detach().clone()
    del p.W
    with torch.inference_mode():
        p.W = usual.clone()
        options = {"dorafx.codegen": "eager"}
        torch.compile(lambda x: layer(p, x), backend=backend, options=options)(drawn(3, 12).detach())


@instead(ReasonKind.VIEW_WITHOUT_GRADIENT, "other-parts")
def _(patch: Patch) -> None:
    """The view is made where gradients are recorded."""

    def program(p: Layer, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            down = p.A.t()
            return (p.W + S * (p.B @ down.t())).pow(2).sum(1).rsqrt() * F.linear(x, p.W)

    with torch.no_grad():
        compiled(program)


@instead(ReasonKind.STRIDES, WHOLE)
def _(patch: Patch) -> None:
    dorafx.rewrite(captured(Layer(), drawn(5, 12)))


@instead(ReasonKind.PLACEMENTS, "norm-is-output")
def _(patch: Patch) -> None:
    """Sharded by rows, each device has whole norms."""
    norm_of_shards(0, 0, None)


@instead(ReasonKind.ZERO3, WHOLE)
def _(patch: Patch) -> None:
    p = Layer()
    p.A.ds = 0  # type: ignore[attr-defined]
    torch.compile(lambda x: layer(p, x), backend=backend, options={"dorafx.codegen": "eager"})(drawn(5, 12))


@instead(ReasonKind.TRANSFORMED, WHOLE)
def _(patch: Patch) -> None:
    """Another layer's transform."""
    compiled(lambda p, x: layer(p, torch.func.vmap(torch.sin)(x.detach())))


@instead(ReasonKind.UNKNOWN_SHAPES, WHOLE)
def _(patch: Patch) -> None:
    """A graph without shapes that can be found: the numbers in it are Python's."""
    dorafx.rewrite(fx.symbolic_trace(Scaled(0.5)), torch.randn(3, 6))


@instead(ReasonKind.TENSOR_SUBCLASS, WHOLE)
def _(patch: Patch) -> None:
    p = Layer()
    codes, scale = torch.randint(0, 16, (10, 12), dtype=torch.uint8), torch.rand(10, 1).double()
    packed = torch.nn.Parameter(Casting(codes, scale), requires_grad=False)

    def program(x: torch.Tensor) -> torch.Tensor:
        w = packed.to(torch.float64)
        return p.m / (w + S * p.B @ p.A).norm(dim=1) * (F.linear(x, w) + S * lora(p, x))

    torch.compile(program, backend=backend, options={"dorafx.codegen": "eager"})(drawn(2, 12))


@instead(ReasonKind.NOT_EMITTED, "norm-is-output")
def _(patch: Patch) -> None:
    """Squares of the norm beside it: both are read as vectors."""
    compiled(lambda p, x: adapted(p).square().sum(1).sqrt() * 2)


@instead(ReasonKind.REPLACEMENT_FAILED, "norm-is-output")
def _(patch: Patch) -> None:
    """What would fail is not asked for: there is no composition."""
    from dorafx.rewriter import Emitter

    patch.setattr(Emitter, "compose", fails)
    compiled(NEGATIVES["norm_is_returned"][0])


for _kind, _run in outside_programs.NEAR.items():
    NEAR[_kind] = (lambda patch, run=_run: run("eager")), {WHOLE}


@instead(ReasonKind.OPERATOR_FAILED)
def _(patch: Patch) -> None:
    """An operator that is read wrongly where there is no DoRA."""
    from transfer_functions import wrap

    from dorafx.lift import Lifter

    patch.setattr(Lifter, "_failed", _FAILED)
    wrap(patch, "norm", lambda transfer: fails)
    compiled(lambda p, x: x.norm(dim=-1))


@instead(ReasonKind.FORM_FAILED, WHOLE)
def _(patch: Patch) -> None:
    """A form that is asked after the one that knows the layer."""
    patch.setattr(registry._FORMS["embedding"], "check", fails, raising=False)
    compiled(layer)


@instead(ReasonKind.VERIFICATION, WHOLE)
def _(patch: Patch) -> None:
    compiled(layer, **{"dorafx.verify": True})


@instead(ReasonKind.NOT_VERIFIED, WHOLE)
def _(patch: Patch) -> None:
    """What cannot be run is no matter where nothing is verified."""
    from dorafx.validation import Region

    patch.setattr(Region, "_run", fails)
    compiled(layer)


@instead(ReasonKind.SKIPPED, WHOLE)
def _(patch: Patch) -> None:
    """A pattern of another module, and one that every name matches."""
    compiled(layer, **{"dorafx.skip": ["lm_head", "lay"], "dorafx.only": "*"})


@instead(ReasonKind.CODEGEN_FAILED)
def _(patch: Patch) -> None:
    """A codegen that fails on the original, too: that is the caller's error."""
    from dorafx import codegen

    patch.setattr(codegen, "compile_graph", fails)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="a fault that is planted"):
        compiled(lambda p, x: F.linear(x, p.W))


@instead(ReasonKind.INTERNAL_FAILURE)
def _(patch: Patch) -> None:
    """A model that fails by itself."""
    with pytest.raises(Exception, match=r"shape|size"):
        compiled(lambda p, x: layer(p, x[..., :3]))


@pytest.mark.parametrize("kind", ReasonKind, ids=lambda kind: kind.value)
def test_what_is_said_instead(kind: ReasonKind, monkeypatch: Patch) -> None:
    assert kind in NEAR, f"no near miss of the kind {kind.value!r}"
    run, said = NEAR[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dorafx.DorafxWarning)
        run(monkeypatch)
    records = rewrite_log().records
    assert kind.value not in said
    assert {r.kind or WHOLE for r in records} == said, [(r.status, r.kind, r.reason) for r in records]
