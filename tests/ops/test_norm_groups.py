"""Several norms in one call; squared norms that are kept."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dorafx.ops  # noqa: F401
from dorafx.ops import dispatch, norm, reference

row_norms = torch.ops.dorafx.row_norms.default
SHAPES = [(5, 12, 3), (40, 9, 2), (5, 12, 3), (7, 30, 8)]


def operands(dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], ...]:
    generator = torch.Generator().manual_seed(0)
    made = [
        [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in ((o, i), (o, r), (r, i))]
        for o, i, r in SHAPES
    ]
    weights, lefts, rights = (list(column) for column in zip(*made))
    return weights, lefts, rights


@pytest.mark.parametrize("algorithm", ["auto", "tiled", "factored"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_list_is_what_each_is(dtype: torch.dtype, algorithm: str) -> None:
    lists = operands(dtype)
    scales = [0.5, -1.0, 2.0, 0.0]
    found = row_norms(*lists, scales, algorithm, [])
    for n, weight, left, right, scale in zip(found, *lists, scales, strict=True):
        assert torch.equal(n, torch.ops.dorafx.row_norm(weight, left, right, scale, algorithm))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_kept_squares(dtype: torch.dtype, transposed: bool) -> None:
    lists = operands(dtype)
    if transposed:
        lists = tuple([t.t().contiguous().t() for t in tensors] for tensors in lists)
    squares: list[torch.Tensor | None] = [norm.row_squares(w) for w in lists[0]]
    squares[1] = None
    found = row_norms(*lists, [0.7] * 4, "factored", squares)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for n, weight, left, right in zip(found, *lists, strict=True):
        exact = reference.row_norm(weight.double(), left.double(), right.double(), 0.7)
        torch.testing.assert_close(n.double(), exact, rtol=tolerance, atol=tolerance)


def test_squares_are_read_and_not_computed_again() -> None:
    """Squares of another weight would show."""
    weight, left, right = (t[0] for t in operands())
    doubled = norm.row_squares(weight) * 2
    (n,) = row_norms([weight], [left], [right], [0.0], "factored", [doubled])
    torch.testing.assert_close(n, (2 * weight.square().sum(1)).sqrt())
    assert torch.equal(doubled, norm.row_squares(weight) * 2), "what is kept is not written"


def test_nothing_to_compute() -> None:
    assert row_norms([], [], [], [], "auto", []) == []


def test_flops_are_those_of_each() -> None:
    with FlopCounterMode(display=False) as counter:
        row_norms(*operands(), [1.0] * 4, "auto", [])
    assert counter.get_total_flops() == sum(2 * o * i * r for o, i, r in SHAPES)


def test_operator_contract() -> None:
    for squares in ([], [None] * 4):
        torch.library.opcheck(row_norms, (*operands(), [0.5] * 4, "factored", squares))


def test_lists_that_do_not_belong_together() -> None:
    weights, lefts, rights = operands()
    with pytest.raises(ValueError, match="4 weights, 3 lefts, 4 rights, 4 scales and 0 squares"):
        row_norms(weights, lefts[:3], rights, [1.0] * 4, "auto", [])
    with pytest.raises(ValueError, match="4 scales and 1 squares"):
        row_norms(weights, lefts, rights, [1.0] * 4, "factored", [None])
    with pytest.raises(ValueError, match=r"squares \(3,\) of torch.float32 on cpu do not belong"):
        row_norms(weights, lefts, rights, [1.0] * 4, "factored", [torch.ones(3), None, None, None])
    with pytest.raises(ValueError, match="weight \\[d_out, d_in\\]"):
        row_norms(weights, lefts[::-1], rights, [1.0] * 4, "auto", [])


def test_what_one_launch_serves() -> None:
    """Equal shapes, dtypes, strides, scale and alignment; anything else takes a launch of its own."""
    weight, left, right = (t[0] for t in operands())
    key = dispatch.group_key((weight, left, right), 0.5)
    assert key == dispatch.group_key((weight.clone(), left.clone(), right.clone()), 0.5)
    shifted = torch.empty(weight.numel() + 1)[1:].view_as(weight)
    others = [(weight.bfloat16(), left, right), (weight.t().contiguous().t(), left, right), (shifted, left, right)]
    others += [(weight, left[:, :2], right[:2]), (weight.to("meta"), left, right)]
    assert (
        len({key, dispatch.group_key((weight, left, right), 0.25), *(dispatch.group_key(o, 0.5) for o in others)}) == 7
    )
