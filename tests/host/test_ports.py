"""Which ports others listen on, and who they are: with real sockets."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sage_reconcile.core.observed import Port
from sage_reconcile.core.spec import Desired
from sage_reconcile.errors import PortTaken
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


BIND = """
import socket, sys, time
with socket.socket() as holder:
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(sys.argv[1]))
    holder.bind(("127.0.0.1", 0))
    print(holder.getsockname()[1], flush=True)
    time.sleep(600)
"""


@contextmanager
def binder(*, reuse: bool = True) -> Iterator[tuple[int, int]]:
    """The pid and port of another program that has bound the port and does not listen, as vLLM while it loads."""
    with subprocess.Popen([sys.executable, "-c", BIND, str(int(reuse))], stdout=subprocess.PIPE) as program:
        assert program.stdout
        try:
            yield program.pid, int(program.stdout.readline())
        finally:
            program.kill()


@pytest.fixture(name="kernel", params=["asked", "older", "not asked"])
def _kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the kernel tells of sockets that are bound only: this one may; older ones, and its tables, do not."""
    if request.param == "older":
        monkeypatch.setattr(ports, "_BOUND", ports._LISTEN)
    if request.param == "not asked":
        monkeypatch.setattr(ports, "_SOCK_DIAG", 63)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        tells = bound.getsockname()[1] in ports._sockets()
    if request.param != "asked":
        assert not tells
    return tells


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
@pytest.mark.usefixtures("kernel")
def test_a_stranger_that_listens_in_the_range_is_found(host: str, family: int) -> None:
    with listener(host, family) as (_, port):
        assert ports.in_use(wanted(port, port), set()) == (Port(port),)


@pytest.mark.usefixtures("kernel")
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


def test_a_connection_to_a_port_is_no_listener() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client:
            number = client.getsockname()[1]
            assert ports.in_use(wanted(number, number), set()) == ()
        assert free_port() > 0


def test_a_stranger_among_the_inner_ports_is_found() -> None:
    with listener() as (_, port):
        file = f"version: 1\nhost: {{ports: 1-1, inner_ports: {port}-{port}}}\nengines: {{}}\n"
        assert ports.in_use(desired(file), set()) == (Port(port),)
        assert ports.in_use(desired(file), {port}) == ()


@pytest.mark.parametrize("reuse", [True, False])
def test_a_port_that_is_bound_is_taken_though_nobody_listens(kernel: bool, reuse: bool) -> None:
    with binder(reuse=reuse) as (pid, port):
        holder = f"pid {pid} (python" if kernel else "another program"
        with pytest.raises(PortTaken, match=rf"cannot start chat/0: port {port} has been taken by {re.escape(holder)}"):
            ports.check_free("chat/0", "127.0.0.1", port)
        assert ports.is_bound("0.0.0.0", port), "an address that includes the other one"
        assert not ports.is_bound("127.0.0.2", port), "an address of its own"
        seen = ports.in_use(wanted(1, 1, port), set())
        assert [found.number for found in seen] == ([port] if kernel else [])
        told = ports.in_use(wanted(1, 1, port), set(), {port})
        assert [found.number for found in told] == [port]
        assert told[0].holder.startswith(f"pid {pid} (python") == kernel
    assert not ports.is_bound("127.0.0.1", port)
    ports.check_free("chat/0", "127.0.0.1", port)


@pytest.mark.usefixtures("kernel")
def test_a_port_that_somebody_listens_on_is_taken() -> None:
    with listener() as (pid, port):
        with pytest.raises(PortTaken, match=rf"port {port} has been taken by pid {pid} \("):
            ports.check_free("chat/0", "127.0.0.1", port)
        assert not ports.is_bound("127.0.0.2", port)


@pytest.mark.usefixtures("kernel")
def test_a_port_from_which_somebody_is_connected_elsewhere_is_taken() -> None:
    """No listener is there, and yet no server could bind it."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.bind(("127.0.0.1", 0))
        client.connect(server.getsockname())
        with pytest.raises(PortTaken, match="taken by another program"):
            ports.check_free("chat/0", "127.0.0.1", client.getsockname()[1])


def test_connections_of_a_server_that_has_ended_do_not_take_its_port(kernel: bool) -> None:
    """TIME_WAIT, and a client that has not closed yet; a program that took the port over does, if it can be seen."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        accepted = [server.accept()[0] for _ in clients]
    accepted[0].close()
    clients[0].close()
    with clients[1], accepted[1]:
        with socket.socket() as probe, pytest.raises(OSError, match="already in use"):
            probe.bind(("127.0.0.1", port))
        ports.check_free("chat/0", "127.0.0.1", port)
        with socket.socket() as heir:
            heir.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            heir.bind(("127.0.0.1", port))
            assert ports.is_bound("127.0.0.1", port) == kernel


def test_an_address_that_is_not_here_is_left_to_the_engine_to_complain_of() -> None:
    for bind in ("192.0.2.1", "no-such-host.invalid"):
        ports.check_free("chat/0", bind, free_port())


def test_they_come_in_order() -> None:
    with listener() as (_, one), listener() as (_, two), listener() as (_, three):
        found = ports.in_use(wanted(1024, 65535), set())
        numbers = [port.number for port in found]
        assert numbers == sorted(set(numbers))
        assert {one, two, three} <= set(numbers)
