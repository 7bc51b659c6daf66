"""How much memory a GPU has left, and who has the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from sage_reconcile.core.observed import Gpu, Launch, Life, Observed

MEMORY_RETURN_S = 30.0
"""How long what a process held may take to come back after its end; the driver is done within a few seconds."""
IDLE_MIB = 64
"""What may show as used on a GPU that nobody uses; the smallest CUDA context takes more than twice as much."""


@dataclass(frozen=True, slots=True)
class Occupancy:
    """What the memory of a GPU, or of the host, is taken by, in MiB.

    ``ours`` is by replica; ``unmanaged_mib`` is strangers'.
    """

    total_mib: int
    kept_back_mib: int
    ours: tuple[tuple[str, int], ...]
    unmanaged_mib: int

    @property
    def promised_mib(self) -> int:
        """What our replicas take: for each the larger of promised and held."""
        return sum(mib for _, mib in self.ours)

    @property
    def left_mib(self) -> int:
        """What is left when all have theirs; below zero where more is taken than there is."""
        return self.total_mib - self.kept_back_mib - self.promised_mib - self.unmanaged_mib

    @property
    def free_mib(self) -> int:
        """What can still be promised; never below zero."""
        return max(0, self.left_mib)

    def with_ours(self, *more: tuple[str, int]) -> Occupancy:
        """The same with these replicas of ours there too, each with its MiB."""
        return replace(self, ours=(*self.ours, *more))


def launches_by_gpu(observed: Observed) -> Mapping[str, list[Launch]]:
    """The launches on each GPU, by its UUID, in a fixed order: those placed there, and those NVML shows there."""
    on: dict[str, dict[str, Launch]] = {gpu.uuid: {} for gpu in observed.gpus}
    by_id = {launch.id: launch for launch in observed.launches if launch.holds}
    for launch in by_id.values():
        for uuid in launch.gpus:
            if uuid in on:
                on[uuid][launch.id] = launch
    for gpu in observed.gpus:
        for process in gpu.processes:
            if process.launch in by_id:
                on[gpu.uuid][process.launch] = by_id[process.launch]
    return {
        uuid: sorted(launches.values(), key=lambda x: (x.engine_name, x.index, x.created_at, x.id))
        for uuid, launches in on.items()
    }


def occupancy(
    gpu: Gpu, launches: Iterable[Launch], headroom_mib: int, *, leaving: frozenset[str] = frozenset()
) -> Occupancy:
    """Who has what of a GPU, given the launches on it, as if those in ``leaving`` (ids) had gone already.

    A launch counts with max(promised, held); one that sizes itself (``memory: manual``), once it is ready, with what it
    holds. What NVML shows as used and does not name as held by one of
    ours is unmanaged; for a process of ours whose memory NVML does not tell, its promise is assumed.
    """
    held: dict[str, int] = {}
    untold: set[str] = set()
    for process in gpu.processes:
        if process.launch is None:
            continue
        held[process.launch] = held.get(process.launch, 0) + (process.memory_mib or 0)
        if process.memory_mib is None:
            untold.add(process.launch)
    ours: list[tuple[str, int]] = []
    known = 0
    for launch in launches:
        promised = launch.memory_mib if gpu.uuid in launch.gpus else 0
        mine = held.get(launch.id, 0)
        known += max(mine, promised) if launch.id in untold else mine
        if launch.id not in leaving:
            seen = launch.sizes_itself and mine > 0 and launch.id not in untold
            ours.append((launch.replica, mine if seen else max(promised, mine)))
    unmanaged = max(0, gpu.memory_used_mib - known)
    return Occupancy(gpu.memory_total_mib, gpu.memory_reserved_mib + headroom_mib, tuple(ours), unmanaged)


@dataclass(frozen=True, slots=True)
class Lingering:
    """Memory of a GPU that is still shown as used and that nobody holds but, so it seems, what has just ended there.

    ``launches`` are the ids of what ended, ``replicas`` their names.
    """

    mib: int
    launches: frozenset[str]
    replicas: tuple[str, ...]


def lingering(gpu: Gpu, launches: Iterable[Launch], now: float) -> Lingering | None:
    """What is not back yet of launches that ended less than ``MEMORY_RETURN_S`` ago; None where all is.

    That is what NVML shows as used and names no process for, as far as they had been promised it. Where it does
    not tell how much a stranger holds, nothing can be known of the rest.
    """
    ended = [
        launch
        for launch in launches
        if launch.life is Life.EXITED
        and gpu.uuid in launch.gpus
        and launch.exit is not None
        and launch.exit.at is not None
        and 0 <= now - launch.exit.at < MEMORY_RETURN_S
    ]
    mib = min(unexplained_mib(gpu), sum(launch.memory_mib for launch in ended))
    if mib <= 0:
        return None
    names = tuple(sorted({launch.replica for launch in ended}))
    return Lingering(mib, frozenset(launch.id for launch in ended), names)


def unexplained_mib(gpu: Gpu) -> int:
    """Memory that is shown as used and that no process is named for; 0 where a process's share is not told."""
    if not gpu.memory_told or any(process.memory_mib is None for process in gpu.processes):
        return 0
    return max(0, gpu.memory_used_mib - sum(process.memory_mib or 0 for process in gpu.processes))
