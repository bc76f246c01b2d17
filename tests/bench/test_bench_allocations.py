"""Bytes are counted exactly where they can be worked out by hand."""

from __future__ import annotations

import pytest
import torch

import dorafx.ops  # noqa: F401
from dorafx.bench.allocations import allocations, saved_bytes, storage_bytes


def test_largest_and_peak() -> None:
    x = torch.ones(1000)

    def step() -> None:
        a = torch.empty(2000)  # 8000 bytes
        b = torch.empty(1000)  # and 4000
        del a
        c = torch.empty(1500)  # 4000 + 6000
        del b, c

    found = allocations(step, "cpu")
    assert (found.largest, found.peak) == (8000, 12000)
    assert allocations(x.exp, "cpu").peak == 4000


def test_allocations_inside_operators_are_seen() -> None:
    w, b, a = torch.randn(64, 48), torch.randn(64, 4), torch.randn(4, 48)
    dense = allocations(lambda: torch.linalg.norm(w + 2 * (b @ a), dim=1), "cpu")
    assert dense.largest == 64 * 48 * 4
    assert allocations(lambda: torch.ops.dorafx.row_norm(w, b, a, 2.0), "cpu").largest < 64 * 48 * 4 / 8 + 256


def test_no_allocations_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no allocations"):
        allocations(lambda: None, "cpu")


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_saved_bytes(backend: str | None) -> None:
    linear, x = torch.nn.Linear(64, 32), torch.randn(10, 64)

    def plain(t: torch.Tensor) -> torch.Tensor:
        return linear(t).tanh()

    call = plain if backend is None else torch.compile(plain, backend=backend)
    call(x)
    # The input for the weight's gradient and tanh's output for its own; the weight is a parameter.
    expected = (10 * 64 + 10 * 32) * 4
    assert saved_bytes(lambda: call(x), linear.parameters()) == expected


def test_a_storage_counts_once_and_whole() -> None:
    x = torch.randn(8, 4, requires_grad=True)
    y = x.detach() * 2
    assert saved_bytes(lambda: (x * y) + (x * y[:]), [x]) == 8 * 4 * 4
    assert storage_bytes([y, y[:2], y.T]) == 8 * 4 * 4
