"""What the simulated engine answers over HTTP."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from openai import OpenAI

from tests.simulator.running import CHAT, A, Asking, Fleet, eventually, on


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
