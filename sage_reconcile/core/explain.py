"""Why a replica is where it is, or nowhere: every GPU with what it has free and what it means to this replica."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from sage_reconcile.core.host_memory import host_occupancy
from sage_reconcile.core.host_needs import host_need
from sage_reconcile.core.lifecycle import StopCause, gpu_faults
from sage_reconcile.core.observed import Gpu, Link, Observed
from sage_reconcile.core.placement import Placement, books, needs, promise_of
from sage_reconcile.core.plan import Action, Kept, Plan, Proposal, Unplaced
from sage_reconcile.core.plan_text import way_lines
from sage_reconcile.core.promise import Breakdown
from sage_reconcile.core.reasons import Book, bar, gib, gpu_names, host_holders, pinned
from sage_reconcile.core.spec import Desired, Engine


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one GPU means to a replica once all else is as planned.

    ``free_mib`` is what it has left for it, ``need_mib`` what it would take (None where that cannot be told);
    ``chosen`` tells that it is, or will be, there.
    """

    gpu: Gpu
    free_mib: int
    need_mib: int | None
    chosen: bool
    text: str


@dataclass(frozen=True, slots=True)
class HostVerdict:
    """What the host's memory means to a replica that needs some of it, once all else is as planned."""

    free_mib: int
    need_mib: int
    text: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """One replica: what becomes of it, why, and what was there to choose from.

    ``placed`` is False where it has no place. ``made_of`` is what it is promised, or would need, of each GPU; on the
    CPU of the host. ``host`` is None where it needs nothing of the host's memory, or that is not known.
    """

    replica: str
    outcome: str
    placed: bool
    why: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    proposal: Proposal | None = None
    made_of: Breakdown | None = None
    host: HostVerdict | None = None


def explain(desired: Desired, observed: Observed, plan: Plan, name: str) -> list[Explanation]:
    """Of an engine, or of one of its replicas (``chat/0``); empty where the file names none of that name."""
    return [
        _explained(desired, observed, plan, engine, replica)
        for engine in desired.engines
        for replica in engine.replicas()
        if name in (engine.name, replica)
    ]


def _explained(desired: Desired, observed: Observed, plan: Plan, engine: Engine, replica: str) -> Explanation:
    """See ``explain``; the plan tells what becomes of the replica, the GPUs without it what it could have."""
    spawn = next((x for x in plan.actions if x.kind == "spawn" and x.replica == replica), None)
    kept = next((x for x in plan.kept if x.launch.replica == replica), None)
    unplaced = next((x for x in plan.unplaced if x.replica == replica), None)
    proposal = next((x for x in plan.proposals if x.replica == replica), None)
    ends = next((x for x in plan.actions if x.kind != "spawn" and x.replica == replica), None)
    pages = _without(desired, observed, plan, replica)
    if spawn is not None:
        chosen = [gpu.uuid for gpu in spawn.gpus]
        verb = "would be on" if spawn.blocked else "moves to" if replica in plan.moved() else "starts on"
        outcome = f"{verb} {gpu_names(spawn.gpus) if spawn.gpus else 'the CPU'}"
        why = [*_cause(spawn, ends), *_when(spawn, plan)]
        why += _choice(engine, observed, pages, spawn.gpus, spawn.memory_mib)
    elif kept is not None:
        chosen = list(kept.launch.gpus)
        outcome = f"runs on {_on(kept)}"
        why = _stays(kept, ends, unplaced, observed)
        waits = next((item.waits_for for item in plan.queued if item.launch.replica == replica), "")
        why = [f"its entry changed, and it runs on until its turn comes: it waits for {waits}"] if waits else why
    else:
        chosen, outcome = [], "has no place"
        why = [f"what runs of it stops: {ends.cause}"] if ends else []
        why += [unplaced.reason, *way_lines(unplaced)] if unplaced else []
    why += [found.text() for found in plan.rollbacks if found.engine_name == engine.name]
    verdicts = tuple(_verdicts(engine, observed, pages, chosen)) if engine.spec.gpu_count else ()
    placed = spawn is not None or kept is not None
    need = host_need(engine, observed.models.get(engine.spec.model_at), observed.host_memory)
    if kept is not None:
        need = replace(need, mib=kept.launch.host_memory_mib)
    made = spawn.made_of if spawn else _made_of(engine, observed, kept, pages) or need.made_of
    host = _host_verdict(observed, plan, replica, need.mib)
    return Explanation(replica, outcome, placed, tuple(why), verdicts, proposal, made, host)


def _host_verdict(observed: Observed, plan: Plan, replica: str, need_mib: int) -> HostVerdict | None:
    taken = host_occupancy(observed, leaving=_gone(observed, plan, replica))
    if taken is None or not need_mib:
        return None
    others = (x for x in plan.actions if x.kind == "spawn" and x.replica != replica)
    taken = taken.with_ours(*((action.replica, action.host_memory_mib) for action in others if action.host_memory_mib))
    left = taken.left_mib - need_mib
    text = f"{gib(left)} left beside it" if left >= 0 else f"{gib(-left)} too little"
    return HostVerdict(taken.free_mib, need_mib, f"{text} ({', '.join(host_holders(taken))})")


def _made_of(engine: Engine, observed: Observed, kept: Kept | None, pages: Sequence[Book]) -> Breakdown | None:
    """What its promise is made of where it runs; else what it would need of the GPU with most room."""
    if not engine.spec.gpu_count or not pages:
        return None
    if kept is not None:
        return promise_of(engine, Placement(kept.gpus, kept.launch.memory_mib), observed)[0]
    best = max(pages, key=lambda page: page.taken.free_mib)
    need = needs(engine, best, observed)
    return promise_of(engine, Placement((best.gpu,), need), observed)[0] if need else None


def _cause(spawn: Action, ends: Action | None) -> list[str]:
    """Why it starts, and what of it ends for that."""
    if ends is None:
        return [spawn.cause]
    if ends.stop_cause is StopCause.MOVED:
        first = "starts there first, and ends where it is when it is ready: no downtime"
        return [spawn.cause, first if spawn.predecessor else "stops where it is, then starts there: downtime"]
    beside = ["starts beside the old one, which ends when it is ready: no downtime"] if spawn.predecessor else []
    return [ends.cause, *(change.text() for change in ends.changes), *beside]


def _stays(kept: Kept, ends: Action | None, unplaced: Unplaced | None, observed: Observed) -> list[str]:
    """Why what runs is left there; ``ends`` is what becomes of the launch that it takes over from."""
    if ends is not None and ends.stop_cause is StopCause.MOVED:
        until = "serves there until it is ready here" if ends.waits_for else "ends now"
        return [f"it is just being moved here: the one before {until}"]
    if ends is not None and ends.changes:
        until = "serves until it is ready" if ends.waits_for else "ends now"
        return [f"{ends.cause}; the old one {until}"]
    faults = gpu_faults(kept.launch, observed)
    why = ["what runs stays where it is: neither its entry nor the user asks for a change"]
    if unplaced is not None:
        why = [f"its entry changed, but its new revision has no place, so what runs stays: {unplaced.reason}"]
    return why + ([f"it runs on a GPU at fault: {faults}"] if faults else [])


def _on(kept: Kept) -> str:
    """Where it runs, with the GPUs that are not there any more."""
    seen = {gpu.uuid for gpu in kept.gpus}
    gone = [uuid for uuid in kept.launch.gpus if uuid not in seen]
    places = [gpu_names(kept.gpus)] if kept.gpus else []
    places += [f"{', '.join(gone)} (not seen)"] if gone else []
    return " and ".join(places) or "the CPU"


def _without(desired: Desired, observed: Observed, plan: Plan, replica: str) -> list[Book]:
    """The GPUs once all is done, as if this replica were nowhere."""
    pages = books(desired, observed, _gone(observed, plan, replica))
    by_uuid = {page.gpu.uuid: page for page in pages}
    alone = {engine.name for engine in desired.engines if engine.spec.exclusive}
    for action in plan.actions:
        for gpu in action.gpus if action.kind == "spawn" and action.replica != replica else ():
            page = by_uuid[gpu.uuid]
            page.taken = page.taken.with_ours((action.replica, action.memory_mib))
            if action.replica.rpartition("/")[0] in alone:
                page.alone = action.replica
    return sorted(pages, key=lambda page: page.gpu.index)


def _gone(observed: Observed, plan: Plan, replica: str) -> frozenset[str]:
    """The launches that will have gone, and those of this replica."""
    ended = {action.launch for action in plan.actions if action.kind != "spawn"}
    own = {launch.id for launch in observed.launches if launch.replica == replica}
    stopping = {launch.id for launch in observed.launches if launch.stopping_since is not None}
    return frozenset(ended | own | stopping)


def _verdicts(engine: Engine, observed: Observed, pages: Sequence[Book], chosen: Sequence[str]) -> Iterator[Verdict]:
    for page in pages:
        need = needs(engine, page, observed)
        here = page.gpu.uuid in chosen
        yield Verdict(page.gpu, page.taken.free_mib, need, here, _meaning(engine, page, need, here=here))


def _meaning(engine: Engine, page: Book, need: int | None, *, here: bool) -> str:
    """What stands in the way, or what would be left beside it."""
    if not pinned(engine, page.gpu):
        return "not among its `gpus`"
    if need is None:
        return "its need cannot be told (`memory: auto`)"
    if stands := bar(engine, page):
        return f"{stands}, and it is here" if here else stands
    free = page.taken.free_mib
    if free < need:
        return f"{gib(need - free)} too little" + (", and it is here" if here else "")
    left = f"{gib(free - need)} left beside it"
    return f"chosen, {left}" if here else f"fits, {left}" + (", nothing is on it yet" if page.clean else "")


def _when(spawn: Action, plan: Plan) -> list[str]:
    if spawn.blocked:
        return [f"cannot start here: {spawn.blocked}"]
    before = [f"{action.kind} {action.replica}" for action in plan.actions if action.id in spawn.after]
    waits = [f"comes after: {', '.join(before)}"] if before else []
    return waits + ([f"waits for {spawn.waits_for}"] if spawn.waits_for else [])


def _choice(
    engine: Engine, observed: Observed, pages: Sequence[Book], gpus: Sequence[Gpu], memory_mib: int
) -> Iterator[str]:
    """Which of the rules decided for these GPUs and against those that would do too."""
    if not gpus:
        return
    own = {gpu.uuid for gpu in gpus}
    by_uuid = {page.gpu.uuid: page for page in pages}
    others = [
        page
        for page in pages
        if page.gpu.uuid not in own
        and pinned(engine, page.gpu)
        and not bar(engine, page)
        and page.taken.free_mib >= (needs(engine, page, observed) or memory_mib)
    ]
    if len(gpus) > 1:
        yield f"its ranks are joined by {_joined(gpus, observed.links)}"
    if not others:
        yield "no other GPU would do" if len(gpus) == 1 else "no other GPU would do for one of its ranks"
        return
    mine = [by_uuid[gpu.uuid] for gpu in gpus]
    if any(page.clean for page in others) and not any(page.clean for page in mine):
        yield "GPUs on which nothing is yet are left whole for what needs them"
    tightest = min(page.taken.free_mib for page in others)
    if max(page.taken.free_mib for page in mine) < tightest:
        yield "of those that would do it leaves least free"
    elif max(page.taken.free_mib for page in mine) == tightest:
        yield "others would do as well: the order of PCI ids decided"
    else:
        yield "others would do too: this arrangement of all that starts links best, or touches fewest GPUs"


def _joined(gpus: Sequence[Gpu], links: Mapping[frozenset[str], Link]) -> str:
    """The worst link between any two of them, as far as it is known."""
    order = list(Link)
    pairs = [links.get(frozenset((one.uuid, other.uuid))) for one, other in combinations(gpus, 2)]
    known = [link for link in pairs if link is not None]
    if len(known) < len(pairs):
        return "links of which not all are known"
    worst = max(known, key=order.index)
    return worst.name if worst is order[0] else f"{worst.name} or better"
