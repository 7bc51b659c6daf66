"""How much memory an engine takes, and how much a GPU has left."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sage_reconcile.core.memory import (
    Occupancy,
    launches_by_gpu,
    occupancy,
    promised_mib,
    utilization,
)
from sage_reconcile.core.model_config import read_model_config
from sage_reconcile.core.observed import Gpu, GpuProcess, Launch, Life, ModelFacts, Observed
from sage_reconcile.core.spec import EngineSpec
from sage_reconcile.core.weights import Checkpoint, Piece, Share
from tests.models import LLAMA_8B as MODEL

GIB = 1024
CARD = Gpu("GPU-0", 0, "H100", "0000:00:00.0", 80 * GIB)


def spec(**fields: Any) -> EngineSpec:
    return EngineSpec.model_validate({"model": "m"} | fields)


def launch(name: str = "a", **fields: Any) -> Launch:
    known: dict[str, Any] = {
        "id": name,
        "engine_name": name,
        "index": 0,
        "spec": {},
        "secret_marks": {},
        "gpus": ("GPU-0",),
        "memory_mib": 40 * GIB,
        "port": 8000,
        "bind": "127.0.0.1",
        "life": Life.ALIVE,
        "created_at": 0.0,
    }
    return Launch(**known | fields)


def card(*processes: GpuProcess, used: int | None = None, **fields: Any) -> Gpu:
    told = sum(process.memory_mib or 0 for process in processes)
    return replace(CARD, processes=processes, memory_used_mib=told if used is None else used, **fields)


LLAMA_8B = MODEL | {"max_position_embeddings": 8192}
FACTS = ModelFacts("folder", read_model_config(LLAMA_8B))


def automatic(facts: ModelFacts | None = FACTS, gpu: Gpu = CARD, **fields: Any) -> int:
    need = promised_mib(spec(memory="auto", **fields), gpu, facts)
    assert need is not None
    return need


def test_auto_by_name_is_weights_and_a_fifth_over_the_ranks_and_two_gib() -> None:
    assert automatic(None, model="Llama-8B") == 18311 + 2048
    assert automatic(None, model="Llama-8B", tensor_parallel_size=2) == 9156 + 2048
    assert automatic(None, model="Llama-8B", pipeline_parallel_size=2, tensor_parallel_size=2) == 4578 + 2048
    assert automatic(None, model="Llama-8B", data_parallel_size=2) == 18311 + 2048, "each copy is whole"
    assert automatic(ModelFacts("f", problem="unreadable"), model="Llama-8B") == 18311 + 2048
    assert promised_mib(spec(model="mystery"), CARD, ModelFacts("f", problem="unreadable")) is None


def test_auto_has_room_for_one_request_of_the_longest_context() -> None:
    kv_of_1k = 1024 * 32 * 2 * 8 * 128 * 2 // 2**20
    whole = automatic()
    assert automatic(args={"max-model-len": 4096}) == whole - 4 * kv_of_1k
    assert automatic(args={"max-model-len": "4K"}) == whole - 4 * kv_of_1k
    assert automatic(args={"max-model-len": 4096, "kv-cache-dtype": "fp8"}) == pytest.approx(
        whole - 6 * kv_of_1k, abs=2
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
    assert promised_mib(spec(memory="24GiB"), CARD, None) == 24 * GIB
    assert promised_mib(spec(memory="30%"), CARD, None) == 24 * GIB
    assert promised_mib(spec(memory="100%"), CARD, None) == 80 * GIB
    assert promised_mib(spec(memory="33%"), replace(CARD, memory_total_mib=81559), None) == 26914, "rounded down"
    assert promised_mib(spec(memory="auto"), CARD, None) is None


@pytest.mark.parametrize(
    ("memory", "fits"),
    [("20GiB", 4), ("39.9GiB", 2), ("40GiB", 2), ("40.1GiB", 1), ("79GiB", 1), ("80GiB", 1), ("80.1GiB", 0)],
)
def test_how_many_fit_an_80_gib_card(memory: str, fits: int) -> None:
    need = promised_mib(spec(memory=memory), CARD, None)
    assert need is not None
    launches: list[Launch] = []
    while len(launches) <= fits and occupancy(CARD, launches, 0).free_mib >= need:
        launches.append(launch(f"a{len(launches)}", memory_mib=need))
    assert len(launches) == fits


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


def test_an_empty_card_is_free_but_for_what_is_kept_back() -> None:
    reserved = replace(CARD, memory_reserved_mib=512)
    assert occupancy(reserved, [], 1024) == Occupancy(80 * GIB, 1536, (), 0)
    assert occupancy(reserved, [], 1024).free_mib == 80 * GIB - 1536


@pytest.mark.parametrize(("held", "counts"), [(0, 40), (12, 40), (40, 40), (45, 45)])
def test_ours_count_with_the_larger_of_promised_and_held(held: int, counts: int) -> None:
    gpu = card(GpuProcess(1, held * GIB, launch="a"))
    taken = occupancy(gpu, [launch("a")], 0)
    assert (taken.ours, taken.unmanaged_mib) == ((("a/0", counts * GIB),), 0)
    assert taken.free_mib == (80 - counts) * GIB


def test_several_processes_of_one_launch_are_one_holding() -> None:
    gpu = card(GpuProcess(1, 30 * GIB, launch="a"), GpuProcess(2, 15 * GIB, launch="a"))
    assert occupancy(gpu, [launch("a")], 0).ours == (("a/0", 45 * GIB),)


def test_strangers_count_with_what_they_hold_whoever_they_are() -> None:
    gpu = card(GpuProcess(1, 40 * GIB, launch="a"), GpuProcess(2, 7 * GIB))
    assert occupancy(gpu, [launch("a")], 0).unmanaged_mib == 7 * GIB
    assert occupancy(card(used=9 * GIB), [], 0).unmanaged_mib == 9 * GIB, "also where no process is listed"
    ended = card(GpuProcess(1, 9 * GIB, launch="gone"))
    assert occupancy(ended, [], 0).unmanaged_mib == 9 * GIB, "also what a launch that is over still holds"


def test_a_holding_that_is_not_told_is_taken_for_the_promise() -> None:
    gpu = card(GpuProcess(1, None, launch="a"), used=45 * GIB)
    taken = occupancy(gpu, [launch("a")], 0)
    assert (taken.promised_mib, taken.unmanaged_mib) == (40 * GIB, 5 * GIB)
    partly = card(GpuProcess(1, None, launch="a"), GpuProcess(2, 10 * GIB, launch="a"), used=45 * GIB)
    assert occupancy(partly, [launch("a")], 0) == taken


def test_less_used_than_assumed_is_nobody_elses_memory() -> None:
    gpu = card(GpuProcess(1, None, launch="a"), used=10 * GIB)
    assert occupancy(gpu, [launch("a")], 0).unmanaged_mib == 0


def test_what_leaves_gives_back_its_promise_and_its_holding() -> None:
    gpu = card(GpuProcess(1, 45 * GIB, launch="a"), GpuProcess(2, 7 * GIB))
    after = occupancy(gpu, [launch("a")], 0, leaving=frozenset({"a"}))
    assert (after.ours, after.unmanaged_mib, after.free_mib) == ((), 7 * GIB, 73 * GIB)


def test_a_launch_holding_where_it_was_not_placed_counts_with_what_it_holds() -> None:
    gpu = card(GpuProcess(1, 3 * GIB, launch="a"))
    assert occupancy(gpu, [launch("a", gpus=("GPU-1",))], 0).ours == (("a/0", 3 * GIB),)


def test_free_memory_is_never_negative() -> None:
    assert occupancy(card(used=79 * GIB), [launch("a")], 0).free_mib == 0


def test_launches_are_on_the_gpus_they_were_given_and_on_those_where_they_are_seen() -> None:
    gpus = (card(GpuProcess(1, 3 * GIB, launch="b")), replace(CARD, uuid="GPU-1", index=1))
    a, b = launch("a", gpus=("GPU-0", "GPU-1")), launch("b", gpus=("GPU-1", "GPU-9"))
    ended = launch("c", life=Life.EXITED)
    on = launches_by_gpu(Observed(gpus, (ended, b, a)))
    assert on == {"GPU-0": [a, b], "GPU-1": [a, b]}


@pytest.mark.parametrize("life", [life for life in Life if life is not Life.EXITED])
def test_whatever_may_still_run_holds_its_memory(life: Life) -> None:
    assert launches_by_gpu(Observed((CARD,), (launch("a", life=life),)))["GPU-0"]
