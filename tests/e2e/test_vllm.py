"""Real vLLM on the CPU, from its entry in the file to the last of its processes."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import openai
import pytest

from sage_reconcile.host.learned import Learned
from sage_reconcile.host.metrics import read_metrics
from tests.e2e import vllm_cpu
from tests.e2e.box import Box

pytestmark = [pytest.mark.vllm, pytest.mark.xdist_group("vllm")]

_START_S = 300.0


@pytest.fixture(scope="module", name="python")
def _python() -> Path:
    return vllm_cpu.python_with_vllm()


def entry(python: Path, model: Path, args: str = "") -> str:
    flags = "load-format: dummy, max-model-len: 256, enforce-eager: true"
    return (
        f"tiny: {{model: {model}, device: cpu, python: {python}, startup_timeout: 5m, kv_cache: 1GiB, max_surge: 0, "
        f"env: {{HF_HUB_OFFLINE: '1', VLLM_NO_USAGE_STATS: '1', VLLM_API_KEY: '${{KEY:-none}}'}}, "
        f"args: {{{flags}{args}}}}}"
    )


def complete(port: int, key: str = "none") -> str:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, timeout=60, max_retries=0)
    with client:
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hello!"}], max_tokens=4
        )
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0
    return answer.choices[0].finish_reason


def block(box: Box) -> tuple[int, int]:
    """The inner ports that the engine which runs was given: the first, and how many."""
    [found] = {(record["inner_port"], record["inner_count"]) for record in box.records() if not record["ended"]}
    return found


def environ(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text(encoding="utf-8").split("\0")


def test_a_real_engine_lives_changes_heals_and_leaves_nothing(box: Box, python: Path) -> None:
    """Apply until ready, a chat completion, a changed flag, kill -9 of the server, removal."""
    model = vllm_cpu.tiny_model(box.folder / "model")
    box.write(entry(python, model), host="gpus: none")
    text = box.run("apply", "--yes")
    row = box.replicas()["tiny/0"]
    assert row["phase"] == "Ready", text
    assert complete(row["port"]) == "length"
    asked = read_metrics("127.0.0.1", row["port"])
    assert asked is not None
    assert (asked.running, asked.waiting, asked.generation_tokens) == (0.0, 0.0, 4.0)
    comms = set(box.processes().values())
    assert {"VLLM::EngineCor", "VLLM::Worker"} <= comms, comms
    assert box.json("diff")["in_sync"]
    first_block = block(box)
    assert f"VLLM_PORT={first_block[0]}" in environ(row["pid"])

    box.write(entry(python, model, ", max-num-seqs: 8"), host="gpus: none")
    first = set(box.processes())
    box.run("apply", "--yes")
    changed = box.replicas()["tiny/0"]
    assert changed["pid"] != row["pid"]
    assert changed["port"] == row["port"]
    assert block(box) == first_block
    assert f"VLLM_PORT={first_block[0]}" in environ(changed["pid"])
    assert not first & set(box.processes())
    assert "--max-num-seqs" in Path(f"/proc/{changed['pid']}/cmdline").read_text(encoding="utf-8").split("\0")

    box.start_daemon()
    box.until("the daemon has adopted it", lambda: box.status()["daemon"] and "tiny/0" in box.ready())
    assert box.ready() == {"tiny/0": changed["pid"]}
    second = set(box.processes())
    os.kill(changed["pid"], signal.SIGKILL)
    healed = box.until(
        "a new one is ready", lambda: (box.ready().get("tiny/0") or changed["pid"]) != changed["pid"], _START_S
    )
    assert healed
    assert not second & set(box.processes()), "EngineCore and Worker outlive a killed server; they must be reaped"
    assert complete(box.replicas()["tiny/0"]["port"]) == "length"

    box.write("", host="gpus: none")
    box.until("all of it is gone", lambda: not box.processes(), 60)


def test_a_bad_flag_ends_apply_with_vllms_own_words(box: Box, python: Path) -> None:
    model = vllm_cpu.tiny_model(box.folder / "model")
    box.write(entry(python, model, ", max-modellen: 8"), host="gpus: none")
    text = box.run("apply", "--yes", expect=1)
    assert "tiny/0 is Stalled: ended: exit 2: wrong flag: this vLLM has no flag `max-modellen` (in `args`)" in text
    assert "did you mean `max-model-len`?" in text
    assert "unrecognized arguments: --max-modellen" in text
    assert not box.processes()


def sized(box: Box, python: Path, cache: str, context: int, flag: str = "") -> None:
    """The tiny model with that KV cache, made for contexts that long."""
    model = vllm_cpu.tiny_model(box.folder / "model")
    box.write(
        f"tiny: {{model: {model}, device: cpu, python: {python}, startup_timeout: 5m, context: {context}, {cache}, "
        f"env: {{HF_HUB_OFFLINE: '1', VLLM_NO_USAGE_STATS: '1'}}, args: {{load-format: dummy, {flag}"
        "enforce-eager: true, hf-overrides: {max_position_embeddings: 65536}}}",
        host="gpus: none",
    )


def test_the_kv_cache_it_reports_is_what_it_was_told_and_is_kept(box: Box, python: Path) -> None:
    sized(box, python, "kv_cache: 700MiB", 256)
    box.run("apply", "--yes")
    [record] = box.records()
    parts = box.json("explain", "tiny")["replicas"][0]["made_of"]["parts"]
    assert (parts["kv_cache_mib"], parts["processes_mib"]) == (1024, 3 * 512)
    assert record["host_memory_mib"] == sum(parts.values())
    status = box.status()
    row = status["engines"][0]["replicas"][0]
    assert row["host_memory_mib"] == record["host_memory_mib"]
    # the KV cache and three processes with a torch of their own each; less than that would be somebody else's memory
    assert 1024 + 3 * 200 < row["host_held_mib"] <= row["host_memory_mib"]
    assert status["host_memory"]["promised_mib"] == row["host_memory_mib"]
    assert "VLLM_CPU_KVCACHE_SPACE=1" in environ(row["pid"])
    [found] = Learned(box.state / "measured.json").read().values()
    assert (found.vllm_version, found.starts, found.held_mib) == (vllm_cpu.VLLM_VERSION, 1, None)
    assert found.figures.cpu_kv_cache_mib == 1024
    # of each token the keys and values of 2 layers and 2 heads of 32 numbers, 2 bytes each
    assert found.kv_tokens == found.figures.kv_tokens == (1 << 30) // (2 * 2 * 2 * 32 * 2)
    assert (found.kv_blocks or 0) * (found.block_tokens or 0) == found.kv_tokens
    asked = read_metrics("127.0.0.1", box.replicas()["tiny/0"]["port"])
    assert asked is not None
    assert asked.cache_configs[0]["kv_cache_memory_bytes"] == str(1 << 30)
    assert asked.kv_tokens == found.kv_tokens


def test_a_start_that_cannot_fit_says_the_number_that_would_and_it_does(box: Box, python: Path) -> None:
    by_hand = "memory: manual"
    sized(box, python, by_hand, 65536, "kv-cache-memory-bytes: 16M, ")
    text = box.run("apply", "--yes", expect=1)
    told = box.replicas()["tiny/0"]["failure"]
    assert told["class"] == "KV cache too small"
    fix = f"`kv-cache-memory-bytes: {told['kv_cache_mib']}M` in `args`"
    assert f"write {fix}, or `context: {told['context_tokens']}`" in text
    sized(box, python, by_hand, 65536, f"kv-cache-memory-bytes: {told['kv_cache_mib']}M, ")
    box.run("apply", "--yes")
    assert complete(box.replicas()["tiny/0"]["port"]) == "length"
    sized(box, python, by_hand, told["context_tokens"], "kv-cache-memory-bytes: 16M, ")
    box.run("apply", "--yes")
    [tokens] = {record["kv_tokens"] for record in box.records() if not record["ended"]}
    assert tokens == 32768


def test_a_second_engine_that_does_not_fit_the_host_is_refused_with_numbers(box: Box, python: Path) -> None:
    """One that runs, one that asks for nearly all that there is, and one for all: the first stays as it is."""
    model = vllm_cpu.tiny_model(box.folder / "model")
    box.write(entry(python, model), host="gpus: none")
    box.run("apply", "--yes")
    first = box.ready()["tiny/0"]
    host = box.status()["host_memory"]
    large = f"large: {{model: {model}, device: cpu, python: {python}, memory: {host['total_mib'] - 3000}MiB}}"
    box.write(f"{entry(python, model)}\n{large}", host="gpus: none")
    text = box.run("diff", expect=3)
    assert re.search(
        r"! large/0 +unplaced +needs [\d.]+GiB of host memory; [\d.]+GiB of [\d.]+GiB are free \(tiny/0", text
    )
    assert (
        box.json("explain", "large", expect=3)["replicas"][0]["host_memory"]["verdict"]
        .partition(" ")[2]
        .startswith("too little")
    )
    assert "Host memory:" in text
    assert box.ready() == {"tiny/0": first}


def test_a_model_that_is_not_there_is_told(box: Box, python: Path) -> None:
    box.write(entry(python, Path("nobody/nothing")), host="gpus: none")
    text = box.run("apply", "--yes", expect=1)
    assert "model not found: `model: nobody/nothing` is neither a folder here nor a name that the hub" in text
    assert not box.replicas()["tiny/0"]["failure"]["can_recover"]
