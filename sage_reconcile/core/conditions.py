"""The conditions of a replica, as Kubernetes means them: each with its status, a stable reason, and since when.

``since`` comes from the record of the launch where that tells it; else from what was told before, as long as the
condition is the same. It is never the time of asking.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sage_reconcile.core.lifecycle import Phase
from sage_reconcile.core.observed import Launch, Life
from sage_reconcile.core.plan import Action

_WAITS = (
    ("hub", "WaitingForHub"),
    ("give back", "WaitingForMemory"),
    ("starts under way", "WaitingForLane"),
    ("to be ready", "WaitingForLane"),
    ("to end", "WaitingForEnd"),
    ("have a place again", "WaitingForRoom"),
    ("next `apply`", "WaitingForApply"),
)
"""What a start waits for, by the words with which the plan says so."""
_PORTS = ("port", "ports")


@dataclass(frozen=True, slots=True)
class Around:
    """What the plan says of a replica besides its launch.

    ``start`` starts it, ``replaced`` ends it since its entry changed, ``refused`` is why it has no place, and
    ``faults`` tells what is wrong with the GPUs that it runs on.
    """

    start: Action | None = None
    replaced: Action | None = None
    refused: str = ""
    runs_on: bool = False
    faults: str = ""


def conditions(phase: Phase, reason: str, launch: Launch | None, around: Around) -> list[dict[str, Any]]:
    """``Ready`` and ``Placed`` of a replica in this phase, and ``Current`` of one that runs."""
    found = [_ready(phase, reason, launch, around), _placed(launch, around)]
    if launch is not None and launch.life is Life.ALIVE:
        found.append(_current(launch, around))
    return found


def _condition(
    kind: str, status: bool | None, reason: str, message: str = "", since: float | None = None
) -> dict[str, Any]:
    told = "Unknown" if status is None else str(status)
    return {"type": kind, "status": told, "reason": reason, "message": message, "since": since}


def _ready(phase: Phase, reason: str, launch: Launch | None, around: Around) -> dict[str, Any]:
    ended = launch.exit.at if launch and launch.exit else None
    since: float | None = None
    status: bool | None = False
    match phase:
        case Phase.READY:
            code, status, since = "Answers", True, _answers_since(launch)
        case Phase.STARTING:
            code, since = "Starting", launch.created_at if launch else None
            reason = reason or (launch.stage if launch else "")
        case Phase.DEGRADED:
            code, since = ("GpuFault", None) if around.faults else ("NotAnswering", _answers_since(launch))
        case Phase.STOPPING:
            code, since = "Stopping", (launch.stopping_since if launch else None) or ended
        case Phase.BACKOFF | Phase.STALLED:
            code, since = phase.value, ended
        case Phase.UNKNOWN:
            code, status = "NotProvenOurs", None
        case Phase.PENDING:
            code = _why_pending(around)
    return _condition("Ready", status, code, reason, since)


def _answers_since(launch: Launch | None) -> float | None:
    if launch is None:
        return None
    return launch.answers_since if launch.answers_since is not None or not launch.ready else launch.ready_at


def _why_pending(around: Around) -> str:
    if around.refused:
        return _why_refused(around)
    if around.start is None:
        return "NotPlanned"
    for words, code in _WAITS:
        if words in around.start.waits_for:
            return code
    return "WaitingForEnd" if around.start.after else "AboutToStart"


def _why_refused(around: Around) -> str:
    if around.start is not None and around.start.blocked:
        return "CannotStartHere"
    return "NoPort" if set(_PORTS) & set(around.refused.replace("`", " ").split()) else "NoPlace"


def _placed(launch: Launch | None, around: Around) -> dict[str, Any]:
    if launch is not None and launch.life in (Life.ALIVE, Life.INTENT):
        return _condition("Placed", True, "Running", since=launch.created_at)
    if launch is not None and launch.life is Life.UNPROVEN:
        return _condition("Placed", None, "NotProvenOurs")
    if around.refused:
        return _condition("Placed", False, _why_refused(around), around.refused)
    if around.start is not None:
        return _condition("Placed", True, "Planned")
    return _condition("Placed", False, "NotWanted" if launch is not None else "NotPlanned")


def _current(launch: Launch, around: Around) -> dict[str, Any]:
    """Whether it runs what its entry says now."""
    if around.replaced is not None:
        return _condition("Current", False, "Outdated", around.replaced.cause)
    if around.runs_on:
        return _condition("Current", False, "NoPlaceForChange", around.refused)
    return _condition("Current", True, "AsWritten", since=launch.created_at)


def keep_since(document: Mapping[str, Any], before: Mapping[str, Any], now: float | None) -> None:
    """Fills in since when, from what was told before; what is new is so since ``now``, where that is given."""
    told = {key: condition["since"] for key, condition in _rows(before)}
    for key, condition in _rows(document):
        if condition["since"] is None:
            condition["since"] = told.get(key, now)


def _rows(document: Mapping[str, Any]) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    return [
        ((row["name"], condition["type"], condition["status"], condition["reason"]), condition)
        for engine in document.get("engines", ())
        for row in engine["replicas"]
        for condition in row.get("conditions", ())  # one who told it may be of an earlier version
    ]
