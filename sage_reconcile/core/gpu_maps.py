"""The GPUs and the host's memory before and after a plan, and what of their memory is only late."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from sage_reconcile.core.host_memory import host_occupancy
from sage_reconcile.core.memory import IDLE_MIB, MEMORY_RETURN_S, launches_by_gpu, occupancy, unexplained_mib
from sage_reconcile.core.observed import Life, Observed
from sage_reconcile.core.plan import Action, GpuMap, HostMap
from sage_reconcile.core.reasons import gib, problem
from sage_reconcile.core.spec import Desired
from sage_reconcile.core.standing import Standing


def gpu_maps(
    desired: Desired, observed: Observed, expected: Observed, leaving: frozenset[str], actions: Sequence[Action]
) -> Iterator[GpuMap]:
    """Each GPU as it is, and as it will be (``expected``) when those in ``leaving`` have gone and all is started."""
    on = launches_by_gpu(observed)
    added: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for action in actions:
        for gpu in action.gpus:
            added[gpu.uuid].append((action.replica, action.memory_mib))
    later = {gpu.uuid: gpu for gpu in expected.gpus}
    for gpu in sorted(observed.gpus, key=lambda item: item.index):
        before = occupancy(gpu, on[gpu.uuid], desired.host.headroom)
        after = occupancy(later[gpu.uuid], on[gpu.uuid], desired.host.headroom, leaving=leaving)
        stays = [launch for launch in on[gpu.uuid] if launch.id not in leaving]
        yield GpuMap(gpu, before, after.with_ours(*added[gpu.uuid]), problem(gpu, stays))


def host_map(observed: Observed, leaving: frozenset[str], actions: Sequence[Action]) -> HostMap | None:
    """The host's memory as it is, and as it will be; None where no engine has or gets any."""
    before, after = host_occupancy(observed), host_occupancy(observed, leaving=leaving)
    spawns = (action for action in actions if action.kind == "spawn" and action.host_memory_mib)
    added = [(action.replica, action.host_memory_mib) for action in spawns]
    if before is None or after is None or not (before.ours or added):
        return None
    return HostMap(before, after.with_ours(*added))


def once_back(observed: Observed, standing: Standing) -> Observed:
    """What is observed, as it will be when all memory of what has just ended is back."""
    if not standing.lingering:
        return observed
    late = {uuid: found.mib for uuid, found in standing.lingering.items()}
    gpus = (replace(gpu, memory_used_mib=gpu.memory_used_mib - late.get(gpu.uuid, 0)) for gpu in observed.gpus)
    return replace(observed, gpus=tuple(gpus))


def not_back(observed: Observed, standing: Standing) -> Iterator[str]:
    """Of what memory a start would have been for, had it come back; nobody waits for it any longer."""
    for gpu in observed.gpus:
        mib = unexplained_mib(gpu)
        ended = sorted({x.replica for x in observed.launches if x.life is Life.EXITED and gpu.uuid in x.gpus})
        if ended and mib > IDLE_MIB and gpu.uuid not in standing.lingering:
            yield (
                f"GPU {gpu.index} shows {gib(mib)} as used for which NVML names no process, and {', '.join(ended)} "
                f"ended there more than {MEMORY_RETURN_S:.0f}s ago; find who holds them with: fuser -v /dev/nvidia*"
            )
