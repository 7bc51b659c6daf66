"""Which ports others listen on, and who they are: with real sockets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sage_reconcile.core.observed import Port
from sage_reconcile.core.spec import Desired
from sage_reconcile.host import ports
from tests.host.world import free_port
from tests.reading import desired

LISTEN = """
import socket, sys, time
with socket.create_server((sys.argv[1], 0), family=int(sys.argv[2])) as server:
    print(server.getsockname()[1], flush=True)
    time.sleep(600)
"""


@contextmanager
def listener(host: str = "127.0.0.1", family: int = socket.AF_INET) -> Iterator[tuple[int, int]]:
    """The pid and port of another program that listens."""
    with subprocess.Popen([sys.executable, "-c", LISTEN, host, str(int(family))], stdout=subprocess.PIPE) as program:
        assert program.stdout
        port = program.stdout.readline()
        try:
            if not port and family == socket.AF_INET6:
                pytest.skip("this machine has no IPv6, so nothing of it can be seen")
            assert port, f"the other program cannot listen on {host}"
            yield program.pid, int(port)
        finally:
            program.kill()


def wanted(low: int, high: int, *fixed: int, replicas: int = 1) -> Desired:
    engines = "".join(
        f"  e{port}: {{runtime: command, command: [x], port: {port}, replicas: {replicas}}}\n" for port in fixed
    )
    return desired(
        f"version: 1\nhost: {{ports: {low}-{high}, inner_ports: 9-9}}\nengines:{'' if engines else ' {}'}\n{engines}"
    )


@pytest.mark.parametrize(
    ("host", "family"),
    [("127.0.0.1", socket.AF_INET), ("0.0.0.0", socket.AF_INET), ("::1", socket.AF_INET6), ("::", socket.AF_INET6)],
)
def test_a_stranger_that_listens_in_the_range_is_found(host: str, family: int) -> None:
    with listener(host, family) as (_, port):
        assert ports.in_use(wanted(port, port), set()) == (Port(port),)


def test_a_port_out_of_the_range_matters_only_where_an_entry_names_it() -> None:
    with listener() as (pid, port):
        elsewhere = port - 1 if port > 40000 else port + 1
        assert ports.in_use(wanted(elsewhere, elsewhere), set()) == ()
        name = os.path.basename(os.path.realpath(sys.executable))  # noqa: PTH119
        found = ports.in_use(wanted(elsewhere, elsewhere, port), set())
        assert [one.number for one in found] == [port]
        assert found[0].holder.startswith(f"pid {pid} ("), name
        assert "python" in found[0].holder


def test_of_several_replicas_each_has_its_port() -> None:
    with listener() as (_, port):
        assert ports.in_use(wanted(1, 1, port - 2, replicas=2), set()) == ()
        assert [p.number for p in ports.in_use(wanted(1, 1, port - 2, replicas=3), set())] == [port]


def test_our_own_ports_and_those_nobody_listens_on_are_free() -> None:
    with listener() as (_, port):
        assert ports.in_use(wanted(port, port, port), {port}) == ()
    assert ports.in_use(wanted(port, port, port), set()) == (), "its program has ended"
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        number = bound.getsockname()[1]
        assert ports.in_use(wanted(number, number), set()) == (), "bound, but it does not listen"


def test_a_connection_to_a_port_is_no_listener() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client:
            number = client.getsockname()[1]
            assert ports.in_use(wanted(number, number), set()) == ()
        assert free_port() > 0


def test_they_come_in_order() -> None:
    with listener() as (_, one), listener() as (_, two), listener() as (_, three):
        found = ports.in_use(wanted(1024, 65535), set())
        numbers = [port.number for port in found]
        assert numbers == sorted(set(numbers))
        assert {one, two, three} <= set(numbers)
