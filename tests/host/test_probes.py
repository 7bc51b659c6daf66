"""Readiness asked of real servers that answer well, badly, late, or not at all."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sage_reconcile.host import probes
from sage_reconcile.host.metrics import EngineMetrics
from sage_reconcile.host.probes import FAILURES, Prober, Target, ask_once, is_ready, loopback
from tests.host.world import eventually, free_port


class Server:
    """A server that answers each page with the status it is told, and counts what it was asked."""

    def __init__(self, port: int = 0, host: str = "127.0.0.1") -> None:
        self.pages = {"/health": 200}
        self.asked: list[tuple[float, str]] = []
        self.delay_s = 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append((time.monotonic(), self.path))
                time.sleep(outer.delay_s)
                self.send_response(outer.pages.get(self.path, 404))
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        class Listening(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, *_: object) -> None:
                pass  # a client that does not wait for the answer

        self.server = Listening((host, port), Handler)
        self.port = int(self.server.server_address[1])
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def serving(port: int = 0, host: str = "127.0.0.1") -> Iterator[Server]:
    server = Server(port, host)
    try:
        yield server
    finally:
        server.close()


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def prober(clock: Clock) -> Iterator[tuple[Prober, list[str]]]:
    changes: list[str] = []
    made = Prober(clock, lambda: changes.append("changed"))
    try:
        yield made, changes
    finally:
        made.close()


def probed(made: Prober, server: Server) -> None:
    """Makes the next probe due now, and waits until it has come back."""
    before = len(server.asked)
    made.ask()
    eventually(lambda: len(server.asked) > before and idle(made), "a probe")


def idle(made: Prober) -> bool:
    return all(state.asking is None or state.asking.done() for state in made._states.values())


@pytest.mark.parametrize(
    ("pages", "ready"),
    [
        ({"/health": 200}, True),
        ({"/health": 204}, True),
        ({"/health": 503}, False),
        ({"/health": 500, "/v1/models": 200}, False),
        ({"/health": 302}, False),
        ({"/v1/models": 200}, True),
        ({"/health": 405, "/v1/models": 200}, True),
        ({"/v1/models": 401}, False),
        ({}, False),
    ],
)
def test_ready_is_who_answers_its_health_page_or_lists_its_models(pages: dict[str, int], ready: bool) -> None:
    with serving() as server:
        server.pages = pages
        assert is_ready("127.0.0.1", server.port) is ready


def test_who_does_not_listen_or_speaks_no_http_is_not_ready() -> None:
    assert not is_ready("127.0.0.1", free_port())
    with socket.create_server(("127.0.0.1", 0)) as mute:
        begun = time.monotonic()
        assert not is_ready("127.0.0.1", mute.getsockname()[1], timeout_s=0.1)
        assert time.monotonic() - begun < 5
    with socket.create_server(("127.0.0.1", 0)) as odd:

        def talk() -> None:
            with odd.accept()[0] as connection:
                connection.sendall(b"\x00rubbish\r\n\r\n")

        talking = threading.Thread(target=talk)
        talking.start()
        assert not is_ready("127.0.0.1", odd.getsockname()[1], timeout_s=5)
        talking.join()


def test_where_a_server_that_listens_everywhere_is_reached() -> None:
    assert [loopback(bind) for bind in ("0.0.0.0", "::", "127.0.0.1", "10.0.0.5")] == [
        *("127.0.0.1", "::1", "127.0.0.1", "10.0.0.5")
    ]
    if socket.has_ipv6:
        try:
            server = Server(host="::1")
        except OSError:
            return
        assert is_ready("::1", server.port)
        server.close()


def test_all_are_asked_at_once_and_each_once() -> None:
    with serving() as good, serving() as slow, serving() as bad:
        slow.delay_s = 0.3
        bad.pages = {"/health": 503}
        targets = [Target(str(n), "127.0.0.1", slow.port, was_ready=False) for n in range(8)]
        targets += [Target("good", "127.0.0.1", good.port, was_ready=False)]
        targets += [Target("bad", "127.0.0.1", bad.port, was_ready=True)]
        begun = time.monotonic()
        assert ask_once(targets) == {*"01234567", "good"}
        assert time.monotonic() - begun < 8 * 0.3
        assert len(good.asked) == 1
    assert ask_once([]) == set()


def test_a_ready_replica_is_not_ready_after_three_failures_in_a_row_and_again_after_one_answer() -> None:
    clock = Clock()
    with serving() as server, prober(clock) as (made, changes):
        made.follow([Target("a", "127.0.0.1", server.port, was_ready=False)])
        eventually(lambda: made.ready("a"))
        eventually(lambda: changes == ["changed"])
        server.pages = {"/health": 503}
        for failure in range(1, FAILURES):
            clock.now += probes.PERIOD_S
            probed(made, server)
            assert made.ready("a"), f"{failure} of {FAILURES}"
        server.pages = {"/health": 200}
        clock.now += probes.PERIOD_S
        probed(made, server)
        server.pages = {"/health": 503}
        for _ in range(FAILURES - 1):
            clock.now += probes.PERIOD_S
            probed(made, server)
            assert made.ready("a"), "the answer in between ended the row"
        clock.now += probes.PERIOD_S
        probed(made, server)
        assert not made.ready("a")
        assert changes == ["changed"] * 2
        server.pages = {"/health": 200}
        clock.now += probes.PERIOD_S
        probed(made, server)
        assert made.ready("a")
        assert changes == ["changed"] * 3


def test_one_that_was_ready_before_counts_as_ready_until_it_fails_three_times() -> None:
    clock = Clock()
    with serving() as server, prober(clock) as (made, changes):
        server.pages = {"/health": 503}
        made.follow([Target("a", "127.0.0.1", server.port, was_ready=True)])
        assert made.ready("a")
        for _ in range(FAILURES):
            eventually(lambda: idle(made))
            clock.now += probes.PERIOD_S
            made.ask()
        eventually(lambda: not made.ready("a"))
        eventually(lambda: changes == ["changed"])


def test_one_that_loads_is_asked_often_at_first_and_never_slower_than_every_two_seconds() -> None:
    clock = Clock()
    with serving() as server, prober(clock) as (made, _):
        server.pages = {"/health": 503}
        made.follow([Target("a", "127.0.0.1", server.port, was_ready=False)])
        eventually(lambda: server.asked and idle(made))
        assert made.ask() == pytest.approx(clock.now + 0.05)
        clock.now += 5
        probed(made, server)
        assert made.ask() == pytest.approx(clock.now + 0.5)
        clock.now += 1000
        probed(made, server)
        assert made.ask() == pytest.approx(clock.now + 2)


def test_ready_ones_are_asked_all_at_the_same_moments() -> None:
    clock = Clock()
    with serving() as server, prober(clock) as (made, _):
        for offset, name in ((0.0, "a"), (3.5, "b")):
            clock.now = 1000.0 + offset
            made.follow([Target(n, "127.0.0.1", server.port, was_ready=False) for n in "ab" if n <= name])
            eventually(lambda name=name: made.ready(name) and idle(made))
        assert {state.next_at for state in made._states.values()} == {1010.0}
        assert made.ask() == 1010.0
        assert len([page for _, page in server.asked if page == "/health"]) == 2


def test_what_it_says_of_itself_is_there_when_it_counts_as_ready_and_asked_once() -> None:
    clock = Clock()
    with serving() as server, prober(clock) as (made, _):
        server.pages["/metrics"] = 200
        made.follow([Target("a", "127.0.0.1", server.port, was_ready=False)])
        assert made.metrics("other") is None
        eventually(lambda: made.ready("a"))
        assert made.metrics("a") == EngineMetrics()
        clock.now += probes.PERIOD_S
        probed(made, server)
        eventually(lambda: idle(made))
        assert [page for _, page in server.asked] == ["/health", "/metrics", "/health"]


def test_a_probe_under_way_is_looked_after_soon_and_not_doubled() -> None:
    clock = Clock()
    with serving() as server, prober(clock) as (made, _):
        server.delay_s = 0.2
        made.follow([Target("a", "127.0.0.1", server.port, was_ready=False)])
        eventually(lambda: server.asked)
        assert clock.now < made.ask() <= clock.now + 0.1, "when the next one is due depends on how this one ends"
        clock.now += 100
        made.ask()
        assert len(server.asked) == 1
        eventually(lambda: made.ready("a"))


def test_who_is_no_longer_followed_is_asked_no_more_and_is_not_ready() -> None:
    clock = Clock()
    with serving() as server, prober(clock) as (made, _):
        made.follow([Target("a", "127.0.0.1", server.port, was_ready=False)])
        eventually(lambda: made.ready("a") and idle(made))
        made.follow([])
        assert not made.ready("a")
        clock.now += 100
        assert made.ask() == float("inf")
        assert [page for _, page in server.asked] == ["/health", "/metrics"]
        made.follow([Target("a", "127.0.0.1", server.port, was_ready=False)])
        assert not made.ready("nobody")
        eventually(lambda: made.ready("a"))


def test_one_that_hangs_holds_up_nobody() -> None:
    clock = Clock()
    with serving() as server, socket.create_server(("127.0.0.1", 0)) as mute, prober(clock) as (made, _):
        targets = [Target(str(n), "127.0.0.1", mute.getsockname()[1], was_ready=False) for n in range(3)]
        begun = time.monotonic()
        made.follow([*targets, Target("good", "127.0.0.1", server.port, was_ready=False)])
        assert time.monotonic() - begun < 1, "asking does not wait"
        eventually(lambda: made.ready("good"))
        assert not made.ready("0")
