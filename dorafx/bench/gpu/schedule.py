"""Jobs on one device within a budget: groups of processes that compile side by side and are timed one at a time.

A job of a group asks for the turn ``DEVICE`` before it touches the device, and for ``ALONE`` before it times anything. The first
is given to all of a group at once, so that their compilers run on all cores; the second to one job, in the group's order, when
all others are compiled and wait. The next group's processes are started meanwhile, and import while these are timed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, Protocol

from ..processes import ALONE, DEVICE, Job, JobError, JobProcess, is_turn


class Budget:
    """Seconds that may be spent from now on."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._now = now
        self._end = now() + seconds

    @property
    def left(self) -> float:
        return self._end - self._now()


@dataclass(frozen=True)
class Member:
    """One process of a group.

    Attributes:
        key: what the listener knows it by.
        needed: the group makes no sense without it: dorafx, and the implementation that it is compared with first.
    """

    key: Any
    job: Job
    request: dict[str, Any]
    needed: bool = False
    start_method: str | None = None
    preload: Sequence[str] = ()


@dataclass(frozen=True)
class Group:
    """Members in the order of their importance, and an estimate of their time.

    Attributes:
        together: seconds until all are compiled, side by side.
        each: seconds that one is timed.
        wants: asked before the group is started; a reason why it need not be, or nothing.
    """

    members: Sequence[Member]
    together: float
    each: float
    reason_to_skip: Callable[[], str] = lambda: ""

    def seconds(self, members: int) -> float:
        """The estimate for so many members."""
        return self.together + members * self.each

    def fitting(self, left: float) -> list[Member]:
        """The members for which ``left`` seconds suffice: fewer if not all do, from the end; none without those that are needed."""
        members = list(self.members)
        while members and self.seconds(len(members)) > left:
            spare = [m for m in members if not m.needed]
            if not spare:
                return []
            members.remove(spare[-1])
        return members


class Listener(Protocol):
    """Who is told of what happens, at once."""

    def started(self, member: Member) -> None: ...

    def reported(self, member: Member, what: Any) -> None:
        """What a job reports that is no turn."""

    def ended(self, member: Member, result: dict[str, Any]) -> None: ...

    def failed(self, member: Member, why: str) -> None: ...

    def left_out(self, member: Member, why: str) -> None: ...


@dataclass
class _Running:
    member: Member
    process: JobProcess
    waits_for: str = ""
    holds: list[str] = field(default_factory=list)

    @property
    def compiled(self) -> bool:
        return ALONE in (self.waits_for, *self.holds)


@dataclass
class _Stage:
    """A group whose processes run."""

    group: Group
    running: list[_Running]

    @property
    def compiled(self) -> bool:
        return all(r.compiled for r in self.running)

    @property
    def timing(self) -> float:
        """Seconds, by the estimate, until all that are compiled are timed."""
        return self.group.each * len(self.running)


def run_groups(
    pending: deque[Group],
    budget: Budget,
    listener: Listener,
    start: Callable[..., JobProcess] = JobProcess,
) -> None:
    """Run the groups one after the other, as far as the budget goes: what does not fit into what is left is left out, and what runs
    when it is spent is stopped.

    Args:
        pending: the groups; they are taken from it, and the listener may put others in.
        start: makes a process of a member's job, request, start method and modules to load before.
    """
    stages: list[_Stage] = []  # the one that has the device, and the one that imports
    why = "the run was interrupted"
    try:
        while pending or stages:
            if len(stages) < 2 and pending and all(stage.compiled for stage in stages):
                # What is to be timed of the group before comes first.
                left = budget.left - sum(stage.timing for stage in stages)
                stages.append(_start(pending.popleft(), left, listener, start))
            else:
                _give_turns(stages[0].running)
                _listen([stage.running for stage in stages], budget, listener)
            stages = [stage for stage in stages if stage.running]
            if budget.left <= 0:
                why = f"the budget of {budget.seconds:g} s was spent"
                break
    finally:
        for running in (r for stage in stages for r in stage.running):
            running.process.end()
            listener.failed(running.member, f"stopped: {why}")
        for group in pending:
            for member in group.members:
                listener.left_out(member, why)


def _start(group: Group, left: float, listener: Listener, start: Callable[..., JobProcess]) -> _Stage:
    why = group.reason_to_skip()
    members = [] if why else group.fitting(left)
    for member in group.members:
        if member not in members:
            estimate = group.seconds(len(members) + 1 if members else len(group.members))
            listener.left_out(
                member, why or f"its estimate of {estimate:.0f} s was more than the {max(left, 0):.0f} s left"
            )
    stage = _Stage(group, [])
    for m in members:
        listener.started(m)
        stage.running.append(_Running(m, start(m.job, m.request, m.start_method, m.preload)))
    return stage


def _give_turns(current: list[_Running]) -> None:
    if any(ALONE in r.holds for r in current):
        return  # it is being timed
    for running in current:
        if running.waits_for == DEVICE:
            _give(running)
    if all(r.waits_for == ALONE for r in current):
        _give(current[0])


def _give(running: _Running) -> None:
    running.holds.append(running.waits_for)
    running.waits_for = ""
    running.process.give_turn()


def _listen(running: Sequence[list[_Running]], budget: Budget, listener: Listener) -> None:
    """Wait for what any of them says; who is through is taken out of its list."""
    by_connection = {id(r.process.connection): (r, stage) for stage in running for r in stage}
    ready = wait([r.process.connection for stage in running for r in stage], max(budget.left, 0))
    for connection in ready:
        one, stage = by_connection[id(connection)]
        try:
            message = one.process.receive()
        except JobError as error:
            listener.failed(one.member, str(error))
        else:
            if "result" not in message:
                if is_turn(message["progress"]):
                    one.waits_for = message["progress"]["turn"]
                else:
                    listener.reported(one.member, message["progress"])
                continue
            listener.ended(one.member, message["result"])
        stage.remove(one)
        one.process.end()
