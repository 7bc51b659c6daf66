"""Which TCP ports other programs have: those they listen on, and those they have bound and may listen on later.

Of two programs that bind one port with SO_REUSEADDR the second fails only when it comes to listen, which with vLLM
is minutes later, after loading.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from sage_reconcile.core.observed import Port
from sage_reconcile.core.spec import Desired
from sage_reconcile.errors import PortTaken

_SOCK_DIAG = 4
_LISTEN, _BOUND = 10, 13
"""Socket states as linux/tcp_states.h counts them; a socket that is bound only can be asked for from Linux 6.8 on."""


def in_use(desired: Desired, ours: set[int], found_bound: Iterable[int] = ()) -> tuple[Port, ...]:
    """The ports that matter to this file and that something not ours listens on or has bound.

    ``found_bound`` are ports which a start found taken, since older kernels tell only of those that listen. Who has
    a port is looked up only where it stands in the way of one that an engine asks for by number.
    """
    fixed = {
        engine.spec.port + index
        for engine in desired.engines
        if engine.spec.port != "auto"
        for index in range(engine.spec.replicas)
    }
    ranges = [_range(desired.host.ports), _range(desired.host.inner_ports)]
    sockets = {**dict.fromkeys(found_bound, 0), **_sockets()}
    taken = {
        port: inode
        for port, inode in sockets.items()
        if port not in ours and (port in fixed or any(port in among for among in ranges))
    }
    asked = {port: inode for port, inode in taken.items() if port in fixed}
    holders = _holders(asked) if asked else {}
    return tuple(Port(port, holders.get(port, "")) for port in sorted(taken))


def check_free(replica: str, bind: str, port: int) -> None:
    """The last look before a start: whether the port can be bound at this address.

    Raises:
        PortTaken: another program has it.
    """
    if is_bound(bind, port):
        holder = _holders({port: _sockets().get(port, 0)}).get(port, "another program")
        raise PortTaken(
            f"cannot start {replica}: port {port} has been taken by {holder} meanwhile; end that program or choose "
            "another port (`port: auto` takes another one by itself)"
        )


def is_bound(bind: str, port: int) -> bool:
    """Whether another program has this port at this address, listening or not, so that an engine could not have it.

    What only connections of a server that has ended still hold (TIME_WAIT and the like) is free: servers take it
    over with SO_REUSEADDR. Where the kernel does not tell such connections and a silent program apart, it is free.
    """
    if _can_bind(bind, port, reuse=False):
        return False
    if not _can_bind(bind, port, reuse=True) or port in _sockets():
        return True
    return not any(local == port for local, _, _ in _table())


def _can_bind(bind: str, port: int, *, reuse: bool) -> bool:
    try:
        found = socket.getaddrinfo(bind, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuse))
            probe.bind(address)
    except OSError as error:
        return error.errno != errno.EADDRINUSE  # what else is wrong, the engine says itself
    return True


def _range(text: str) -> range:
    low, high = text.split("-")
    return range(int(low), int(high) + 1)


def _sockets() -> dict[int, int]:
    """The inode of a socket for each port that is listened on or, where the kernel can tell, bound.

    The kernel is asked for these sockets alone (under 1 ms); its tables in ``/proc`` list all connections, and
    reading them takes 10 ms even where there are none. They are for where it may not be asked.
    """
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as kernel:
            kernel.settimeout(1)
            return {port: inode for family in (socket.AF_INET, socket.AF_INET6) for port, inode in _ask(kernel, family)}
    except OSError:
        return {port: inode for port, state, inode in _table() if state == _LISTEN}


def _ask(kernel: socket.socket, family: int) -> Iterator[tuple[int, int]]:
    """Port and inode of every socket that listens or is bound only, by sock_diag(7).

    Raises:
        OSError: the kernel cannot or may not tell.
    """
    request = struct.pack("=BBBxI48x", family, socket.IPPROTO_TCP, 0, 1 << _LISTEN | 1 << _BOUND)
    kernel.send(struct.pack("=IHHII", 16 + len(request), 20, 0x301, 0, 0) + request)  # SOCK_DIAG_BY_FAMILY, a dump
    while True:
        answer = kernel.recv(1 << 16)
        at = 0
        while at < len(answer):
            length, kind = struct.unpack_from("=IH", answer, at)
            if kind in (2, 3):  # NLMSG_ERROR, NLMSG_DONE
                code = struct.unpack_from("=i", answer, at + 16)[0]
                if code < 0:
                    raise OSError(-code, os.strerror(-code))
                return
            (port,) = struct.unpack_from("!H", answer, at + 20)
            (inode,) = struct.unpack_from("=I", answer, at + 84)
            yield port, inode
            at += (length + 3) & ~3


def _table() -> Iterator[tuple[int, int, int]]:
    """Local port, state and inode of every TCP socket that ``/proc`` lists: all but those that are bound only."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_bytes().splitlines()[1:]:
                fields = line.split(maxsplit=10)
                yield int(fields[1].rpartition(b":")[2], 16), int(fields[3], 16), int(fields[9])


def _holders(wanted: Mapping[int, int]) -> dict[int, str]:
    """Who has the sockets of these inodes, by their ports, where that can be told.

    Seldom needed: it goes through the open files of all processes.
    """
    ports = {f"socket:[{inode}]": port for port, inode in wanted.items() if inode}
    holders: dict[int, str] = {}
    for process in os.scandir("/proc") if ports else ():
        if not process.name.isdecimal():
            continue
        with contextlib.suppress(OSError):
            for file in Path(process.path, "fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    port = ports.get(str(file.readlink()))
                    if port is not None:
                        holders.setdefault(port, f"pid {process.name} ({_command(process.name)})")
    return holders


def _command(pid: str) -> str:
    return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
