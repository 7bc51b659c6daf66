"""The GPUs as data for JSON: a row for each, and the links between them; ``schemas/gpu.schema.json`` describes both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from sage_reconcile.core.host_spec import HostSpec
from sage_reconcile.core.memory import launches_by_gpu, occupancy
from sage_reconcile.core.observed import Gpu, Launch, Observed
from sage_reconcile.core.reasons import barred, excluded, problem

VERSION = 1
_VOLATILE = ("utilization_percent", "temperature_c", "power_w")


def gpu_document(host: HostSpec, observed: Observed) -> dict[str, Any]:
    """What ``gpu -o json`` prints; who asks adds the file, and what is wrong with it."""
    return {
        "version": VERSION,
        "gpus": gpu_rows(host, observed),
        "links": _links(observed),
        "note": observed.gpu_note,
    }


def gpu_rows(host: HostSpec, observed: Observed) -> list[dict[str, Any]]:
    """The GPUs by index. What could not be read is None."""
    on = launches_by_gpu(observed)
    return [_row(host, gpu, on[gpu.uuid]) for gpu in sorted(observed.gpus, key=lambda item: item.index)]


def lasting_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows without what changes at every look, as for a report that is kept."""
    return [{**row, **dict.fromkeys(_VOLATILE)} for row in rows]


def _row(host: HostSpec, gpu: Gpu, here: Sequence[Launch]) -> dict[str, Any]:
    taken = occupancy(gpu, here, host.headroom)
    told = gpu.memory_told
    return {
        "index": gpu.index,
        "uuid": gpu.uuid,
        "name": gpu.name,
        "pci_id": gpu.pci_id,
        "numa_node": gpu.numa_node,
        "compute_capability": gpu.compute_capability,
        "compute_mode": gpu.compute_mode,
        "simulated": gpu.simulated,
        "memory_total_mib": gpu.memory_total_mib or None,
        "memory_reserved_mib": gpu.memory_reserved_mib,
        "memory_headroom_mib": host.headroom,
        "memory_used_mib": gpu.memory_used_mib if told else None,
        "memory_promised_mib": sum(x.memory_mib for x in here if gpu.uuid in x.gpus),
        "memory_free_mib": 0 if barred(host, gpu, here) else taken.free_mib,
        "unmanaged_mib": taken.unmanaged_mib if told else None,
        "utilization_percent": gpu.utilization_percent,
        "temperature_c": gpu.temperature_c,
        "power_w": gpu.power_w,
        "problem": problem(gpu, here),
        "faulty": gpu.faulty,
        "excluded": excluded(host, gpu),
        "engines": [
            {
                "replica": launch.replica,
                "promised_mib": launch.memory_mib if gpu.uuid in launch.gpus else 0,
                "held_mib": _held(gpu, launch),
            }
            for launch in here
        ],
        "unmanaged": [
            {"pid": p.pid, "user": p.user, "command": p.command, "memory_mib": p.memory_mib}
            for p in gpu.processes
            if p.launch is None
        ],
    }


def _held(gpu: Gpu, launch: Launch) -> int | None:
    """What the driver says that a launch holds of a GPU; None where it does not say it of every process."""
    told = [process.memory_mib for process in gpu.processes if process.launch == launch.id]
    known = [mib for mib in told if mib is not None]
    return sum(known) if gpu.memory_told and len(known) == len(told) else None


def _links(observed: Observed) -> list[dict[str, Any]]:
    """The link of each pair of GPUs, by index; a pair whose link is not known is left out."""
    pairs = combinations(sorted(observed.gpus, key=lambda gpu: gpu.index), 2)
    rows = []
    for one, other in pairs:
        pair = frozenset((one.uuid, other.uuid))
        if pair in observed.links:
            link, nvlinks = observed.links[pair].value, observed.nvlink_counts.get(pair)
            rows.append({"between": [one.uuid, other.uuid], "link": link, "nvlinks": nvlinks})
    return rows
