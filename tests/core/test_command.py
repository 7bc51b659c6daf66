"""The words and the environment with which a replica is started."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sage_reconcile.core.command import command_line, environment, inner_base, inner_port_count
from sage_reconcile.core.observed import Gpu
from sage_reconcile.core.spec import EngineSpec

CARD = Gpu("GPU-a", 0, "H100", "0000:01", 80 * 1024)
OTHER = replace(CARD, uuid="GPU-b", index=1)


def entry(**fields: Any) -> EngineSpec:
    return EngineSpec.model_validate({"model": "org/m", "served_model_name": "chat", **fields})


def words(
    gpus: tuple[Gpu, ...] = (), memory_mib: int = 0, inner_ports: range = range(0), kv_bytes: int = 0, **fields: Any
) -> list[str]:
    spec = entry(**fields)
    python = "/opt/python"
    return list(
        command_line(
            spec,
            "chat",
            python=python,
            bind="127.0.0.1",
            port=8000,
            gpus=gpus,
            memory_mib=memory_mib,
            kv_bytes=kv_bytes,
            inner_ports=inner_ports,
        )
    )


def test_vllm_on_the_cpu() -> None:
    assert words(device="cpu") == [
        *("/opt/python", "-m", "vllm.entrypoints.openai.api_server", "--model", "org/m"),
        *("--host", "127.0.0.1", "--port", "8000", "--served-model-name", "chat", "--shutdown-timeout", "25"),
    ]


def test_vllm_on_gpus_keeps_what_cuda_and_nccl_take_inside_the_promise() -> None:
    """40 GiB of 80 with two ranks: 2150 MiB outside vLLM's own budget."""
    found = words((CARD, OTHER), 40 * 1024, tensor_parallel_size=2)
    assert found[found.index("--tensor-parallel-size") + 1] == "2"
    share = float(found[found.index("--gpu-memory-utilization") + 1])
    assert share * 80 * 1024 + 2150 <= 40 * 1024 < (share + 1e-6) * 80 * 1024 + 2150


def test_the_smallest_gpu_decides_the_share() -> None:
    larger = replace(OTHER, memory_total_mib=160 * 1024)
    assert words((CARD, larger), 40 * 1024) == words((larger, CARD), 40 * 1024)
    found = words((CARD, larger), 40 * 1024)
    assert float(found[found.index("--gpu-memory-utilization") + 1]) < 0.25


def test_a_context_and_a_kv_cache_of_the_file_are_told_to_vllm() -> None:
    found = words((CARD,), 40 * 1024, context="32k", kv_bytes=2**30)
    assert found[found.index("--max-model-len") + 1] == "32768"
    assert found[found.index("--kv-cache-memory-bytes") + 1] == str(2**30)
    assert len(found) == len(words((CARD,), 40 * 1024)) + 4


def test_with_memory_manual_the_flags_are_the_users() -> None:
    plain = words((CARD,), 40 * 1024, memory="manual")
    assert "--gpu-memory-utilization" not in plain
    own = words((CARD,), 40 * 1024, memory="manual", args={"gpu-memory-utilization": 0.3})
    assert own == [*plain, "--gpu-memory-utilization", "0.3"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, ["--flag"]),
        (False, ["--no-flag"]),
        (None, []),
        (4096, ["--flag", "4096"]),
        (0.5, ["--flag", "0.5"]),
        ("text with spaces", ["--flag", "text with spaces"]),
        ("--port=1", ["--flag=--port=1"]),
        (["a", 1], ["--flag", "a", "1"]),
        ({"method": "ngram"}, ["--flag", '{"method": "ngram"}']),
    ],
)
def test_args_become_flags(value: object, expected: list[str]) -> None:
    plain = words(device="cpu")
    assert words(device="cpu", args={"flag": value}) == plain + expected


@pytest.mark.parametrize(("stop_timeout", "drain"), [("30s", "25"), ("2m", "115"), ("5s", "0"), ("0s", "0")])
def test_vllm_has_time_to_drain_before_it_is_killed(stop_timeout: str, drain: str) -> None:
    found = words(device="cpu", stop_timeout=stop_timeout)
    assert found[found.index("--shutdown-timeout") + 1] == drain


def test_a_command_of_ones_own() -> None:
    command = "serve '{model}' --listen {host}:{port} --as {name} '{{}}'"
    found = words(runtime="command", command=command, device="cpu")
    assert found == ["serve", "org/m", "--listen", "127.0.0.1:8000", "--as", "chat", "{}"]


def test_an_engine_sees_its_gpus_by_uuid_and_nothing_that_would_mislead_it() -> None:
    inherited = {"PATH": "/bin", "VLLM_PORT": "tcp://1.2.3.4:5", "NOTIFY_SOCKET": "/run/n", "CUDA_VISIBLE_DEVICES": "7"}
    found = environment(inherited, {"HF_TOKEN": "t", "PATH": "/mine"}, (OTHER, CARD))
    assert found == {
        "PATH": "/mine",
        "HF_TOKEN": "t",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "GPU-b,GPU-a",
        "SPT_NOENV": "1",
    }
    assert environment(inherited, {}, ())["CUDA_VISIBLE_DEVICES"] == "", "an engine on the CPU sees no GPU"


def test_vllm_on_the_cpu_is_told_its_cache_and_never_inherits_one() -> None:
    inherited = {"VLLM_CPU_KVCACHE_SPACE": "40"}
    assert environment(inherited, {}, (), None, 4)["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment(inherited, {}, ())
    by_hand = environment(inherited, {"VLLM_CPU_KVCACHE_SPACE": "3"}, ())
    assert by_hand["VLLM_CPU_KVCACHE_SPACE"] == "3"


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 8),
        ({"tensor_parallel_size": 8}, 8),
        ({"data_parallel_size": 4}, 2),
        ({"runtime": "simulator"}, 0),
        ({"runtime": "command", "command": "x"}, 0),
    ],
)
def test_how_many_inner_ports_an_engine_takes(fields: dict[str, Any], count: int) -> None:
    assert inner_port_count(entry(**fields)) == count


@pytest.mark.parametrize(
    ("fields", "base"),
    [
        ({}, 20008),
        ({"tensor_parallel_size": 8}, 20008),
        ({"data_parallel_size": 2}, None),
        ({"args": {"kv-transfer-config": {"kv_connector": "MoRIIOConnector"}}}, None),
        ({"args": {"kv-transfer-config.kv_connector": "NixlConnector"}}, None),
    ],
)
def test_vllm_looks_for_inner_ports_in_its_block(fields: dict[str, Any], base: int | None) -> None:
    """Not where several processes, or several calls, would be told the same port."""
    assert inner_base(entry(**fields), range(20008, 20016)) == base
    assert inner_base(entry(**fields), range(0)) is None
    assert environment({"VLLM_PORT": "1"}, {}, (), base).get("VLLM_PORT") == (str(base) if base else None)


def test_the_base_of_an_env_file_stands_and_an_inherited_one_does_not() -> None:
    inherited = {"VLLM_PORT": "1", "VLLM_DP_MASTER_PORT": "2"}
    assert environment(inherited, {"VLLM_PORT": "3"}, (), 20000)["VLLM_PORT"] == "3"
    assert environment(inherited, {}, (), 20000)["VLLM_PORT"] == "20000"
    assert "VLLM_DP_MASTER_PORT" not in environment(inherited, {}, (), 20000)
    assert environment({}, {"VLLM_DP_MASTER_PORT": "4"}, ())["VLLM_DP_MASTER_PORT"] == "4"


MEET = ["--master-port", "20000", "--data-parallel-rpc-port", "20001"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, []),
        ({"data_parallel_size": 2}, MEET),
        ({"data_parallel_size": 2, "args": {"data-parallel-backend": "mp"}}, [*MEET, "--data-parallel-backend", "mp"]),
        (
            {"data_parallel_size": 2, "args": {"master-port": 5}},
            ["--data-parallel-rpc-port", "20001", "--master-port", "5"],
        ),
        (
            {"data_parallel_size": 2, "args": {"data-parallel-address": "10.0.0.1"}},
            ["--data-parallel-address", "10.0.0.1"],
        ),
        ({"data_parallel_size": 2, "args": {"nnodes": 2}}, ["--nnodes", "2"]),
    ],
)
def test_where_ranks_meet_is_leased_too(fields: dict[str, Any], expected: list[str]) -> None:
    """Unless the entry says it, or has ranks on other machines, which have to know the port."""
    found = words(device="cpu", inner_ports=range(20000, 20002), **fields)
    assert found[found.index("--shutdown-timeout") + 2 :] == expected
