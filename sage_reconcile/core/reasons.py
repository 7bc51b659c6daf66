"""Why a replica has no place, in numbers: what it needs, what is there, and which limit ran out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sage_reconcile.core.gpu_models import size_text
from sage_reconcile.core.host_spec import HostSpec
from sage_reconcile.core.memory import IDLE_MIB, Occupancy
from sage_reconcile.core.observed import ComputeMode, Gpu, GpuProcess, Launch, Link
from sage_reconcile.core.spec import Engine
from sage_reconcile.core.units import mib_text, printable

WORST_LINK: Mapping[str, Link] = {"nvlink": Link.NVLINK, "numa": Link.NODE}
"""What each value of ``link`` asks for at the least; NVLink between NUMA nodes is better than either asks for."""
_LINKED = {"nvlink": " joined by NVLink (`link: nvlink`)", "numa": " of one NUMA node (`link: numa`)", "any": ""}
_MOST_SHOWN = 16
"""GPUs told one by one in a reason: as many as a large box has."""


@dataclass(slots=True)
class Book:
    """One GPU's page while placing: what it has left, and who has the rest.

    ``barred`` says why it takes nothing new, ``alone`` which replica has it for itself; both empty where neither.
    ``started_mib`` is what the plan starts there.
    """

    gpu: Gpu
    taken: Occupancy
    barred: str
    alone: str
    started_mib: int = 0

    @property
    def has_strangers(self) -> bool:
        """Whether others than ours are on it; what an idle driver shows as used is nobody's."""
        return self.taken.unmanaged_mib > IDLE_MIB or any(x.launch is None for x in self.gpu.processes)

    @property
    def clean(self) -> bool:
        """Whether nothing is on it, of ours or of others'."""
        return not (self.taken.ours or self.has_strangers)


def excluded(host: HostSpec, gpu: Gpu) -> bool:
    """Whether the file keeps everything new off a GPU."""
    return gpu.index in host.exclude or gpu.uuid in host.exclude


def problem(gpu: Gpu, here: Sequence[Launch]) -> str:
    """Why nothing new may be placed on a GPU where these launches are; empty where it may.

    One in exclusive-process mode is full when a single process computes on it, or a launch of ours is about to.
    """
    if gpu.problem or gpu.compute_mode is not ComputeMode.EXCLUSIVE:
        return gpu.problem
    replicas = {launch.id: launch.replica for launch in here}
    holders = [process for process in gpu.processes if not process.graphics]
    names = [_names(process) for process in sorted(holders, key=lambda p: p.pid) if process.launch is None]
    names = [*dict.fromkeys(replicas.values()), *names]
    return f"it is in exclusive-process mode and held by {', '.join(names)}" if names else ""


def barred(host: HostSpec, gpu: Gpu, here: Sequence[Launch]) -> str:
    """The same, where the file may say so too."""
    return problem(gpu, here) or ("excluded by `host.exclude`" if excluded(host, gpu) else "")


def gib(mib: int) -> str:
    """MiB as GiB for people: ``23.5GiB``."""
    return f"{mib / 1024:.1f}GiB"


def gpu_names(gpus: Sequence[Gpu]) -> str:
    """``GPU 3`` or ``GPUs 0,1``."""
    return f"{'GPU' if len(gpus) == 1 else 'GPUs'} {','.join(str(gpu.index) for gpu in gpus)}"


def pinned(engine: Engine, gpu: Gpu) -> bool:
    """Whether an engine may use this GPU as far as its own ``gpus`` field goes."""
    pins = engine.spec.gpus
    return pins == "auto" or gpu.index in pins or gpu.uuid in pins


def impossible(engine: Engine, books: Sequence[Book], needs: Sequence[int | None], note: str) -> str:
    """Why no amount of free memory would help; empty where it would. ``note`` is that of the look at the GPUs."""
    spec = engine.spec
    if not books:
        why = f": {note}" if note else ""
        return f"needs {_gpus(spec.gpu_count)}, but this machine has none{why}; `device: cpu` runs it without"
    missing = (
        []
        if spec.gpus == "auto"
        else [pin for pin in spec.gpus if not any(pin in (b.gpu.index, b.gpu.uuid) for b in books)]
    )
    if missing:
        known = ", ".join(str(book.gpu.index) for book in books)
        why = f"; {note}" if note and any(isinstance(pin, str) for pin in missing) else ""
        return f"its `gpus` name {', '.join(map(str, missing))}, which this machine does not have; it has {known}{why}"
    if needs[0] is None:
        return f"`memory: auto` cannot tell what {spec.model or 'it'} takes; say it with `memory: 24GiB`"
    return ""


def blocked(engine: Engine, gpus: Sequence[Gpu]) -> str:
    """Why a replica could have these GPUs and yet never be started on this machine; empty where it can be."""
    if engine.spec.runtime != "simulator" and any(gpu.simulated for gpu in gpus):
        return (
            "the GPUs of this file are declared, not there; only `runtime: simulator` runs on them (`host.gpus: auto` "
            "takes those of the machine)"
        )
    return ""


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What one GPU means to an engine: ``bar`` is what keeps it off, whatever memory is free there."""

    book: Book
    need_mib: int
    free_mib: int
    bar: str


def no_room(
    engine: Engine, books: Sequence[Book], needs: Sequence[int], groups: Mapping[str, int], *, proven: bool
) -> str:
    """Need, what is there, and for every GPU what stands in the way.

    ``needs`` go with the books; ``groups`` tell which GPUs are joined by the links that are asked for.
    """
    spec = engine.spec
    verdicts = [
        _Verdict(book, need, book.taken.free_mib, bar(engine, book))
        for book, need in zip(books, needs, strict=True)
        if pinned(engine, book.gpu)
    ]
    most = max(verdict.need_mib for verdict in verdicts)
    close = any(v.free_mib < most and gib(v.free_mib) == gib(most) for v in verdicts)
    size = _mib if close else gib
    amount = size(most) if spec.memory.kind == "mib" else f"{spec.memory} = {size(most)}"
    fitting = [v.book for v in verdicts if v.need_mib <= v.free_mib and not v.bar]
    mixed = spec.gpu_count > 1 and len({v.book.gpu.name for v in verdicts}) > 1
    best = sorted(range(len(verdicts)), key=lambda at: (bool(verdicts[at].bar), -verdicts[at].free_mib))
    states = [
        _state(verdicts[at], f"GPU {verdicts[at].book.gpu.index}{f' ({verdicts[at].book.gpu.name})' * mixed}", size)
        for at in sorted(best[:_MOST_SHOWN])
    ]
    if len(verdicts) > len(states):
        states.append(f"{len(verdicts) - len(states)} more have no more than these")
    return (
        f"needs {amount} on {_gpus(spec.gpu_count)}{_conditions(engine)}; {_has(engine, fitting, groups)}"
        f"{_short_of(engine, verdicts, fitting, size)}: " + "; ".join(states) + _proof(engine, verdicts, proven=proven)
    )


def no_host_room(engine: Engine, need_mib: int, taken: Occupancy) -> str:
    """Why the host's memory is not enough: the need, what is free, and who has the rest."""
    spec = engine.spec
    size = _mib if gib(need_mib) == gib(taken.free_mib) else gib
    told = f"{spec.memory} = " if spec.device == "cpu" and spec.memory.kind != "mib" else ""
    what = "" if spec.device == "cpu" else " beside its GPUs (offloaded by its `args`)"
    usable = taken.total_mib - taken.kept_back_mib
    never = f"; empty it would have {size(usable)} to give" if need_mib > usable else ""
    return (
        f"needs {told}{size(need_mib)} of host memory{what}; {size(taken.free_mib)} of {gib(taken.total_mib)} are free "
        f"({', '.join(host_holders(taken))}){never}"
    )


def host_holders(taken: Occupancy) -> list[str]:
    """Who has what of the host's memory: ``chat/0 6.0GiB``, then all others, then what is kept back."""
    holders = [f"{replica} {gib(mib)}" for replica, mib in taken.ours]
    if taken.unmanaged_mib:
        holders.append(f"others {gib(taken.unmanaged_mib)}")
    return [*holders, f"kept back {gib(taken.kept_back_mib)}"]


def _conditions(engine: Engine) -> str:
    spec = engine.spec
    them = "it" if spec.gpu_count == 1 else "them"
    alone = f" with nothing else on {them} (`exclusive: true`)" if spec.exclusive else ""
    spread = " without another replica of it (`spread: gpu`)" if spec.spread == "gpu" else ""
    only = "" if spec.gpus == "auto" else f" (`gpus: [{', '.join(str(pin) for pin in spec.gpus)}]`)"
    linked = _LINKED[spec.link] if spec.gpu_count > 1 else ""
    return f"{linked}{alone}{spread}{only}"


def _has(engine: Engine, fitting: Sequence[Book], groups: Mapping[str, int]) -> str:
    has = f"{len(fitting)} {'has' if len(fitting) == 1 else 'have'} that free" if fitting else "none has that free"
    if engine.spec.gpu_count < 2 or engine.spec.link == "any" or len(fitting) < 2:
        return has
    joined = [groups[book.gpu.uuid] for book in fitting]
    most = max(joined.count(group) for group in joined)
    return f"{has}, and no two of them are known to be so linked" if most < 2 else f"{has}, {most} of them so linked"


def _short_of(engine: Engine, verdicts: Sequence[_Verdict], fitting: Sequence[Book], size: Callable[[int], str]) -> str:
    """Which limit ran out, and of memory the best that is there; nothing where an arrangement is what is missing."""
    spec, count = engine.spec, engine.spec.gpu_count
    models = [book.gpu.name for book in fitting]
    if len(fitting) >= count:
        one_model = any(models.count(name) >= count for name in models)
        return " (short of linked GPUs)" if one_model and spec.link != "any" else " (short of GPUs of one model)"
    with_room = [verdict for verdict in verdicts if verdict.need_mib <= verdict.free_mib]
    if len(with_room) >= count:
        return " (short of GPUs that it may use)"
    usable = [verdict for verdict in verdicts if not verdict.bar]
    if len(usable) < count:
        return f" (short of GPUs: {len(usable)} of {count} may be used)" if usable or count > 1 else ""
    best = sorted(usable, key=lambda verdict: -verdict.free_mib)[count - 1]
    many = f"{count} with at least " if count > 1 else ""
    where = f" on GPU {best.book.gpu.index}" if count == 1 else ""
    return f" (short of memory: the best is {many}{size(best.free_mib)}{where})"


def _proof(engine: Engine, verdicts: Sequence[_Verdict], *, proven: bool) -> str:
    """Whether the refusal is proven, and how where the numbers do not speak for themselves."""
    if not proven:
        return "; budget ended: no arrangement that makes room was found, and not all were tried"
    could = [
        v.book
        for v in verdicts
        if (not v.book.barred or v.book.started_mib) and v.need_mib <= v.free_mib + v.book.started_mib
    ]
    enough = len(could) >= engine.spec.gpu_count and any(book.started_mib for book in could)
    return "; exact: no other arrangement of what is started makes room" if enough else "; exact"


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs of one model"


def _mib(mib: int) -> str:
    """For amounts so close that they would look the same in GiB."""
    return f"{mib}MiB"


def bar(engine: Engine, book: Book) -> str:
    """What keeps this engine off a GPU, whatever memory is free there."""
    if book.barred:
        return f"takes nothing new ({book.barred})"
    if book.alone:
        return f"is for {book.alone} alone (`exclusive: true`)"
    here = [replica for replica, _ in book.taken.ours if replica.rpartition("/")[0] == engine.name]
    if engine.spec.spread == "gpu" and here:
        return f"has {here[0]} already"
    if engine.spec.exclusive and not book.clean:
        return f"is not free of others ({', '.join(_holders(book))})"
    return ""


def _holders(book: Book) -> list[str]:
    holders = [f"{replica} {gib(mib)}" for replica, mib in book.taken.ours]
    if book.has_strangers:
        holders.append(f"{strangers(book.gpu)} {gib(book.taken.unmanaged_mib)}")
    return holders


def _state(verdict: _Verdict, label: str, size: Callable[[int], str]) -> str:
    if verdict.bar:
        return f"{label} {verdict.bar}"
    book = verdict.book
    holders = [f"{replica} {gib(mib)}" for replica, mib in book.taken.ours]
    if book.taken.unmanaged_mib:
        holders.append(f"{strangers(book.gpu)} {gib(book.taken.unmanaged_mib)}")
    if book.taken.kept_back_mib:
        holders.append(f"reserve and headroom {gib(book.taken.kept_back_mib)}")
    taken = f" ({', '.join(holders)})" if holders else ""
    return f"{label} has {size(verdict.free_mib)} of {size_text(book.gpu.memory_total_mib)} free{taken}"


def strangers(gpu: Gpu) -> str:
    """Who holds memory here that is not ours: ``unmanaged (pid 812 alice python)``."""
    names = stranger_names(gpu)
    return f"unmanaged ({names})" if names else "unmanaged"


def stranger_names(gpu: Gpu) -> str:
    """``pid 812 alice python``: whose processes are here that are not ours; of several what each has, if told."""
    found = sorted(
        (process for process in gpu.processes if process.launch is None),
        key=lambda p: (-(p.memory_mib or 0), p.pid),
    )
    each = [_names(process, with_size=len(found) > 1) for process in found]
    return ", ".join(each[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _names(process: GpuProcess, *, with_size: bool = False) -> str:
    mib = process.memory_mib if with_size else None
    size = "" if mib is None else gib(mib) if mib >= 1024 else mib_text(mib)
    return printable(" ".join(part for part in (f"pid {process.pid}", process.user, process.command, size) if part))
