"""DoRA over a batch of weights, one for each expert: ``W [E, d_out, d_in]``, ``A [E, r, d_in]``, ``B [E, d_out, r]``, ``m [E, d_out]``."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from same_results import check_everything

import dorafx
from dorafx import rewrite_log

EXPERTS, D_OUT, D_IN, RANK, TOKENS = 3, 8, 6, 2, 5
S = 0.5


class Experts:
    def __init__(self, trained: bool = False, experts: int = EXPERTS, d_out: int = D_OUT, d_in: int = D_IN) -> None:
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, dtype=torch.float64, generator=generator) * 0.5)

        self.W = parameter(experts, d_out, d_in).requires_grad_(trained)
        self.A, self.B = parameter(experts, RANK, d_in), parameter(experts, d_out, RANK)
        self.m = parameter(experts, d_out)
        self.m_column = parameter(experts, d_out, 1)
        self.s = torch.tensor(S, dtype=torch.float64)

    def trainable(self) -> list[torch.Tensor]:
        return [p for p in vars(self).values() if p.requires_grad]


def tokens(experts: int = EXPERTS, count: int = TOKENS, d_in: int = D_IN) -> torch.Tensor:
    return torch.randn(experts, count, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def adapted(p: Experts) -> torch.Tensor:
    return p.W + S * torch.bmm(p.B, p.A)


Weight = Callable[[Experts], torch.Tensor]
Norm = Callable[[torch.Tensor], torch.Tensor]
Layer = Callable[[Experts, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

WEIGHTS: dict[str, Weight] = {
    "bmm": lambda p: adapted(p),
    "matmul": lambda p: p.W + (p.B @ p.A) * S,
    "baddbmm": lambda p: torch.baddbmm(p.W, p.B, p.A, alpha=S),
    "einsum": lambda p: p.W + p.s * torch.einsum("eor,eri->eoi", p.B, p.A),
    "einsum of factors in another order": lambda p: torch.add(p.W, torch.einsum("eri,eor->eoi", p.A, p.B), alpha=S),
    "product of transposes": lambda p: p.W + S * torch.bmm(p.A.transpose(1, 2), p.B.mT).permute(0, 2, 1),
    "factor scaled": lambda p: p.W.detach() + torch.bmm(p.B * p.s, p.A),
    "delta detached": lambda p: p.W + S * torch.bmm(p.B, p.A).detach(),
    "two deltas": lambda p: p.W + S * (p.B @ p.A) - 2 * torch.bmm(p.B, p.A.detach().clone()),
    "weight expanded": lambda p: p.W[0].expand(p.B.shape[0], -1, -1) + p.B @ p.A,
}
NORMS: dict[str, Norm] = {
    "norm": lambda v: v.norm(dim=-1, keepdim=True),
    "vector_norm": lambda v: torch.linalg.vector_norm(v, dim=2).unsqueeze(-1),
    "linalg.norm": lambda v: torch.linalg.norm(v, dim=(-1,), keepdim=True),
    "root of squares": lambda v: v.pow(2).sum(-1, keepdim=True).sqrt(),
    "root of a product": lambda v: (v * v).sum(2)[:, :, None] ** 0.5,
    "root of an einsum": lambda v: torch.einsum("eoi,eoi->eo", v, v).sqrt()[..., None],
    "with an epsilon": lambda v: (v.square().sum(-1, keepdim=True) + 1e-6).sqrt(),
    "clamped": lambda v: v.norm(dim=-1, keepdim=True).clamp_min(1e-3),
    "norm of the transpose": lambda v: v.mT.norm(dim=1)[:, :, None],
}
LAYERS: dict[str, Layer] = {
    "merged, bmm": lambda p, x, v, n: torch.bmm(x, (p.m_column * v / n).transpose(1, 2)),
    "merged, einsum": lambda p, x, v, n: torch.einsum("eti,eoi->eto", x, (p.m / n.squeeze(-1))[:, :, None] * v),
    "merged, matmul": lambda p, x, v, n: x @ (v * (p.m.unsqueeze(-1) / n)).mT,
    "factored": lambda p, x, v, n: (
        (p.m / n[..., 0])[:, None, :]
        * (torch.bmm(x, p.W.transpose(1, 2)) + S * torch.bmm(torch.bmm(x, p.A.mT), p.B.mT))
    ),
    "tokens for all, matmul": lambda p, x, v, n: x[0] @ (p.m_column * v / n).mT,
    "tokens expanded": lambda p, x, v, n: torch.bmm(x[:1].expand_as(x), (p.m_column * v / n).mT),
    "tokens broadcast": lambda p, x, v, n: torch.matmul(x[:1], (p.m_column * v / n).mT),
    "tokens for all": lambda p, x, v, n: torch.einsum("ti,eoi->eto", x[0], p.m_column * v / n),
}


def program_of(weight: str, norm: str, layer: str, detached: bool = False) -> Callable[..., torch.Tensor]:
    def program(p: Experts, x: torch.Tensor) -> torch.Tensor:
        v = WEIGHTS[weight](p)
        n = NORMS[norm](v)
        return LAYERS[layer](p, x, v, n.detach() if detached else n)

    return program


CASES = [
    *((w, "norm", "merged, bmm") for w in WEIGHTS),
    *(("bmm", n, "merged, matmul") for n in NORMS),
    *(("baddbmm", "norm", layer) for layer in LAYERS),
]


@pytest.mark.parametrize(("weight", "norm", "layer"), CASES)
def test_every_spelling(weight: str, norm: str, layer: str) -> None:
    """Values, strides and gradients; the base weight trained and not, the norm detached and not."""
    for grad, trained, detached in ((True, False, True), (True, True, False), (False, False, False)):
        rewrite_log().clear()
        check_everything(program_of(weight, norm, layer, detached), Experts(trained), tokens(), grad=grad)
        (record,) = rewrite_log().records
        assert record.rewritten, record.reason
        assert (record.d_out, record.d_in, record.flops_after % (2 * EXPERTS * D_OUT * D_IN)) == (D_OUT, D_IN, 0)
        if not grad or (detached and norm == "norm"):
            assert record.norm_placement == "prologue", record.decision
        assert (record.pattern, record.reason) == ("linear", ""), record.reason


def drawn(count: int, seed: int) -> list[tuple[str, str, str, bool, bool]]:
    """Any way to write each part, with any other."""
    chance = random.Random(seed)
    parts = list(WEIGHTS), list(NORMS), list(LAYERS), [True, False], [True, False]
    return [tuple(chance.choice(options) for options in parts) for _ in range(count)]  # type: ignore[misc]


def check_drawn(weight: str, norm: str, layer: str, trained: bool, detached: bool, codegen: str = "eager") -> None:
    rewrite_log().clear()
    check_everything(program_of(weight, norm, layer, detached), Experts(trained), tokens(), codegen)
    assert [r.status for r in rewrite_log().records] == ["rewritten"], (weight, norm, layer, trained, detached)


def test_parts_in_any_combination() -> None:
    for case in drawn(12, 0):
        check_drawn(*case)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_parts_in_many_combinations(seed: int) -> None:
    for case in drawn(40, seed):
        check_drawn(*case)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(101, 105))
def test_parts_in_many_combinations_with_inductor(seed: int) -> None:
    for case in drawn(6, seed):
        check_drawn(*case, codegen="inductor")


@pytest.mark.parametrize(
    ("weight", "norm", "layer"),
    [
        ("bmm", "norm", "merged, bmm"),
        ("baddbmm", "root of squares", "factored"),
        ("einsum", "vector_norm", "merged, einsum"),
    ],
)
def test_with_inductor(weight: str, norm: str, layer: str) -> None:
    for grad, trained, detached in ((True, False, True), (True, True, False), (False, False, True)):
        rewrite_log().clear()
        program = program_of(weight, norm, layer, detached)
        check_everything(program, Experts(trained), tokens(), "inductor", grad=grad)
        assert [(r.pattern, r.reason) for r in rewrite_log().records] == [("linear", "")]


@pytest.mark.parametrize(
    ("experts", "d_out", "d_in", "count"), [(8, 8, 6, 5), (6, 8, 6, 6), (5, 8, 6, 5), (1, 8, 6, 5), (4, 1, 6, 1), (4, 4, 4, 4), (3, 5, 1, 2)]
)  # fmt: skip
@pytest.mark.parametrize("layer", LAYERS)
def test_sizes_that_are_equal_or_one(layer: str, experts: int, d_out: int, d_in: int, count: int) -> None:
    x = tokens(experts, count, d_in)
    check_everything(program_of("bmm", "norm", layer), Experts(True, experts, d_out, d_in), x)
    assert all(r.rewritten or r.reason for r in rewrite_log().records) and rewrite_log().records


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """The norm is computed in fp32, and rounded as the program's own is."""
    p, x = Experts(), tokens().to(dtype)
    for name, value in vars(p).items():
        setattr(p, name, torch.nn.Parameter(value.detach().to(dtype), requires_grad=value.requires_grad))
    p.s = p.s.detach()
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for grad in (True, False):
        rewrite_log().clear()
        check_everything(program_of("bmm", "norm", "merged, bmm", True), p, x, grad=grad, tolerance=tolerance)
        assert [r.rewritten for r in rewrite_log().records] == [True]


def of_each_row_scaled(p: Experts, x: torch.Tensor) -> torch.Tensor:
    """A norm by column; the gain is that of the columns."""
    v = adapted(p)
    return torch.bmm(x, (v / v.norm(dim=1, keepdim=True)).mT)


def shared_magnitude(p: Experts, x: torch.Tensor) -> torch.Tensor:
    v = adapted(p)
    return torch.bmm(x, (p.m_column[0] * v / v.norm(dim=-1, keepdim=True)).mT)


def routed(p: Experts, x: torch.Tensor) -> torch.Tensor:
    """Tokens are gathered for each expert, and their outputs are added where they came from."""
    flat = x.reshape(-1, x.shape[-1])
    gate, chosen = (flat @ p.W[:, 0].mT).softmax(-1).topk(4, dim=0)
    v = adapted(p)
    y = torch.bmm(flat[chosen.T], (p.m_column * v / v.norm(dim=-1, keepdim=True).detach()).mT)
    out = y.new_zeros(flat.shape[0], y.shape[-1])
    return out.index_add(0, chosen.T.reshape(-1), (y * gate.T[:, :, None]).flatten(0, 1))


def norm_without_gradients(p: Experts, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        n = torch.baddbmm(p.W, p.B, p.A, alpha=S).norm(dim=-1)
    return (p.m / n)[:, None, :] * (x @ p.W.mT + S * (x @ p.A.mT @ p.B.mT))


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("program", [of_each_row_scaled, shared_magnitude])
def test_other_layers(program: Callable[..., torch.Tensor], codegen: str) -> None:
    for grad in (True, False):
        rewrite_log().clear()
        check_everything(program, Experts(), tokens(), codegen, grad)
        assert [r.rewritten for r in rewrite_log().records] == [True]


UNKNOWN: dict[str, tuple[Norm, Weight | None, str]] = {
    "of order 1": (lambda v: v.norm(p=1, dim=-1, keepdim=True), None, "is of order 1"),
    "of each expert": (lambda v: v.norm(dim=(1, 2), keepdim=True), None, "over dimensions (1, 2)"),
    "over the experts": (lambda v: v.norm(dim=0, keepdim=True), None, "over dimensions 0"),
    "of all": (lambda v: v.norm(), None, "of the whole weight"),
    "largest": (lambda v: v.amax(-1, keepdim=True), None, "operator amax"),
    "flattened": (lambda v: v.reshape(-1, D_IN).norm(dim=1).view(-1, D_OUT, 1), None, "operator reshape"),
    "tanh of the delta": (NORMS["norm"], lambda p: p.W + torch.tanh(p.B @ p.A), "operator tanh"),
    "one weight for all": (NORMS["norm"], lambda p: p.W[0] + p.B @ p.A, "has no such axis"),
    "scaled by row": (NORMS["norm"], lambda p: p.m_column * p.W + p.B @ p.A, "itself scaled by a vector"),
    "written in place": (NORMS["norm"], lambda p: torch.relu_(p.W + p.B @ p.A), "written in place"),
    "squares changed": (lambda v: v.square().sum(-1, keepdim=True).sin().add(2).sqrt(), None, "operator sin"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_left_alone_has_a_reason(name: str) -> None:
    norm, weight, reason = UNKNOWN[name]

    def program(p: Experts, x: torch.Tensor) -> torch.Tensor:
        v = (weight or WEIGHTS["bmm"])(p)
        return torch.bmm(x, (p.m_column * v / norm(v)).mT)

    check_everything(program, Experts(), tokens())
    records = rewrite_log().records
    assert [(r.status, reason in r.reason) for r in records] == [("missed", True)], [r.reason for r in records]


def attention(p: Experts, x: torch.Tensor) -> torch.Tensor:
    """A batch of activations, whose products and norms are no weights'."""
    q, k = x @ p.W.mT, torch.bmm(x, p.B @ p.A @ x.mT @ x) @ p.W.mT
    scores = torch.bmm(q, k.mT) + x @ x.mT
    return scores / scores.norm(dim=-1, keepdim=True)


def experts_without_delta(p: Experts, x: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x, (p.m_column * p.W / p.W.norm(dim=-1, keepdim=True)).mT)


def low_rank_experts_without_norm(p: Experts, x: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x, adapted(p).mT)


@pytest.mark.parametrize("program", [attention, experts_without_delta, low_rank_experts_without_norm])
def test_no_dora_leaves_no_record(program: Callable[..., torch.Tensor]) -> None:
    check_everything(program, Experts(d_in=D_OUT), tokens(d_in=D_OUT))
    assert rewrite_log().records == []


def biased(p: Experts, x: torch.Tensor) -> torch.Tensor:
    v = adapted(p)
    return torch.bmm(x, (p.m_column * v / v.norm(dim=-1, keepdim=True).detach()).mT) + p.m[:, None, :]


def delta_form(p: Experts, x: torch.Tensor) -> torch.Tensor:
    g = (p.m / torch.baddbmm(p.W, p.B, p.A, alpha=S).norm(dim=-1).detach())[:, None]
    base = x @ p.W.mT
    return base + (g - 1) * base + g * (x @ p.A.mT @ p.B.mT) * S


def weight_delta(p: Experts, x: torch.Tensor) -> torch.Tensor:
    v = adapted(p)
    return torch.relu(x @ (p.m_column * v / v.norm(dim=-1, keepdim=True) - p.W).mT)


def with_dropout_that_drops_nothing(p: Experts, x: torch.Tensor) -> torch.Tensor:
    v = adapted(p)
    g = (p.m / v.norm(dim=-1)).unsqueeze(1)
    dropped = torch.nn.functional.dropout(x, 0.5, training=False)
    return g * (torch.bmm(x, p.W.mT) + torch.bmm(torch.bmm(dropped, p.A.mT), p.B.mT) * S)


def normalized(p: Experts, x: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x, (p.m_column * torch.nn.functional.normalize(adapted(p), dim=-1)).mT)


def two_layers(p: Experts, x: torch.Tensor) -> torch.Tensor:
    v = adapted(p)
    w = p.m_column * v / v.norm(dim=-1, keepdim=True).detach()
    return torch.bmm(torch.relu(torch.bmm(x, w.mT)), w)


COMPOSED: dict[str, tuple[Callable[..., torch.Tensor], list[tuple[str, str]]]] = {
    "routed": (routed, [("linear", "")]),
    "biased": (biased, [("linear", "")]),
    "delta form": (delta_form, [("linear", "")]),
    "weight delta": (weight_delta, [("linear_weight_delta", "")]),
    "normalized": (normalized, [("linear", "")]),
    "without gradients": (norm_without_gradients, [("linear", "")]),
    "dropout that drops nothing": (with_dropout_that_drops_nothing, [("linear", "")]),
}


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("name", COMPOSED)
def test_compositions(name: str, codegen: str) -> None:
    program, expected = COMPOSED[name]
    for grad, trained in ((True, False), (True, True), (False, False)):
        rewrite_log().clear()
        check_everything(program, Experts(trained), tokens(), codegen, grad)
        assert [(r.pattern, r.reason) for r in rewrite_log().records] == expected


def test_a_weight_that_is_read_both_ways() -> None:
    check_everything(two_layers, Experts(True), tokens())
    assert all(r.rewritten for r in rewrite_log().records) and rewrite_log().records


def another_weight(p: Experts, x: torch.Tensor) -> torch.Tensor:
    g = (p.m / adapted(p).norm(dim=-1))[:, None]
    return g * (x @ p.W.sin().mT + x @ p.A.mT @ p.B.mT)


def another_expert(p: Experts, x: torch.Tensor) -> torch.Tensor:
    """The weights of the experts, in another order than those of the norm."""
    g = (p.m / adapted(p).norm(dim=-1))[:, None]
    return g * (x @ p.W.flip(0).mT + x @ p.A.mT @ p.B.mT)


def scaled_by_another_axis(p: Experts, x: torch.Tensor) -> torch.Tensor:
    """Of as many tokens as rows, each token is scaled and not each row."""
    g = (p.m / adapted(p).norm(dim=-1))[:, :, None]
    return g * (x @ p.W.mT + x @ p.A.mT @ p.B.mT)


def scaled_by_the_experts(p: Experts, x: torch.Tensor) -> torch.Tensor:
    """Of as many experts as tokens, the batch is broadcast along another axis."""
    g = p.m / adapted(p).norm(dim=-1)
    return g * (x @ p.W.mT + x @ p.A.mT @ p.B.mT)


def unscaled_part(p: Experts, x: torch.Tensor) -> torch.Tensor:
    g = (p.m / adapted(p).norm(dim=-1))[:, None]
    return g * (x @ p.W.mT) + x @ p.A.mT @ p.B.mT


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize(
    "program", [another_weight, another_expert, scaled_by_another_axis, scaled_by_the_experts, unscaled_part]
)
def test_only_the_norm_of_other_compositions(program: Callable[..., torch.Tensor], codegen: str) -> None:
    size = 4  # all that may be confused has it
    check_everything(program, Experts(False, size, size, size), tokens(size, size, size), codegen)
    assert [(r.pattern, bool(r.reason)) for r in rewrite_log().records] == [("norm_only", True)]


def one_expert(p: Experts, x: torch.Tensor) -> torch.Tensor:
    """Matrices that are made a batch of one."""
    v = torch.baddbmm(p.W[0][None], p.B[0].unsqueeze(0), p.A[:1])
    return x @ (p.m_column[0] * v[0] / v.norm(dim=-1)[0][:, None]).mT


def one_expert_without_its_axis(p: Experts, x: torch.Tensor) -> torch.Tensor:
    v = torch.baddbmm(p.W[0][None], p.B[0][None], p.A[0][None]).squeeze(0)
    return x @ (p.m_column[0] * v / v.norm(dim=-1, keepdim=True)).mT


@pytest.mark.parametrize(
    ("program", "pattern", "reason"),
    [
        (one_expert, "rewritten", "operator getitem"),
        (one_expert_without_its_axis, "missed", "operator squeeze"),
    ],
)
def test_a_batch_of_one(program: Callable[..., torch.Tensor], pattern: str, reason: str) -> None:
    check_everything(program, Experts(), tokens())
    assert [(r.status, reason in r.reason) for r in rewrite_log().records] == [(pattern, True)]


class Mixture(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        p = Experts()
        self.W, self.A, self.B, self.m = (torch.nn.Parameter(t.detach().float()) for t in (p.W, p.A, p.B, p.m_column))
        self.W.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v = self.W + S * torch.bmm(self.B, self.A)
        return torch.bmm(x, (self.m * v / v.norm(dim=-1, keepdim=True).detach()).transpose(1, 2))


def test_norms_are_kept_in_decoding() -> None:
    """In forwards of one token they are computed once, and again when a factor of one expert has changed."""
    model = dorafx.optimize(Mixture(), codegen="eager")
    counters = rewrite_log().norms
    x = tokens(count=1).float()
    with torch.no_grad():
        for step in range(3):
            torch.testing.assert_close(model(x), Mixture().forward(x))
            assert (counters.computed, counters.reused) == (1, step)
        model.A[1].mul_(2.0)
        expected = Mixture()
        expected.A[1].mul_(2.0)
        torch.testing.assert_close(model(x), expected(x))
    assert counters.computed == 2
    assert [(r.pattern, r.norm_placement) for r in rewrite_log().records] == [("linear", "prologue")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype: torch.dtype) -> None:
    model, x = Mixture(), tokens().float().requires_grad_()
    compiled = torch.compile(model, backend="dorafx", options={"dorafx.codegen": "eager"})
    with torch.autocast("cpu", dtype):
        actual, expected = compiled(x), model(x)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=3e-2, atol=3e-2)
    leaves = [x, model.A, model.B, model.m]
    gradients = (torch.autograd.grad(y.float().sin().sum(), leaves) for y in (actual, expected))
    for got, wanted in zip(*gradients):
        torch.testing.assert_close(got, wanted, rtol=5e-2, atol=5e-2)
    assert [r.rewritten for r in rewrite_log().records] == [True]


def test_as_many_tokens_as_there_are() -> None:
    """With sizes that are symbols; and with each rewrite verified."""
    model = Mixture()
    options = {"dorafx.codegen": "eager", "dorafx.verify": True}
    compiled = torch.compile(model, backend="dorafx", dynamic=True, options=options)
    for count in (5, 7, 11):
        x = tokens(count=count).float()
        torch.testing.assert_close(compiled(x), model(x))
    assert [(r.pattern, r.reason) for r in rewrite_log().records] == [("linear", "")]


def test_terms_are_explained() -> None:
    text = str(dorafx.explain(Mixture(), tokens().float()))
    assert "linear" in text and "Mixture" not in text.splitlines()[0]


def test_exported() -> None:
    model, x = Mixture(), tokens().float()
    new = dorafx.rewrite(torch.export.export(model, (x,)))
    torch.testing.assert_close(new.module()(x), model(x))
    assert [r.rewritten for r in rewrite_log().records] == [True]
