"""What follows from the difference between desired and observed: an immutable list of actions with order and cause.

The plan decides everything; whoever carries it out only does. The same input gives the same plan, byte for byte.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from sage_reconcile.core.drift import Change
from sage_reconcile.core.lifecycle import StopCause
from sage_reconcile.core.memory import Occupancy
from sage_reconcile.core.observed import Gpu, Launch
from sage_reconcile.core.promise import Breakdown
from sage_reconcile.core.spec import Engine

if TYPE_CHECKING:
    from sage_reconcile.core.ways import Way

Kind = Literal["reap", "kill", "stop", "spawn"]


@dataclass(frozen=True, slots=True)
class Action:
    """One thing to do.

    ``after`` are the ids of actions that must have come to their end first (for a spawn: the replica is
    ready or has failed); ``waits_for`` says what else it waits for, and is empty where it can be done now.
    ``launch`` is the id of the launch it acts on; a spawn has none yet, but ``predecessor`` where it takes over
    from a launch that ends when this one is ready. ``goes_to`` is where what is stopped is started again, where
    that is settled already. ``blocked`` says why it is never done on this machine: it has its place, and nothing
    waits for it. ``stalled`` tells that it waits for a person, since the last one failed for what lasts.
    ``inner_ports`` are for what vLLM opens inside. ``made_of`` is what ``memory_mib`` is made of, as far as that is
    known, ``kv_bytes`` the size that vLLM's KV cache is given; 0 where it takes what is left.
    ``host_memory_mib`` is promised of the host's memory; ``kv_space_gib`` is the KV cache that vLLM is told to take on
    each rank where it runs on the CPU.
    """

    id: str
    kind: Kind
    replica: str
    cause: str
    after: tuple[str, ...] = ()
    waits_for: str = ""
    not_before: float | None = None
    gpus: tuple[Gpu, ...] = ()
    memory_mib: int = 0
    port: int = 0
    inner_ports: range = range(0)
    launch: str = ""
    stop_cause: StopCause | None = None
    changes: tuple[Change, ...] = ()
    restarts: int = 0
    failures: int = 0
    stalled: bool = False
    predecessor: str = ""
    goes_to: tuple[Gpu, ...] = ()
    blocked: str = ""
    made_of: Breakdown | None = None
    kv_bytes: int = 0
    host_memory_mib: int = 0
    kv_space_gib: int = 0
    revision: Engine | None = None
    """What is started, where that is not the entry of the file."""
    restart_s: float | None = None
    """How long a start like this one took last time, in seconds."""

    @property
    def now(self) -> bool:
        """Whether nothing stands before it."""
        return not (self.after or self.waits_for or self.blocked)


@dataclass(frozen=True, slots=True)
class Kept:
    """A replica that runs on, on these GPUs."""

    launch: Launch
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True, slots=True)
class Queued:
    """A replica that is to be replaced, and keeps running until its turn comes."""

    launch: Launch
    changes: tuple[Change, ...]
    waits_for: str


@dataclass(frozen=True, slots=True)
class Rollback:
    """An engine whose entry failed to start, and that goes back to the last revision that was ready.

    ``failed`` and ``good`` are the ids of the launches that show it, ``cause`` is why the one failed. ``revision`` is
    what runs instead; None where it cannot be started again, and ``problem`` says why.
    """

    engine_name: str
    failed: str
    good: str
    cause: str
    revision: Engine | None = None
    problem: str = ""

    def text(self) -> str:
        """What happened, and what to do."""
        if self.revision is None:
            return (
                f"{self.engine_name}: its new revision failed ({self.cause}), and cannot be rolled back: {self.problem}"
            )
        return (
            f"{self.engine_name}: its new revision failed ({self.cause}), and was rolled back to the one before; "
            "edit its entry, or `apply` tries it again"
        )


@dataclass(frozen=True, slots=True)
class Unplaced:
    """A replica that cannot be started, and why. ``runs_on`` tells that its old revision keeps running.

    ``ways`` are the changes of its entry with which it would fit on this machine, where it is too large for any GPU.
    """

    replica: str
    reason: str
    runs_on: bool = False
    ways: tuple[Way, ...] = ()


@dataclass(frozen=True, slots=True)
class Move:
    """A running replica that goes to other GPUs.

    ``start_first`` tells that it is started there before it ends here, so that it never stops serving;
    ``restart_s`` is how long it took to get ready last time, in seconds.
    """

    launch: Launch
    from_gpus: tuple[Gpu, ...]
    to_gpus: tuple[Gpu, ...]
    memory_mib: int
    start_first: bool
    restart_s: float | None
    host_memory_mib: int = 0


@dataclass(frozen=True, slots=True)
class Proposal:
    """What would let in a replica that has no place: moves that nobody allowed yet."""

    replica: str
    moves: tuple[Move, ...]


@dataclass(frozen=True, slots=True)
class GpuMap:
    """A GPU before and after the plan, and why it takes nothing new (empty where it does)."""

    gpu: Gpu
    before: Occupancy
    after: Occupancy
    problem: str = ""


@dataclass(frozen=True, slots=True)
class HostMap:
    """The host's memory before and after the plan."""

    before: Occupancy
    after: Occupancy


@dataclass(frozen=True, slots=True)
class Plan:
    """All that shall happen, and what shall not and why.

    ``proposals`` would let in some of what is unplaced; ``waiting`` tells of what is under way; ``host`` is None where
    no engine has or gets any of the host's memory, or it is not known; ``forget`` are ids of ended launches whose
    records are no longer needed; ``notes`` are things a person should know. ``queued`` are
    among ``kept`` until their turn comes.
    """

    actions: tuple[Action, ...] = ()
    kept: tuple[Kept, ...] = ()
    unplaced: tuple[Unplaced, ...] = ()
    proposals: tuple[Proposal, ...] = ()
    waiting: tuple[str, ...] = ()
    gpus: tuple[GpuMap, ...] = ()
    host: HostMap | None = None
    forget: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    queued: tuple[Queued, ...] = ()
    rollbacks: tuple[Rollback, ...] = ()

    @property
    def unchanged(self) -> tuple[Kept, ...]:
        """Who runs on without waiting for a turn to be replaced."""
        queued = {item.launch.id for item in self.queued}
        return tuple(kept for kept in self.kept if kept.launch.id not in queued)

    @property
    def in_sync(self) -> bool:
        """Whether there is nothing to do, nothing under way and nothing left out."""
        return not (self.actions or self.unplaced or self.waiting or self.queued or self.rollbacks)

    def mark(self) -> str:
        """Names what the plan does: two plans of one mark do the same to the same processes on the same GPUs.

        What is only told (memory that others hold, times, reasons, whose turn it is) may differ from look to look.
        """
        actions = [(replace(x, **_TOLD), _uuids(x.gpus), _uuids(x.goes_to)) for x in self.actions]
        kept = sorted((kept.launch.id, _uuids(kept.gpus)) for kept in self.kept)
        unplaced = [(item.replica, item.runs_on) for item in self.unplaced]
        return hashlib.sha256(repr((actions, kept, unplaced)).encode()).hexdigest()

    def replaced(self) -> frozenset[str]:
        """The replicas that are stopped and started again, moved ones among them."""
        stopped = {action.replica for action in self.actions if action.kind != "spawn"}
        found = stopped & {a.replica for a in self.actions if a.kind == "spawn" and not a.blocked}
        return frozenset(found | self.taken_over())

    def taken_over(self) -> frozenset[str]:
        """The replicas whose new revision runs beside the old one, which ends when that is ready."""
        changed = {action.replica for action in self.actions if action.stop_cause is StopCause.CHANGED}
        return frozenset(changed & {kept.launch.replica for kept in self.kept})

    def moved(self) -> frozenset[str]:
        """The replicas that go to other GPUs to make room; those that are on their way are among them."""
        return frozenset(action.replica for action in self.actions if action.stop_cause is StopCause.MOVED)

    @property
    def making_room(self) -> bool:
        """Whether a replica is moved or displaced: what has no place may get one when that is done."""
        return any(action.stop_cause in (StopCause.MOVED, StopCause.DISPLACED) for action in self.actions)


_TOLD: dict[str, Any] = {
    **dict.fromkeys(("cause", "waits_for"), ""),
    **dict.fromkeys(("not_before", "made_of", "restart_s"), None),
    **dict.fromkeys(("restarts", "failures", "stalled"), 0),
    **dict.fromkeys(("gpus", "goes_to"), ()),
}


def _uuids(gpus: tuple[Gpu, ...]) -> tuple[str, ...]:
    return tuple(gpu.uuid for gpu in gpus)
