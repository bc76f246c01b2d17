"""Every spelling of the linear form is recognised whole, and computes what it did, with the gradients that it had."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from same_results import check_same
from torch import fx
from transfer_functions import wrap

from dorafx import rewrite_log
from dorafx.lift import Lifter

from factor_programs import WIDE  # isort: skip
from programs import LINEAR, Layer, Program, lora  # isort: skip

SPELLINGS = {**LINEAR, **WIDE}
# Not the linear form once: another form, or several layers.
FORMS = {
    "column_norm": ["linear_columns"],
    "normalize_by_column": ["linear_columns"],
    "columns_bounded_from_both_sides": ["linear_columns"],
    "dropout_correction": ["linear_dropout"],
    "another_input_for_each_branch": ["linear_dropout"],
    "biased_base_of_the_dropped_input": ["linear_dropout"],
    "rows_and_columns": ["linear", "linear"],
    "two_layers_share_a_factor_and_their_input": ["linear", "linear"],
    "two_layers_share_the_weight": ["linear", "linear"],
}


@pytest.mark.parametrize("name", sorted(SPELLINGS))
def test_spelling_is_rewritten_and_exact(name: str) -> None:
    check_same(
        SPELLINGS[name], Layer(), torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True), tolerance=1e-11
    )
    log = rewrite_log()
    expected = [("rewritten", form, "") for form in FORMS.get(name, ["linear"])]
    assert [(r.status, r.pattern, r.reason) for r in log.records] == expected


@pytest.mark.parametrize("name", sorted(SPELLINGS))
def test_spelling_without_parameters_is_rewritten_and_exact(name: str) -> None:
    """No module owns these tensors, so the graph does not tell weights from activations."""
    layer = Layer()
    for of, tensor in vars(layer).items():
        if isinstance(tensor, torch.nn.Parameter):
            setattr(layer, of, tensor.detach().clone().requires_grad_(tensor.requires_grad))
    check_same(SPELLINGS[name], layer, torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True), tolerance=1e-11)
    found = [(r.status, r.pattern, r.kind) for r in rewrite_log().records]
    if name in ("one_row_repeated", "one_row_repeated_and_transposed"):
        # A product with a row that is repeated is taken for one with an activation.
        assert found == [("rewritten", "norm_only", "other-parts")]
    else:
        assert found == [("rewritten", form, "") for form in FORMS.get(name, ["linear"])]


@pytest.mark.slow
def test_one_kernel_serves_what_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every spelling under ``dorafx.compose="triton_linear"``, planned as for a CUDA device: exact, whichever operator each
    layer becomes, and a layer that does not become one kernel has a reason. The operators compute by ATen calls here."""
    monkeypatch.setattr("dorafx.plan.kernel.runs_kernels", lambda device, *dtypes: True)
    whole = 0
    for name in sorted(SPELLINGS):
        rewrite_log().clear()
        x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
        check_same(SPELLINGS[name], Layer(), x, tolerance=1e-11, **{"dorafx.compose": "triton_linear"})
        decisions = [r.decision for r in rewrite_log().rewrites]
        assert all("one Triton kernel" in d or "not in one with the products: " in d for d in decisions), (
            name,
            decisions,
        )
        whole += any("the whole layer is one Triton kernel" in d for d in decisions)
    # The others have no base product of their own, several adapters, or another form.
    assert whole >= 33


@pytest.mark.parametrize("shape", [(4, 12), (1, 12), (3, 1, 12), (2, 2, 2, 12), (0, 12)])
def test_shapes_of_the_input(shape: tuple[int, ...]) -> None:
    for name in ("direct", "merged_weight_differentiable", "identity_forward_delta_form"):
        check_same(LINEAR[name], Layer(), torch.randn(*shape, dtype=torch.float64, requires_grad=True))
        assert len(rewrite_log().rewrites) == 1, name
        rewrite_log().clear()


def _stacked(p: Layer, x: torch.Tensor) -> torch.Tensor:
    down = p.A3.flatten(0, 1)
    n = (p.W + p.B6 @ down).norm(dim=1)
    return p.m / n * (F.linear(x, p.W) + F.linear(F.linear(x, p.A3.view(-1, 12)), p.B6))


def _stacked_merged(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W3.view(10, 12) + (p.A3.flatten(0, 1).T @ p.B6.T).T
    return F.linear(x, p.m_column * adapted / adapted.norm(dim=1, keepdim=True))


def _heads(p: Layer, x: torch.Tensor) -> torch.Tensor:
    weight = p.W3.reshape(-1, 12)
    return p.m / (weight + p.B @ p.A).norm(dim=1) * (x @ weight.T + lora(p, x))


def _stacked_and_scaled(p: Layer, x: torch.Tensor) -> torch.Tensor:
    scale = torch.cat([p.d, p.d])
    adapted = p.W + (p.b[:, None] * p.B6) @ (scale[:, None] * p.A3.view(6, 12))
    return F.linear(x, p.m_column * adapted / adapted.norm(dim=1, keepdim=True)) + p.A3.view(6, 2, 6).sum()


@pytest.mark.parametrize("program", [_stacked, _stacked_merged, _stacked_and_scaled, _heads])
def test_parameters_of_three_axes(program: Program) -> None:
    """Factors of several adapters in one parameter, a weight by heads: the layer takes a view of two axes."""
    layer = Layer()
    shapes = {"A3": (3, 2, 12), "B6": (10, 6), "W3": (2, 5, 12)}
    for name, shape in shapes.items():
        setattr(layer, name, torch.nn.Parameter(torch.randn(*shape, dtype=torch.float64), name != "W3"))
    check_same(program, layer, torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True), tolerance=1e-11)
    assert [(r.pattern, r.reason) for r in rewrite_log().records] == [("linear", "")]


def _by_keyword(p: Layer, x: torch.Tensor) -> torch.Tensor:
    squares = torch.square(input=p.W + torch.matmul(input=p.B, other=p.A))
    n = torch.sqrt(input=torch.sum(squares, axis=1, keepdims=True)).transpose(dim0=0, dim1=1)
    y = F.linear(x, p.W) + torch.permute(input=lora(p, x), dims=(0, 1, 2))
    return torch.neg(input=torch.unsqueeze(input=torch.reshape(input=p.m / n, shape=(-1,)) * y, dim=0))


def _table_by_keyword(p: Layer, x: torch.Tensor) -> torch.Tensor:
    i = torch.tensor([0, 2, 1])
    rows = F.embedding(input=i, weight=p.W) + F.embedding(weight=p.B, input=i) @ p.A
    return rows / torch.clone(input=p.W + p.B @ p.A).norm(dim=0) + x.sum()


@pytest.mark.parametrize(("program", "form"), [(_by_keyword, "linear"), (_table_by_keyword, "embedding")])
def test_operands_by_keyword(program: Program, form: str) -> None:
    """Every operator takes its operands by name, too, and some under NumPy's names."""
    check_same(program, Layer(), torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True), tolerance=1e-11)
    assert [(r.pattern, r.reason) for r in rewrite_log().records] == [(form, "")]


def test_what_a_transfer_function_does_not_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    """The node is an unknown value, and nothing but what needs it is lost."""

    def failing(lift: Lifter, node: fx.Node) -> None:
        raise IndexError("tuple index out of range")

    def program(p: Layer, x: torch.Tensor) -> torch.Tensor:
        return LINEAR["direct"](p, -x)

    monkeypatch.undo()  # what makes such an error one of the test
    wrap(monkeypatch, "neg", lambda _: failing)
    check_same(program, Layer(), torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True))
    assert [(r.pattern, r.reason) for r in rewrite_log().records] == [("linear", "")]


def test_one_row_that_was_flattened_and_brought_back() -> None:
    """A weight ``[1, d_in]``, as of a head with one output, is a vector by its shape."""

    def program(p: Layer, x: torch.Tensor) -> torch.Tensor:
        adapted = p.W.view(-1).view(p.W.shape) + p.B @ p.A
        return F.linear(x, p.m_column * adapted / adapted.norm(dim=1, keepdim=True), p.bias)

    check_same(program, Layer(1, 6, 2), torch.randn(3, 6, dtype=torch.float64, requires_grad=True))
    assert [(r.pattern, r.reason) for r in rewrite_log().records] == [("linear", "")]


def test_one_token_scaled_on_its_way_in() -> None:
    """A normalised single token is a vector times a vector by its shape, and still the input of a layer."""

    def program(p: Layer, x: torch.Tensor) -> torch.Tensor:
        x = p.m_in * (x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt())
        return LINEAR["direct"](p, x) + 1.0

    check_same(program, Layer(), torch.randn(1, 1, 12, dtype=torch.float64, requires_grad=True))
    assert [r.pattern for r in rewrite_log().rewrites] == ["linear"]


@pytest.mark.parametrize(("d_out", "d_in", "rank"), [(7, 5, 1), (5, 7, 9), (2, 3, 2), (12, 12, 12), (1, 6, 2)])
def test_shapes_of_the_layer(d_out: int, d_in: int, rank: int) -> None:
    for name in ("direct", "merged_weight_detached_norm", "bias_taken_off_first"):
        layer = Layer(d_out, d_in, rank)
        check_same(LINEAR[name], layer, torch.randn(3, d_in, dtype=torch.float64, requires_grad=True))
        assert len(rewrite_log().rewrites) == 1, name
        rewrite_log().clear()
