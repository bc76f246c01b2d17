"""A merged weight is taken apart where that pays, and only there; the record says what was weighed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from programs import Layer
from same_results import check_same

from dorafx import rewrite_log
from dorafx.backend import dorafx as backend
from dorafx.plan.cost import merged_cost


def merged(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + p.B @ p.A
    return F.linear(x, p.m_column * adapted / adapted.norm(dim=1, keepdim=True))


def test_few_tokens_pay() -> None:
    check_same(merged, Layer(), torch.randn(10, 12, dtype=torch.float64, requires_grad=True))
    (record,) = rewrite_log().records
    assert (record.pattern, record.reason) == ("linear", "")
    # 3 · 2·10·3·(10 + 12) FLOPs more in a training step; 2·10·10·12 and 4·10·12·3 fewer; 4 intermediates of 10 · 12 fp64 numbers.
    assert record.decision == (
        "at 10 tokens the factored products cost 3.96e+03 FLOPs more, and save 3.84e+03 FLOPs and 1.54e+04 bytes of dense "
        "intermediates"
    )


def test_many_tokens_without_gradients_do_not() -> None:
    layer, x = Layer(), torch.randn(4000, 12, dtype=torch.float64)
    with torch.no_grad():
        run = torch.compile(
            lambda value: merged(layer, value), backend=backend, fullgraph=True, options={"dorafx.codegen": "eager"}
        )
        torch.testing.assert_close(run(x), merged(layer, x))
    (record,) = rewrite_log().records
    assert (record.pattern, record.status) == ("norm_only", "rewritten")
    assert record.reason == "only the norm is rewritten: the merged weight is cheaper"
    assert record.decision == (
        "at 4000 tokens the factored products cost 5.28e+05 FLOPs more, and save 0 FLOPs and 7.68e+03 bytes of dense "
        "intermediates"
    )


@pytest.mark.parametrize(
    ("tokens", "rank", "trains", "pays"),
    [
        (1, 8, False, True),
        (4096, 8, False, False),
        (4096, 8, True, True),  # the dense gradient costs d_in · d_out a token, the factored one r · (d_in + d_out)
        (4096, 512, True, False),
        (1, 512, False, True),
    ],
)
def test_tokens_rank_and_gradients_decide(tokens: int, rank: int, trains: bool, pays: bool) -> None:
    cost = merged_cost(tokens, 1024, 1024, rank, 3 * 4 * 1024 * 1024, trains, torch.device("cpu"))
    assert cost.pays is pays, str(cost)
