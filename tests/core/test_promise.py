"""What an engine is promised of a GPU, what that is made of, and what would make one fit that is too large."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sage_reconcile.core.measured import Measured, subject
from sage_reconcile.core.model_config import read_model_config
from sage_reconcile.core.observed import Gpu, ModelFacts, Observed
from sage_reconcile.core.promise import (
    Breakdown,
    Known,
    known_of,
    kv_bytes,
    made_of,
    nearest_ways,
    promised_mib,
    utilization,
)
from sage_reconcile.core.spec import EngineSpec
from sage_reconcile.core.startup_figures import StartupFigures
from sage_reconcile.core.ways import Way, way_text
from sage_reconcile.core.weights import Checkpoint, Piece, Share
from tests.models import LLAMA_8B as MODEL
from tests.reading import desired

GIB = 1024
CARD = Gpu("GPU-0", 0, "H100", "0000:00:00.0", 80 * GIB)
KV_OF_1K = 1024 * 32 * 2 * 8 * 128 * 2 // 2**20


def spec(**fields: Any) -> EngineSpec:
    return EngineSpec.model_validate({"model": "m"} | fields)


LLAMA_8B = MODEL | {"max_position_embeddings": 8192}
FACTS = ModelFacts("folder", read_model_config(LLAMA_8B))


def automatic(facts: ModelFacts | None = FACTS, gpu: Gpu = CARD, **fields: Any) -> int:
    need = promised_mib(spec(memory="auto", **fields), gpu, Known(facts))
    assert need is not None
    return need


def test_auto_by_name_is_weights_and_a_fifth_over_the_ranks_and_two_gib() -> None:
    assert automatic(None, model="Llama-8B") == 18311 + 2048
    assert automatic(None, model="Llama-8B", tensor_parallel_size=2) == 9156 + 2048
    assert automatic(None, model="Llama-8B", pipeline_parallel_size=2, tensor_parallel_size=2) == 4578 + 2048
    assert automatic(None, model="Llama-8B", data_parallel_size=2) == 18311 + 2048, "each copy is whole"
    assert automatic(ModelFacts("f", problem="unreadable"), model="Llama-8B") == 18311 + 2048
    assert promised_mib(spec(model="mystery"), CARD, Known(ModelFacts("f", problem="unreadable"))) is None


def test_auto_has_room_for_one_request_of_the_longest_context() -> None:
    whole = automatic()
    assert automatic(args={"max-model-len": 4096}) == whole - 4 * KV_OF_1K
    assert automatic(args={"max-model-len": "4K"}) == whole - 4 * KV_OF_1K
    assert automatic(args={"max-model-len": 4096, "kv-cache-dtype": "fp8"}) == pytest.approx(
        whole - 6 * KV_OF_1K, abs=2
    )
    assert automatic(args={"enforce-eager": True}) == whole - 1280, "no graphs"


def test_auto_takes_the_weights_from_the_headers_where_they_were_read() -> None:
    half = Checkpoint((Piece(0, Share.TENSOR, 2**32, 0),))
    assert automatic(replace(FACTS, checkpoint=half)) < automatic() - 6 * GIB


def test_auto_depends_on_the_gpu_as_vllms_own_defaults_do() -> None:
    small = automatic(gpu=replace(CARD, name="L40S", memory_total_mib=48 * GIB))
    assert automatic(gpu=replace(CARD, name="A100-80GB")) == small < automatic()
    assert automatic(gpu=replace(CARD, name="H200", memory_total_mib=141 * GIB)) == automatic()


def test_promises() -> None:
    assert promised_mib(spec(memory="24GiB"), CARD, Known()) == 24 * GIB
    assert promised_mib(spec(memory="30%"), CARD, Known()) == 24 * GIB
    assert promised_mib(spec(memory="100%"), CARD, Known()) == 80 * GIB
    assert promised_mib(spec(memory="33%"), replace(CARD, memory_total_mib=81559), Known()) == 26914, "rounded down"
    assert promised_mib(spec(memory="auto"), CARD, Known()) is None


def test_vllm_gets_its_share_after_what_it_takes_outside() -> None:
    assert utilization(spec(runtime="simulator"), 40 * GIB, CARD) == 0.5
    assert utilization(spec(), 40 * GIB, CARD) == (40 * GIB - 614) / (80 * GIB) // 1e-6 / 1e6
    many = utilization(spec(tensor_parallel_size=2), 40 * GIB, CARD)
    assert many == utilization(spec(pipeline_parallel_size=2), 40 * GIB, CARD)
    assert many == pytest.approx((40 * GIB - 2150) / (80 * GIB), abs=1e-6)


def test_the_share_is_of_what_cuda_sees() -> None:
    assert utilization(spec(runtime="simulator"), 40 * GIB, replace(CARD, cuda_total_mib=79 * GIB)) == 0.506329


def test_the_share_stays_between_nothing_and_all() -> None:
    assert utilization(spec(), 100, CARD) == 0
    assert utilization(spec(runtime="simulator"), 80 * GIB, replace(CARD, cuda_total_mib=79 * GIB)) == 1


@pytest.mark.parametrize("mib", range(1000, 81920, 7919))
def test_the_share_never_exceeds_the_promise(mib: int) -> None:
    assert utilization(spec(), mib, CARD) * CARD.memory_total_mib <= mib


def test_a_context_is_that_of_the_flag() -> None:
    assert automatic(context="4k") == automatic(args={"max-model-len": 4096}) == automatic() - 4 * KV_OF_1K


def test_concurrency_asks_for_room_for_so_many_requests() -> None:
    assert automatic(concurrency=5) == automatic() + 4 * 8 * KV_OF_1K
    assert automatic(context="1k", concurrency=9) == automatic(context="1k") + 8 * KV_OF_1K
    assert automatic(concurrency=1) == automatic()


def test_a_kv_cache_of_a_given_size_stands_for_what_the_context_needs() -> None:
    without = automatic() - (8 * KV_OF_1K + 2)
    assert automatic(kv_cache="10GiB") == without + 10 * GIB
    assert automatic(kv_cache="10GiB", context="4k") == without + 10 * GIB
    guessed = automatic(None, model="Llama-8B", kv_cache="10GiB")
    assert guessed == automatic(None, model="Llama-8B") + 10 * GIB


def test_all_is_what_can_be_given_but_for_what_an_idle_driver_shows() -> None:
    card = replace(CARD, memory_reserved_mib=600)
    assert promised_mib(spec(memory="all"), card, Known(), 1000) == 80 * GIB - 600 - 1000 - 64


def test_manual_is_what_vllm_takes_by_its_flags() -> None:
    card = replace(CARD, memory_reserved_mib=512)
    total = 80 * GIB - 512
    half = promised_mib(spec(memory="manual", args={"gpu-memory-utilization": 0.5}), card, Known())
    assert half == total // 2 + 614
    assert promised_mib(spec(memory="manual"), card, Known()) == -(-total * 92 // 100) + 614, "vLLM's default"
    whole = spec(memory="manual", args={"gpu-memory-utilization": 1})
    assert promised_mib(whole, card, Known(), 100) == total - 100, "no more than there is to give"
    fixed = spec(memory="manual", args={"kv-cache-memory-bytes": 10 * 2**30})
    assert promised_mib(fixed, card, Known(FACTS)) == automatic(kv_cache="10GiB", gpu=card)
    assert promised_mib(fixed, card, Known()) == promised_mib(spec(memory="manual"), card, Known())


def test_the_share_is_of_what_the_driver_does_not_keep_where_cudas_total_is_not_known() -> None:
    card = replace(CARD, memory_reserved_mib=1024)
    assert utilization(spec(runtime="simulator"), 40 * GIB, card) == utilization(
        spec(runtime="simulator"), 40 * GIB, replace(card, cuda_total_mib=79 * GIB)
    )


def parts(found: Breakdown | None) -> dict[str, int]:
    assert found is not None
    return {part.name: part.mib for part in found.parts}


def test_a_promise_is_made_of_parts_that_add_up_to_it() -> None:
    whole = automatic()
    found = made_of(spec(memory="auto"), whole, CARD, Known(FACTS))
    assert found is not None
    assert found.total_mib == found.needed_mib == whole
    assert parts(found)["kv_cache"] == 8 * KV_OF_1K + 2
    assert (found.kv_tokens, found.context, found.confidence) == (8192 + 16, 8192, "estimated")
    assert found.requests == pytest.approx(1, abs=0.01)


def test_of_a_given_size_the_kv_cache_is_what_the_other_parts_leave() -> None:
    whole = automatic()
    found = made_of(spec(memory="60GiB"), 60 * GIB, CARD, Known(FACTS))
    assert found is not None
    assert found.total_mib == 60 * GIB
    assert found.needed_mib == whole
    assert parts(found)["kv_cache"] == 60 * GIB - (whole - 8 * KV_OF_1K - 2)
    little = made_of(spec(memory="10GiB"), 10 * GIB, CARD, Known(FACTS))
    assert little is not None
    assert (parts(little)["kv_cache"], little.kv_tokens, little.needed_mib) == (0, 0, whole)


def test_what_is_guessed_from_a_name_has_parts_only_where_they_were_promised() -> None:
    named = spec(model="Llama-8B")
    found = made_of(named, automatic(None, model="Llama-8B"), CARD, Known(None))
    assert found is not None
    assert (parts(found)["weights"], found.confidence, found.kv_tokens) == (15259, "guessed", 0)
    assert made_of(named, 30 * GIB, CARD, Known(None)) is None, "it was promised when more was known"
    assert made_of(spec(model="Llama-8B", memory="30GiB"), 30 * GIB, CARD, Known(None)) is None
    assert made_of(spec(), 30 * GIB, CARD, Known(None)) is None


LONG = ModelFacts("folder", read_model_config(MODEL | {"max_position_embeddings": 131072}))
SMALL = replace(CARD, name="L4", memory_total_mib=24 * GIB)


def ways(facts: ModelFacts | None, *gpus: Gpu, usable: int | None = None, **fields: Any) -> dict[str, Way]:
    told = [(gpu, gpu.memory_total_mib if usable is None else usable) for gpu in gpus]
    return {way.field: way for way in nearest_ways(spec(**fields), told, Known(facts))}


def test_what_is_too_large_is_told_the_changes_that_make_it_fit() -> None:
    found = nearest_ways(spec(), [(SMALL, 24 * GIB)] * 4, Known(LONG))
    assert [(way.field, way.value) for way in found] == [
        ("context", 45 * 1024),
        ("tensor_parallel_size", 2),
    ]


def test_each_change_is_enough_and_the_context_is_the_longest() -> None:
    found = ways(LONG, SMALL, SMALL)
    longest = int(found["context"].value)
    assert automatic(LONG, SMALL, context=longest) == found["context"].total_mib <= 24 * GIB
    assert automatic(LONG, SMALL, context=longest + 1024) > 24 * GIB
    more = ways(LONG, SMALL, SMALL, context="16k", concurrency=8)
    assert automatic(LONG, SMALL, context="16k", concurrency=int(more["concurrency"].value)) <= 24 * GIB
    assert automatic(LONG, SMALL, context="16k", concurrency=int(more["concurrency"].value) + 1) > 24 * GIB
    half = ways(LONG, SMALL, context="60k")["kv_cache_dtype"]
    assert half.total_mib == automatic(LONG, SMALL, context="60k", args={"kv-cache-dtype": "fp8"}) <= 24 * GIB


def test_ranks_are_proposed_only_as_many_as_gpus_are_there() -> None:
    assert "tensor_parallel_size" not in ways(LONG, SMALL)
    assert ways(LONG, *[SMALL] * 8)["tensor_parallel_size"].value == 2, "the fewest that do"
    assert ways(LONG, *[SMALL] * 8, concurrency=3)["tensor_parallel_size"].value == 4
    assert ways(LONG, *[SMALL] * 8, concurrency=3, tensor_parallel_size=2)["tensor_parallel_size"].value == 4
    assert "tensor_parallel_size" not in ways(LONG, *[SMALL] * 3, concurrency=3)
    other = replace(SMALL, name="A10", memory_total_mib=23 * GIB)
    assert "tensor_parallel_size" not in ways(LONG, *[SMALL, other] * 2, concurrency=3), "of one model"
    assert "tensor_parallel_size" not in ways(LONG, *[SMALL] * 4, pipeline_parallel_size=2, concurrency=7)


def test_a_smaller_checkpoint_is_proposed_where_the_weights_are_what_is_too_large() -> None:
    found = ways(LONG, replace(SMALL, memory_total_mib=14 * GIB), context="4k")
    assert set(found) == {"weights"}
    assert found["weights"].value == "fp8", "8 bits do, and cost least"
    tiny = ways(LONG, replace(SMALL, memory_total_mib=10 * GIB), context="4k")
    assert (set(tiny), tiny["weights"].value) == ({"weights"}, "4 bits")
    assert ways(LONG, replace(SMALL, memory_total_mib=14 * GIB), context="4k", args={"quantization": "fp8"}) == {}


def test_a_kv_cache_that_is_too_large_is_told_the_largest() -> None:
    largest = int(ways(LONG, SMALL, kv_cache="20GiB")["kv_cache"].value)
    assert automatic(LONG, SMALL, kv_cache=f"{largest}MiB") == 24 * GIB


def test_nothing_is_proposed_for_what_fits_an_empty_gpu_or_was_given_a_size() -> None:
    assert ways(FACTS, SMALL, CARD) == {}
    assert ways(LONG, CARD, SMALL) == {}, "on one of them it fits"
    wide = replace(CARD, name="A100-80GB")  # vLLM's defaults take less of it
    need = automatic(LONG, wide)
    assert automatic(LONG, CARD) > need + 1000
    assert nearest_ways(spec(), [(CARD, need + 500), (wide, need)], Known(LONG)) == ()
    assert nearest_ways(spec(), [(CARD, need + 500), (wide, need - 1)], Known(LONG)) != ()
    assert ways(LONG, SMALL, memory="30GiB") == {}
    assert ways(LONG) == {}
    assert ways(None, SMALL) == {}, "nothing is known of it"


def test_of_a_name_alone_only_the_ranks_can_be_changed() -> None:
    found = nearest_ways(spec(model="Llama-70B"), [(CARD, 80 * GIB)] * 8, Known())
    assert [(way.field, way.value) for way in found] == [("tensor_parallel_size", 4)], "the fewest that do"


def test_ways_are_told_in_the_words_of_the_file() -> None:
    told = [("context", 35840), ("kv_cache", 900), ("kv_cache_dtype", "fp8"), ("weights", "4 bits"), ("concurrency", 3)]
    assert [way_text(Way(field, value, 1)) for field, value in told] == [
        "`context: 35k`",
        "`kv_cache: 900MiB`",
        "`kv-cache-dtype: fp8` in `args`",
        "a checkpoint quantised to 4 bits",
        "`concurrency: 3`",
    ]


def seen(beside: int | None = 17 * GIB, **fields: Any) -> Known:
    figures = fields.pop("figures", StartupFigures(weights_mib=15000, activation_mib=1000, cuda_graphs_mib=500))
    known: dict[str, Any] = {"promised_mib": 30 * GIB, "held_mib": 29 * GIB, "starts": 1}
    return Known(fields.pop("facts", FACTS), Measured("[]", beside_kv_mib=beside, figures=figures, **known | fields))


def test_after_a_start_auto_is_what_it_took_beside_its_kv_cache_and_the_cache_that_is_asked_for() -> None:
    cache = 8 * KV_OF_1K + 2
    assert promised_mib(spec(), CARD, seen()) == 17 * GIB + 150 + cache
    assert promised_mib(spec(concurrency=3), CARD, seen()) == 17 * GIB + 150 + 3 * 8 * KV_OF_1K + 2
    assert promised_mib(spec(kv_cache="5GiB"), CARD, seen()) == 17 * GIB + 150 + 5 * GIB
    assert promised_mib(spec(), CARD, seen(None)) == automatic(), "it could not be told apart"


def test_a_model_that_was_never_read_is_sized_by_the_tokens_that_its_cache_held() -> None:
    figures = StartupFigures(kv_tokens=80_000, kv_available_mib=10_000, context_tokens=4096)
    assert promised_mib(spec(), CARD, seen(facts=None, figures=figures)) == 17 * GIB + 150 + 512
    more = promised_mib(spec(context="8k", concurrency=2), CARD, seen(facts=None, figures=figures))
    assert more == 17 * GIB + 150 + 2048
    held = seen(None, facts=None, figures=StartupFigures(), held_mib=33 * GIB)
    assert promised_mib(spec(model="Llama-8B"), CARD, held) == 33 * GIB, "never less than it held"
    assert promised_mib(spec(model="mystery"), CARD, held) == 33 * GIB


def test_a_start_that_failed_for_want_of_memory_is_given_the_number_that_would_have_done() -> None:
    failed = seen(None, held_mib=None, starts=0, needed_mib=70 * GIB)
    assert promised_mib(spec(), CARD, failed) == 70 * GIB
    assert promised_mib(spec(), CARD, failed._replace(facts=None)) == 70 * GIB
    assert promised_mib(spec(), CARD, seen(needed_mib=70 * GIB)) == 70 * GIB
    assert promised_mib(spec(memory="20GiB"), CARD, failed) == 20 * GIB, "what the user says is what the user says"


def test_once_it_was_measured_the_kv_cache_is_given_what_the_promise_leaves() -> None:
    left = 30 * GIB - 17 * GIB - 150
    assert kv_bytes(spec(memory="30GiB"), 30 * GIB, CARD, seen()) == left << 20
    promise = promised_mib(spec(), CARD, seen())
    assert promise is not None
    assert kv_bytes(spec(), promise, CARD, seen()) == (8 * KV_OF_1K + 2) << 20
    assert kv_bytes(spec(kv_cache="2GiB"), 30 * GIB, CARD, Known()) == 2 << 30, "from the first start on"


@pytest.mark.parametrize(
    ("fields", "known"),
    [
        ({"memory": "30GiB"}, Known(FACTS)),
        ({"memory": "30GiB"}, seen(None)),
        ({"memory": "18GiB"}, seen()),
        ({"memory": "30GiB", "context": "200k"}, seen()),
        ({"memory": "30GiB"}, seen(facts=None)),
        ({"memory": "manual"}, seen()),
        ({"memory": "30GiB", "device": "cpu"}, seen()),
        ({"memory": "30GiB", "runtime": "command", "command": "serve"}, seen()),
    ],
    ids=["never started", "not told apart", "too little", "less than asked", "unread", "manual", "cpu", "command"],
)
def test_otherwise_vllm_takes_what_it_finds(fields: dict[str, Any], known: Known) -> None:
    wanted = spec(**fields)
    size = int(wanted.memory.amount) or 30 * GIB
    assert kv_bytes(wanted, size, CARD, known) == 0


def test_a_size_that_was_outgrown_is_raised_unless_the_cache_can_keep_it_inside() -> None:
    outgrown = seen(None, held_mib=31 * GIB)
    assert promised_mib(spec(memory="30GiB"), CARD, outgrown) == 31 * GIB
    assert promised_mib(spec(memory="37.5%"), CARD, outgrown) == 31 * GIB
    assert promised_mib(spec(memory="30GiB"), CARD, seen(held_mib=31 * GIB)) == 30 * GIB, "a smaller cache does it"
    assert promised_mib(spec(memory="28GiB"), CARD, outgrown) == 28 * GIB, "that was another promise"
    assert promised_mib(spec(memory="30GiB"), CARD, seen(None)) == 30 * GIB


def test_measured_parts_stand_for_estimated_ones_and_say_so() -> None:
    found = made_of(spec(memory="30GiB"), 30 * GIB, CARD, seen())
    assert found is not None
    assert parts(found) == {
        "weights": 15000,
        "kv_cache": 30 * GIB - 17 * GIB - 150,
        "activation": 1000,
        "cuda_graphs": 500,
        "context": 17 * GIB - 16500,
        "nccl": 0,
        "lora": 0,
        "draft": 0,
        "processes": 0,
        "margin": 150,
    }
    assert found.confidence == "measured"
    assert (found.total_mib, found.needed_mib) == (30 * GIB, 17 * GIB + 150 + 8 * KV_OF_1K + 2)
    odd = made_of(spec(memory="30GiB"), 30 * GIB, CARD, seen(1 * GIB))
    assert odd is not None
    assert odd.confidence == "estimated", "more than all of it cannot be part of it"


def test_known_is_what_was_read_and_what_like_starts_took() -> None:
    wanted = desired("version: 1\nengines: {chat: {model: m, memory: auto}, other: {model: n}}\n")
    chat, other = wanted.engines
    took = Measured(subject(chat.record, "H100"), starts=1)
    observed = Observed((CARD,), models={"m": FACTS}, measured={took.key: took})
    assert known_of(chat, CARD, observed) == Known(FACTS, took)
    assert known_of(chat, replace(CARD, name="L4"), observed) == Known(FACTS, None)
    assert known_of(other, CARD, observed) == Known(None, None)
