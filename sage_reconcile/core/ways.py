"""What would make a model fit where it does not: less context, a smaller cache, more ranks, quantised weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from sage_reconcile.core.observed import ModelFacts
from sage_reconcile.core.sizing import Card, Part, Sizing, guess, size
from sage_reconcile.core.units import MIB
from sage_reconcile.core.workload import Workload

TENSOR_SIZES = (1, 2, 4, 8)
"""The tensor parallel sizes that are tried."""
LEAST_CONTEXT = 1024
"""A context shorter than this is of no use to anybody."""
_CONTEXT_STEP = 1024
LONGEST = 1 << 27


class Way(NamedTuple):
    """One change with which it fits: ``field`` set to ``value``, and what it takes of each GPU then, in MiB."""

    field: str
    value: int | str
    total_mib: int


def parts_of(model: str, work: Workload, facts: ModelFacts | None, card: Card) -> tuple[Part, ...] | None:
    """What an engine takes, part by part: worked out, or else guessed; None where nothing tells anything."""
    sized = sizing_of(work, facts, card)
    return sized.parts if sized else guess(model, work)


def sizing_of(work: Workload, facts: ModelFacts | None, card: Card) -> Sizing | None:
    """The same with what follows for its KV cache; None where the model was not read."""
    return size(facts.config, work, card, facts.checkpoint) if facts and facts.config else None


def divisible(facts: ModelFacts | None, tensor: int) -> bool:
    """vLLM divides the heads of attention evenly, or refuses."""
    layers = facts.config.layers if facts and facts.config else ()
    heads = next((layer.attention.heads for layer in layers if layer.attention), 0)
    return heads % tensor == 0


def with_tensor(work: Workload, tensor: int) -> Workload:
    """The same work on so many tensor-parallel ranks."""
    return replace(work, parallel=work.parallel._replace(tensor=tensor))


def ways_to_fit(
    model: str, work: Workload, facts: ModelFacts | None, card: Card, *, usable_mib: int, count: int
) -> tuple[Way, ...]:
    """The changes of which each alone makes it fit on ``count`` empty GPUs with ``usable_mib`` each; none if it does.

    Of several values of one field the first that does.
    """
    parts = parts_of(model, work, facts, card)
    if parts is None or _total(parts) <= usable_mib:
        return ()
    found = [*_with_less_cache(work, facts, card, usable_mib), *_on_more_ranks(model, work, facts, card, count)]
    found += _quantised(work, facts, card)
    fitting = [way for way in found if way.total_mib <= usable_mib]
    return tuple({way.field: way for way in reversed(fitting)}.values())[::-1]


def _total(parts: tuple[Part, ...]) -> int:
    return sum(part.mib for part in parts)


def _with_less_cache(work: Workload, facts: ModelFacts | None, card: Card, usable_mib: int) -> Iterator[Way]:
    sized = sizing_of(work, facts, card)
    if sized is None:
        return
    others = sized.total_mib - next(part.mib for part in sized.parts if part.name == "kv_cache")
    pool = (usable_mib - others) * MIB
    if work.kv_mib:
        if pool > 0:
            yield Way("kv_cache", pool // MIB, usable_mib)
        return
    longest = sized.layout.longest_in(pool, work.concurrency, sized.in_flight, sized.context)
    longest -= longest % _CONTEXT_STEP
    if longest >= LEAST_CONTEXT:
        yield _way("context", longest, replace(work, context=longest), facts, card)
    fewer = int(sized.layout.requests_in(pool, sized.context, sized.in_flight))
    if 1 <= fewer < work.concurrency:
        yield _way("concurrency", fewer, replace(work, concurrency=fewer), facts, card)
    if work.cache_bytes != 1:
        yield _way("kv_cache_dtype", "fp8", replace(work, cache_bytes=1), facts, card)


def _way(field: str, value: int | str, work: Workload, facts: ModelFacts | None, card: Card) -> Way:
    sized = sizing_of(work, facts, card)
    assert sized is not None, "it was read before"
    return Way(field, value, sized.total_mib)


def _on_more_ranks(model: str, work: Workload, facts: ModelFacts | None, card: Card, count: int) -> Iterator[Way]:
    others = work.parallel.pipeline * work.parallel.data
    tried = [x for x in TENSOR_SIZES if x > work.parallel.tensor and x * others <= count and divisible(facts, x)]
    ways = [
        Way("tensor_parallel_size", tensor, _total(parts))
        for tensor in tried
        if (parts := parts_of(model, with_tensor(work, tensor), facts, card))
    ]
    yield from sorted(ways, key=lambda way: way.value)


def _quantised(work: Workload, facts: ModelFacts | None, card: Card) -> Iterator[Way]:
    """A checkpoint of the same model with smaller weights; 4 bits as bitsandbytes has them, AWQ and GPTQ are near."""
    if not (facts and facts.config) or facts.config.quantization or work.quantization:
        return
    unread = replace(facts, checkpoint=None)
    for name, method in (("fp8", "fp8"), ("4 bits", "bitsandbytes")):
        yield _way("weights", name, replace(work, quantization=method), unread, card)


def way_text(way: Way) -> str:
    """The change in the words of the file."""
    match way.field:
        case "context":
            return f"`context: {int(way.value) // 1024}k`"
        case "kv_cache":
            return f"`kv_cache: {way.value}MiB`"
        case "kv_cache_dtype":
            return f"`kv-cache-dtype: {way.value}` in `args`"
        case "weights":
            return f"a checkpoint quantised to {way.value}"
    return f"`{way.field}: {way.value}`"
