"""What an engine needs of the host's own memory: all of it on the CPU, and on GPUs what it keeps outside them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sage_reconcile.core.fields import CPU_KV_SPACE
from sage_reconcile.core.host_memory import kept_back_mib
from sage_reconcile.core.observed import HostMemory, ModelFacts
from sage_reconcile.core.promise import DEFAULT_UTILIZATION, Breakdown
from sage_reconcile.core.spec import Engine, EngineSpec
from sage_reconcile.core.units import MIB

if TYPE_CHECKING:
    from sage_reconcile.core.cpu_sizing import CpuSizing

_GIB = 1024
_NUMBER = re.compile(r"\d+(\.\d+)?")
_OFFLOADS = ("cpu-offload-gb", "kv-offloading-size")
_NOT_COUNTED = (
    "its weights are not counted: nothing here tells how large the model is; say what it takes with `memory: 8GiB`"
)
_LEFT_FOR_WEIGHTS = "nothing here tells how large its weights are: the rest of its memory is left for them"


@dataclass(frozen=True, slots=True)
class HostNeed:
    """MiB of the host's memory for one replica, all its processes together, and what they are made of.

    ``kv_gib`` is the KV cache that vLLM is told to take on each rank, in whole GiB; 0 where it is not told.
    """

    mib: int = 0
    kv_gib: int = 0
    made_of: Breakdown | None = None


NOTHING = HostNeed()


def asks_host(spec: EngineSpec) -> bool:
    """Whether an engine is promised any of the host's memory at all."""
    if spec.device == "cpu":
        return spec.runtime == "vllm" or spec.memory.kind == "mib"
    return any(_gib_of(spec, flag) for flag in _OFFLOADS)


def host_need(engine: Engine, facts: ModelFacts | None, host: HostMemory | None) -> HostNeed:
    """What a replica of this engine needs of the host.

    vLLM on the CPU needs what ``memory`` says in GiB, else what it seems to take. Any other server there needs what
    ``memory`` says, or nothing that is known: the simulator takes next to nothing. On GPUs it is what vLLM keeps
    outside them (``cpu-offload-gb`` of each, ``kv-offloading-size`` of each data-parallel copy).
    """
    spec = engine.spec
    if not asks_host(spec):
        return NOTHING
    if spec.device == "cuda":
        return HostNeed(_offloaded_mib(spec, facts))
    if spec.runtime != "vllm":
        return HostNeed(int(spec.memory.amount))
    # as in core/promise.py: 15 ms of every start
    from sage_reconcile.core.cpu_sizing import cpu_sizing  # noqa: PLC0415
    from sage_reconcile.core.workload import workload  # noqa: PLC0415

    sized = cpu_sizing(spec.model or "", workload(spec), facts)
    match spec.memory.kind:
        case "manual":
            return HostNeed(_by_its_flags(spec, engine.env, sized, host))
        case "mib":
            return _given(int(spec.memory.amount), sized)
    return HostNeed(sized.total_mib, sized.kv_gib, _breakdown(sized, sized.kv_gib, 0))


def _given(amount: int, sized: CpuSizing) -> HostNeed:
    """A size that the entry says: the KV cache is what the other parts leave, in whole GiB, one at the least.

    Where nothing tells the weights no more than vLLM's former default, so that room is left for them.
    """
    from sage_reconcile.core.cpu_sizing import KV_SPACE_GIB  # noqa: PLC0415 - see host_need

    kv_gib = max(1, (amount - sized.others_mib) // (sized.ranks * _GIB))
    if not sized.weights_known:
        kv_gib = min(kv_gib, KV_SPACE_GIB)
    return HostNeed(amount, kv_gib, _breakdown(sized, kv_gib, amount))


def _breakdown(sized: CpuSizing, kv_gib: int, promised_mib: int) -> Breakdown:
    pool = kv_gib * _GIB * MIB
    shape = sized.layout
    return Breakdown(
        parts=sized.parts(kv_gib * _GIB, promised_mib),
        kv_tokens=shape.tokens_in(pool) if shape else 0,
        context=sized.context,
        requests=round(shape.requests_in(pool, sized.context, sized.in_flight), 2) if shape else 0.0,
        needed_mib=sized.total_mib if shape else sized.others_mib + sized.ranks * _GIB,
        promised_mib=promised_mib,
        note="" if sized.weights_known else _LEFT_FOR_WEIGHTS if promised_mib else _NOT_COUNTED,
    )


def _by_its_flags(spec: EngineSpec, env: Mapping[str, str], sized: CpuSizing, host: HostMemory | None) -> int:
    """``memory: manual``: a KV cache as the environment or the flags say it, else vLLM's share of the machine.

    Each rank takes that share with all that it holds (``--gpu-memory-utilization``, whatever its name).
    """
    space = env.get(CPU_KV_SPACE, "").strip()
    if space.isdecimal():
        return sized.others_mib + sized.ranks * int(space) * _GIB
    if "kv-cache-memory-bytes" in spec.args or host is None:
        return sized.others_mib + sized.ranks * sized.kv_mib
    try:
        share = float(str(spec.args.get("gpu-memory-utilization", DEFAULT_UTILIZATION)))
    except ValueError:
        share = 1.0  # vLLM will refuse it
    whole = math.ceil(sized.ranks * share * host.total_mib)
    return min(whole, host.total_mib - kept_back_mib(host))


def _offloaded_mib(spec: EngineSpec, facts: ModelFacts | None) -> int:
    """What all ranks keep in the host's memory: weights, at most as many as they have, and KV cache."""
    ranks = spec.tensor_parallel_size * spec.pipeline_parallel_size * spec.data_parallel_size
    weights, cache = (math.ceil(_gib_of(spec, flag) * _GIB) for flag in _OFFLOADS)
    if weights and facts and facts.config:
        from sage_reconcile.core.sizing import Card, size  # noqa: PLC0415
        from sage_reconcile.core.workload import workload  # noqa: PLC0415

        whole = size(facts.config, replace(workload(spec), offload_mib=0), Card(), facts.checkpoint)
        weights = min(weights, next(part.mib for part in whole.parts if part.name == "weights"))
    return weights * ranks + cache * spec.data_parallel_size


def _gib_of(spec: EngineSpec, flag: str) -> float:
    """A flag in GiB; 0 where it is not set, or not a number and so vLLM's to refuse."""
    text = str(spec.args.get(flag, "")).strip() if spec.runtime != "command" else ""
    return float(text) if _NUMBER.fullmatch(text) else 0.0
