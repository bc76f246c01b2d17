"""A norm that one stream computes and another reads. Without a device, streams are stand-ins that note what they are asked."""

from __future__ import annotations

import pytest
import torch
from integration_support import assert_close, peft_perceptron
from reuse_support import LAYERS, Decoder, counts, one_token, parameters

import dorafx
from dorafx.runtime import streams


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream


class Stream:
    def __init__(self, name: str) -> None:
        self.name = name

    def record_event(self) -> Event:
        NOTED.append(f"{self.name}: event")
        return Event(self)

    def wait_event(self, event: Event) -> None:
        NOTED.append(f"{self.name}: waits for {event.stream.name}")


NOTED: list[str] = []
MAIN, SIDE = Stream("main"), Stream("side")


class Device:
    """Which stream the program is on."""

    current = MAIN


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()
    NOTED.clear()
    monkeypatch.setattr(streams, "_WITH_STREAMS", ("cpu",))
    monkeypatch.setattr(streams, "_current_stream", lambda _: found.current)
    monkeypatch.setattr(streams, "_hold", lambda part, stream: NOTED.append(f"{stream.name}: holds"))
    return found


def taken() -> list[str]:
    """What the streams were asked since the last time."""
    noted = list(NOTED)
    NOTED.clear()
    return noted


def test_a_norm_that_another_stream_computed(device: Device) -> None:
    decoder = Decoder()
    device.current = SIDE
    decoder.step()
    assert taken() == ["side: event"], "one for all norms of a call"
    decoder.step()
    assert taken() == [], "a stream does its work in order"
    device.current = MAIN
    for _ in range(2):
        decoder.step()
        assert taken() == ["main: waits for side", "main: holds"] * LAYERS
    assert counts() == (LAYERS, 3 * LAYERS)
    for p in parameters(decoder.model):
        p.data.mul_(1.1)
    decoder.step()
    assert taken() == ["main: event"]


def test_what_is_not_kept_needs_no_event(device: Device) -> None:
    for reuse in ("never", "auto"):
        model = peft_perceptron().train()
        options = {"dorafx.codegen": "eager", "dorafx.norm_reuse": reuse}
        compiled = torch.compile(model, backend="dorafx", options=options)
        compiled(one_token()).sum().backward()
        assert taken() == []


def test_a_recomputation_on_another_stream(device: Device) -> None:
    """Autograd runs a backward on the forward's stream, but whoever drives it need not be on it."""
    model = peft_perceptron().train()
    compiled = torch.compile(model, backend="dorafx", options={"dorafx.codegen": "eager"})
    y = torch.utils.checkpoint.checkpoint(compiled, torch.randn(3, 5, 24), use_reentrant=False)
    assert taken() == ["main: event"]
    device.current = SIDE
    y.sum().backward()
    assert taken() == ["side: waits for main", "side: holds"] * LAYERS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_streams_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream that computes the norms is far behind the one that reads them."""
    monkeypatch.undo()
    model = peft_perceptron().cuda()
    compiled = torch.compile(model, backend="dorafx")
    token = one_token().cuda()
    side = torch.cuda.Stream()
    with torch.no_grad():
        compiled(token)
        expected = model(token)
        for _ in range(3):
            dorafx.invalidate(model)
            torch.cuda.synchronize()
            with torch.cuda.stream(side):
                torch.full((1 << 28,), 1.0, device="cuda").cumsum(0)
                compiled(token)
            assert_close(compiled(token), expected, 1e-4)
