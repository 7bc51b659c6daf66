"""Which ports a replica gets. A port is taken while anything of ours or of a stranger may hold it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from sage_reconcile.core.command import inner_port_count
from sage_reconcile.core.observed import Launch, Observed
from sage_reconcile.core.placement import Refusal
from sage_reconcile.core.spec import Desired, Engine


@dataclass(frozen=True, slots=True)
class Lease:
    """The ports of one replica: the one it listens on, and a block of its own for what vLLM opens inside."""

    port: int
    inner_ports: range

    @property
    def ports(self) -> tuple[int, ...]:
        """All of them."""
        return (self.port, *self.inner_ports)


class Ports:
    """The ports of one plan: leased one by one, none of them twice.

    ``leaving`` are the ids of launches that end before anything starts; their ports are free again,
    but are given first to the replica that had them, so that its address stays. Blocks of inner ports keep
    clear of ``host.ports`` and of every port that an entry names.
    """

    def __init__(self, desired: Desired, observed: Observed, leaving: frozenset[str]) -> None:
        self._range, self._inner = _range(desired.host.ports), _range(desired.host.inner_ports)
        self._holding = [launch for launch in observed.launches if launch.holds]
        self._leaving, self._others = leaving, observed.ports
        self._promised = {
            engine.spec.port + index: f"{engine.name}/{index}"
            for engine in desired.engines
            if engine.spec.port != "auto"
            for index in range(engine.spec.replicas)
        }
        self._looked_to: dict[tuple[int, bool], int] = {}

    # Most plans lease nothing: these are made when they are asked for first.

    @cached_property
    def _taken(self) -> dict[int, str]:
        staying = (launch for launch in self._holding if launch.id not in self._leaving)
        return {port: launch.replica for launch in staying for port in launch.ports}

    @cached_property
    def _before(self) -> set[int]:
        return {port for launch in self._holding if launch.id in self._leaving for port in launch.ports}

    @cached_property
    def _strangers(self) -> dict[int, str]:
        ours = {port for launch in self._holding for port in launch.ports}
        return {port.number: port.holder for port in self._others if port.number not in ours}

    def lease(self, engine: Engine, index: int, before: Launch | None) -> Lease | Refusal:
        """The ports of this replica, ``before`` being its last launch; or why there are none."""
        replica = f"{engine.name}/{index}"
        port = self._port(engine, index, before.port if before else None)
        if isinstance(port, Refusal):
            return port
        count = inner_port_count(engine.spec)
        block = self._block(count, before.inner_ports if before else range(0))
        if block is None:
            return Refusal(self._no_block(count))
        lease = Lease(port, block)
        self._taken |= dict.fromkeys(lease.ports, replica)
        return lease

    def _port(self, engine: Engine, index: int, before: int | None) -> int | Refusal:
        replica = f"{engine.name}/{index}"
        if engine.spec.port != "auto":
            return self._fixed(engine.spec.port + index)
        if before is not None and before in self._range and self._free(before, replica):
            return before
        free = (port for port in self._range if self._free(port, replica))
        port = next((port for port in free if port not in self._before), None)
        port = port or next((port for port in self._range if self._free(port, replica)), None)
        return port or Refusal(self._full())

    def _full(self) -> str:
        ours, others, kept = self._counts(self._range, set(self._promised))
        return (
            f"no port is free in {self._range.start}-{self._range.stop - 1} (`host.ports`): "
            f"{ours} ours, {others} of other programs, {kept} kept for entries that name them"
        )

    def _no_block(self, count: int) -> str:
        ours, others, kept = self._counts(self._inner, self._promised.keys() | set(self._range))
        return (
            f"no {count} ports in a row are free in {self._inner.start}-{self._inner.stop - 1} (`host.inner_ports`), "
            f"which vLLM needs inside: {ours} ours, {others} of other programs, {kept} kept for `host.ports` and "
            "entries that name them; make the range larger"
        )

    def _counts(self, among: range, kept: set[int]) -> tuple[int, int, int]:
        """How many ports of a range are ours, of other programs, and kept for something else."""
        ours = {port for port in self._taken if port in among}
        others = {port for port in self._strangers if port in among} - ours
        return len(ours), len(others), len({port for port in kept if port in among} - ours - others)

    def _fixed(self, port: int) -> int | Refusal:
        holder = self._taken.get(port)
        if holder is None and port in self._strangers:
            holder = self._strangers[port] or "another program"
        if holder is not None:
            return Refusal(f"port {port} is taken by {holder}; choose another, or write `port: auto`")
        return port

    def _free(self, port: int, replica: str) -> bool:
        return port not in self._taken and port not in self._strangers and self._promised.get(port, replica) == replica

    def _block(self, count: int, before: range) -> range | None:
        """The block it had, where that is free; else the first that nobody had; else the first that comes free."""
        if len(before) == count and all(self._free_inside(port) for port in before):
            return before
        found = self._first(count, fresh=True)
        return self._first(count, fresh=False) if found is None else found

    def _first(self, count: int, *, fresh: bool) -> range | None:
        """The first so many free ports in a row. Within one plan ports are only taken: what was too small stays so."""
        start = self._looked_to.get((count, fresh), self._inner.start)
        end = start
        while end - start < count:
            if end not in self._inner:
                self._looked_to[count, fresh] = start
                return None
            end += 1
            if not self._free_inside(end - 1) or (fresh and end - 1 in self._before):
                start = end
        self._looked_to[count, fresh] = start
        return range(start, end)

    def _free_inside(self, port: int) -> bool:
        taken = port in self._taken or port in self._strangers or port in self._promised
        return port in self._inner and port not in self._range and not taken


def _range(text: str) -> range:
    low, high = text.split("-")
    return range(int(low), int(high) + 1)
