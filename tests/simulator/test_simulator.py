"""The simulated engine behaves as vLLM does, as a process and over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from sage_reconcile.simulator import gpus
from tests.simulator import running
from tests.simulator.running import ROOT, Fleet, Simulated, eventually, session, stat

A, B = "GPU-aaaa", "GPU-bbbb"
TOTAL_MIB = 81_559
CHAT = {"model": "m", "messages": [{"role": "user", "content": "one two three"}]}


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    yield from running.fleet(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "gpus"
    gpus.write_inventory(made, [{"uuid": uuid, "name": "H100", "memory_total_mib": TOTAL_MIB} for uuid in (A, B)])
    return made


def on(folder: Path, *uuids: str) -> dict[str, str]:
    return {gpus.ENVIRONMENT: str(folder), "CUDA_VISIBLE_DEVICES": ",".join(uuids)}


class Asking(threading.Thread):
    """A request in a thread of its own."""

    def __init__(self, simulated: Simulated, body: dict[str, object] | None = None) -> None:
        super().__init__(daemon=True)
        self.simulated, self.body = simulated, body or CHAT
        self.status, self.text = 0, ""
        self.start()

    def run(self) -> None:
        try:
            self.status, self.text = self.simulated.post("/v1/chat/completions", self.body)
        except OSError as error:
            self.text = str(error)

    def answered(self) -> int:
        self.join(running.DEADLINE_S)
        assert not self.is_alive()
        return self.status


# What it answers


def test_openai_client_chats_streams_and_completes(fleet: Fleet) -> None:
    simulated = fleet.start("--model", "some/model", "--served-model-name", "first", "second").ready()
    with OpenAI(base_url=f"http://127.0.0.1:{simulated.port}/v1", api_key="any", max_retries=0) as client:
        asked = [{"role": "user", "content": "one two three"}]
        whole = client.chat.completions.create(model="second", messages=asked)
        assert "simulated" in whole.choices[0].message.content
        assert (whole.model, whole.choices[0].finish_reason, whole.usage.prompt_tokens) == ("second", "stop", 3)

        short = client.chat.completions.create(model="first", messages=asked, max_tokens=4)
        assert (short.choices[0].message.content, short.choices[0].finish_reason, short.usage.completion_tokens) == (
            "This answer is simulated:",
            "length",
            4,
        )

        stream = client.chat.completions.create(
            model="first", messages=asked, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        words = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
        assert "".join(words) == whole.choices[0].message.content
        assert len(words) == 1 + whole.usage.completion_tokens
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].usage == whole.usage

        text = client.completions.create(
            model="first", prompt="one two", max_tokens=40, extra_body={"ignore_eos": True}
        )
        assert (text.usage.completion_tokens, text.usage.prompt_tokens) == (40, 2)
        parts = client.completions.create(model="first", prompt="one", max_tokens=3, stream=True)
        assert "".join(part.choices[0].text for part in parts) == "This answer is"

        assert [model.id for model in client.models.list()] == ["first", "second"]


def test_refusals_have_vllm_shapes(fleet: Fleet) -> None:
    simulated = fleet.start("--max-model-len", "256").ready()
    status, text = simulated.post("/v1/chat/completions", CHAT | {"model": "other"})
    assert status == 404
    assert json.loads(text)["error"] == {
        "message": "The model `other` does not exist. Valid aliases: m.",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }
    for body in (b"{bad", b"[]", b"", b'{"model": "m"}', json.dumps(CHAT | {"max_tokens": 257}).encode()):
        status, text = simulated.post("/v1/chat/completions", body)
        assert (status, json.loads(text)["error"]["code"]) == (400, 400)
    assert simulated.get("/nothing") == (404, '{"detail":"Not Found"}')
    assert simulated.get("/v1/completions")[0] == 405
    assert json.loads(simulated.get("/version")[1]).keys() == {"version"}
    assert simulated.get("/ping")[0] == 200


def test_api_key_guards_only_the_api(fleet: Fleet) -> None:
    simulated = fleet.start(VLLM_API_KEY="secret").ready()
    assert simulated.get("/v1/models") == (401, '{"error":"Unauthorized"}')
    assert simulated.post("/v1/chat/completions", CHAT, {"Authorization": "Bearer wrong"})[0] == 401
    assert simulated.post("/v1/chat/completions", CHAT, {"Authorization": "Bearer secret"})[0] == 200
    assert [simulated.get(path)[0] for path in ("/health", "/metrics", "/version")] == [200, 200, 200]


def test_metrics_count_progress_waiting_and_capacity(fleet: Fleet, folder: Path) -> None:
    simulated = fleet.start(
        "--max-num-seqs=1", "--simulate-token-ms=20", "--gpu-memory-utilization", "0.5", **on(folder, A)
    ).ready()
    assert simulated.metric("generation_tokens_total") == 0
    first, second = Asking(simulated, CHAT | {"max_tokens": 20}), Asking(simulated, CHAT | {"max_tokens": 20})
    eventually(lambda: simulated.metric("num_requests_waiting") == 1)
    assert simulated.metric("num_requests_running") == 1
    eventually(lambda: simulated.metric("kv_cache_usage_perc") > 0)
    assert (first.answered(), second.answered()) == (200, 200)
    assert simulated.metric("generation_tokens_total") == 40
    assert simulated.metric("prompt_tokens_total") == 6
    eventually(lambda: simulated.metric("num_requests_running") == 0)
    assert simulated.metric("kv_cache_usage_perc") == 0
    assert 'model_name="m"' in simulated.get("/metrics")[1]
    [config] = [line for line in simulated.get("/metrics")[1].splitlines() if "cache_config_info{" in line]
    assert 'block_size="16"' in config
    assert 'gpu_memory_utilization="0.5"' in config


def test_client_that_leaves_frees_its_place(fleet: Fleet) -> None:
    simulated = fleet.start("--simulate-hang").ready()
    body = json.dumps(CHAT).encode()
    with socket.create_connection(("127.0.0.1", simulated.port)) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        eventually(lambda: simulated.metric("num_requests_running") == 1)
        assert simulated.health() == 200
    eventually(lambda: simulated.metric("num_requests_running") == 0)


def test_unix_socket_stays_behind_and_blocks_the_next_start(fleet: Fleet, tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = fleet.start("--uds", str(path))

    def healthy() -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(path))
            except (ConnectionRefusedError, FileNotFoundError):
                return False
            client.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            return client.recv(99).startswith(b"HTTP/1.1 200")

    eventually(healthy)
    first.terminate()
    assert first.ended() == 0
    assert fleet.start("--uds", str(path)).ended() == 1


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
    simulated = fleet.start("-tp", "2", "--simulate-token-ms=1000", **on(folder, A, B)).ready()
    asking = Asking(simulated)
    eventually(lambda: simulated.metric("num_requests_running") == 1)
    os.kill(simulated.named(victim)[0], signal.SIGKILL)
    eventually(lambda: simulated.health() == 503, within_s=0.5)
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


# Simulated GPUs


def test_each_rank_claims_its_gpu(fleet: Fleet, folder: Path) -> None:
    fleet.start("-tp", "2", "--gpu-memory-utilization", "0.29", **on(folder, B, A)).ready()
    assert {uuid: [mib for _, mib in held] for uuid, held in gpus.usage(folder).items()} == {
        A: [TOTAL_MIB * 29 // 100],
        B: [TOTAL_MIB * 29 // 100],
    }


def test_overcommit_is_refused_in_vllms_words(fleet: Fleet, folder: Path) -> None:
    first = fleet.start("--gpu-memory-utilization", "0.6", **on(folder, A)).ready()
    second = fleet.start("--gpu-memory-utilization", "0.6", **on(folder, A))
    assert second.ended() == 1
    words = (
        "ValueError: Free memory on device cuda:0 (31.86/79.65 GiB) on startup is less than desired "
        "GPU memory utilization (0.6, 47.79 GiB). Decrease GPU memory utilization"
    )
    assert words in second.text()
    assert second.text().index(words) < second.text().index("Engine core initialization failed. See root cause above.")
    assert [pid for pid, _ in gpus.usage(folder)[A]] == first.named("VLLM::EngineCor")
    fleet.start("--gpu-memory-utilization", "0.6", **on(folder, B)).ready()
    fleet.start("--gpu-memory-utilization", "0.4", **on(folder, A)).ready()  # to the last MiB


def test_of_many_starts_at_once_only_those_that_fit_go_through(fleet: Fleet, folder: Path) -> None:
    started = [fleet.start("--gpu-memory-utilization", "0.3", **on(folder, A)) for _ in range(6)]
    eventually(lambda: all(one.process.poll() is not None or one.health() == 200 for one in started))
    assert sorted(one.process.poll() is None for one in started) == [False] * 3 + [True] * 3
    assert [mib for _, mib in gpus.usage(folder)[A]] == [int(TOTAL_MIB * 0.3)] * 3


@pytest.mark.parametrize(
    ("seen", "told"),
    [((), "No CUDA GPUs are available"), ((A,), "invalid device ordinal"), ((A, "GPU-c"), "invalid device ordinal")],
)
def test_too_few_gpus_end_the_start(fleet: Fleet, folder: Path, seen: tuple[str, ...], told: str) -> None:
    simulated = fleet.start("-tp", "2", **on(folder, *seen))
    assert simulated.ended() == 1
    assert told in simulated.text()
    assert gpus.usage(folder) == {A: [], B: []}


class Claimant:
    """A process that claims when told to, and then stays until it is killed."""

    CODE = """
import sys
from pathlib import Path
from sage_reconcile.simulator import gpus
print("there", flush=True)
sys.stdin.buffer.read(1)
try:
    gpus.claim(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    print("claimed", flush=True)
except gpus.TooLittleFree:
    print("refused", flush=True)
sys.stdin.buffer.read()
"""

    def __init__(self, folder: Path, mib: int, gate: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.CODE, str(folder), A, str(mib)], cwd=ROOT, stdin=gate, stdout=subprocess.PIPE
        )

    def said(self) -> str:
        return self.process.stdout.readline().decode().strip()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def test_claims_of_the_dead_do_not_count(folder: Path) -> None:
    gate_read, gate_write = os.pipe()
    claimant = Claimant(folder, 60_000, gate_read)
    pid = claimant.process.pid
    try:
        os.write(gate_write, b"!")
        assert [claimant.said(), claimant.said()] == ["there", "claimed"]
        assert gpus.usage(folder) == {A: [(pid, 60_000)], B: []}
        with pytest.raises(gpus.TooLittleFree) as refused:
            gpus.claim(folder, A, 21_560)
        assert (refused.value.free_mib, refused.value.total_mib) == (21_559, TOTAL_MIB)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: stat(pid)[0] == "Z")  # not waited for yet
        assert gpus.usage(folder) == {A: [], B: []}
    finally:
        claimant.close()
        os.close(gate_read)
        os.close(gate_write)
    [left] = (folder / A).iterdir()
    gpus.claim(folder, A, TOTAL_MIB)
    assert gpus.usage(folder) == {A: [(os.getpid(), TOTAL_MIB)], B: []}
    assert not left.exists()


def test_claims_made_at_the_same_moment_do_not_overcommit(folder: Path) -> None:
    gate_read, gate_write = os.pipe()
    claimants = [Claimant(folder, TOTAL_MIB // 5, gate_read) for _ in range(20)]
    try:
        assert {claimant.said() for claimant in claimants} == {"there"}
        os.write(gate_write, b"!" * len(claimants))
        assert sorted(claimant.said() for claimant in claimants) == ["claimed"] * 5 + ["refused"] * 15
        assert len(gpus.usage(folder)[A]) == 5
    finally:
        for claimant in claimants:
            claimant.close()
        os.close(gate_read)
        os.close(gate_write)


def test_claim_of_an_earlier_process_with_the_same_id_does_not_count(folder: Path) -> None:
    (folder / A).mkdir()
    ticks = int(stat(os.getpid())[19])
    (folder / A / f"{os.getpid()}-{ticks - 1}").write_text("70000")
    assert gpus.usage(folder)[A] == []
    (folder / A / f"{os.getpid()}-{ticks}").write_text("7")
    assert gpus.usage(folder)[A] == [(os.getpid(), 7)]


def test_usage_without_an_inventory_is_empty(tmp_path: Path) -> None:
    assert gpus.usage(tmp_path / "nowhere") == {}


def test_unknown_gpu_is_not_claimed(folder: Path) -> None:
    with pytest.raises(gpus.UnknownGpu):
        gpus.claim(folder, "GPU-cccc", 1)


@pytest.mark.parametrize(
    ("devices", "seen"),
    [(None, [A, B]), ("", []), (f"{B},{A}", [B, A]), ("1", [B]), ("GPU-b", [B]), (f"{A},x,{B}", [A]), ("GPU-", [])],
)
def test_visible_devices_are_read_as_cuda_reads_them(folder: Path, devices: str | None, seen: list[str]) -> None:
    assert gpus.visible(folder, devices) == seen
