"""What happened between two looks, to whom, and why: the events that a pass has to tell.

What was told before is all that is remembered, so whoever begins anew (the next daemon) goes on from the events
on disk: nothing is told twice, and what happened while nobody looked is told when somebody does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from sage_reconcile.core.lifecycle import StopCause, failed, next_try, stalled
from sage_reconcile.core.observed import Launch, Life, Observed
from sage_reconcile.core.plan import Action, Plan

VERSION = 1


class EventType(StrEnum):
    """What happened. The words do not change."""

    SPAWN = "spawn"
    STOP = "stop"
    KILL = "kill"
    REAP = "reap"
    MOVED = "moved"
    DISPLACED = "displaced"
    ACTION_FAILED = "action-failed"
    ADOPTED = "adopted"
    READY = "ready"
    NOT_READY = "not-ready"
    FAILED = "failed"
    BACK_OFF = "back-off"
    STALLED = "stalled"
    STOPPED = "stopped"
    UNPLACED = "unplaced"
    GPU_LOST = "gpu-lost"
    GPU_BACK = "gpu-back"
    FILE_ACCEPTED = "file-accepted"
    FILE_REFUSED = "file-refused"
    FILE_HELD_BACK = "file-held-back"
    FILE_CONFIRMED = "file-confirmed"
    DAEMON_STARTED = "daemon-started"
    DAEMON_ENDED = "daemon-ended"


BAD = frozenset(
    {
        *(EventType.ACTION_FAILED, EventType.FAILED, EventType.STALLED, EventType.NOT_READY, EventType.UNPLACED),
        *(EventType.FILE_REFUSED, EventType.FILE_HELD_BACK, EventType.GPU_LOST),
    }
)
"""What somebody should see to."""
_OVER = (EventType.FAILED, EventType.STOPPED)
_TURNS = (EventType.SPAWN, EventType.READY, EventType.NOT_READY, EventType.STOP, *_OVER)
_DISPLACING = {StopCause.MOVED: EventType.MOVED, StopCause.DISPLACED: EventType.DISPLACED}


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. ``message`` is for people; ``details`` are what it is made of."""

    type: EventType
    message: str = ""
    replica: str = ""
    launch: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def engine(self) -> str:
        """The engine that the replica is of; empty where it is about none."""
        return self.replica.rpartition("/")[0]


class Told:
    """What has been told: of each launch the last turn of its life, of each replica and GPU how it stands.

    ``events`` are those on disk, the oldest first. One that ``adopts`` tells of what it finds running at first.
    """

    def __init__(self, events: Iterable[Mapping[str, Any]] = (), *, adopts: bool = False) -> None:
        self._turns: dict[str, EventType] = {}
        self._unplaced: set[str] = set()
        self._lost: set[str] = set()
        self._first, self._adopts = True, adopts
        for event in events:
            launch, replica = (str(event.get(name) or "") for name in ("launch", "replica"))
            details = event.get("details")
            self._take(str(event.get("type")), launch, replica)
            gpu = details.get("gpu") if isinstance(details, Mapping) else None
            if gpu and event.get("type") == EventType.GPU_LOST:
                self._lost.add(str(gpu))
            elif event.get("type") == EventType.GPU_BACK:
                self._lost.discard(str(gpu))

    def _take(self, kind: str, launch: str, replica: str) -> None:
        if launch and kind in _TURNS:
            self._turns[launch] = EventType(kind)
        elif launch and kind == EventType.ADOPTED:
            self._turns.setdefault(launch, EventType.ADOPTED)
        if kind == EventType.UNPLACED:
            self._unplaced.add(replica)
        elif kind == EventType.SPAWN:
            self._unplaced.discard(replica)

    def news(
        self,
        observed: Observed,
        plan: Plan,
        now: float,
        done: Sequence[Action] = (),
        could_not: Sequence[tuple[Action, str]] = (),
    ) -> list[Event]:
        """What a pass has to tell, in the order in which it saw and did it; it counts as told from now on."""
        starts = {action.replica: action for action in plan.actions if action.kind == "spawn"}
        found = [*self._gpus(observed)]
        for launch in sorted(observed.launches, key=lambda x: (x.created_at, x.id)):
            found += self._of(launch, starts.get(launch.replica), now)
        found += self._places(plan)
        for action in done:
            found += _done(action)
        found += [_could_not(action, why) for action, why in could_not]
        for event in found:
            self._take(event.type, event.launch, event.replica)
        self._first = False
        known = {launch.id for launch in observed.launches} | {action.launch for action in done}
        self._turns = {launch: turn for launch, turn in self._turns.items() if launch in known}
        return found

    def _of(self, launch: Launch, start: Action | None, now: float) -> Iterator[Event]:
        before = self._turns.get(launch.id)
        if before in _OVER or launch.life is Life.UNPROVEN:
            return
        if launch.life is Life.EXITED:
            if before is None and self._first:
                self._turns[launch.id] = EventType.STOPPED  # it was over before anybody told anything
            else:
                yield from _ended(launch, start, now)
            return
        if self._first and self._adopts:
            yield _event(EventType.ADOPTED, launch, f"pid {launch.pid}, port {launch.port}", pid=launch.pid)
        if before is None and self._first and launch.ready:
            self._turns[launch.id] = before = EventType.READY  # so it was before
        if launch.life is not Life.ALIVE or launch.stopping_since is not None:
            return
        if launch.ready and before is not EventType.READY:
            took = f"{max(0.0, (launch.ready_at or now) - launch.created_at):.0f}s after its start"
            yield _event(EventType.READY, launch, "it answers again" if before is EventType.NOT_READY else took)
        elif not launch.ready and before is EventType.READY:
            yield _event(EventType.NOT_READY, launch, "it does not answer any more")

    def _places(self, plan: Plan) -> Iterator[Event]:
        refused = {item.replica: item.reason for item in plan.unplaced} if not plan.making_room else {}
        for replica in sorted(refused.keys() - self._unplaced):
            yield Event(EventType.UNPLACED, refused[replica], replica)
        placed = {action.replica for action in plan.actions if action.kind == "spawn"}
        placed |= {kept.launch.replica for kept in plan.kept} - refused.keys()
        self._unplaced -= placed

    def _gpus(self, observed: Observed) -> Iterator[Event]:
        """A GPU at fault, or one that was there and is not listed any more; and when it is back."""
        lost = {gpu.uuid: f"GPU {gpu.index}: {gpu.problem}" for gpu in observed.gpus if gpu.faulty}
        listed = {gpu.uuid for gpu in observed.gpus}
        on = {uuid for launch in observed.launches if launch.holds for uuid in launch.gpus}
        lost |= {uuid: f"{uuid} is not listed any more" for uuid in sorted(on - listed)}
        for uuid in sorted(lost.keys() - self._lost):
            yield Event(EventType.GPU_LOST, lost[uuid], details={"gpu": uuid})
        for uuid in sorted((self._lost & listed) - lost.keys()):
            yield Event(EventType.GPU_BACK, f"{uuid} is back", details={"gpu": uuid})
        self._lost = lost.keys() | (self._lost - listed)


def _event(kind: EventType, launch: Launch, message: str, **details: object) -> Event:
    return Event(kind, message, launch.replica, launch.id, details)


def _ended(launch: Launch, start: Action | None, now: float) -> Iterator[Event]:
    how = launch.exit.text() if launch.exit else "its end was not seen"
    code = launch.exit.code if launch.exit else None
    if not failed(launch):
        yield _event(EventType.STOPPED, launch, f"{launch.stop_cause} ({how})", cause=launch.stop_cause, exit_code=code)
        return
    why = launch.failure
    told = ": ".join(part for part in (launch.stop_cause or how, why.summary() if why else "") if part)
    kind = str(why.kind) if why else None
    details = {"class": kind, "line": why.line if why else "", "exit_code": code, "failures": launch.failures + 1}
    yield _event(EventType.FAILED, launch, told, **details)
    if stalled(launch) and (start is None or start.failures):
        yield _event(EventType.STALLED, launch, "not tried again until its entry changes, or with `apply`")
    elif start is not None and start.not_before is not None:
        when = next_try(launch, now)
        yield _event(EventType.BACK_OFF, launch, f"tried again in {when - now:.0f}s", next_try_at=when)


def _done(action: Action) -> Iterator[Event]:
    gpus = [gpu.index for gpu in action.gpus]
    details: dict[str, Any] = {"cause": action.cause, "gpus": gpus, "port": action.port}
    if action.changes:
        details["changes"] = [change.text() for change in action.changes]
    where = f"GPU {','.join(map(str, gpus))}, port {action.port}: " if action.kind == "spawn" and gpus else ""
    yield Event(EventType(action.kind), f"{where}{action.cause}", action.replica, action.launch, details)
    if action.stop_cause in _DISPLACING and action.kind == "stop":
        to = [gpu.index for gpu in action.goes_to]
        goes = f"to GPU {','.join(map(str, to))}: " if to else ""
        kind = _DISPLACING[action.stop_cause]
        yield Event(kind, f"{goes}{action.cause}", action.replica, action.launch, {"cause": action.cause, "to": to})


def _could_not(action: Action, why: str) -> Event:
    details = {"kind": action.kind, "reason": why}
    return Event(EventType.ACTION_FAILED, f"{action.kind}: {why}", action.replica, action.launch, details)


def selected(event: Mapping[str, Any], name: str, since: float) -> bool:
    """Whether an event is of an engine or replica of this name (any, where it is empty) and not older."""
    mine = not name or name in (event.get("engine"), event.get("replica"))
    at = event.get("at")
    return mine and isinstance(at, int | float) and at >= since
