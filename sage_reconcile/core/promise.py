"""How much of a GPU an engine is promised, and what that is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from sage_reconcile.core.measured import Measured, find
from sage_reconcile.core.memory import IDLE_MIB
from sage_reconcile.core.observed import Gpu, ModelFacts, Observed
from sage_reconcile.core.resolve import secret_marks
from sage_reconcile.core.spec import Engine, EngineSpec
from sage_reconcile.core.units import MIB

if TYPE_CHECKING:
    from sage_reconcile.core.sizing import Part, Sizing
    from sage_reconcile.core.ways import Way

DEFAULT_UTILIZATION = 0.92
"""vLLM's own ``--gpu-memory-utilization`` (``config/cache.py`` of 0.32)."""
_OUTSIDE_MARGIN_MIB = 91
"""For what the context takes more elsewhere than where it was measured."""


SPARE_MIB = 150
"""What is left beside a KV cache of a given size for what a start takes more than the ones before it: vLLM's own
``redundancy_buffer_memory`` (``v1/worker/gpu_worker.py``)."""


class Known(NamedTuple):
    """What is known of an engine before it starts: what was read of its model, and what past starts of it took."""

    facts: ModelFacts | None = None
    measured: Measured | None = None


def known_of(engine: Engine, gpu: Gpu, observed: Observed) -> Known:
    """What is known of an engine that is to start on such a GPU."""
    facts = observed.models.get(engine.spec.model_at)
    if not observed.measured:
        return Known(facts)
    return Known(
        facts, find(observed.measured, engine.record, gpu.name, lambda salt: secret_marks(engine.secrets, salt))
    )


def promised_mib(spec: EngineSpec, gpu: Gpu, known: Known, headroom_mib: int = 0) -> int | None:
    """MiB that a replica of this engine is promised on this GPU; None where ``auto`` cannot be worked out.

    ``all`` is what can be given of the GPU, but for what an idle driver may show as used. ``manual`` is what vLLM will
    take by its flags in ``args``; what it does take is seen when it runs. A size that a start with it has outgrown is
    raised to what that took, unless its KV cache can be given a size that keeps it inside.
    """
    usable = max(0, gpu.memory_total_mib - gpu.memory_reserved_mib - headroom_mib)
    match spec.memory.kind:
        case "mib":
            return _raised(spec, int(spec.memory.amount), gpu, known)
        case "percent":
            return _raised(spec, int(gpu.memory_total_mib * spec.memory.amount / 100), gpu, known)
        case "all":
            return max(0, usable - IDLE_MIB)
        case "manual":
            return min(usable, _by_its_flags(spec, gpu, known.facts))
        case "auto":
            return automatic_mib(spec, gpu, known)


def _raised(spec: EngineSpec, mib: int, gpu: Gpu, known: Known) -> int:
    seen = known.measured
    if seen is None or not seen.outgrew or seen.promised_mib != mib or kv_bytes(spec, mib, gpu, known):
        return mib
    return max(mib, seen.held_mib or 0)


def automatic_mib(spec: EngineSpec, gpu: Gpu, known: Known) -> int | None:
    """MiB per GPU for ``memory: auto``; None where nothing tells the model's size.

    Room for ``concurrency`` requests (one, where it is not given) of the longest ``context``, else of what the model is
    made for, which is what vLLM asks of its KV cache before it starts; or a KV cache of ``kv_cache``. What else it
    takes is what past starts took; before the first one it is estimated, and where the model was not read, guessed
    from its name. Where a start failed for want of memory, at the least the number that would have done.
    """
    seen = known.measured
    least = (seen.needed_mib or 0) if seen else 0
    cache = _asked_cache_mib(spec, gpu, known)
    if seen is not None and seen.beside_kv_mib is not None and cache is not None:
        return max(least, seen.beside_kv_mib + SPARE_MIB + cache)
    sized = _sized(spec, gpu, known.facts)
    if sized is not None:
        return max(least, sized.total_mib)
    # 15 ms of every start, and wanted only where a size has to be worked out
    from sage_reconcile.core.sizing import guess  # noqa: PLC0415
    from sage_reconcile.core.workload import workload  # noqa: PLC0415

    parts = guess(spec.model or "", workload(spec))
    held = (seen.held_mib or 0) if seen else 0
    return max(least, held, sum(part.mib for part in parts)) if parts else max(least, held) or None


def _asked_cache_mib(spec: EngineSpec, gpu: Gpu, known: Known) -> int | None:
    """MiB of the KV cache that the entry asks for; at the least one request. None where that cannot be told.

    Of a model that was not read, what its tokens took at a past start.
    """
    if spec.kv_cache:
        return spec.kv_cache
    sized = _sized(spec, gpu, known.facts)
    if sized is not None:
        return math.ceil(sized.kv_bytes / MIB)
    figures = known.measured.figures if known.measured else None
    if figures is None or not (figures.kv_tokens and figures.kv_available_mib and figures.context_tokens):
        return None
    each = figures.kv_available_mib / figures.kv_tokens
    return math.ceil(each * (spec.context or figures.context_tokens) * (spec.concurrency or 1))


def kv_bytes(spec: EngineSpec, memory_mib: int, gpu: Gpu, known: Known) -> int:
    """The size that vLLM's KV cache is given; 0 where it shall take what it finds to be left.

    That of ``kv_cache``; else, once it was measured what a start takes beside it, what is left of the promise. Then a
    start does not depend on what its neighbours do meanwhile: vLLM charges it with all that changes on the GPU while
    it measures (vllm#55827). Not where that is less than the entry asks for: then vLLM tells what is missing.
    """
    if spec.runtime == "command" or spec.memory.kind == "manual" or not spec.gpu_count:
        return 0
    if spec.kv_cache:
        return spec.kv_cache * MIB
    seen = known.measured
    asked = _asked_cache_mib(spec, gpu, known)
    if seen is None or seen.beside_kv_mib is None or asked is None:
        return 0
    left = memory_mib - seen.beside_kv_mib - SPARE_MIB
    return left * MIB if left >= max(asked, 1) else 0


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
    return math.ceil(share * cuda_total_mib(gpu)) + outside_mib(spec.runtime, _ranks(spec))


def cuda_total_mib(gpu: Gpu) -> int:
    """The total of a GPU as CUDA reports it, of which vLLM takes its share.

    Where nobody has told it: NVML's without what the driver keeps (H100: 79.19 of 79.65 GiB).
    """
    return gpu.cuda_total_mib or max(1, gpu.memory_total_mib - gpu.memory_reserved_mib)


def outside_mib(runtime: str, ranks: int) -> int:
    """MiB of an engine that vLLM does not count: CUDA's context and NCCL, as they were measured.

    Of several ranks what they take with experts, since nothing here tells whether the model has any. The simulator has
    no context.
    """
    if runtime != "vllm":
        return 0
    from sage_reconcile.core.sizing import CONTEXT_EXPERTS_MIB, CONTEXT_ONE_RANK_MIB  # noqa: PLC0415 - as above

    return (CONTEXT_EXPERTS_MIB if ranks > 1 else CONTEXT_ONE_RANK_MIB) + _OUTSIDE_MARGIN_MIB


def _ranks(spec: EngineSpec) -> int:
    return spec.tensor_parallel_size * spec.pipeline_parallel_size


def utilization(spec: EngineSpec, memory_mib: int, gpu: Gpu) -> float:
    """vLLM's ``--gpu-memory-utilization`` for a promise, so that all of the engine fits inside it.

    vLLM takes this share of the GPU for weights, activations and KV cache; the CUDA context and NCCL come on top, so
    they are taken off first. Rounded down to six decimals.
    """
    share = max(0, memory_mib - outside_mib(spec.runtime, _ranks(spec))) / cuda_total_mib(gpu)
    return math.floor(min(share, 1.0) * 1e6) / 1e6


@dataclass(frozen=True, slots=True)
class Breakdown:
    """A promise on one GPU, or of the host's memory, part by part: its KV cache is what the other parts leave.

    ``kv_tokens`` fit into it, or ``requests`` of ``context`` tokens each. ``needed_mib`` is what the entry asks for, at
    the least one such request: with less it will hardly start; ``cache_mib`` is the KV cache in that. ``promised_mib``
    is the promise where the parts may not fit into it; ``note`` is something to know of them.
    """

    parts: tuple[Part, ...]
    kv_tokens: int = 0
    context: int = 0
    requests: float = 0.0
    needed_mib: int = 0
    cache_mib: int = 0
    promised_mib: int = 0
    note: str = ""

    @property
    def total_mib(self) -> int:
        """All parts together."""
        return sum(part.mib for part in self.parts)

    @property
    def too_little(self) -> bool:
        """Whether less is promised than the entry seems to need."""
        return self.needed_mib > (self.promised_mib or self.total_mib)

    @property
    def confidence(self) -> str:
        """How sure the weights are, and with them the whole."""
        return str(next(part.confidence for part in self.parts if part.name == "weights"))


def made_of(spec: EngineSpec, memory_mib: int, gpu: Gpu, known: Known) -> Breakdown | None:
    """What a promise of ``memory_mib`` on this GPU is made of; None where nothing is known of the model."""
    sized = _sized(spec, gpu, known.facts)
    if sized is None:
        return _guessed(spec, memory_mib) if spec.memory.kind == "auto" else None
    parts = _with_measured(sized, known.measured)
    others = sum(part.mib for part in parts if part.name != "kv_cache")
    pool_mib = max(0, memory_mib - others)
    cache = next(part.mib for part in parts if part.name == "kv_cache")
    return Breakdown(
        parts=tuple(part._replace(mib=pool_mib) if part.name == "kv_cache" else part for part in parts),
        kv_tokens=sized.layout.tokens_in(pool_mib * MIB),
        context=sized.context,
        requests=round(sized.layout.requests_in(pool_mib * MIB, sized.context, sized.in_flight), 2),
        needed_mib=others + cache,
        cache_mib=cache,
    )


def _with_measured(sized: Sizing, seen: Measured | None) -> tuple[Part, ...]:
    """The parts, those that a past start told in place of what was estimated; the context is what is left of it."""
    if seen is None or seen.beside_kv_mib is None:
        return sized.parts
    from sage_reconcile.core.sizing import Confidence  # noqa: PLC0415 - see automatic_mib

    figures = seen.figures
    told = {
        "weights": figures.weights_mib,
        "activation": figures.activation_mib,
        "cuda_graphs": figures.cuda_graphs_mib,
    }
    found = {name: max(0, mib) for name, mib in told.items() if mib is not None}
    rest = seen.beside_kv_mib - sum(found.values())
    if "weights" not in found or rest < 0:
        return sized.parts
    found |= {"context": rest, "margin": SPARE_MIB}
    return tuple(
        part if part.name == "kv_cache" else part._replace(mib=found.get(part.name, 0), confidence=Confidence.MEASURED)
        for part in sized.parts
    )


def _guessed(spec: EngineSpec, memory_mib: int) -> Breakdown | None:
    from sage_reconcile.core.sizing import guess  # noqa: PLC0415 - see automatic_mib
    from sage_reconcile.core.workload import workload  # noqa: PLC0415

    parts = guess(spec.model or "", workload(spec))
    return Breakdown(parts) if parts and sum(part.mib for part in parts) == memory_mib else None


def nearest_ways(spec: EngineSpec, gpus: Sequence[tuple[Gpu, int]], known: Known) -> tuple[Way, ...]:
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
        need = automatic_mib(spec, gpu, known)
        if need is None or need <= usable_mib:
            return ()
    best, usable_mib = max(gpus, key=lambda item: item[1])
    count = sum(gpu.name == best.name for gpu, _ in gpus)
    card = Card(best.name, best.memory_total_mib)
    return ways_to_fit(spec.model or "", workload(spec), known.facts, card, usable_mib=usable_mib, count=count)
