"""The answer to "how much of the GPU will it take, and does it fit?", as a document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sage_reconcile.core.cpu_sizing import GIB_MIB, cpu_sizing
from sage_reconcile.core.gpu_models import MODELS, Declared
from sage_reconcile.core.observed import ModelFacts
from sage_reconcile.core.sizing import Card, Part, Sizing, batch_defaults
from sage_reconcile.core.units import MIB
from sage_reconcile.core.ways import (
    LONGEST,
    TENSOR_SIZES,
    Way,
    divisible,
    parts_of,
    sizing_of,
    ways_to_fit,
    with_tensor,
)
from sage_reconcile.core.workload import Workload

VERSION = 1
DRIVER_MIB = 512
"""What the driver keeps of a GPU for itself, about: CUDA's total is 0.46 GiB below NVML's on an H100."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked.

    ``gpu`` of a count above one stands for so many GPUs; ``tensor_told`` is False where the tensor parallel size is
    to be found. ``on_cpu`` asks what it takes of the host, all processes together.
    """

    model: str
    work: Workload
    gpu: Declared | None = None
    tensor_told: bool = True
    longest: bool = False
    on_cpu: bool = False


def estimate(question: Question, facts: ModelFacts | None) -> Mapping[str, Any] | None:
    """The document; None where neither what was read of the model nor its name tells anything."""
    question = _with_tensor(question, facts)
    host = cpu_sizing(question.model, question.work, facts) if question.on_cpu else None
    sized = sizing_of(question.work, facts, _card(question))
    parts = parts_of(question.model, question.work, facts, _card(question))
    if host is not None:
        parts = host.parts(host.kv_gib * GIB_MIB) if host.weights_known else None
    if parts is None:
        return None
    kv_tokens = sized.kv_tokens if sized else None
    if host is not None and host.layout is not None:
        kv_tokens = host.layout.tokens_in(host.kv_gib * GIB_MIB * MIB)
    problem = facts.problem if facts else ""
    return {
        "version": VERSION,
        "device": "cpu" if host else "cuda",
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
        "kv_tokens": kv_tokens,
        "kv_space_gib": host.kv_gib if host else None,
        "gpu": _on_gpu(question, facts, sized, parts),
        "smallest": [] if question.gpu or host else list(_smallest_sets(question, facts)),
    }


def _smallest_sets(question: Question, facts: ModelFacts | None) -> Iterator[Mapping[str, Any]]:
    """Of each known GPU as few as hold it, the fewest and smallest first; those of which 8 ranks do not are left out.

    What an engine takes differs between GPUs only by vLLM's own defaults, so few sizes have to be worked out.
    """
    each = question.work.parallel.pipeline * question.work.parallel.data
    tensors = [question.work.parallel.tensor] if question.tensor_told else TENSOR_SIZES
    totals: dict[tuple[tuple[int, int], int], int] = {}
    found: list[tuple[int, int, str]] = []
    for model in MODELS:
        card = Card(model.name, model.memory_mib)
        usable = usable_mib(Declared(model.name, model.memory_mib, 1))
        for tensor in (x for x in tensors if divisible(facts, x)):
            key = batch_defaults(card), tensor
            if key not in totals:
                totals[key] = _total(parts_of(question.model, with_tensor(question.work, tensor), facts, card) or ())
            if totals[key] <= usable:
                found.append((tensor * each, model.memory_mib, model.name))
                break
    yield from ({"gpu": name, "count": count} for count, _, name in sorted(found))


def _total(parts: tuple[Part, ...]) -> int:
    return sum(part.mib for part in parts)


def _card(question: Question) -> Card:
    return Card(question.gpu.name, question.gpu.memory_mib) if question.gpu else Card()


def usable_mib(gpu: Declared) -> int:
    """What engines can have of such a GPU when it is empty."""
    return max(0, gpu.memory_mib - DRIVER_MIB)


def _ranks(work: Workload) -> int:
    return work.parallel.tensor * work.parallel.pipeline * work.parallel.data


def smallest_tensor(question: Question, facts: ModelFacts | None) -> int | None:
    """The smallest tensor parallel size of ``TENSOR_SIZES`` with which it fits on such GPUs; None where none does."""
    gpu = question.gpu
    if gpu is None:
        return None
    for tensor in TENSOR_SIZES:
        work = with_tensor(question.work, tensor)
        parts = parts_of(question.model, work, facts, _card(question))
        enough = gpu.count == 1 or _ranks(work) <= gpu.count
        if parts and enough and divisible(facts, tensor) and _total(parts) <= usable_mib(gpu):
            return tensor
    return None


def _with_tensor(question: Question, facts: ModelFacts | None) -> Question:
    """With several GPUs and no size given: as few as hold it; all of them where the longest context is asked for."""
    if question.tensor_told or question.gpu is None or question.gpu.count == 1:
        return question
    each = question.work.parallel.pipeline * question.work.parallel.data
    possible = [tensor for tensor in TENSOR_SIZES if tensor * each <= question.gpu.count and divisible(facts, tensor)]
    found = None if question.longest else smallest_tensor(question, facts)
    return replace(question, work=with_tensor(question.work, found or max(possible, default=1)))


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
        most = facts.config.context if facts.config.context_told else LONGEST
        longest = sized.layout.longest_in(pool * MIB, question.work.concurrency, sized.in_flight, most)
    held = pool * MIB if pool is not None else 0
    return {
        "name": gpu.name,
        "count": max(gpu.count, _ranks(question.work)),
        "memory_mib": gpu.memory_mib,
        "usable_mib": usable,
        "fits": enough and divisible(facts, question.work.parallel.tensor) and _fits(question, parts, usable, longest),
        "kv_pool_mib": pool,
        "kv_tokens": sized.layout.tokens_in(held) if sized else None,
        "concurrency": round(sized.layout.requests_in(held, sized.context, sized.in_flight), 2) if sized else None,
        "longest_context": longest,
        "smallest_tensor_parallel_size": smallest_tensor(question, facts),
        "ways": [way._asdict() for way in _ways(question, facts, usable)],
    }


def _ways(question: Question, facts: ModelFacts | None, usable_mib: int) -> tuple[Way, ...]:
    """What would make it fit; on one GPU that was given, also more of its kind."""
    gpu = question.gpu
    assert gpu is not None
    count = gpu.count if gpu.count > 1 else max(TENSOR_SIZES)
    return ways_to_fit(question.model, question.work, facts, _card(question), usable_mib=usable_mib, count=count)


def _fits(question: Question, parts: tuple[Part, ...], usable: int, longest: int | None) -> bool:
    """Whether it fits; where the longest context is asked for, whether there is any."""
    if longest is not None and not question.work.context:
        return longest > 0
    return _total(parts) <= usable
