"""Which GPUs a replica gets: the file and the machine put into slots and items, packed, and told as GPUs again."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sage_reconcile.core.host_memory import host_occupancy
from sage_reconcile.core.host_needs import NOTHING, HostNeed, host_need
from sage_reconcile.core.memory import launches_by_gpu, occupancy
from sage_reconcile.core.observed import ComputeMode, Gpu, Launch, Link, Observed, link_groups
from sage_reconcile.core.packing import BUDGET, pack
from sage_reconcile.core.promise import Breakdown, Known, known_of, kv_bytes, made_of, nearest_ways, promised_mib
from sage_reconcile.core.reasons import WORST_LINK, Book, barred, blocked, impossible, no_host_room, no_room, pinned
from sage_reconcile.core.slots import Item, Option, Slot
from sage_reconcile.core.spec import Desired, Engine

if TYPE_CHECKING:
    from sage_reconcile.core.ways import Way

_Kind = tuple[str, int, int]
"""GPUs of one model with equal memory and driver's reserve: an engine needs the same of each."""


@dataclass(frozen=True, slots=True)
class Request:
    """A replica that needs a place.

    ``position`` is its engine's place in the file; ``returning`` tells that it gives up a place which it has;
    ``destination`` are the GPUs (by UUID) to which it was on its way when it was stopped.
    """

    engine: Engine
    index: int
    position: int
    returning: bool = False
    destination: tuple[str, ...] = ()

    @property
    def replica(self) -> str:
        """``chat/0``."""
        return f"{self.engine.name}/{self.index}"

    def rank(self) -> tuple[bool, int, int, int]:
        """Where it stands in the order of admission."""
        return not self.returning, -self.engine.spec.priority, self.position, self.index


@dataclass(frozen=True, slots=True)
class Placement:
    """GPUs for a replica, in rank order, and what it is promised on each of them.

    ``blocked`` says why it can never be started there; empty where it can. ``host`` is what it is promised of the
    host's memory.
    """

    gpus: tuple[Gpu, ...]
    memory_mib: int
    blocked: str = ""
    host: HostNeed = NOTHING


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a replica has no place, in numbers.

    ``ways`` are changes of its entry that would make it fit, where it is too large for every GPU even if it is empty.
    """

    reason: str
    ways: tuple[Way, ...] = ()


def place(
    desired: Desired,
    observed: Observed,
    requests: Iterable[Request],
    leaving: frozenset[str],
    budget: int = BUDGET,
) -> dict[str, Placement | Refusal]:
    """A place, or a reason why not, for every request.

    ``leaving`` are the ids of launches that will be gone before anything is started. First come those that give
    up a place (a newcomer never displaces what runs), then by priority, then in file order: each gets in if and
    only if it and all before it can be placed together. Of the arrangements that hold them all the one is taken
    that links the ranks of each best, leaves most islands and GPUs whole, and fits tightest; then the order of
    PCI ids decides. What is on its way to a place goes there or nowhere. ``budget`` is what may be spent on searching.
    """
    return _Placing(desired, observed, leaving).results(sorted(requests, key=Request.rank), budget)


def books(desired: Desired, observed: Observed, leaving: frozenset[str]) -> list[Book]:
    """A page for each GPU with what is on it once those in ``leaving`` have gone, in the order of PCI ids."""
    alone = {engine.name for engine in desired.engines if engine.spec.exclusive}
    on = launches_by_gpu(observed)
    found = []
    for gpu in sorted(observed.gpus, key=lambda gpu: (gpu.pci_id, gpu.index)):
        here = [launch for launch in on[gpu.uuid] if launch.id not in leaving]
        exclusive = (x.replica for x in here if x.engine_name in alone or x.spec.get("exclusive") is True)
        taken = occupancy(gpu, on[gpu.uuid], desired.host.headroom, leaving=leaving)
        found.append(Book(gpu, taken, barred(desired.host, gpu, here), next(exclusive, "")))
    return found


def needs(engine: Engine, book: Book, observed: Observed) -> int | None:
    """MiB that a replica of this engine needs of this GPU; None where that cannot be told."""
    headroom = book.taken.kept_back_mib - book.gpu.memory_reserved_mib
    return promised_mib(engine.spec, book.gpu, known_of(engine, book.gpu, observed), headroom)


class _Placing:
    """One box being filled."""

    def __init__(self, desired: Desired, observed: Observed, leaving: frozenset[str]) -> None:
        self.observed = observed
        self.spread = [engine.name for engine in desired.engines if engine.spec.spread == "gpu"]
        self.books = books(desired, observed, leaving)
        self._host = host_occupancy(observed, leaving=leaving)
        self._host_needs: dict[str, HostNeed] = {}
        self._kinds: dict[_Kind, list[int]] = {}
        for position, book in enumerate(self.books):
            kind = (book.gpu.name, book.gpu.memory_total_mib, book.gpu.memory_reserved_mib)
            self._kinds.setdefault(kind, []).append(position)
        self._groups: dict[Link, dict[str, int]] = {}
        self._pools: dict[object, tuple[tuple[int, ...], ...]] = {}

    def results(self, requests: Sequence[Request], budget: int) -> dict[str, Placement | Refusal]:
        """What becomes of each request, in this order.

        What has no GPUs for it leaves the host's memory to others: then all are packed once more, without it.
        """
        no_gpus: dict[str, bool] = {}
        while True:
            results: dict[str, Placement | Refusal] = {}
            asking, short = self._asking(requests, no_gpus, results)
            packed = pack([item for _, item in asking], self._slots(), budget)
            refused = {asking[at][0].replica: proven for at, proven in packed.refused.items()}
            if not (short and any(self._host_need(asking[at][0].engine).mib for at in packed.refused)):
                break
            no_gpus |= refused
        for position, found in sorted(packed.places.items()):
            request = asking[position][0]
            gpus = tuple(self.books[slot].gpu for slot in found.slots)
            need = self._host_need(request.engine)
            results[request.replica] = Placement(gpus, found.need_mib, blocked(request.engine, gpus), need)
            self._enter(request, found.slots, found.need_mib)
        told: dict[tuple[str, bool], Refusal] = {}
        engines = {request.replica: request.engine for request in requests}
        for replica, proven in (no_gpus | refused).items():
            engine = engines[replica]
            if (engine.name, proven) not in told:
                told[engine.name, proven] = Refusal(self._reason(engine, proven=proven), self._ways(engine))
            results[replica] = told[engine.name, proven]
        return results

    def _asking(
        self, requests: Sequence[Request], but_for: Container[str], results: dict[str, Placement | Refusal]
    ) -> tuple[list[tuple[Request, Item]], bool]:
        """What is to be packed, and whether the host's memory ran out for some; the rest goes into ``results``.

        The host's memory is one pool, so that whoever comes gets it as long as it lasts, one after another.
        """
        items: dict[tuple[str, tuple[str, ...]], Item | str] = {}
        asking: list[tuple[Request, Item]] = []
        taken, short = self._host, False
        for request in requests:
            engine, name = request.engine, (request.engine.name, request.destination)
            if request.replica in but_for:
                continue
            if engine.spec.gpu_count and name not in items:
                items[name] = self._item(engine, request.destination)
            item = items.get(name)
            need = self._host_need(engine)
            if isinstance(item, str):
                results[request.replica] = Refusal(item)
            elif item and request.returning and (why := blocked(engine, [book.gpu for book in self.books])):
                results[request.replica] = Refusal(why)  # what runs does not end for what cannot start
            elif need.mib and taken is not None and taken.free_mib < need.mib:
                results[request.replica] = Refusal(no_host_room(engine, need.mib, taken))
                short = True
            else:
                taken = taken.with_ours((request.replica, need.mib)) if need.mib and taken else taken
                if item:
                    asking.append((request, item))
                else:
                    results[request.replica] = Placement((), 0, host=need)
        return asking, short

    def _host_need(self, engine: Engine) -> HostNeed:
        if engine.name not in self._host_needs:
            facts = self.observed.models.get(engine.spec.model_at)
            self._host_needs[engine.name] = host_need(engine, facts, self.observed.host_memory)
        return self._host_needs[engine.name]

    def _need(self, engine: Engine, book: Book) -> int | None:
        return needs(engine, book, self.observed)

    def _slots(self) -> list[Slot]:
        bits = {name: 1 << number for number, name in enumerate(self.spread)}
        groups = list(zip(*self._levels(), strict=True)) or [()] * len(self.books)
        return [
            Slot(
                free_mib=-1 if book.barred or book.alone else book.taken.free_mib,
                clean=book.clean,
                marks=sum({bits.get(replica.rpartition("/")[0], 0) for replica, _ in book.taken.ours}),
                groups=group,
                single=book.gpu.compute_mode is ComputeMode.EXCLUSIVE,
            )
            for book, group in zip(self.books, groups, strict=True)
        ]

    def _levels(self) -> Iterator[list[int]]:
        """The groups of all GPUs at each level of links that tells some of them apart or joins some."""
        before = list(range(len(self.books)))
        for link in Link:
            found = self._linked(link)
            numbers = [found[book.gpu.uuid] for book in self.books]
            if numbers != before:
                yield numbers
            before = numbers

    def _linked(self, link: Link) -> dict[str, int]:
        if link not in self._groups:
            uuids = [book.gpu.uuid for book in self.books]
            numbers = {uuid: number for number, uuid in enumerate(uuids)}
            links = self.observed.links
            self._groups[link] = link_groups(uuids, links, link) if links else numbers
        return self._groups[link]

    def _item(self, engine: Engine, destination: tuple[str, ...]) -> Item | str:
        """What to pack for a replica of this engine, or why no amount of memory would help."""
        needs = {kind: self._need(engine, self.books[slots[0]]) for kind, slots in self._kinds.items()}
        reason = impossible(engine, self.books, list(needs.values()), self.observed.gpu_note)
        if reason:
            return reason
        known = {kind: need for kind, need in needs.items() if need is not None}
        options = []
        for name in dict.fromkeys(name for name, *_ in known):
            for most in sorted({need for kind, need in known.items() if kind[0] == name}):
                kinds = tuple(kind for kind, need in known.items() if kind[0] == name and need <= most)
                pools = self._allowed(engine, kinds)
                if destination:
                    pools = tuple(tuple(x for x in pool if self.books[x].gpu.uuid in destination) for pool in pools)
                options += [Option(most, pool) for pool in pools if len(pool) >= engine.spec.gpu_count]
        spread = 1 << self.spread.index(engine.name) if engine.name in self.spread else 0
        return Item(engine.spec.gpu_count, tuple(options), spread, engine.spec.exclusive)

    def _allowed(self, engine: Engine, kinds: tuple[_Kind, ...]) -> tuple[tuple[int, ...], ...]:
        """The slots of these kinds that an engine may use: all together, or those that are linked as it asks."""
        spec = engine.spec
        link = WORST_LINK.get(spec.link) if spec.gpu_count > 1 else None
        key = (kinds, spec.gpus, link)
        if key not in self._pools:
            slots = sorted(slot for kind in kinds for slot in self._kinds[kind])
            pools: dict[int, list[int]] = {}
            for slot in slots:
                gpu = self.books[slot].gpu
                if pinned(engine, gpu):
                    pools.setdefault(self._linked(link)[gpu.uuid] if link else 0, []).append(slot)
            self._pools[key] = tuple(tuple(pool) for pool in pools.values())
        return self._pools[key]

    def _enter(self, request: Request, slots: Sequence[int], need_mib: int) -> None:
        for slot in slots:
            book = self.books[slot]
            book.taken = book.taken.with_ours((request.replica, need_mib))
            book.started_mib += need_mib
            if request.engine.spec.exclusive:
                book.alone = request.replica
            elif book.gpu.compute_mode is ComputeMode.EXCLUSIVE:
                book.barred = f"it is in exclusive-process mode, and {request.replica} comes there"

    def _ways(self, engine: Engine) -> tuple[Way, ...]:
        usable = [
            (book.gpu, book.gpu.memory_total_mib - book.taken.kept_back_mib)
            for book in self.books
            if pinned(engine, book.gpu) and not book.gpu.problem
        ]
        return nearest_ways(engine.spec, usable, Known(self.observed.models.get(engine.spec.model_at)))

    def _reason(self, engine: Engine, *, proven: bool) -> str:
        needs = [self._need(engine, book) or 0 for book in self.books]
        groups: Mapping[str, int] = self._linked(WORST_LINK.get(engine.spec.link, Link.SYS))
        return no_room(engine, self.books, needs, groups, proven=proven)


def promise_of(engine: Engine, placement: Placement, observed: Observed) -> tuple[Breakdown | None, int]:
    """What is promised there, part by part, and the size that its KV cache is given (0: what is left).

    Of several GPUs on the smallest, which decides.
    """
    if not placement.gpus:
        return placement.host.made_of, 0
    smallest = min(placement.gpus, key=lambda gpu: gpu.memory_total_mib)
    known = known_of(engine, smallest, observed)
    found = made_of(engine.spec, placement.memory_mib, smallest, known)
    return found, kv_bytes(engine.spec, placement.memory_mib, smallest, known)


def launch_gpus(launch: Launch, gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """The GPUs of a launch that are there, in its order."""
    by_uuid = {gpu.uuid: gpu for gpu in gpus}
    return tuple(by_uuid[uuid] for uuid in launch.gpus if uuid in by_uuid)
