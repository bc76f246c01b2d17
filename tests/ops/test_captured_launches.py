"""What a CUDA graph that the user captures launches: nothing that the calls before it have not compiled and loaded, since the driver
permits neither during a capture. On a driver of ours in the device's place; kernels are compiled by Triton as for a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from driver_in_place import Device  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from dorafx.ops import dispatch  # noqa: E402
from dorafx.ops.quantized import Packed  # noqa: E402
from dorafx.ops.triton import configs, row_norm, tiles  # noqa: E402

pytestmark = [pytest.mark.triton, pytest.mark.timeout(600)]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Device]:
    found = Device(request.node.name)
    driver.set_active(found)
    # A card with as many multiprocessors as one has, so that d_in is divided.
    monkeypatch.setattr(configs, "gpu", lambda device: configs.Gpu(90, 132, 227 << 10, 228 << 10))
    monkeypatch.setattr(tiles, "_FINISHES", set())
    yield found
    driver.set_active(None)


def _norms(count: int, d_out: int = 256, d_in: int = 4096, rank: int = 8) -> list[list[torch.Tensor]]:
    """New tensors, at other addresses than those before."""
    shapes = ((d_out, d_in), (d_out, rank), (rank, d_in))
    return [[torch.zeros(shape) for _ in range(count)] for shape in shapes]


def _call(count: int, **options: Any) -> list[list[torch.Tensor]]:
    lists = _norms(count, **options)
    dispatch.row_norms(*lists, [0.5] * count, "auto", [])
    return lists


def test_a_capture_loads_nothing(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of one shape, and one of another; what is captured is a call like those before it, and reads other addresses."""
    kept = [_call(2), _call(1, d_out=512)]
    assert set(device.loaded) == {"row_norm_kernel", "finish_kernel"}
    device.forget()
    monkeypatch.setattr(dispatch, "being_captured", lambda: True)
    kept += [_call(2), _call(1, d_out=512)]
    assert device.loaded == []
    assert device.launched == ["row_norm_kernel", "finish_kernel"] * 2


@pytest.mark.parametrize(("before", "then"), [(2, 1), (1, 2), (20, 1), (1, 20), (9, 8)])
def test_however_many_norms_the_calls_before_computed(before: int, then: int, device: Device) -> None:
    """The store keeps some norms and not others, and a capture computes all: in parts of d_in of another number, or in none."""
    kept = [_call(before)]
    assert sorted(set(device.loaded)) == ["finish_kernel", "row_norm_kernel"]
    assert len(device.loaded) == 2
    device.forget()
    kept.append(_call(then))
    assert device.loaded == []
    assert device.launched.count("row_norm_kernel") == -(-then // row_norm.GROUP)
    assert device.launched.count("finish_kernel") <= 1


def test_a_kernel_that_divides_nothing_loads_what_adds_parts(device: Device) -> None:
    """As many blocks of rows as fill the card: the first call has no parts, and loads what a later call needs."""
    kept = [_call(8, d_out=8192, d_in=64)]
    assert device.launched == ["row_norm_kernel", "finish_kernel"]
    device.forget()
    kept.append(_call(8, d_out=8192, d_in=64))
    assert device.launched == ["row_norm_kernel"]
    assert device.loaded == []


def test_operands_that_are_not_aligned(device: Device) -> None:
    """They have kernels of their own, whatever their addresses are."""

    def call(offset: int) -> list[torch.Tensor]:
        storages = [torch.zeros(256 * 4096 + 64) for _ in range(2)]
        weights = [s[offset : offset + 256 * 4096].view(256, 4096) for s in storages]
        _, lefts, rights = _norms(2)
        dispatch.row_norms(weights, lefts, rights, [0.5] * 2, "auto", [])
        return [*weights, *lefts, *rights]

    kept = [call(1)]
    device.forget()
    kept.append(call(2))
    kept.append(call(3))
    assert device.loaded == []


def test_factors_that_are_converted(device: Device) -> None:
    """Copies of factors are new tensors at every call."""

    def call() -> list[list[torch.Tensor]]:
        lists = _norms(2, rank=100)
        dispatch.row_norms(*lists, [0.5] * 2, "auto", [], torch.bfloat16)
        return lists

    kept = [call()]
    device.forget()
    kept.append(call())
    assert device.loaded == []
    assert device.launched == ["row_norm_kernel", "finish_kernel"]


def test_quantised_weights(device: Device) -> None:
    def call() -> Packed:
        codes = torch.zeros(256, 2048, dtype=torch.uint8)
        weight = Packed(codes, torch.ones(256, 64), None, "nf4", (256, 4096), 64, torch.float32)
        left, right = torch.zeros(256, 8), torch.zeros(8, 4096)
        dispatch.row_norm_quantized(weight, left, right, 0.5)
        return weight

    kept = [call()]
    device.forget()
    kept.append(call())
    assert device.loaded == []
    assert device.launched == ["quantized_row_norm_kernel", "finish_kernel"]
