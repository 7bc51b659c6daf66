"""What a running replica was promised, what it holds, and what was estimated and measured of it, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sage_reconcile.core.host_memory import host_occupancy
from sage_reconcile.core.observed import Gpu, Launch, Observed
from sage_reconcile.core.promise import Breakdown, Known, known_of, made_of
from sage_reconcile.core.reasons import gib
from sage_reconcile.core.spec import Engine

TOLERATED_MIB = 64
"""So much more than promised is within what the driver rounds, and not worth a word."""


def memory_document(engine: Engine | None, launch: Launch, observed: Observed) -> dict[str, Any]:
    """``promised_mib``, ``held_mib`` on the GPU of which it holds most, and ``estimated`` beside ``measured``.

    Without a GPU promised and held are of the host.

    The two tell the same of its promise: weights, what it takes beside its KV cache, and the tokens in that; null where
    nothing is known.
    """
    gpus = {gpu.uuid: gpu for gpu in observed.gpus}
    gpu = next((gpus[uuid] for uuid in launch.gpus if uuid in gpus), None)
    known = known_of(engine, gpu, observed) if engine is not None and gpu is not None else Known()
    return {
        "promised_mib": launch.memory_mib if launch.gpus else launch.host_memory_mib,
        "held_mib": launch.held_mib if launch.gpus else launch.host_held_mib or None,
        "estimated": _estimated(engine, launch, gpu, known),
        "measured": _measured(launch, known),
    }


def _estimated(engine: Engine | None, launch: Launch, gpu: Gpu | None, known: Known) -> Mapping[str, Any] | None:
    if engine is None or gpu is None or known.facts is None:
        return None
    found = made_of(engine.spec, launch.memory_mib, gpu, Known(known.facts))
    if found is None:
        return None
    return {
        "weights_mib": _part(found, "weights"),
        "beside_kv_mib": found.needed_mib - found.cache_mib,
        "kv_tokens": found.kv_tokens or None,
    }


def _part(found: Breakdown, name: str) -> int:
    return next(part.mib for part in found.parts if part.name == name)


def _measured(launch: Launch, known: Known) -> Mapping[str, Any] | None:
    seen = known.measured
    if seen is None or not seen.starts:
        return None
    return {
        "weights_mib": seen.figures.weights_mib,
        "beside_kv_mib": seen.beside_kv_mib,
        "kv_tokens": launch.kv_tokens,
    }


def outgrown(launch: Launch) -> str:
    """What to say of a replica that holds more than it was promised; empty where it does not."""
    if not launch.gpus and launch.host_memory_mib and launch.host_held_mib > launch.host_memory_mib + TOLERATED_MIB:
        return (
            f"{launch.replica}: holds {gib(launch.host_held_mib)} of the host's memory and was promised "
            f"{gib(launch.host_memory_mib)}; what it holds counts"
        )
    if launch.held_mib is None or launch.held_mib <= launch.memory_mib + TOLERATED_MIB or not launch.gpus:
        return ""
    return (
        f"{launch.replica}: holds {gib(launch.held_mib)} of a GPU and was promised {gib(launch.memory_mib)}; what it "
        "holds counts, and its next start is planned by what was measured"
    )


def host_document(observed: Observed) -> dict[str, Any] | None:
    """The host's memory; None where no engine has or asks for any, or it could not be read."""
    taken, host = host_occupancy(observed), observed.host_memory
    if taken is None or host is None:
        return None
    return {
        "total_mib": taken.total_mib,
        "available_mib": host.available_mib,
        "kept_back_mib": taken.kept_back_mib,
        "promised_mib": taken.promised_mib,
        "unmanaged_mib": taken.unmanaged_mib,
        "free_mib": taken.free_mib,
    }
