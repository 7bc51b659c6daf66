"""What a ready engine says of itself: a page of a real vLLM, and pages that nobody should have to read."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from sage_reconcile.host.metrics import LIMIT_BYTES, EngineMetrics, parse, read_metrics
from tests.host.world import free_port

PAGE = (Path(__file__).parent / "data" / "vllm_metrics.txt").read_text(encoding="utf-8")


@contextmanager
def answering(*chunks: bytes, hold: bool = False) -> Iterator[int]:
    """A server that sends these bytes to whoever asks; with ``hold`` it then neither sends nor closes."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with suppress(OSError):
                connection, _ = listening.accept()
                with connection:
                    connection.recv(65536)
                    for chunk in chunks:
                        connection.sendall(chunk)
                    if hold:
                        done.wait(30)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            done.set()
            listening.close()
            thread.join()


def test_a_page_of_a_real_vllm_is_understood() -> None:
    read = parse(PAGE)
    assert (read.running, read.waiting) == (0.0, 0.0)
    assert (read.prompt_tokens, read.generation_tokens) == (5.0, 5.0)
    assert read.kv_cache_usage == 0.0
    assert (read.kv_blocks, read.block_tokens, read.kv_tokens) == (16384, 128, 2097152)
    [config] = read.cache_configs
    assert config["kv_cache_memory_bytes"] == str(1 << 30)
    assert config["kv_cache_dtype_skip_layers"] == "[]"


def test_ranks_are_added_up_and_the_smallest_cache_counts() -> None:
    read = parse(
        'vllm:num_requests_running{engine="0"} 2.0\nvllm:num_requests_running{engine="1"} 3\n'
        'vllm:kv_cache_usage_perc{engine="0"} 0.5\nvllm:kv_cache_usage_perc{engine="1"} 0.25\n'
        'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100"} 1.0\n'
        'vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="90"} 1.0\n'
    )
    assert (read.running, read.waiting, read.kv_cache_usage) == (5.0, None, 0.5)
    assert read.kv_tokens == 1440


def test_what_labels_may_hold_is_read() -> None:
    read = parse('vllm:cache_config_info{a="x,y=\\"z\\"}",b="back\\\\slash\\nline", c = "" ,num_gpu_blocks="7"} 1\n')
    assert read.cache_configs == ({"a": 'x,y="z"}', "b": "back\\slash\nline", "c": "", "num_gpu_blocks": "7"},)
    assert read.kv_blocks == 7


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<html>",
        "vllm:num_requests_running{engine=",
        "vllm:num_requests_running NaN",
        "vllm:num_requests_running much",
        "vllm:num_requests_running_by_reason 3",
        "# vllm:num_requests_running 3",
        'other:num_requests_running{engine="0"} 3',
    ],
)
def test_what_is_not_understood_is_passed_over(text: str) -> None:
    assert parse(f"{text}\n") == EngineMetrics()
    assert parse(f"{text}\nvllm:num_requests_waiting 1 1700000000\n").waiting == 1.0


def test_the_size_of_a_cache_that_was_not_sized_is_not_known() -> None:
    assert parse('vllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1.0').kv_tokens is None
    assert parse('vllm:gpu_cache_usage_perc{engine="0"} 0.75').kv_cache_usage == 0.75


def test_a_server_is_asked() -> None:
    body = PAGE.encode()
    with answering(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body), body[:9], body[9:], hold=True) as port:
        read = read_metrics("127.0.0.1", port)
    assert read is not None
    assert read.kv_tokens == 2097152


def test_who_has_no_page_or_never_ends_or_says_too_much_tells_nothing() -> None:
    assert read_metrics("127.0.0.1", free_port()) is None
    with answering(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n") as port:
        assert read_metrics("127.0.0.1", port) is None
    with answering(b"HTTP/1.1 200 OK\r\n\r\nvllm:num_requests_waiting 1\n", hold=True) as port:
        assert read_metrics("127.0.0.1", port, timeout_s=0.1) is None
    with answering(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * (LIMIT_BYTES + 1)) as port:
        assert read_metrics("127.0.0.1", port) is None
    with answering(b"SSH-2.0-x\r\n") as port:
        assert read_metrics("127.0.0.1", port) is None
