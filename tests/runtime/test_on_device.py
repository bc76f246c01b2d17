"""Norms by content on a device: in Triton's interpreter, on a driver of ours in the device's place, and on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_support import peft_perceptron
from reuse_support import Decoder, one_token, prompt
from test_content import UNSEEN
from test_staleness import CHANGES

from dorafx.ops import dispatch
from dorafx.runtime.on_device import NormsOnDevice, Source

triton = pytest.importorskip("triton")

from driver_in_place import Device  # noqa: E402
from interpreter import MARKS, interpreted  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from dorafx.ops.triton import configs  # noqa: E402


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param("not slow", marks=MARKS),
        pytest.param("slow", marks=[*MARKS, pytest.mark.slow]),
    ],
)
def test_in_the_interpreter(chosen: str) -> None:
    file = str(Path(__file__).with_name("on_a_device.py"))
    interpreted("-n", "0", "-m", chosen, file)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Device]:
    found = Device(request.node.name)
    driver.set_active(found)
    monkeypatch.setattr(configs, "gpu", lambda device: configs.Gpu(90, 132, 227 << 10, 228 << 10))
    yield found
    driver.set_active(None)


SHAPES = [(256, 128), (64, 128), (128, 256), (512, 128)]


@pytest.mark.triton
@pytest.mark.timeout(600)
def test_a_token_launches_two_kernels_and_a_capture_loads_none(device: Device) -> None:
    """Whatever the number of norms and of shapes, if they have the same dtypes."""
    layers = [[torch.zeros(n, k), torch.zeros(n, 8), torch.zeros(8, k)] for n, k in SHAPES for _ in range(10)]
    entries: list[Any] = [object() for _ in layers]
    norms = NormsOnDevice(few_tokens=True)

    def sources() -> list[Source | None]:
        return [Source(tensors, [], (tensors[0], tensors[1], tensors[2]), 0.5, None) for tensors in layers]

    def compute(places: list[int]) -> list[torch.Tensor]:
        return dispatch.row_norms(*zip(*(layers[i] for i in places)), [0.5] * len(places), "auto", [])  # type: ignore[arg-type, misc]

    def call(captured: bool = False) -> list[str]:
        device.launched.clear()
        assert len(norms.norms(layers[0], sources, compute, entries, captured=captured)) == len(layers)
        return list(device.launched)

    assert call()[0] == "checksum_kernel"
    assert call() == ["checksum_kernel", "guarded_norm_kernel"]
    device.loaded.clear()
    for captured in (True, False, True):
        assert call(captured) == ["checksum_kernel", "guarded_norm_kernel"]
    assert device.loaded == []


# -- on a GPU ---------------------------------------------------------------------------------------------------------

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(
    "change", [pytest.param(c, id=c.__name__.strip("_"), marks=on_gpu) for c in [*CHANGES, *UNSEEN]]
)
def test_change_between_tokens_and_prefills_on_a_gpu(change: Callable[[Any], None]) -> None:
    if change.__name__ == "_through_numpy":
        pytest.skip("numpy does not write to a device")
    decoder = Decoder(peft_perceptron().cuda())
    x, xs = one_token().cuda(), prompt().cuda()
    for _ in range(3):
        decoder.step(x, 1e-3)
        decoder.step(xs, 1e-3)
    change(decoder.model)
    for _ in range(2):
        decoder.step(x, 1e-3)
        decoder.step(xs, 1e-3)
