"""Who has the device when, and what a budget leaves out: jobs are functions in threads, and the clock is ours."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from typing import Any

import pytest

from dorafx.bench.processes import ALONE, DEVICE, JobError, is_turn, turn
from dorafx.bench.schedule import Budget, Group, Member, run_groups

Report = Callable[[Any], None]


class Thread:
    """In place of a :class:`JobProcess`."""

    def __init__(self, job: Any, request: dict[str, Any], *unused: Any) -> None:
        self.connection, self._theirs = Pipe()
        self._thread = threading.Thread(target=self._run, args=(job, request), daemon=True)
        self._thread.start()

    def _run(self, job: Any, request: dict[str, Any]) -> None:
        def report(what: Any) -> None:
            self._theirs.send({"progress": what})
            if is_turn(what):
                self._theirs.recv()

        try:
            self._theirs.send({"result": job(request, report)})
        except (EOFError, OSError):
            pass  # stopped
        except Exception as error:
            self._theirs.send({"error": str(error)})

    def receive(self) -> dict[str, Any]:
        message: dict[str, Any] = self.connection.recv()
        if "error" in message:
            raise JobError(message["error"])
        return message

    def give_turn(self) -> None:
        self.connection.send(None)

    def end(self) -> None:
        self.connection.close()


class Heard:
    """A listener that notes everything in one list."""

    def __init__(self) -> None:
        self.all: list[tuple[str, Any]] = []
        self.why: dict[Any, str] = {}

    def started(self, member: Member) -> None:
        self.all.append(("started", member.key))

    def reported(self, member: Member, what: Any) -> None:
        self.all.append((what, member.key))

    def ended(self, member: Member, result: dict[str, Any]) -> None:
        self.all.append(("ended", member.key))

    def failed(self, member: Member, why: str) -> None:
        self.all.append(("failed", member.key))
        self.why[member.key] = why

    def left_out(self, member: Member, why: str) -> None:
        self.all.append(("left out", member.key))
        self.why[member.key] = why

    def place(self, what: str, key: str) -> int:
        return self.all.index((what, key))


def job(request: dict[str, Any], report: Report) -> dict[str, Any]:
    report("imported")
    report(turn(DEVICE))
    report("compiling")
    if request.get("fails"):
        raise RuntimeError("no such kernel")
    report("compiled")
    report(turn(ALONE))
    report("timing")
    report("timed")
    return {}


def group(names: str, needed: int = 0, together: float = 1, each: float = 1, failing: str = "", **rest: Any) -> Group:
    members = [Member(n, job, {"fails": n in failing}, i < needed) for i, n in enumerate(names)]
    return Group(members, together, each, **rest)


def heard(groups: Sequence[Group], budget: Budget | None = None) -> Heard:
    listener = Heard()
    run_groups(deque(groups), budget or Budget(1000), listener, Thread)  # type: ignore[arg-type]
    return listener


def test_all_compile_side_by_side_and_are_timed_one_at_a_time() -> None:
    found = heard([group("abc"), group("de")])
    for names in ("abc", "de"):
        last_compiled = max(found.place("compiled", n) for n in names)
        assert all(found.place("timing", n) > last_compiled for n in names)
        for one, following in itertools.pairwise(names):  # in the group's order
            assert found.place("ended", one) < found.place("timing", following)
    # While the first group is timed the second imports, and does not touch the device.
    assert found.place("started", "d") < found.place("timing", "a")
    assert found.place("ended", "c") < min(found.place("compiling", n) for n in "de")


def test_one_that_fails_holds_up_nobody() -> None:
    found = heard([group("abc", failing="a"), group("d", failing="d"), group("e")])
    assert found.why == {"a": "no such kernel", "d": "no such kernel"}
    assert [key for what, key in found.all if what == "ended"] == ["b", "c", "e"]


@pytest.mark.parametrize(("left", "fitting"), [(9, "abcd"), (8.5, "abc"), (7.9, "ab"), (7, "ab"), (6.9, ""), (0, "")])
def test_what_does_not_fit_is_left_out_from_the_end_but_never_what_is_needed(left: float, fitting: str) -> None:
    """5 s together, 1 s each."""
    assert "".join(m.key for m in group("abcd", needed=2, together=5).fitting(left)) == fitting


def test_what_is_left_decides_and_reasons_are_told() -> None:
    now = [0.0]

    def passing(request: dict[str, Any], report: Report) -> dict[str, Any]:
        now[0] += 10
        return job(request, report)

    first = Group([Member("a", passing, {})], together=5, each=1)
    budget = Budget(30, lambda: now[0])
    found = heard([first, group("bcde", needed=2, together=16, each=1), group("f", together=25, each=1)], budget)
    ended = [key for what, key in found.all if what == "ended"]
    assert ended == ["a", "b", "c", "d"]  # 16 + 3 of the 19 that are left when a is compiled and has yet to be timed
    assert found.why["e"] == "its estimate of 20 s was more than the 19 s left"
    assert found.why["f"].startswith("its estimate of 26 s was more than the ")


def test_a_group_that_is_not_wanted_says_why() -> None:
    found = heard([group("a", failing="a"), group("b", reason_to_skip=lambda: "there is no a"), group("c")])
    assert found.why == {"a": "no such kernel", "b": "there is no a"}
    assert ("ended", "c") in found.all


def test_what_runs_when_the_budget_is_spent_is_stopped() -> None:
    waiting = threading.Event()

    def endless(request: dict[str, Any], report: Report) -> dict[str, Any]:
        report(turn(DEVICE))
        report("compiling")
        waiting.wait(60)
        return {}

    groups = [Group([Member("a", endless, {}), Member("b", job, {})], 0, 0), group("c")]
    found = heard(groups, Budget(0.5))
    waiting.set()
    assert found.why == {
        "a": "stopped: the budget of 0.5 s was spent",
        "b": "stopped: the budget of 0.5 s was spent",
        "c": "the budget of 0.5 s was spent",
    }
    assert ("timing", "b") not in found.all


def test_an_interrupted_run_ends_its_processes() -> None:
    ended: list[str] = []

    class Noting(Thread):
        def __init__(self, job: Any, request: dict[str, Any], *unused: Any) -> None:
            super().__init__(job, request)
            self.name = request["name"]

        def end(self) -> None:
            ended.append(self.name)
            super().end()

    class Interrupting(Heard):
        def reported(self, member: Member, what: Any) -> None:
            raise KeyboardInterrupt

    listener = Interrupting()
    members = [Member(name, job, {"name": name}) for name in "ab"]
    with pytest.raises(KeyboardInterrupt):
        run_groups(deque([Group(members, 1, 1), group("c")]), Budget(100), listener, Noting)  # type: ignore[arg-type]
    assert sorted(ended) == ["a", "b"]
    assert listener.why["c"] == "the run was interrupted"


def test_a_process_that_cannot_be_started_leaves_none_running() -> None:
    """Python waits at its end for processes that wait for a turn."""
    ended = []

    class Third(Thread):
        def __init__(self, job: Any, request: dict[str, Any], *unused: Any) -> None:
            if request["name"] == "c":
                raise OSError("too many processes")
            super().__init__(job, request)
            self.name = request["name"]

        def end(self) -> None:
            ended.append(self.name)
            super().end()

    members = [Member(name, job, {"name": name}) for name in "abc"]
    with pytest.raises(OSError, match="too many"):
        run_groups(deque([Group(members, 1, 1)]), Budget(100), Heard(), Third)  # type: ignore[arg-type]
    assert ended == ["a", "b"]


def test_a_listener_may_add_a_group() -> None:
    groups = deque([group("a", failing="a"), group("b")])

    class Adding(Heard):
        def failed(self, member: Member, why: str) -> None:
            super().failed(member, why)
            groups.appendleft(group("c"))

    listener = Adding()
    run_groups(groups, Budget(100), listener, Thread)  # type: ignore[arg-type]
    assert [key for what, key in listener.all if what == "ended"] == ["c", "b"]
