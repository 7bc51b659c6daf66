"""The guard: whether a new content of the file stops more of what runs than is normal on this machine.

It stands between a file that lost its engines (emptied, cut off, wrongly merged) and the daemon, which would stop
them all. What is replaced does not count: it comes back by itself, and an edit of the one engine of a machine
replaces all that runs there every day. Nor does a share hold anything back where a single replica runs: to remove
it is an edit like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sage_reconcile.core.host_spec import Guard
from sage_reconcile.core.observed import Life, Observed
from sage_reconcile.core.plan import Plan

_NAMED = 8


@dataclass(frozen=True, slots=True)
class Stops:
    """The running replicas that a plan ends and does not bring back, of how many that run."""

    replicas: tuple[str, ...]
    running: int


def lasting_stops(plan: Plan, observed: Observed) -> Stops:
    """Who runs now and will not when all is done, be it for want of an entry or of a place."""
    running = {x.replica for x in observed.launches if x.life is Life.ALIVE and x.stopping_since is None}
    stays = {kept.launch.replica for kept in plan.kept}
    stays |= {action.replica for action in plan.actions if action.kind == "spawn" and not action.blocked}
    return Stops(tuple(sorted(running - stays)), len(running))


def too_many(guard: Guard, stops: Stops) -> bool:
    """Whether that is more than the guard lets go at once."""
    match guard.kind:
        case "off":
            return False
        case "count":
            return len(stops.replicas) > guard.amount
        case "percent":
            return stops.running > 1 and len(stops.replicas) * 100 > guard.amount * stops.running


def held_text(replicas: Sequence[str], running: int, guard: str) -> str:
    """What is held back and why, in a sentence."""
    names = ", ".join(replicas[:_NAMED]) + (f" and {len(replicas) - _NAMED} more" if len(replicas) > _NAMED else "")
    return f"it would stop {len(replicas)} of the {running} running replicas ({names}); `host.guard` is {guard}"
