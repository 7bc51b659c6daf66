"""The answer to "how much of the GPU will it take, and does it fit?", as a document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sage_reconcile.core.gpu_models import Declared
from sage_reconcile.core.observed import ModelFacts
from sage_reconcile.core.sizing import MIB, Card, Confidence, Part, Sizing, guess, size
from sage_reconcile.core.workload import Workload

VERSION = 1
DRIVER_MIB = 512
"""What the driver keeps of a GPU for itself, about: CUDA's total is 0.46 GiB below NVML's on an H100."""
SIZES = (1, 2, 4, 8)
"""The tensor parallel sizes that are tried."""
_LONGEST = 1 << 27


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked.

    ``gpu`` of a count above one stands for so many GPUs; ``tensor_told`` is False where the tensor parallel size is
    to be found; ``kv_mib`` asks for a KV cache of that size, whatever the context needs.
    """

    model: str
    work: Workload
    gpu: Declared | None = None
    tensor_told: bool = True
    longest: bool = False
    kv_mib: int = 0


def estimate(question: Question, facts: ModelFacts | None) -> Mapping[str, Any] | None:
    """The document; None where neither what was read of the model nor its name tells anything."""
    question = _with_tensor(question, facts)
    sized = _sized(question, facts, question.work)
    parts = _parts(question, facts, question.work)
    if parts is None:
        return None
    problem = facts.problem if facts else ""
    return {
        "version": VERSION,
        "model": question.model,
        "source": facts.source if facts and facts.config else "",
        "confidence": str(next(part.confidence for part in parts if part.name == "weights")),
        "note": problem,
        "tensor_parallel_size": question.work.parallel.tensor,
        "pipeline_parallel_size": question.work.parallel.pipeline,
        "data_parallel_size": question.work.parallel.data,
        "context": sized.context if sized else None,
        "context_assumed": bool(
            sized and facts and facts.config and not (question.work.context or facts.config.context_told)
        ),
        "concurrency": question.work.concurrency if sized else None,
        "parts": {f"{part.name}_mib": part.mib for part in parts},
        "part_confidence": {part.name: str(part.confidence) for part in parts},
        "total_mib": _total(parts),
        "kv_tokens": sized.layout.tokens_in(question.kv_mib * MIB or sized.kv_bytes) if sized else None,
        "gpu": _on_gpu(question, facts, sized, parts),
    }


def _total(parts: tuple[Part, ...]) -> int:
    return sum(part.mib for part in parts)


def _sized(question: Question, facts: ModelFacts | None, work: Workload) -> Sizing | None:
    if not (facts and facts.config):
        return None
    gpu = question.gpu
    card = Card(gpu.name, gpu.memory_mib) if gpu else Card()
    return size(facts.config, work, card, facts.checkpoint)


def _parts(question: Question, facts: ModelFacts | None, work: Workload) -> tuple[Part, ...] | None:
    sized = _sized(question, facts, work)
    if sized is None:
        return guess(question.model, work.parallel)
    if not question.kv_mib:
        return sized.parts
    cache = Part("kv_cache", question.kv_mib, Confidence.EXACT)
    return tuple(cache if part.name == "kv_cache" else part for part in sized.parts)


def usable_mib(gpu: Declared) -> int:
    """What engines can have of such a GPU when it is empty."""
    return max(0, gpu.memory_mib - DRIVER_MIB)


def _divisible(facts: ModelFacts | None, tensor: int) -> bool:
    """vLLM divides the heads of attention evenly, or refuses."""
    layers = facts.config.layers if facts and facts.config else ()
    heads = next((layer.attention.heads for layer in layers if layer.attention), 0)
    return heads % tensor == 0


def _at(work: Workload, tensor: int) -> Workload:
    return replace(work, parallel=work.parallel._replace(tensor=tensor))


def _ranks(work: Workload) -> int:
    return work.parallel.tensor * work.parallel.pipeline * work.parallel.data


def smallest_tensor(question: Question, facts: ModelFacts | None) -> int | None:
    """The smallest tensor parallel size of ``SIZES`` with which it fits on such GPUs; None where none does."""
    gpu = question.gpu
    if gpu is None:
        return None
    for tensor in SIZES:
        work = _at(question.work, tensor)
        parts = _parts(question, facts, work)
        enough = gpu.count == 1 or _ranks(work) <= gpu.count
        if parts and enough and _divisible(facts, tensor) and _total(parts) <= usable_mib(gpu):
            return tensor
    return None


def _with_tensor(question: Question, facts: ModelFacts | None) -> Question:
    """With several GPUs and no size given: as few as hold it; all of them where the longest context is asked for."""
    if question.tensor_told or question.gpu is None or question.gpu.count == 1:
        return question
    each = question.work.parallel.pipeline * question.work.parallel.data
    possible = [tensor for tensor in SIZES if tensor * each <= question.gpu.count and _divisible(facts, tensor)]
    found = None if question.longest else smallest_tensor(question, facts)
    return replace(question, work=_at(question.work, found or max(possible, default=1)))


def _on_gpu(
    question: Question, facts: ModelFacts | None, sized: Sizing | None, parts: tuple[Part, ...]
) -> Mapping[str, Any] | None:
    gpu = question.gpu
    if gpu is None:
        return None
    usable = usable_mib(gpu)
    enough = gpu.count == 1 or _ranks(question.work) <= gpu.count
    pool = max(0, usable - sum(part.mib for part in parts if part.name != "kv_cache")) if sized else None
    longest = None
    if question.longest and sized and pool is not None and facts and facts.config:
        most = facts.config.context if facts.config.context_told else _LONGEST
        longest = sized.layout.longest_in(pool * MIB, question.work.concurrency, sized.in_flight, most)
    held = pool * MIB if pool is not None else 0
    return {
        "name": gpu.name,
        "count": max(gpu.count, _ranks(question.work)),
        "memory_mib": gpu.memory_mib,
        "usable_mib": usable,
        "fits": enough and _divisible(facts, question.work.parallel.tensor) and _fits(question, parts, usable, longest),
        "kv_pool_mib": pool,
        "kv_tokens": sized.layout.tokens_in(held) if sized else None,
        "concurrency": round(sized.layout.requests_in(held, sized.context, sized.in_flight), 2) if sized else None,
        "longest_context": longest,
        "smallest_tensor_parallel_size": smallest_tensor(question, facts),
    }


def _fits(question: Question, parts: tuple[Part, ...], usable: int, longest: int | None) -> bool:
    """Whether it fits; where the longest context is asked for, whether there is any."""
    if longest is not None and not question.work.context:
        return longest > 0
    return _total(parts) <= usable
