"""How much of the host's own memory is left, and who has the rest: engines on the CPU, and what others keep there."""

from __future__ import annotations

from sage_reconcile.core.memory import Occupancy
from sage_reconcile.core.observed import HostMemory, Launch, Observed

KEPT_BACK_MIB = 2048
"""Of the host's memory never promised to an engine: for the system, and for what starts beside."""
_KEPT_BACK_PART = 10
"""On a small machine only one part of so many."""
_STEP_MIB = 256
"""What others take is counted in steps of so many, upwards: it changes from one moment to the next, and plans should
not."""


def kept_back_mib(host: HostMemory) -> int:
    """MiB of the host that no engine gets: 2 GiB, at most a tenth of it."""
    return min(KEPT_BACK_MIB, host.total_mib // _KEPT_BACK_PART)


def taken_mib(launch: Launch) -> int:
    """MiB of the host that count as a launch's: the larger of promised and held.

    Of one that sizes itself (``memory: manual``), once it is ready, what it holds.
    """
    if launch.sizes_itself and launch.host_held_mib:
        return launch.host_held_mib
    return max(launch.host_memory_mib, launch.host_held_mib)


def host_occupancy(observed: Observed, *, leaving: frozenset[str] = frozenset()) -> Occupancy | None:
    """Who has what of the host's memory, as if the launches in ``leaving`` (ids) had gone; None where it is not known.

    What is not available and not held by ours is unmanaged: that of other programs, of engines that were promised none
    of it, and what processes share.
    """
    host = observed.host_memory
    if host is None:
        return None
    there = sorted(
        (launch for launch in observed.launches if launch.holds),
        key=lambda x: (x.engine_name, x.index, x.created_at, x.id),
    )
    held = sum(launch.host_held_mib for launch in there)
    ours = tuple((x.replica, taken_mib(x)) for x in there if x.id not in leaving and taken_mib(x))
    steps = -(-max(0, host.total_mib - host.available_mib - held) // _STEP_MIB)
    return Occupancy(host.total_mib, kept_back_mib(host), ours, steps * _STEP_MIB)
