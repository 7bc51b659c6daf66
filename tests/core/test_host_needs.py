"""What engines need of the host's own memory, part by part, and what vLLM is told of it."""

from __future__ import annotations

from typing import Any

import pytest

from sage_reconcile.core.cpu_sizing import cpu_sizing
from sage_reconcile.core.host_memory import host_occupancy, kept_back_mib
from sage_reconcile.core.host_needs import NOTHING, HostNeed, asks_host, host_need
from sage_reconcile.core.model_config import read_model_config
from sage_reconcile.core.observed import HostMemory, Launch, Life, ModelFacts, Observed
from sage_reconcile.core.sizing import PARTS, Card, size
from sage_reconcile.core.spec import Engine, EngineSpec
from sage_reconcile.core.workload import Workload
from tests.models import LLAMA_8B

GIB = 1024
HOST = HostMemory(256 * GIB, 250 * GIB)
FACTS = ModelFacts("folder", read_model_config(LLAMA_8B | {"max_position_embeddings": 8192}))
ON_CPU: dict[str, Any] = {"model": "m", "device": "cpu"}


def need(facts: ModelFacts | None = FACTS, host: HostMemory | None = HOST, **fields: Any) -> HostNeed:
    spec = EngineSpec.model_validate(ON_CPU | fields)
    assert asks_host(spec) is (host_need(Engine("e", spec, spec, {}, env=spec.env), facts, host) != NOTHING)
    return host_need(Engine("e", spec, spec, {}, env=spec.env), facts, host)


def parts(found: HostNeed) -> dict[str, int]:
    assert found.made_of is not None
    assert tuple(part.name for part in found.made_of.parts) == PARTS
    return {part.name: part.mib for part in found.made_of.parts}


def test_vllm_on_the_cpu_takes_weights_cache_and_processes_and_nothing_of_a_gpu() -> None:
    """The default batch is that of vLLM on the CPU: 2048 tokens, and 128 requests."""
    found = need()
    on_gpu = {
        part.name: part for part in size(FACTS.config, Workload(batched_tokens=2048, sequences=128), Card()).parts
    }
    told = parts(found)
    assert (told["weights"], told["activation"]) == (on_gpu["weights"].mib, on_gpu["activation"].mib)
    assert (told["cuda_graphs"], told["context"], told["nccl"]) == (0, 0, 0)
    assert told["processes"] == 3 * 512
    assert told["margin"] == on_gpu["margin"].mib
    assert (told["kv_cache"], found.kv_gib) == (2 * GIB, 2), "8k tokens of 128 KiB are 1 GiB, and one block more"
    assert found.mib == sum(told.values())


@pytest.mark.parametrize(
    ("fields", "kv_gib"),
    [
        ({"context": 4096}, 1),
        ({"context": 4096, "concurrency": 4}, 3),
        ({"kv_cache": "4GiB"}, 4),
        ({"kv_cache": "4097MiB"}, 5),
        ({"kv_cache": "1MiB"}, 1),
        ({"args": {"max-model-len": 4096}}, 1),
        ({"args": {"kv-cache-dtype": "fp8"}}, 1),
    ],
)
def test_the_cache_is_told_in_whole_gib_that_hold_what_was_asked_for(fields: dict[str, Any], kv_gib: int) -> None:
    found = need(**fields)
    assert found.kv_gib == kv_gib
    assert parts(found)["kv_cache"] == kv_gib * GIB
    assert found.mib == sum(parts(found).values())


def test_all_ranks_of_a_replica_add_up_on_the_host() -> None:
    alone, two = need(kv_cache="3GiB"), need(kv_cache="3GiB", tensor_parallel_size=2)
    assert (two.kv_gib, parts(two)["kv_cache"]) == (3, 6 * GIB)
    assert parts(two)["weights"] == pytest.approx(parts(alone)["weights"], rel=0.01), "divided, and norms twice"
    assert parts(two)["processes"] == 4 * 512
    copies = need(kv_cache="3GiB", data_parallel_size=2)
    assert parts(copies)["weights"] == 2 * parts(alone)["weights"]
    assert parts(copies)["processes"] == (1 + 2 + 2) * 512
    stages = need(kv_cache="3GiB", pipeline_parallel_size=2)
    assert parts(stages)["kv_cache"] == 6 * GIB
    assert parts(stages)["weights"] >= parts(alone)["weights"]


def test_a_batch_that_is_given_is_that_which_counts() -> None:
    sequences = need(args={"max-num-seqs": 1024})
    assert parts(sequences)["activation"] > parts(need())["activation"]
    twice = parts(need(tensor_parallel_size=2))["activation"]
    assert twice > 2 * parts(need())["activation"], "both ranks hold it, and vLLM takes twice the batch by default"


def test_what_is_left_of_a_given_size_is_the_cache() -> None:
    others = need().mib - 2 * GIB
    found = need(memory=f"{others + 5 * GIB + 1023}MiB")
    assert (found.mib, found.kv_gib) == (others + 5 * GIB + 1023, 5)
    assert sum(parts(found).values()) == found.mib
    assert found.made_of is not None
    assert not found.made_of.too_little
    assert found.made_of.requests == pytest.approx(4.9, abs=0.1)
    both = need(memory="40GiB", tensor_parallel_size=2)
    assert both.kv_gib == (
        40 * GIB - (need(tensor_parallel_size=2).mib - 2 * need(tensor_parallel_size=2).kv_gib * GIB)
    ) // (2 * GIB)


@pytest.mark.parametrize("more", [-1, 0])
def test_a_size_that_may_be_too_little_says_so_and_vllm_gets_one_gib(more: int) -> None:
    fits = need(context=4096)
    found = need(context=4096, memory=f"{fits.mib + more}MiB")
    assert (found.mib, found.kv_gib) == (fits.mib + more, 1)
    assert found.made_of is not None
    assert found.made_of.too_little is (more < 0)


def test_where_only_the_name_is_known_its_weights_are_guessed() -> None:
    found = need(None, model="a/b-7B")
    told = parts(found)
    assert told["weights"] == 13352
    assert told["margin"] == 13352 // 5
    assert (found.kv_gib, told["kv_cache"], told["processes"]) == (4, 4 * GIB, 1536)
    assert need(None, model="a/b-7B", kv_cache="2GiB").kv_gib == 2
    assert found.made_of is not None
    assert found.made_of.note == ""
    half = parts(need(None, model="a/b-7B", tensor_parallel_size=2))["weights"]
    assert half == 13352


def test_where_nothing_is_known_the_rest_is_promised_and_said() -> None:
    found = need(None, model="mystery")
    assert (found.mib, found.kv_gib) == (4 * GIB + 1536, 4)
    assert found.made_of is not None
    assert "its weights are not counted" in found.made_of.note
    assert need(None, model="mystery", tensor_parallel_size=2).mib == 8 * GIB + 2048
    large = need(None, model="mystery", memory="64GiB")
    assert (large.mib, large.kv_gib) == (64 * GIB, 4), "the rest is left for the weights"
    small = need(None, model="mystery", memory="2GiB")
    assert (small.mib, small.kv_gib) == (2 * GIB, 1)
    assert small.made_of is not None
    assert small.made_of.too_little
    assert need(ModelFacts("f", problem="unreadable"), model="mystery").mib == 4 * GIB + 1536


@pytest.mark.parametrize(
    ("fields", "kv_mib"),
    [
        ({"env": {"VLLM_CPU_KVCACHE_SPACE": "3"}}, 3 * GIB),
        ({"env": {"VLLM_CPU_KVCACHE_SPACE": "3"}, "args": {"kv-cache-memory-bytes": "1G"}}, 3 * GIB),
        ({"args": {"kv-cache-memory-bytes": "512M"}}, 512),
    ],
)
def test_by_hand_the_cache_is_what_the_entry_says(fields: dict[str, Any], kv_mib: int) -> None:
    others = need().mib - 2 * GIB
    found = need(memory="manual", **fields)
    assert (found.mib, found.kv_gib, found.made_of) == (others + kv_mib, 0, None)


def test_by_hand_vllm_takes_its_share_of_the_machine_at_most_all_that_is_given() -> None:
    assert need(memory="manual", args={"gpu-memory-utilization": 0.25}).mib == 64 * GIB
    assert need(memory="manual", args={"gpu-memory-utilization": 0.25}, tensor_parallel_size=2).mib == 128 * GIB
    assert need(memory="manual").mib == -(-256 * GIB * 92 // 100)
    assert need(memory="manual", args={"gpu-memory-utilization": 0.999}).mib == 254 * GIB
    assert need(memory="manual", args={"gpu-memory-utilization": "much"}).mib == 254 * GIB
    assert need(memory="manual", host=None).mib == need().mib - 2 * GIB + 1040, "as much as it needs: 65 blocks of 128"


@pytest.mark.parametrize("other", [{"runtime": "simulator"}, {"runtime": "command", "command": "serve {port}"}])
def test_any_other_server_needs_what_its_entry_says_or_nothing(other: dict[str, Any]) -> None:
    assert need(**other) == NOTHING
    assert need(**other, memory="3GiB") == HostNeed(3 * GIB)


@pytest.mark.parametrize(
    ("args", "fields", "mib"),
    [
        ({}, {}, 0),
        ({"cpu-offload-gb": 4}, {}, 4 * GIB),
        ({"cpu-offload-gb": "2.5"}, {"tensor_parallel_size": 2, "data_parallel_size": 2}, 10 * GIB),
        ({"kv-offloading-size": 6}, {"tensor_parallel_size": 2}, 6 * GIB),
        ({"kv-offloading-size": 6, "cpu-offload-gb": 1}, {"data_parallel_size": 2}, 14 * GIB),
        ({"cpu-offload-gb": "much"}, {}, 0),
        ({"cpu-offload-gb": 0}, {}, 0),
        ({"cpu-offload-gb": 4}, {"runtime": "simulator"}, 4 * GIB),
    ],
)
def test_on_gpus_it_is_what_is_offloaded(args: dict[str, Any], fields: dict[str, Any], mib: int) -> None:
    assert need(None, device="cuda", args=args, **fields) == (HostNeed(mib) if mib else NOTHING)


def test_no_more_weights_are_offloaded_than_there_are() -> None:
    weights = parts(need())["weights"]
    assert need(device="cuda", args={"cpu-offload-gb": 10}).mib == 10 * GIB
    assert need(device="cuda", args={"cpu-offload-gb": 100}).mib == weights
    assert need(device="cuda", args={"cpu-offload-gb": 100}, tensor_parallel_size=2).mib == pytest.approx(
        weights, abs=99
    )


def test_weights_on_the_cpu_are_never_offloaded_from_it() -> None:
    assert need(args={"cpu-offload-gb": 10}) == need()
    assert cpu_sizing("m", Workload(offload_mib=4096), FACTS) == cpu_sizing("m", Workload(), FACTS)


@pytest.mark.parametrize(
    ("total", "kept"), [(8 * GIB, 819), (20 * GIB, 2048), (20 * GIB - 10, 2047), (512 * GIB, 2048)]
)
def test_a_tenth_is_kept_back_and_at_most_two_gib(total: int, kept: int) -> None:
    assert kept_back_mib(HostMemory(total, total)) == kept


def launch(**fields: Any) -> Launch:
    defaults: dict[str, Any] = {"id": "l", "engine_name": "e", "index": 0, "spec": {}, "secret_marks": {}, "gpus": ()}
    defaults |= {"memory_mib": 0, "port": 8000, "bind": "127.0.0.1", "life": Life.ALIVE, "created_at": 0.0}
    return Launch(**{**defaults, **fields})


def test_who_has_what_of_the_host() -> None:
    """Of ours the larger of promised and held; the rest that is not available is others', in steps of 256 MiB."""
    machine = Observed(
        launches=(
            launch(id="b", index=1, host_memory_mib=4000, host_held_mib=1000),
            launch(id="a", host_memory_mib=2000, host_held_mib=3000),
            launch(id="none", index=2),
            launch(id="ended", index=3, life=Life.EXITED, host_memory_mib=9999),
            launch(
                id="hand", index=4, spec={"memory": "manual"}, ready_at=1.0, host_memory_mib=9000, host_held_mib=500
            ),
            launch(id="untold", index=6, spec={"memory": "manual"}, ready_at=1.0, host_memory_mib=300),
            launch(id="new", index=5, spec={"memory": "manual"}, host_memory_mib=700, host_held_mib=500),
        ),
        host_memory=HostMemory(100_000, 90_000),
    )
    taken = host_occupancy(machine)
    assert taken is not None
    assert taken.ours == (("e/0", 3000), ("e/1", 4000), ("e/4", 500), ("e/5", 700), ("e/6", 300))
    assert (taken.unmanaged_mib, taken.kept_back_mib) == (5120, 2048), "10000 - 1000 - 3000 - 500 - 500, rounded up"
    assert taken.free_mib == 100_000 - 2048 - 8500 - 5120
    later = host_occupancy(machine, leaving=frozenset({"a"}))
    assert later is not None
    assert (later.unmanaged_mib, later.free_mib) == (5120, taken.free_mib + 3000)
    assert host_occupancy(Observed()) is None


def test_what_ours_hold_of_what_counts_as_available_is_nobody_elses() -> None:
    machine = Observed(launches=(launch(host_held_mib=900),), host_memory=HostMemory(10_000, 9_500))
    taken = host_occupancy(machine)
    assert taken is not None
    assert taken.unmanaged_mib == 0
