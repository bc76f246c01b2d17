"""What is done around a timed call, with stand-ins for a CUDA device."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest
import torch

from dorafx._compat import devices
from dorafx.bench import clock as clocks
from dorafx.bench.clock import Clock


class Device:
    """In place of ``torch.cuda``: notes what it is asked for; the time between two events is 1 ms."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[Any] = []
        noted = self.done

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                noted.append("event")

            def synchronize(self) -> None:
                noted.append("wait")

            def elapsed_time(self, other: Any) -> float:
                return 1.0

        class Flush:
            def zero_(self) -> None:
                noted.append("flush")

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: noted.append("wait"))
        monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: Flush())

        def sleep(cycles: int) -> None:
            noted.append(("spin", cycles))

        monkeypatch.setattr(torch.cuda, "_sleep", sleep)
        devices._cycles_per_second.cache_clear()

    def spins(self) -> list[int]:
        return [what[1] for what in self.done if isinstance(what, tuple)]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def test_an_operator_is_issued_while_the_device_spins(device: Device) -> None:
    """Flush, spin, event, call, event: nothing of the host is between the events, and its time is told beside."""

    def step() -> None:
        device.done.append("call")
        time.sleep(0.002)

    timing = Clock("cuda", 0, least=4).timing(step, cold=True, warm_up=1)
    assert timing.seconds == [1e-3] * 4
    assert len(timing.host) == 3 and min(timing.host) >= 0.002
    last = [what if isinstance(what, str) else what[0] for what in device.done[-7:]]
    assert last == ["wait", "flush", "spin", "event", "call", "event", "wait"]
    # 2,000,000 cycles took 1 ms by the events: at that rate it spins for more than the host takes to issue the call.
    spun = [cycles / 2e9 for cycles in device.spins()[2:]]
    assert len(spun) == 4 and all(0.004 <= s <= clocks._LONGEST_SPIN for s in spun)


def test_what_waits_for_the_host_is_timed_waiting(device: Device) -> None:
    """A whole model is: its user waits for the host, too."""
    timing = Clock("cuda", 0, least=3).timing(lambda: device.done.append("call"), warm_up=0)
    assert device.spins() == [] and "flush" not in device.done
    assert len(timing.seconds) == len(timing.host) == 3


def test_the_host_has_a_figure_of_its_own(device: Device) -> None:
    assert set(Clock("cuda", 0).figures("time", lambda: None, cold=True)) == {"time", "time, host"}
    assert set(Clock("cpu", 0).figures("time", lambda: None, cold=True)) == {"time"}


def test_on_a_cpu_the_call_alone_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now[0])
    calls: list[float] = []

    def passing(seconds: float) -> None:
        calls.append(seconds)
        now[0] += seconds

    timing = Clock("cpu", 0, least=5).timing(lambda: passing(0.25), lambda: passing(8.0), cold=True, warm_up=1)
    assert calls == [8.0, 0.25] * 6
    assert timing.seconds == [0.25] * 5 and timing.host == []
