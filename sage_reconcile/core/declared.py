"""A box of GPUs that exist only by declaration: for the simulator, and for plans of hardware that is not here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise

from sage_reconcile.core.gpu_models import Declared, Joined, joined
from sage_reconcile.core.observed import Gpu, GpuProcess, Link, Links

_ONE_NODE = 4
"""Up to so many GPUs are on one NUMA node; of more the first half is on node 0, the second on node 1."""
_ALL_PAIRS = 64
"""Of more GPUs only the links of neighbours are told: they join the same ones, and pairs grow with the square."""


def declared_gpus(
    declared: Iterable[Declared], usage: Mapping[str, Sequence[tuple[int, int]]] | None = None, *, simulated: bool
) -> tuple[Gpu, ...]:
    """The GPUs of such a box, numbered across the declarations.

    Args:
        declared: what there is, in the order of the indexes.
        usage: by UUID (``GPU-simulated-<index>``), the processes on it as (pid, MiB held).
        simulated: whether it is there for the simulator; else it is a box to plan for, as if it were real.
    """
    each = [group for group in declared for _ in range(group.count)]
    kind = "simulated" if simulated else "declared"
    gpus = []
    for index, group in enumerate(each):
        uuid = f"GPU-{kind}-{index}"
        processes = tuple(GpuProcess(pid, mib) for pid, mib in sorted((usage or {}).get(uuid, ())))
        gpus.append(
            Gpu(
                uuid=uuid,
                index=index,
                name=group.name,
                pci_id=f"{kind}:{index:04d}",
                memory_total_mib=group.memory_mib,
                memory_used_mib=sum(process.memory_mib or 0 for process in processes),
                processes=processes,
                simulated=simulated,
                numa_node=_node(index, len(each)),
            )
        )
    return tuple(gpus)


def declared_links(declared: Sequence[Declared], gpus: Sequence[Gpu]) -> Links:
    """How the GPUs of such a box are joined.

    NVLink joins those of one declaration as it usually joins GPUs of that name: all of them, or the first with the
    second, the third with the fourth …. All others are joined by PCIe, inside a NUMA node or between two.
    """
    group_of = [number for number, group in enumerate(declared) for _ in range(group.count)]
    place = [position for group in declared for position in range(group.count)]
    kinds = [joined(group.name) for group in declared]

    def link(one: int, other: int) -> Link:
        if group_of[one] == group_of[other]:
            kind = kinds[group_of[one]]
            if kind is Joined.SWITCH or (kind is Joined.PAIRS and place[one] // 2 == place[other] // 2):
                return Link.NVLINK
        return Link.NODE if gpus[one].numa_node == gpus[other].numa_node else Link.SYS

    numbers = range(len(gpus))
    pairs = combinations(numbers, 2) if len(gpus) <= _ALL_PAIRS else pairwise(numbers)
    return {frozenset((gpus[one].uuid, gpus[other].uuid)): link(one, other) for one, other in pairs}


def _node(index: int, count: int) -> int:
    return int(count > _ONE_NODE and index >= (count + 1) // 2)


def inventory(groups: Sequence[Declared]) -> list[dict[str, object]]:
    """The same as the simulator reads them."""
    return [
        {"uuid": gpu.uuid, "name": gpu.name, "memory_total_mib": gpu.memory_total_mib}
        for gpu in declared_gpus(groups, simulated=True)
    ]
