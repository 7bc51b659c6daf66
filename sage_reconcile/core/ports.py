"""Which port a replica listens on. A port is taken while anything of ours or of a stranger may hold it."""

from __future__ import annotations

from sage_reconcile.core.observed import Observed
from sage_reconcile.core.placement import Refusal
from sage_reconcile.core.spec import Desired, Engine


class Ports:
    """The ports of one plan: leased one by one, none of them twice.

    ``leaving`` are the ids of launches that end before anything starts; their ports are free again,
    but are given first to the replica that had them, so that its address stays.
    """

    def __init__(self, desired: Desired, observed: Observed, leaving: frozenset[str]) -> None:
        low, high = desired.host.ports.split("-")
        self._range = range(int(low), int(high) + 1)
        holding = [launch for launch in observed.launches if launch.holds]
        ours = {launch.port for launch in holding}
        self._strangers = {port.number: port.holder for port in observed.ports if port.number not in ours}
        self._taken = {launch.port: launch.replica for launch in holding if launch.id not in leaving}
        self._promised = {
            engine.spec.port + index: f"{engine.name}/{index}"
            for engine in desired.engines
            if engine.spec.port != "auto"
            for index in range(engine.spec.replicas)
        }
        self._before = {launch.port for launch in holding if launch.id in leaving}

    def lease(self, engine: Engine, index: int, before: int | None) -> int | Refusal:
        """A port for this replica, ``before`` being the one it had last; or why there is none."""
        replica = f"{engine.name}/{index}"
        if engine.spec.port != "auto":
            return self._fixed(replica, engine.spec.port + index)
        if before is not None and before in self._range and self._free(before, replica):
            return self._take(before, replica)
        free = (port for port in self._range if self._free(port, replica))
        port = next((port for port in free if port not in self._before), None)
        port = port or next((port for port in self._range if self._free(port, replica)), None)
        if port is None:
            return Refusal(self._full())
        return self._take(port, replica)

    def _full(self) -> str:
        ours = {port for port in self._taken if port in self._range}
        others = {port for port in self._strangers if port in self._range} - ours
        kept = {port for port in self._promised if port in self._range} - ours - others
        return (
            f"no port is free in {self._range.start}-{self._range.stop - 1} (`host.ports`): "
            f"{len(ours)} ours, {len(others)} of other programs, {len(kept)} kept for entries that name them"
        )

    def _fixed(self, replica: str, port: int) -> int | Refusal:
        holder = self._taken.get(port)
        if holder is None and port in self._strangers:
            holder = self._strangers[port] or "another program"
        if holder is not None:
            return Refusal(f"port {port} is taken by {holder}; choose another, or write `port: auto`")
        return self._take(port, replica)

    def _free(self, port: int, replica: str) -> bool:
        return port not in self._taken and port not in self._strangers and self._promised.get(port, replica) == replica

    def _take(self, port: int, replica: str) -> int:
        self._taken[port] = replica
        return port
