"""What phase a replica is in, and whether and when a failed one is tried again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from sage_reconcile.core.failure import FailureKind
from sage_reconcile.core.observed import Gpu, Launch, Life, Observed

BACKOFF_FIRST_S = 10.0
BACKOFF_LIMIT_S = 300.0
BACKOFF_SPREAD = 0.2
"""By up to this share a wait is shorter, so that what failed together is not all tried again at one moment."""
STEADY_S = 600.0
"""A replica that was ready this long has shown that it works: its failures are forgotten."""
LOADING_GRACE_S = 5.0
"""vLLM loses a SIGTERM that comes while it loads, so a replica that is not ready gets no longer than this."""


class StopCause(StrEnum):
    """Why a replica was told to stop."""

    REMOVED = "no longer wanted"
    CHANGED = "its entry changed"
    STARTUP_TIMEOUT = "not ready in time"
    ENDED = "its leader ended"
    MOVED = "moved to make room"
    DISPLACED = "gave way to a higher priority"


class Phase(StrEnum):
    """Where a replica is between wanted and serving."""

    PENDING = "Pending"
    STARTING = "Starting"
    READY = "Ready"
    DEGRADED = "Degraded"
    STOPPING = "Stopping"
    BACKOFF = "BackOff"
    STALLED = "Stalled"
    UNKNOWN = "Unknown"


def gpu_faults(launch: Launch, observed: Observed) -> str:
    """What is wrong with the GPUs that a launch runs on: ``GPU 3: the GPU is lost …``; empty where nothing is.

    An exclusion, or a compute mode, keeps others off a GPU and is no fault. With a GPU that is not listed any more
    those are told that could never be read: it may be one of them.
    """
    by_uuid = {gpu.uuid: gpu for gpu in observed.gpus}
    never_read = (f"GPU {gpu.index}: {gpu.problem}" for gpu in observed.gpus if not gpu.memory_total_mib)
    known = "; ".join([observed.gpu_note] if observed.gpu_note else never_read)
    why = f" ({known})" if known else ""
    faults = []
    for uuid in launch.gpus:
        gpu = by_uuid.get(uuid)
        if gpu is None:
            faults.append(f"{uuid} is not listed any more{why}")
        elif gpu.faulty:
            faults.append(f"GPU {gpu.index}: {gpu.problem}")
    return "; ".join(faults)


def fault_note(launch: Launch, observed: Observed) -> str:
    """The same as a note of a plan."""
    faults = gpu_faults(launch, observed) if launch.holds else ""
    return f"{launch.replica}: runs on a GPU at fault: {faults}" if faults else ""


def phase(launch: Launch | None, *, wanted: bool, now: float, faults: str = "") -> Phase | None:
    """The phase of a replica from its latest launch; None where there is nothing to show.

    ``faults`` are those of the GPUs that it runs on.
    """
    if launch is None:
        return Phase.PENDING if wanted else None
    match launch.life:
        case Life.INTENT:
            return Phase.STARTING
        case Life.UNPROVEN:
            return Phase.UNKNOWN
        case Life.LEFTOVER:
            return Phase.STOPPING
        case Life.EXITED:
            return _once_ended(launch, now) if wanted else None
        case Life.ALIVE:
            pass
    if launch.stopping_since is not None:
        return Phase.STOPPING
    if launch.ready:
        return Phase.DEGRADED if faults else Phase.READY
    return Phase.STARTING if launch.ready_at is None else Phase.DEGRADED


def _once_ended(launch: Launch, now: float) -> Phase:
    if stalled(launch):
        return Phase.STALLED
    return Phase.BACKOFF if failed(launch) and next_try(launch, now) > now else Phase.PENDING


def failed(launch: Launch) -> bool:
    """Whether a launch that has ended failed. Any end that nobody asked for is a failure, exit 0 included."""
    return launch.stop_cause in ("", StopCause.STARTUP_TIMEOUT)


def how_it_failed(launch: Launch) -> str:
    """In a few words why a failed launch ended, or is about to end."""
    unasked = StopCause.STARTUP_TIMEOUT if launch.life is Life.ALIVE else StopCause.ENDED
    kind = launch.failure.kind if launch.failure else FailureKind.UNKNOWN
    why = "" if kind in (FailureKind.UNKNOWN, FailureKind.KILLED) else f", {kind}"  # the signal says that it was killed
    return launch.stop_cause or (f"{launch.exit.text()}{why}" if launch.exit else unasked)


def failures(launch: Launch) -> int:
    """Failed launches in a row, this one included where it failed."""
    if not failed(launch):
        return 0
    ended = launch.exit.at if launch.exit and launch.exit.at is not None else launch.created_at
    steady = launch.ready_at is not None and ended - launch.ready_at >= STEADY_S
    return (0 if steady else launch.failures) + 1


def stalled(launch: Launch) -> bool:
    """Whether it failed for what cannot get better by itself, and nobody has asked for another try since.

    One that had been ready has shown that it can: whatever its log says, it is tried again.
    """
    lasting = launch.failure is not None and not launch.failure.can_recover
    return launch.life is Life.EXITED and failed(launch) and lasting and launch.ready_at is None and not launch.released


def delay_s(count: int, *, was_ready: bool) -> float:
    """Seconds to wait before the next try after ``count`` failures in a row.

    A replica that had been ready is tried again at once the first time; after that, as after a start that
    failed, 10 s doubling to 300 s.
    """
    doublings = count - (2 if was_ready else 1)
    return 0.0 if doublings < 0 else min(BACKOFF_FIRST_S * 2.0 ** min(doublings, 10), BACKOFF_LIMIT_S)


def next_try(launch: Launch, now: float) -> float:
    """When a replica whose last launch failed may be started again; of one that has not ended yet, at the earliest.

    The delay is up to a fifth shorter, by the id of the launch, so that it is the same at every look. A clock that
    was set back puts the end into the future: where it is further off than the delay itself, the next try is now,
    not in years.
    """
    if launch.released:
        return now
    delay = delay_s(failures(launch), was_ready=launch.ready_at is not None) * (1 - BACKOFF_SPREAD * _share(launch))
    if launch.exit and launch.exit.at is not None:
        ended = launch.exit.at
    else:
        ended = launch.created_at if launch.life is Life.EXITED else now
    return now if ended > now + delay else ended + delay


def _share(launch: Launch) -> float:
    """A number from 0 to 1 that only this launch has."""
    digest = hashlib.sha256(f"{launch.id} {launch.created_at!r}".encode()).digest()
    return int.from_bytes(digest[:4]) / 2**32


@dataclass(frozen=True, slots=True)
class Retry:
    """What a start has to know of the one before it.

    ``not_before`` ends its back-off, in seconds since the epoch; ``stalled`` tells that it is not to be made at all
    until somebody changes something. ``restarts`` and ``failures`` count as in ``Launch``, for the new one.
    """

    cause: str
    not_before: float | None = None
    restarts: int = 0
    failures: int = 0
    stalled: bool = False


_BY_MEMORY = (FailureKind.KV_CACHE_TOO_SMALL, FailureKind.NO_KV_CACHE)


def after(last: Launch, gpus: Sequence[Gpu], memory_mib: int, now: float, *, edited: bool, asked: bool) -> Retry:
    """What follows from the last launch of the same revision for a start on these GPUs with this promise.

    Back-off belongs to a revision and its GPUs; on others it starts anew. What stalled is as wrong there, but an
    edit of anything in its entry releases it, and, of one that wanted memory, a larger promise. Where a person
    ``asked``, nothing holds it back.
    """
    if not failed(last):
        ends = "its last process is ending" if last.holds else "not running"
        return Retry(f"wanted, and {ends}", restarts=last.restarts)
    cause, restarts = f"it failed ({how_it_failed(last)})", last.restarts + 1
    more = last.failure is not None and last.failure.kind in _BY_MEMORY and memory_mib > last.memory_mib
    if stalled(last) and not (edited or more or asked):
        return Retry(cause, None, restarts, failures(last), stalled=True)
    if {gpu.uuid for gpu in gpus} != set(last.gpus) or more or (stalled(last) and edited):
        return Retry(cause, None, restarts)
    when = now if asked else next_try(last, now)
    return Retry(cause, when if when > now else None, restarts, failures(last))


def stop_deadline(launch: Launch, stop_timeout: float) -> float:
    """When a replica that was told to stop is killed: its full time where it was ready then, else little grace.

    vLLM loses a SIGTERM that comes while it loads, and serves on as soon as it has loaded.
    """
    since = launch.stopping_since if launch.stopping_since is not None else launch.created_at
    served = launch.ready_at is not None and launch.ready_at <= since
    return since + (stop_timeout if served else min(stop_timeout, LOADING_GRACE_S))
