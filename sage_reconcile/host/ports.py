"""Which TCP ports other programs listen on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sage_reconcile.core.observed import Port
from sage_reconcile.core.spec import Desired

_LISTEN = "0A"


def in_use(desired: Desired, ours: set[int]) -> tuple[Port, ...]:
    """The ports that matter to this file and that something not ours listens on.

    Who listens is looked up only where it stands in the way of a port that an engine asks for by number.
    """
    fixed = {
        engine.spec.port + index
        for engine in desired.engines
        if engine.spec.port != "auto"
        for index in range(engine.spec.replicas)
    }
    ranges = [_range(desired.host.ports), _range(desired.host.inner_ports)]
    matters = (port for port in _listening() if port in fixed or any(port in among for among in ranges))
    taken = {port for port in matters if port not in ours}
    holders = _holders(taken & fixed) if taken & fixed else {}
    return tuple(Port(port, holders.get(port, "")) for port in sorted(taken))


def _range(text: str) -> range:
    low, high = text.split("-")
    return range(int(low), int(high) + 1)


def _listening() -> Iterator[int]:
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split(maxsplit=4)
            if fields[3] == _LISTEN:
                yield int(fields[1].rpartition(":")[2], 16)


def _holders(wanted: set[int]) -> dict[int, str]:
    import psutil  # noqa: PLC0415 - 20 ms of every start, and seldom needed

    holders: dict[int, str] = {}
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.Error:
        return holders
    for connection in connections:
        local, pid = connection.laddr, connection.pid
        if connection.status != psutil.CONN_LISTEN or not local or local.port not in wanted or not pid:
            continue
        try:
            holders[local.port] = f"pid {pid} ({psutil.Process(pid).name()})"
        except psutil.Error:
            holders[local.port] = f"pid {pid}"
    return holders
