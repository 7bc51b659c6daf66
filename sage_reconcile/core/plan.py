"""What follows from the difference between desired and observed: an immutable list of actions with order and cause.

The plan decides everything; whoever carries it out only does. The same input gives the same plan, byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sage_reconcile.core.drift import Change
from sage_reconcile.core.lifecycle import StopCause
from sage_reconcile.core.memory import Occupancy
from sage_reconcile.core.observed import Gpu, Launch

Kind = Literal["reap", "kill", "stop", "spawn"]


@dataclass(frozen=True, slots=True)
class Action:
    """One thing to do.

    ``after`` are the ids of actions that must have come to their end first (for a spawn: the replica is
    ready or has failed); ``waits_for`` says what else it waits for, and is empty where it can be done now.
    ``launch`` is the id of the launch it acts on; a spawn has none yet.
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
    launch: str = ""
    stop_cause: StopCause | None = None
    changes: tuple[Change, ...] = ()
    restarts: int = 0
    failures: int = 0

    @property
    def now(self) -> bool:
        """Whether nothing stands before it."""
        return not self.after and not self.waits_for


@dataclass(frozen=True, slots=True)
class Kept:
    """A replica that runs on, on these GPUs."""

    launch: Launch
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True, slots=True)
class Unplaced:
    """A replica that cannot be started, and why. ``runs_on`` tells that its old revision keeps running."""

    replica: str
    reason: str
    runs_on: bool = False


@dataclass(frozen=True, slots=True)
class GpuMap:
    """A GPU before and after the plan, and why it takes nothing new (empty where it does)."""

    gpu: Gpu
    before: Occupancy
    after: Occupancy
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """All that shall happen, and what shall not and why.

    ``waiting`` tells of stops under way; ``forget`` are ids of ended launches whose records are no longer
    needed; ``notes`` are things a person should know.
    """

    actions: tuple[Action, ...] = ()
    kept: tuple[Kept, ...] = ()
    unplaced: tuple[Unplaced, ...] = ()
    waiting: tuple[str, ...] = ()
    gpus: tuple[GpuMap, ...] = ()
    forget: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def in_sync(self) -> bool:
        """Whether there is nothing to do, nothing under way and nothing left out."""
        return not (self.actions or self.unplaced or self.waiting)

    def replaced(self) -> frozenset[str]:
        """The replicas that are stopped and started again."""
        stopped = {action.replica for action in self.actions if action.kind != "spawn"}
        return frozenset(stopped & {action.replica for action in self.actions if action.kind == "spawn"})
