"""How much of a GPU an engine is promised, and what that is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sage_reconcile.core.memory import IDLE_MIB
from sage_reconcile.core.observed import Gpu, ModelFacts
from sage_reconcile.core.spec import EngineSpec
from sage_reconcile.core.units import MIB

if TYPE_CHECKING:
    from sage_reconcile.core.sizing import Part, Sizing
    from sage_reconcile.core.ways import Way

DEFAULT_UTILIZATION = 0.92
"""vLLM's own ``--gpu-memory-utilization`` (``config/cache.py`` of 0.32)."""
_OUTSIDE_MARGIN_MIB = 91
"""For what the context takes more elsewhere than where it was measured."""


def promised_mib(spec: EngineSpec, gpu: Gpu, facts: ModelFacts | None, headroom_mib: int = 0) -> int | None:
    """MiB that a replica of this engine is promised on this GPU; None where ``auto`` cannot be worked out.

    ``all`` is what can be given of the GPU, but for what an idle driver may show as used. ``manual`` is what vLLM will
    take by its flags in ``args``; what it does take is seen when it runs.
    """
    usable = max(0, gpu.memory_total_mib - gpu.memory_reserved_mib - headroom_mib)
    match spec.memory.kind:
        case "mib":
            return int(spec.memory.amount)
        case "percent":
            return int(gpu.memory_total_mib * spec.memory.amount / 100)
        case "all":
            return max(0, usable - IDLE_MIB)
        case "manual":
            return min(usable, _by_its_flags(spec, gpu, facts))
        case "auto":
            return automatic_mib(spec, gpu, facts)


def automatic_mib(spec: EngineSpec, gpu: Gpu, facts: ModelFacts | None) -> int | None:
    """MiB per GPU for ``memory: auto``; None where nothing tells the model's size.

    Room for ``concurrency`` requests (one, where it is not given) of the longest ``context``, else of what the model is
    made for, which is what vLLM asks of its KV cache before it starts; or a KV cache of ``kv_cache``. Where the model
    was not read, what its name tells.
    """
    # 15 ms of every start, and wanted only where a size has to be worked out
    from sage_reconcile.core.sizing import guess  # noqa: PLC0415
    from sage_reconcile.core.workload import workload  # noqa: PLC0415

    sized = _sized(spec, gpu, facts)
    if sized is not None:
        return sized.total_mib
    parts = guess(spec.model or "", workload(spec))
    return sum(part.mib for part in parts) if parts else None


def _sized(spec: EngineSpec, gpu: Gpu, facts: ModelFacts | None) -> Sizing | None:
    if not (facts and facts.config):
        return None
    from sage_reconcile.core.sizing import Card, size  # noqa: PLC0415 - see automatic_mib
    from sage_reconcile.core.workload import workload  # noqa: PLC0415

    return size(facts.config, workload(spec), Card(gpu.name, gpu.memory_total_mib), facts.checkpoint)


def _by_its_flags(spec: EngineSpec, gpu: Gpu, facts: ModelFacts | None) -> int:
    """MiB that vLLM takes where ``args`` say it: a KV cache of so many bytes if its size can be told, else a share."""
    if "kv-cache-memory-bytes" in spec.args and (sized := _sized(spec, gpu, facts)) is not None:
        return sized.total_mib
    try:
        share = float(str(spec.args.get("gpu-memory-utilization", DEFAULT_UTILIZATION)))
    except ValueError:
        share = 1.0  # vLLM will refuse it
    return math.ceil(share * cuda_total_mib(gpu)) + outside_mib(spec)


def cuda_total_mib(gpu: Gpu) -> int:
    """The total of a GPU as CUDA reports it, of which vLLM takes its share.

    Where nobody has told it: NVML's without what the driver keeps (H100: 79.19 of 79.65 GiB).
    """
    return gpu.cuda_total_mib or max(1, gpu.memory_total_mib - gpu.memory_reserved_mib)


def outside_mib(spec: EngineSpec) -> int:
    """MiB of an engine that vLLM does not count: CUDA's context and NCCL, as they were measured.

    Of several ranks what they take with experts, since nothing here tells whether the model has any. The simulator has
    no context.
    """
    if spec.runtime != "vllm":
        return 0
    from sage_reconcile.core.sizing import CONTEXT_EXPERTS_MIB, CONTEXT_ONE_RANK_MIB  # noqa: PLC0415 - as above

    ranks = spec.tensor_parallel_size * spec.pipeline_parallel_size
    return (CONTEXT_EXPERTS_MIB if ranks > 1 else CONTEXT_ONE_RANK_MIB) + _OUTSIDE_MARGIN_MIB


def utilization(spec: EngineSpec, memory_mib: int, gpu: Gpu) -> float:
    """vLLM's ``--gpu-memory-utilization`` for a promise, so that all of the engine fits inside it.

    vLLM takes this share of the GPU for weights, activations and KV cache; the CUDA context and NCCL come on top, so
    they are taken off first. Rounded down to six decimals.
    """
    share = max(0, memory_mib - outside_mib(spec)) / cuda_total_mib(gpu)
    return math.floor(min(share, 1.0) * 1e6) / 1e6


@dataclass(frozen=True, slots=True)
class Breakdown:
    """A promise on one GPU, part by part: its KV cache is what the other parts leave.

    ``kv_tokens`` fit into it, or ``requests`` of ``context`` tokens each. ``needed_mib`` is what the entry asks for, at
    the least one such request: with less it will hardly start.
    """

    parts: tuple[Part, ...]
    kv_tokens: int = 0
    context: int = 0
    requests: float = 0.0
    needed_mib: int = 0

    @property
    def total_mib(self) -> int:
        """All parts together."""
        return sum(part.mib for part in self.parts)

    @property
    def confidence(self) -> str:
        """How sure the weights are, and with them the whole."""
        return str(next(part.confidence for part in self.parts if part.name == "weights"))


def made_of(spec: EngineSpec, memory_mib: int, gpu: Gpu, facts: ModelFacts | None) -> Breakdown | None:
    """What a promise of ``memory_mib`` on this GPU is made of; None where nothing is known of the model."""
    sized = _sized(spec, gpu, facts)
    if sized is None:
        return _guessed(spec, memory_mib) if spec.memory.kind == "auto" else None
    others = sum(part.mib for part in sized.parts if part.name != "kv_cache")
    pool_mib = max(0, memory_mib - others)
    return Breakdown(
        parts=tuple(part._replace(mib=pool_mib) if part.name == "kv_cache" else part for part in sized.parts),
        kv_tokens=sized.layout.tokens_in(pool_mib * MIB),
        context=sized.context,
        requests=round(sized.layout.requests_in(pool_mib * MIB, sized.context, sized.in_flight), 2),
        needed_mib=sized.total_mib,
    )


def _guessed(spec: EngineSpec, memory_mib: int) -> Breakdown | None:
    from sage_reconcile.core.sizing import guess  # noqa: PLC0415 - see automatic_mib
    from sage_reconcile.core.workload import workload  # noqa: PLC0415

    parts = guess(spec.model or "", workload(spec))
    return Breakdown(parts) if parts and sum(part.mib for part in parts) == memory_mib else None


def nearest_ways(spec: EngineSpec, gpus: Sequence[tuple[Gpu, int]], facts: ModelFacts | None) -> tuple[Way, ...]:
    """What would make an engine fit that is too large for each of these GPUs, even empty; see ``ways_to_fit``.

    ``gpus`` go with the MiB that can be given of each when nothing is there. The ways are for the model of which most
    can be given.
    """
    if not gpus or spec.memory.kind != "auto":
        return ()
    from sage_reconcile.core.sizing import Card  # noqa: PLC0415 - see automatic_mib
    from sage_reconcile.core.ways import ways_to_fit  # noqa: PLC0415
    from sage_reconcile.core.workload import workload  # noqa: PLC0415

    for gpu, usable_mib in gpus:
        need = automatic_mib(spec, gpu, facts)
        if need is None or need <= usable_mib:
            return ()
    best, usable_mib = max(gpus, key=lambda item: item[1])
    count = sum(gpu.name == best.name for gpu, _ in gpus)
    card = Card(best.name, best.memory_total_mib)
    return ways_to_fit(spec.model or "", workload(spec), facts, card, usable_mib=usable_mib, count=count)
