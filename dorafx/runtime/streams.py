"""Streams of a device: a norm that one stream computed is read on another only after it is there.

Work on one stream is done in its order; between two there is none but what somebody asks for. Whoever computes on a side stream
(a warm-up before a CUDA graph, a server that decodes several requests at a time) keeps norms that others read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .watch import parts

_WITH_STREAMS = ("cuda", "xpu")


class Ready(NamedTuple):
    """When a norm is there.

    Attributes:
        stream: the stream that computes it.
        event: what comes after it on that stream.
    """

    stream: Any
    event: Any


class Streams:
    """The streams that one call of a graph runs on. Each is looked up once a call, and its event recorded once: a decoding step
    takes hundreds of norms."""

    def __init__(self) -> None:
        self._current: dict[torch.device, Any] = {}
        self._ready: dict[torch.device, Ready] = {}

    def ready(self, norm: torch.Tensor) -> Ready | None:
        """To be kept with a norm that this call computed; None on a device without streams. All norms of the call have been
        computed by then."""
        device = norm.device
        if device.type not in _WITH_STREAMS:
            return None
        if device not in self._ready:
            stream = self._of(device)
            self._ready[device] = Ready(stream, stream.record_event())
        return self._ready[device]

    def read(self, norm: torch.Tensor, ready: Ready) -> None:
        """Before this call reads a kept norm: have its stream wait, where another one computed it, and its memory last until it
        has been read."""
        if not self.computes(norm, ready):
            stream = self._of(norm.device)
            stream.wait_event(ready.event)
            for part in parts([norm]):
                _hold(part, stream)

    def computes(self, norm: torch.Tensor, ready: Ready) -> bool:
        """Whether this call runs on the stream that computes a kept norm."""
        return bool(self._of(norm.device) == ready.stream)

    def _of(self, device: torch.device) -> Any:
        if device not in self._current:
            self._current[device] = _current_stream(device)
        return self._current[device]


def _current_stream(device: torch.device) -> Any:
    return torch.accelerator.current_stream(device)


def _hold(tensor: torch.Tensor, stream: Any) -> None:
    """Keep the allocator from giving the tensor's memory away before the stream has done what it was asked by now."""
    tensor.record_stream(stream)
