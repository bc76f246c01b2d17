"""Every spelling of the linear form is recognised whole, and computes what it did, with the gradients that it had."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests_support import check_same

from dorafx import rewrite_log

from factor_programs import WIDE  # isort: skip
from programs import LINEAR, Layer  # isort: skip

SPELLINGS = {**LINEAR, **WIDE}
# Not the linear form once: another form, or several layers.
FORMS = {
    "column_norm": ["linear_columns"],
    "normalize_by_column": ["linear_columns"],
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


@pytest.mark.slow
def test_one_kernel_serves_what_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every spelling under ``dorafx.compose="triton_linear"``, planned as for a CUDA device: exact, whichever operator each
    layer becomes, and a layer that does not become one kernel has a reason. The operators compute by ATen calls here."""
    monkeypatch.setattr("dorafx.kernels.runs_kernels", lambda device, *dtypes: True)
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
