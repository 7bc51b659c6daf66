"""The simulated engine behaves as vLLM does, as a process: how it starts, what it consists of, how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sage_reconcile.simulator import gpus
from tests.simulator.running import CHAT, ROOT, A, Asking, B, Fleet, eventually, on, session, stat

# Starting


def test_log_tells_the_start_in_vllms_order(fleet: Fleet, folder: Path) -> None:
    simulated = fleet.start(**on(folder, A)).ready()
    told = [
        "version 0.",
        "Resolved architecture",
        "Initializing a V1 LLM engine",
        "Starting to load model",
        "Loading safetensors checkpoint shards:   0%",
        "Loading safetensors checkpoint shards: 100%",
        "Loading weights took",
        "Model loading took ",
        "torch.compile took",
        "Profiling CUDA graph memory",
        "Available KV cache memory: ",
        "GPU KV cache size: ",
        "Capturing CUDA graphs",
        "Graph capturing finished",
        "init engine (",
        f"Starting vLLM server on http://127.0.0.1:{simulated.port}",
        "Application startup complete.",
    ]
    text = simulated.text()
    places = [text.find(words) for words in told]
    assert -1 not in places, text
    assert places == sorted(places)


def test_port_is_taken_but_closed_while_loading(fleet: Fleet) -> None:
    simulated = fleet.start("--simulate-load-seconds", "60")
    eventually(lambda: "Starting to load model" in simulated.text())
    assert simulated.health() == 0
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", simulated.port))


def test_of_two_that_load_on_one_port_only_one_becomes_ready(fleet: Fleet) -> None:
    # Both bind: sockets with SO_REUSEADDR are in each other's way only once one of them listens.
    first = fleet.start("--simulate-load-seconds", "0.5")
    second = fleet.start("--simulate-load-seconds", "0.5", port=first.port)
    loser = eventually(lambda: next((one for one in (first, second) if one.process.poll() is not None), None))
    winner = second if loser is first else first
    assert loser.ended() == 1
    assert "OSError: [Errno 98]" in loser.text()
    assert session(loser.pid) == {}
    assert winner.ready().health() == 200


def test_taken_port_ends_the_start_with_1(fleet: Fleet) -> None:
    first = fleet.start().ready()
    second = fleet.start(port=first.port)
    assert second.ended() == 1
    assert "OSError: [Errno 98] Address already in use" in second.text()
    assert session(second.pid) == {}
    assert first.health() == 200


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bogus", "3"], "unrecognized arguments: --bogus\n"),
        (["--no-model"], "unrecognized arguments: --no-model"),
        (["--port", "http"], "argument --port: invalid int value: 'http'"),
        (["--model"], "argument --model: expected one argument"),
        (["--enforce-eager=yes"], "argument --enforce-eager: ignored explicit argument 'yes'"),
        (["--gpu-memory-utilization", "1.5"], "argument --gpu-memory-utilization"),
        (["--simulate-fail", "often"], "invalid choice: 'often'"),
    ],
)
def test_bad_flag_ends_with_2(fleet: Fleet, words: list[str], message: str) -> None:
    simulated = fleet.start(*words, "--model" if words == ["--model"] else "--seed=1")
    assert simulated.ended() == 2
    assert message in simulated.text()
    assert simulated.text().startswith("usage:")


def test_vllms_flags_are_taken(fleet: Fleet) -> None:
    simulated = fleet.start(
        *("-tp", "1", "--max_model_len", "32k", "--dtype", "bfloat16", "--seed=0", "--kv-cache-dtype", "fp8"),
        *("--quantization", "awq", "--enforce-eager", "--load-format", "dummy", "--trust-remote-code"),
        *("--no-enable-prefix-caching", "--download-dir", "/x", "--chat-template", "x", "--tokenizer", "t"),
        *("--revision", "main", "--kv-cache-memory-bytes", "2G", "--max-num-batched-tokens", "8192"),
        *("--api-server-count", "1", "--disable-log-requests", "--uvicorn-log-level", "warning"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"),
        *("--enable-lora", "--lora-modules", "a=/a", "b=/b", "--speculative-config", '{"method": "ngram"}'),
        *("--compilation-config.mode", "3", "-O2", "--hf-overrides={}"),
    ).ready()
    listed = json.loads(simulated.get("/v1/models")[1])["data"]
    assert [(model["id"], model["parent"]) for model in listed] == [("m", None), ("a", "m"), ("b", "m")]
    assert listed[0]["max_model_len"] == 32_000
    config = simulated.get("/metrics")[1]
    assert f'kv_cache_memory_bytes="{2 << 30}"' in config
    assert 'enable_prefix_caching="False"' in config
    assert "GET /metrics" not in simulated.text()  # no access log at that level


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, sage_reconcile.simulator.__main__; heavy = "
        "{'pydantic', 'typer', 'structlog', 'yaml', 'psutil', 'argparse', 'asyncio', 'email', 'multiprocessing'};"
        "print(*heavy & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# The process tree


def test_tree_shares_the_leaders_session_and_group(fleet: Fleet) -> None:
    simulated = fleet.start("--tensor-parallel-size", "2", "--pipeline-parallel-size", "2").ready()
    assert sorted(session(simulated.pid).values()) == ["VLLM::EngineCor", *["VLLM::Worker_PP"] * 4, "python"]
    [core] = simulated.named("VLLM::EngineCor")
    assert all(stat(pid)[2] == str(simulated.pid) for pid in session(simulated.pid))
    assert all(stat(pid)[1] == str(core) for pid in simulated.named("VLLM::Worker"))
    titles = {Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0") for pid in simulated.named("VLLM::Worker")}
    assert titles == {b"VLLM::Worker_PP%d_TP%d" % (pp, tp) for pp in (0, 1) for tp in (0, 1)}


def test_one_rank_is_worked_by_the_core(fleet: Fleet) -> None:
    assert sorted(session(fleet.start().ready().pid).values()) == ["VLLM::EngineCor", "python"]


def test_data_parallel_ranks_have_a_core_and_a_gpu_each(fleet: Fleet, folder: Path) -> None:
    simulated = fleet.start("--data-parallel-size", "2", **on(folder, B, A)).ready()
    cores = simulated.named("VLLM::EngineCor")
    assert len(cores) == 2
    assert sorted(pid for held in gpus.usage(folder).values() for pid, _ in held) == sorted(cores)
    os.kill(cores[0], signal.SIGKILL)
    assert simulated.ended() == 0
    assert session(simulated.pid) == {}


@pytest.mark.parametrize("kept", [False, True])
def test_children_hide_their_command_line_and_environment(fleet: Fleet, *, kept: bool) -> None:
    simulated = fleet.start("-tp", "2", **({"SPT_NOENV": "1"} if kept else {})).ready()
    for beginning, title in (("VLLM::EngineCor", b"VLLM::EngineCore"), ("VLLM::Worker", b"VLLM::Worker_TP")):
        for pid in simulated.named(beginning):
            assert Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").startswith(title)
            assert b"simulator" not in Path(f"/proc/{pid}/cmdline").read_bytes()
            environ = Path(f"/proc/{pid}/environ").read_bytes()
            assert (b"MARKER=seen" in environ.split(b"\0")) is kept
            assert bool(environ.strip(b"\0")) is kept
    assert b"simulator" in Path(f"/proc/{simulated.pid}/cmdline").read_bytes()
    assert b"MARKER=seen" in Path(f"/proc/{simulated.pid}/environ").read_bytes().split(b"\0")


@pytest.mark.parametrize("loading", [False, True])
def test_killed_leader_leaves_its_children_with_the_memory(fleet: Fleet, folder: Path, *, loading: bool) -> None:
    simulated = fleet.start("-tp", "2", *(["--simulate-load-seconds=1"] if loading else []), **on(folder, A, B))
    if not loading:
        simulated.ready()
    held = eventually(lambda: (now := gpus.usage(folder)) and now[A] and now[B] and now)
    os.kill(simulated.pid, signal.SIGKILL)
    assert simulated.ended() == -signal.SIGKILL
    after = fleet.start(port=simulated.port).ready()  # the port is free at once
    eventually(lambda: "init engine" in simulated.text())  # what was loading goes on to the end of it
    assert len(session(simulated.pid)) == 3
    assert gpus.usage(folder) == held
    assert sorted(pid for [(pid, _)] in held.values()) == sorted(simulated.named("VLLM::Worker"))
    assert after.health() == 200


@pytest.mark.parametrize("victim", ["VLLM::EngineCor", "VLLM::Worker"])
def test_killed_child_makes_the_server_unhealthy_and_end_with_0(fleet: Fleet, folder: Path, victim: str) -> None:
    slow = ("--simulate-token-ms=1000", "--simulate-death-seconds=2")
    simulated = fleet.start("-tp", "2", *slow, **on(folder, A, B)).ready()
    asking = Asking(simulated)
    eventually(lambda: simulated.metric("num_requests_running") == 1)
    os.kill(simulated.named(victim)[0], signal.SIGKILL)
    eventually(lambda: simulated.health() == 503, within_s=0.9)
    assert simulated.process.poll() is None
    assert asking.answered() == 500
    assert simulated.ended() == 0
    eventually(lambda: session(simulated.pid) == {})
    assert gpus.usage(folder) == {A: [], B: []}


def test_stopped_core_looks_healthy_but_answers_nothing(fleet: Fleet) -> None:
    simulated = fleet.start().ready()
    [core] = simulated.named("VLLM::EngineCor")
    os.kill(core, signal.SIGSTOP)
    eventually(lambda: stat(core)[0] == "T")
    asking = Asking(simulated)
    eventually(lambda: simulated.metric("num_requests_running") == 1)
    assert [simulated.get(path)[0] for path in ("/health", "/ping", "/v1/models", "/metrics")] == [200] * 4
    assert asking.is_alive()
    os.kill(core, signal.SIGCONT)
    assert asking.answered() == 200


# Ending


@pytest.mark.parametrize("words", [[], ["-tp", "2"]])
def test_idle_server_ends_at_once_with_all_its_children(fleet: Fleet, folder: Path, words: list[str]) -> None:
    simulated = fleet.start(*words, **on(folder, A, B)).ready()
    simulated.terminate()
    assert simulated.ended() == 0
    assert session(simulated.pid) == {}  # no waiting: the leader was the last to go
    assert gpus.usage(folder) == {A: [], B: []}


def test_sigterm_while_loading_is_lost(fleet: Fleet) -> None:
    simulated = fleet.start("-tp", "2", "--simulate-load-seconds", "0.5")
    eventually(lambda: "Starting to load model" in simulated.text())
    assert simulated.health() == 0
    simulated.terminate()
    simulated.ready()
    assert simulated.post("/v1/chat/completions", CHAT)[0] == 200
    simulated.terminate()
    assert simulated.ended() == 0


def test_drain_finishes_what_is_in_flight_and_refuses_what_is_new(fleet: Fleet) -> None:
    simulated = fleet.start("--shutdown-timeout", "60", "--simulate-token-ms", "40").ready()
    asking = Asking(simulated)
    eventually(lambda: simulated.metric("num_requests_running") == 1)
    simulated.terminate()
    eventually(lambda: "mode=drain" in simulated.text())
    eventually(lambda: simulated.post("/v1/chat/completions", CHAT)[0] == 500)
    assert simulated.health() == 200
    simulated.terminate()  # a second one changes nothing
    assert asking.answered() == 200
    assert "to a model." in asking.text
    assert simulated.ended() == 0
    assert session(simulated.pid) == {}


def test_sigterm_to_the_whole_group_drains_too(fleet: Fleet) -> None:
    simulated = fleet.start("-tp", "2", "--shutdown-timeout", "60", "--simulate-token-ms", "20").ready()
    asking = Asking(simulated)
    eventually(lambda: simulated.metric("num_requests_running") == 1)
    os.killpg(simulated.pid, signal.SIGTERM)
    assert asking.answered() == 200
    assert simulated.ended() == 0
    assert session(simulated.pid) == {}


def test_drain_ends_at_its_timeout(fleet: Fleet) -> None:
    simulated = fleet.start("--shutdown-timeout", "1", "--simulate-hang").ready()
    asking = Asking(simulated)
    eventually(lambda: simulated.metric("num_requests_running") == 1)
    simulated.terminate()
    assert simulated.ended() == 0
    assert asking.answered() == 0
    assert session(simulated.pid) == {}


def test_without_a_drain_time_the_engine_dies_and_its_clients_hang(fleet: Fleet, folder: Path) -> None:
    simulated = fleet.start("--simulate-token-ms", "50", **on(folder, A)).ready()
    body = json.dumps(CHAT).encode()
    with socket.create_connection(("127.0.0.1", simulated.port)) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        eventually(lambda: simulated.metric("num_requests_running") == 1)
        simulated.terminate()
        eventually(lambda: gpus.usage(folder)[A] == [])
        client.settimeout(2)  # the answer would have been there after 1.4 s
        with pytest.raises(TimeoutError):
            client.recv(1)
        assert simulated.process.poll() is None
    assert simulated.ended() == 0


def test_sigterm_can_be_ignored(fleet: Fleet) -> None:
    simulated = fleet.start("--simulate-ignore-sigterm").ready()
    simulated.terminate()
    assert simulated.post("/v1/chat/completions", CHAT)[0] == 200
    assert "shutdown triggered" not in simulated.text()


@pytest.mark.parametrize("words", [[], ["-tp", "2"]])
def test_memory_can_outlive_a_clean_stop(fleet: Fleet, folder: Path, words: list[str]) -> None:
    simulated = fleet.start(*words, "--simulate-linger-seconds", "1", **on(folder, A, B)).ready()
    simulated.terminate()
    assert simulated.ended() == 0
    held = gpus.usage(folder)
    assert len(held[A]) == 1
    assert len(held[B]) == (1 if words else 0)
    eventually(lambda: gpus.usage(folder) == {A: [], B: []})
    assert session(simulated.pid) == {}


def test_orphaned_core_ends_by_sigterm(fleet: Fleet) -> None:
    simulated = fleet.start("-tp", "2").ready()
    os.kill(simulated.pid, signal.SIGKILL)
    simulated.ended()
    [core] = simulated.named("VLLM::EngineCor")

    def ended() -> bool:  # the core may not have noticed yet that it is an orphan, and then it does not listen
        if stat(core):
            os.kill(core, signal.SIGTERM)
        return session(simulated.pid) == {}

    eventually(ended)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--simulate-fail", "load"], 1, "safetensors"),
        (["--simulate-fail", "oom"], 1, "torch.OutOfMemoryError: CUDA out of memory"),
        (
            ["--simulate-fail", "exit", "--simulate-exit-code", "7", "--simulate-exit-after", "0.1"],
            7,
            "startup complete",
        ),
        (["--simulate-fail", "exit", "--simulate-exit-code", "0"], 0, "startup complete"),
    ],
)
@pytest.mark.parametrize("size", ["1", "2"])
def test_failures_on_demand(fleet: Fleet, words: list[str], code: int, told: str, size: str) -> None:
    simulated = fleet.start(*words, "-tp", size)
    assert simulated.ended() == code
    assert told in simulated.text()
    failed = "Engine core initialization failed. See root cause above." in simulated.text()
    assert failed is ("exit" not in words)
    assert session(simulated.pid) == {}


def test_core_killed_while_loading_fails_the_start(fleet: Fleet) -> None:
    simulated = fleet.start("--simulate-load-seconds", "60")
    eventually(lambda: "Starting to load model" in simulated.text())
    os.kill(simulated.named("VLLM::EngineCor")[0], signal.SIGKILL)
    assert simulated.ended() == 1
    assert "Engine core initialization failed" in simulated.text()
