"""The words and the environment with which a replica is started."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sage_reconcile.core.command import command_line, environment
from sage_reconcile.core.observed import Gpu
from sage_reconcile.core.spec import EngineSpec

CARD = Gpu("GPU-a", 0, "H100", "0000:01", 80 * 1024)
OTHER = replace(CARD, uuid="GPU-b", index=1)


def words(gpus: tuple[Gpu, ...] = (), memory_mib: int = 0, **fields: Any) -> list[str]:
    spec = EngineSpec(**{"model": "org/m", "served_model_name": "chat", **fields})
    python = "/opt/python"
    return list(
        command_line(spec, "chat", python=python, bind="127.0.0.1", port=8000, gpus=gpus, memory_mib=memory_mib)
    )


def test_vllm_on_the_cpu() -> None:
    assert words(device="cpu") == [
        *("/opt/python", "-m", "vllm.entrypoints.openai.api_server", "--model", "org/m"),
        *("--host", "127.0.0.1", "--port", "8000", "--served-model-name", "chat", "--shutdown-timeout", "25"),
    ]


def test_vllm_on_gpus_keeps_what_cuda_and_nccl_take_inside_the_promise() -> None:
    """40 GiB of 80 with two ranks: 1638 MiB outside vLLM's own budget."""
    found = words((CARD, OTHER), 40 * 1024, tensor_parallel_size=2)
    assert found[found.index("--tensor-parallel-size") + 1] == "2"
    share = float(found[found.index("--gpu-memory-utilization") + 1])
    assert share * 80 * 1024 + 1638 <= 40 * 1024 < (share + 1e-6) * 80 * 1024 + 1638


def test_the_smallest_gpu_decides_the_share() -> None:
    larger = replace(OTHER, memory_total_mib=160 * 1024)
    assert words((CARD, larger), 40 * 1024) == words((larger, CARD), 40 * 1024)
    found = words((CARD, larger), 40 * 1024)
    assert float(found[found.index("--gpu-memory-utilization") + 1]) < 0.25


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
