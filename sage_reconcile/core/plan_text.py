"""A plan as text, for people and for tests: the same plan gives the same text, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator

from sage_reconcile.core.lifecycle import StopCause
from sage_reconcile.core.memory import Occupancy
from sage_reconcile.core.observed import Gpu, Launch
from sage_reconcile.core.plan import Action, GpuMap, Move, Plan, Proposal, Unplaced
from sage_reconcile.core.promise import Breakdown
from sage_reconcile.core.reasons import gib, gpu_names, host_holders, stranger_names

_BAR = 20


def plan_text(plan: Plan, now: float) -> str:
    """The whole plan: engines, order, GPUs before and after, counts. Ends with a newline."""
    lines = [*_engines(plan, now), *_proposals(plan), *_order(plan), *_gpus(plan), *_host(plan), *_notes(plan)]
    lines.append(counts(plan))
    return "\n".join(lines) + "\n"


def counts(plan: Plan) -> str:
    """One line: how many replicas start, are replaced, stop, stay and have no place; of others where there are any."""
    told = summary(plan)
    moves = f"{told['move']} to move, " if told["move"] else ""
    blocked = f", {told['blocked']} that cannot start here" if told["blocked"] else ""
    return (
        f"{told['start']} to start, {told['replace']} to replace, {moves}{told['stop']} to stop, "
        f"{told['unchanged']} unchanged, {told['unplaced']} unplaced{blocked}."
    )


def summary(plan: Plan) -> dict[str, int]:
    """The counts of a plan by name."""
    replaced, moved = plan.replaced(), plan.moved()
    return {
        "start": sum(a.kind == "spawn" and a.replica not in replaced and not a.blocked for a in plan.actions),
        "replace": len(replaced - moved) + len(plan.queued),
        "move": len(moved),
        "stop": len({a.replica for a in plan.actions if a.kind != "spawn"} - replaced - moved),
        "unchanged": len(plan.unchanged),
        "unplaced": len(plan.unplaced),
        "blocked": sum(bool(action.blocked) for action in plan.actions),
    }


def _engines(plan: Plan, now: float) -> Iterator[str]:
    replaced, moved = plan.replaced(), plan.moved()
    running = plan.taken_over()
    beside = {x.launch for x in plan.actions if x.stop_cause is StopCause.CHANGED and x.replica in running}
    ends = {action.replica: action for action in plan.actions if action.kind != "spawn"}
    rows: list[tuple[str, list[str]]] = []
    for action in plan.actions:
        if action.kind == "spawn":
            sign, verb = ("~", "replace") if action.replica in replaced else ("+", "start")
            verb = "placed" if action.blocked else "move" if action.replica in moved else verb
            before = ends[action.replica] if action.replica in replaced else None
            where = f"{_place(action.gpus, action)}  port {action.port}"
            rows.append((f"{sign} {action.replica}\0{verb}\0{where}", _details(action, before, now)))
        elif action.replica not in replaced or action.launch in beside:
            sign, verb = ("~", "move") if action.replica in moved else ("-", action.kind)
            sign, verb = ("~", "replace") if action.launch in beside else (sign, verb)
            rows.append((f"{sign} {action.replica}\0{verb}\0{action.cause}", []))
    queued = {item.launch.id: item for item in plan.queued}
    for kept in plan.kept:
        if kept.launch.id in queued:
            turn = queued[kept.launch.id]
            told = [*(change.text() for change in turn.changes), f"runs on until then, port {kept.launch.port}"]
            rows.append((f"~ {kept.launch.replica}\0replace\0waits for {turn.waits_for}", told))
            continue
        seen = kept.gpus or not kept.launch.gpus
        on = _place(kept.gpus, kept.launch) if seen else f"{', '.join(kept.launch.gpus)} (not seen)"
        lost = len(kept.launch.gpus) - len(kept.gpus) if kept.gpus else 0
        place = f"{on}{f' (and {lost} that are not seen)' if lost else ''}  port {kept.launch.port}"
        rows.append((f"= {kept.launch.replica}\0unchanged\0{place}", []))
    for item in plan.unplaced:
        stays = ["what runs of it now stays as it is"] if item.runs_on else []
        stays += way_lines(item)
        rows.append((f"! {item.replica}\0unplaced\0{item.reason}", stays))
    width = max((len(head.split("\0")[0]) for head, _ in rows), default=0)
    for head, details in rows:
        name, verb, rest = head.split("\0")
        yield f"{name:<{width}}  {verb:<9}  {rest}".rstrip()
        for line in details:
            yield f"{'':<{width}}    {line}"
    if rows:
        yield ""


def _details(spawn: Action, before: Action | None, now: float) -> list[str]:
    """Why it starts, given what ends before it, and when; or why it never does."""
    changed = before.changes if before else ()
    told = [change.text() for change in changed]
    told = told or [before.cause if before else spawn.cause]
    if spawn.made_of:
        told += breakdown_lines(spawn.made_of)
    took = "" if spawn.restart_s is None else f" of about {spawn.restart_s:.0f}s, as its last start"
    if spawn.predecessor and before and before.stop_cause is StopCause.CHANGED:
        told.append("starts beside the old one, which ends when it is ready: no downtime")
    elif spawn.predecessor:
        told.append("starts there first, and ends here when it is ready: no downtime")
    elif before and before.stop_cause is StopCause.MOVED:
        told.append("stops here, then starts there: downtime")
    elif before and before.stop_cause is StopCause.CHANGED:
        told.append(f"stops first, then starts: downtime{took}")
    if spawn.blocked:
        told.append(f"cannot start here: {spawn.blocked}")
    elif spawn.not_before is not None:
        told.append(f"starts in {max(0.0, spawn.not_before - now):.0f}s")
    return told


PART_NAMES = {
    "weights": "weights",
    "kv_cache": "KV cache",
    "activation": "activation",
    "cuda_graphs": "CUDA graphs",
    "context": "CUDA context",
    "nccl": "NCCL",
    "lora": "LoRA adapters",
    "draft": "draft model",
    "processes": "processes",
    "margin": "margin",
}


def breakdown_lines(found: Breakdown) -> Iterator[str]:
    """What a promise is made of, and where it seems too little."""
    parts = [f"{PART_NAMES[part.name]} {gib(part.mib)}" for part in found.parts if part.mib]
    yield ", ".join(parts) + ("" if found.note else f" (weights {found.confidence})")
    if found.kv_tokens:
        many = f"{found.requests:.1f} requests of {found.context:,}"
        yield f"its KV cache holds {found.kv_tokens:,} tokens: {many}"
    if found.too_little:
        what = f"one request of {found.context:,} tokens" if found.context else "it"
        yield f"this may be too little: {what} seems to need {gib(found.needed_mib)}"
    if found.note:
        yield found.note


def way_lines(item: Unplaced) -> Iterator[str]:
    """What would make it fit on this machine, each change with what it takes of each GPU then."""
    if not item.ways:
        return
    from sage_reconcile.core.ways import way_text  # noqa: PLC0415 - 15 ms of every start

    yield "too large for any GPU here; each of these makes it fit:"
    yield from (f"  {way_text(way)}  {gib(way.total_mib)}" for way in item.ways)


def _place(gpus: tuple[Gpu, ...], has: Action | Launch) -> str:
    if not gpus:
        return "CPU" + (f"  {gib(has.host_memory_mib)}" if has.host_memory_mib else "")
    each = " each" if len(gpus) > 1 else ""
    beside = f" + {gib(has.host_memory_mib)} of the host" if has.host_memory_mib else ""
    return f"{gpu_names(gpus)} ({gpus[0].name})  {gib(has.memory_mib)}{each}{beside}"


def _proposals(plan: Plan) -> Iterator[str]:
    for proposal in plan.proposals:
        yield from proposal_lines(proposal)
        yield ""


def proposal_lines(proposal: Proposal) -> Iterator[str]:
    """What would let a replica in, what it costs, and how to have it done."""
    count = len(proposal.moves)
    yield f"Proposal: {proposal.replica} gets in if {count} {'replica moves' if count == 1 else 'replicas move'}:"
    for move in proposal.moves:
        yield f"  {move.launch.replica}  {gpu_names(move.from_gpus)} -> {gpu_names(move.to_gpus)}  {_cost(move)}"
    yield "  Not done by itself: `apply --allow-moves` does it, or `movable: true` in the entries that move."


def _cost(move: Move) -> str:
    """What a move costs, in words."""
    took = "" if move.restart_s is None else f" (its last start took {move.restart_s:.0f}s)"
    if move.start_first:
        return f"no downtime: starts there first{took}"
    return f"downtime: stops here, then starts there{took}"


def _order(plan: Plan) -> Iterator[str]:
    if not plan.actions:
        return
    numbers = {action.id: number for number, action in enumerate(plan.actions, 1)}
    yield "Order:"
    for action in plan.actions:
        yield f"  {numbers[action.id]}. {action.kind} {action.replica}{_after(action, numbers)}"
    yield ""


def _after(action: Action, numbers: dict[str, int]) -> str:
    waits = [f"after {', '.join(map(str, sorted(numbers[step] for step in action.after)))}"] if action.after else []
    if action.blocked:
        waits.append("cannot start here")
    elif action.waits_for:
        waits.append(f"waits for {action.waits_for}")
    return f"  ({'; '.join(waits)})" if waits else ""


def _gpus(plan: Plan) -> Iterator[str]:
    if not plan.gpus:
        return
    yield "GPUs:"
    width = max(len(f"{item.gpu.index} {item.gpu.name}") for item in plan.gpus)
    for item in plan.gpus:
        label = f"{item.gpu.index} {item.gpu.name}"
        moved = _moved(*(bar(taken, told=item.gpu.memory_told) for taken in (item.before, item.after)))
        yield "  ".join(part for part in (f"  {label:<{width}}", moved, _who(item), item.problem) if part)
    yield ""


def _host(plan: Plan) -> Iterator[str]:
    if plan.host is not None:
        yield "Host memory:"
        yield f"  {_moved(bar(plan.host.before), bar(plan.host.after))}  {', '.join(host_holders(plan.host.after))}"
        yield ""


def _moved(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"


def bar(taken: Occupancy, *, told: bool = True) -> str:
    """``[####++....] 24.0/80.0GiB``: # ours, + strangers', - kept back, . free; ? where that is not told."""
    if not told:
        return f"[{'?' * _BAR}] ?/{gib(taken.total_mib) if taken.total_mib else '?GiB'}"
    total = taken.total_mib or 1
    ends = [taken.promised_mib, taken.unmanaged_mib, taken.kept_back_mib]
    cells, reached, drawn = "", 0, 0
    for mark, mib in zip("#+-", ends, strict=True):
        reached += mib
        upto = min(_BAR, round(_BAR * reached / total))
        cells += mark * (upto - drawn)
        drawn = max(drawn, upto)
    used = (taken.promised_mib + taken.unmanaged_mib) / 1024
    return f"[{cells:.<{_BAR}}] {used:.1f}/{taken.total_mib / 1024:.1f}GiB"


def _who(item: GpuMap) -> str:
    names = [f"{replica} {gib(mib)}" for replica, mib in item.after.ours]
    if item.after.unmanaged_mib and item.gpu.memory_told:
        who = stranger_names(item.gpu)
        names.append(f"unmanaged {gib(item.after.unmanaged_mib)}" + (f" ({who})" if who else ""))
    return ", ".join(names)


def _notes(plan: Plan) -> Iterator[str]:
    texts = [*(found.text() for found in plan.rollbacks), *plan.waiting, *plan.notes]
    if plan.making_room and plan.unplaced:
        texts.append("room for what is unplaced is looked for again when all of this is done")
    for text in texts:
        yield f"note: {text}"
    if texts:
        yield ""
