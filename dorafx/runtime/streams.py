"""Streams of a device: a norm that was computed on one stream is read on another one only once it is finished.

Work on one stream is done in order, but two streams are not ordered unless one waits for the other. Programs that compute on a side
stream (a warm-up before a CUDA graph, a server that decodes several requests at a time) keep norms that other streams read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .watch import parts

_WITH_STREAMS = ("cuda", "xpu")


class Ready(NamedTuple):
    """When a norm is finished.

    Attributes:
        stream: the stream that computes it.
        event: recorded on that stream after the norm.
    """

    stream: Any
    event: Any


class Streams:
    """The streams that one call of a graph runs on. Each is looked up once a call, and its event is recorded once, because a decoding
    step reads hundreds of norms."""

    def __init__(self) -> None:
        self._current: dict[torch.device, Any] = {}
        self._ready: dict[torch.device, Ready] = {}

    def ready(self, norm: torch.Tensor) -> Ready | None:
        """What to keep with a norm that this call computed; None on a device without streams. Call it after all norms of the call have
        been computed."""
        device = norm.device
        if device.type not in _WITH_STREAMS:
            return None
        if device not in self._ready:
            stream = self._of(device)
            self._ready[device] = Ready(stream, stream.record_event())
        return self._ready[device]

    def read(self, norm: torch.Tensor, ready: Ready) -> None:
        """Prepare for reading a kept norm in this call. If another stream computed it, this call's stream waits for it, and its memory
        is not reused before it has been read."""
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


def current_stream(device: torch.device) -> Any:
    """The stream that this thread computes on; None on a device without streams."""
    return _current_stream(device) if device.type in _WITH_STREAMS else None


def _hold(tensor: torch.Tensor, stream: Any) -> None:
    """Keep the allocator from reusing the tensor's memory before the stream has finished the work queued so far."""
    tensor.record_stream(stream)
