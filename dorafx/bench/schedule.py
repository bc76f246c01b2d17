"""Jobs on one device within a budget: groups of processes that compile side by side and are timed one at a time.

A job of a group requests the turn ``DEVICE`` before it uses the device, and ``ALONE`` before it times anything. The first is granted
to all jobs of a group at once, so that they compile on all cores; the second to one job at a time, in the group's order, when all
others are compiled and wait. The next group's processes are started meanwhile, and do their imports while these are timed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, Protocol

from .processes import ALONE, DEVICE, Job, JobError, JobProcess, is_turn

STOPPED = "stopped: "
"""How the reason begins for which a job failed that was stopped with the run."""


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
        key: identifies it to the listener.
        needed: whether the group is useless without it, as without dorafx and the implementation that it is first compared with.
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
        each: seconds for timing each.
        reason_to_skip: called before the group is started; returns why it is to be skipped, or an empty text.
    """

    members: Sequence[Member]
    together: float
    each: float
    reason_to_skip: Callable[[], str] = lambda: ""

    def seconds(self, members: int) -> float:
        """The estimate for a number of members."""
        return self.together + members * self.each

    def fitting(self, left: float) -> list[Member]:
        """The members that fit into ``left`` seconds: the last ones are dropped first; none if the needed ones do not fit."""
        members = list(self.members)
        while members and self.seconds(len(members)) > left:
            spare = [m for m in members if not m.needed]
            if not spare:
                return []
            members.remove(spare[-1])
        return members


class Listener(Protocol):
    """Receives all events immediately."""

    def started(self, member: Member) -> None: ...

    def reported(self, member: Member, message: Any) -> None:
        """A report of a job that is not a request of a turn."""

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
    """A group whose processes are running."""

    group: Group
    running: list[_Running]

    @property
    def compiled(self) -> bool:
        return all(r.compiled for r in self.running)

    @property
    def timing(self) -> float:
        """The estimated seconds for timing the running processes."""
        return self.group.each * len(self.running)


def run_groups(
    pending: deque[Group],
    budget: Budget,
    listener: Listener,
    start: Callable[..., JobProcess] = JobProcess,
) -> None:
    """Run the groups one after the other within the budget: members that do not fit into the rest of it are left out, and those that
    run when it is used up are stopped.

    Args:
        pending: the groups; they are removed from it, and the listener may add others.
        start: makes a process from a member's job, request, start method and modules to preload.
    """
    stages: list[_Stage] = []  # the one that uses the device, and the one that imports
    why = "the run was interrupted"
    try:
        while pending or stages:
            if len(stages) < 2 and pending and all(stage.compiled for stage in stages):
                # The rest of the budget after the current group is timed.
                left = budget.left - sum(stage.timing for stage in stages)
                stages.append(_Stage(pending.popleft(), []))
                _start(stages[-1], left, listener, start)
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
            listener.failed(running.member, STOPPED + why)
        for group in pending:
            for member in group.members:
                listener.left_out(member, why)


def _start(stage: _Stage, left: float, listener: Listener, start: Callable[..., JobProcess]) -> None:
    """Start the processes of a stage; those that run when something raises are in it."""
    group = stage.group
    why = group.reason_to_skip()
    members = [] if why else group.fitting(left)
    for member in group.members:
        if member not in members:
            estimate = group.seconds(len(members) + 1 if members else len(group.members))
            listener.left_out(
                member, why or f"its estimate of {estimate:.0f} s was more than the {max(left, 0):.0f} s left"
            )
    for m in members:
        listener.started(m)
        stage.running.append(_Running(m, start(m.job, m.request, m.start_method, m.preload)))


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
    """Wait for the next messages; processes that ended are removed from their lists."""
    by_connection = {id(r.process.connection): (r, stage) for stage in running for r in stage}
    ready = wait([r.process.connection for stage in running for r in stage], max(budget.left, 0))
    for connection in ready:
        sender, stage = by_connection[id(connection)]
        try:
            message = sender.process.receive()
        except JobError as error:
            listener.failed(sender.member, str(error))
        else:
            if "result" not in message:
                if is_turn(message["progress"]):
                    sender.waits_for = message["progress"]["turn"]
                else:
                    listener.reported(sender.member, message["progress"])
                continue
            listener.ended(sender.member, message["result"])
        stage.remove(sender)
        sender.process.end()
