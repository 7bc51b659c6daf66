"""Which GPUs a replica gets: best fit, largest first, every tie broken by a fixed order, every refusal in numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from sage_reconcile.core.memory import Occupancy, launches_by_gpu, occupancy, promised_mib
from sage_reconcile.core.observed import Gpu, Launch, ModelFacts, Observed
from sage_reconcile.core.spec import Desired, Engine, HostSpec
from sage_reconcile.core.units import mib_text


@dataclass(frozen=True, slots=True)
class Request:
    """A replica that needs a place.

    ``position`` is its engine's place in the file; ``returning`` tells that it gives up a place which it has.
    """

    engine: Engine
    index: int
    position: int
    returning: bool = False

    @property
    def replica(self) -> str:
        """``chat/0``."""
        return f"{self.engine.name}/{self.index}"


@dataclass(frozen=True, slots=True)
class Placement:
    """GPUs for a replica, in rank order, and what it is promised on each of them."""

    gpus: tuple[Gpu, ...]
    memory_mib: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a replica has no place, in numbers."""

    reason: str


@dataclass(slots=True)
class _Book:
    """One GPU's page while placing: what it has left, and who has the rest."""

    gpu: Gpu
    taken: Occupancy
    free_mib: int
    barred: str


def gib(mib: int) -> str:
    """MiB as GiB for people: ``23.5GiB``."""
    return f"{mib / 1024:.1f}GiB"


def gpu_label(gpu: Gpu) -> str:
    """How a GPU is called in sentences: ``GPU 0``."""
    return f"GPU {gpu.index}"


def excluded(host: HostSpec, gpu: Gpu) -> bool:
    """Whether the file keeps new engines off this GPU."""
    return gpu.index in host.exclude or gpu.uuid in host.exclude


def pinned(engine: Engine, gpu: Gpu) -> bool:
    """Whether an engine may use this GPU as far as its own ``gpus`` field goes."""
    pins = engine.spec.gpus
    return pins == "auto" or gpu.index in pins or gpu.uuid in pins


def place(
    desired: Desired, observed: Observed, requests: Iterable[Request], leaving: frozenset[str]
) -> dict[str, Placement | Refusal]:
    """A place, or a reason why not, for every request.

    ``leaving`` are the ids of launches that will be gone before anything is started. First those that give up
    a place (a newcomer never displaces what runs), then by priority, then by GPUs × memory with the largest
    first (0.83 % from the best packing on one box, against 6.1 % by memory per GPU), then in file order; each
    on the GPUs that it fills most.
    """
    on = launches_by_gpu(observed)
    books = [
        _Book(gpu, taken, taken.free_mib, _barred(desired.host, gpu))
        for gpu in sorted(observed.gpus, key=lambda gpu: (gpu.pci_id, gpu.index))
        for taken in (occupancy(gpu, on[gpu.uuid], desired.host.headroom, leaving=leaving),)
    ]
    results: dict[str, Placement | Refusal] = {}
    for request in sorted(requests, key=lambda request: _order(request, observed)):
        result = _place_one(request, books, observed)
        results[request.replica] = result
        if isinstance(result, Placement):
            chosen = {gpu.uuid for gpu in result.gpus}
            for book in books:
                if book.gpu.uuid in chosen:
                    book.free_mib -= result.memory_mib
                    held = (*book.taken.ours, (request.replica, result.memory_mib))
                    book.taken = Occupancy(
                        book.taken.total_mib, book.taken.kept_back_mib, held, book.taken.unmanaged_mib
                    )
    return results


def _barred(host: HostSpec, gpu: Gpu) -> str:
    if gpu.problem:
        return gpu.problem
    return "excluded by `host.exclude`" if excluded(host, gpu) else ""


def _order(request: Request, observed: Observed) -> tuple[bool, int, int, int, int]:
    spec = request.engine.spec
    largest = max((_need(request, gpu, observed.models) or 0 for gpu in observed.gpus), default=0)
    return not request.returning, -spec.priority, -spec.gpu_count * largest, request.position, request.index


def _need(request: Request, gpu: Gpu, models: Mapping[str, ModelFacts]) -> int | None:
    spec = request.engine.spec
    return promised_mib(spec, gpu, models.get(spec.model or ""))


def _place_one(request: Request, books: Sequence[_Book], observed: Observed) -> Placement | Refusal:
    spec = request.engine.spec
    if not spec.gpu_count:
        return Placement((), 0)
    refusal = _impossible(request, books, observed)
    if refusal:
        return Refusal(refusal)
    best: tuple[tuple[int, int], Placement] | None = None
    for name in dict.fromkeys(book.gpu.name for book in books):
        fitting = [
            (book.free_mib - need, position, book, need)
            for position, book in enumerate(books)
            if book.gpu.name == name and not book.barred and pinned(request.engine, book.gpu)
            for need in (_need(request, book.gpu, observed.models),)
            if need is not None and need <= book.free_mib
        ]
        if len(fitting) < spec.gpu_count:
            continue
        chosen = sorted(fitting, key=lambda item: item[:2])[: spec.gpu_count]
        memory = max(item[3] for item in chosen)
        if any(item[2].free_mib < memory for item in chosen):
            continue
        gpus = tuple(item[2].gpu for item in sorted(chosen, key=lambda item: item[1]))
        score = (sum(item[0] for item in chosen), min(item[1] for item in chosen))
        if best is None or score < best[0]:
            best = (score, Placement(gpus, memory))
    return best[1] if best else Refusal(_no_room(request, books, observed))


def _impossible(request: Request, books: Sequence[_Book], observed: Observed) -> str:
    """Why no amount of free memory would help; empty where it would."""
    spec = request.engine.spec
    if not books:
        note = f": {observed.gpu_note}" if observed.gpu_note else ""
        return f"needs {_gpus(spec.gpu_count)}, but this machine has none{note}; `device: cpu` runs it without"
    if spec.runtime != "simulator" and all(book.gpu.simulated for book in books):
        return (
            "the GPUs of this file are simulated (declared under `host.gpus`), and only `runtime: simulator` runs on "
            "them; use `host.gpus: auto` for the real ones"
        )
    missing = (
        []
        if spec.gpus == "auto"
        else [pin for pin in spec.gpus if not any(pin in (b.gpu.index, b.gpu.uuid) for b in books)]
    )
    if missing:
        known = ", ".join(str(book.gpu.index) for book in books)
        return f"its `gpus` name {', '.join(map(str, missing))}, which this machine does not have; it has {known}"
    if _need(request, books[0].gpu, observed.models) is None:
        return f"`memory: auto` cannot tell what {spec.model or 'it'} takes; say it with `memory: 24GiB`"
    return ""


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs of one model"


def _no_room(request: Request, books: Sequence[_Book], observed: Observed) -> str:
    """Need, what is there, and for every GPU what stands in the way."""
    spec = request.engine.spec
    allowed = [book for book in books if pinned(request.engine, book.gpu)]
    needs = [_need(request, book.gpu, observed.models) or 0 for book in allowed]
    most = max(needs)
    fitting = [book for book, need in zip(allowed, needs, strict=True) if not book.barred and need <= book.free_mib]
    close = any(book.free_mib < most and gib(book.free_mib) == gib(most) for book in allowed)
    size = _mib if close else gib
    amount = size(most) if spec.memory.kind == "mib" else f"{spec.memory} = {size(most)}"
    only = "" if spec.gpus == "auto" else f" (`gpus: [{', '.join(str(pin) for pin in spec.gpus)}]`)"
    has = f"{len(fitting)} {'has' if len(fitting) == 1 else 'have'} that free" if fitting else "none has that free"
    mixed = spec.gpu_count > 1 and len({book.gpu.name for book in allowed}) > 1
    states = (_state(book, f"{gpu_label(book.gpu)}{f' ({book.gpu.name})' * mixed}", size) for book in allowed)
    return f"needs {amount} on {_gpus(spec.gpu_count)}{only}; {has}: " + "; ".join(states)


def _mib(mib: int) -> str:
    """For amounts so close that they would look the same in GiB."""
    return f"{mib}MiB"


def _state(book: _Book, label: str, size: Callable[[int], str]) -> str:
    if book.barred:
        return f"{label} takes nothing new ({book.barred})"
    holders = [f"{replica} {gib(mib)}" for replica, mib in book.taken.ours]
    if book.taken.unmanaged_mib:
        holders.append(f"{strangers(book.gpu)} {gib(book.taken.unmanaged_mib)}")
    if book.taken.kept_back_mib:
        holders.append(f"reserve and headroom {gib(book.taken.kept_back_mib)}")
    taken = f" ({', '.join(holders)})" if holders else ""
    return f"{label} has {size(max(0, book.free_mib))} of {mib_text_short(book.gpu)} free{taken}"


def mib_text_short(gpu: Gpu) -> str:
    """A GPU's size in the unit in which it is sold."""
    return mib_text(gpu.memory_total_mib) if gpu.memory_total_mib % 1024 == 0 else gib(gpu.memory_total_mib)


def strangers(gpu: Gpu) -> str:
    """Who holds memory here that is not ours: ``unmanaged: pid 812 alice python``."""
    found = sorted(
        (process for process in gpu.processes if process.launch is None),
        key=lambda p: (-(p.memory_mib or 0), p.pid),
    )
    if not found:
        return "unmanaged"
    names = [" ".join(part for part in (f"pid {p.pid}", p.user, p.command) if part) for p in found[:3]]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"unmanaged ({', '.join(names)}{more})"


def launch_gpus(launch: Launch, gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """The GPUs of a launch that are there, in its order."""
    by_uuid = {gpu.uuid: gpu for gpu in gpus}
    return tuple(by_uuid[uuid] for uuid in launch.gpus if uuid in by_uuid)
