"""A plan as text, for people and for tests: the same plan gives the same text, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator

from sage_reconcile.core.memory import Occupancy
from sage_reconcile.core.observed import Gpu
from sage_reconcile.core.plan import Action, GpuMap, Plan
from sage_reconcile.core.reasons import gib, stranger_names

_BAR = 20


def plan_text(plan: Plan, now: float) -> str:
    """The whole plan: engines, order, GPUs before and after, counts. Ends with a newline."""
    lines = [*_engines(plan, now), *_order(plan), *_gpus(plan), *_notes(plan), counts(plan)]
    return "\n".join(lines) + "\n"


def counts(plan: Plan) -> str:
    """One line: how many replicas start, are replaced, stop, stay and have no place."""
    told = summary(plan)
    return (
        f"{told['start']} to start, {told['replace']} to replace, {told['stop']} to stop, "
        f"{told['unchanged']} unchanged, {told['unplaced']} unplaced."
    )


def summary(plan: Plan) -> dict[str, int]:
    """The counts of a plan by name."""
    replaced = plan.replaced()
    return {
        "start": sum(action.kind == "spawn" and action.replica not in replaced for action in plan.actions),
        "replace": len(replaced),
        "stop": len({a.replica for a in plan.actions if a.kind != "spawn" and a.replica not in replaced}),
        "unchanged": len(plan.kept),
        "unplaced": len(plan.unplaced),
    }


def _engines(plan: Plan, now: float) -> Iterator[str]:
    replaced = plan.replaced()
    ends = {action.replica: action for action in plan.actions if action.kind != "spawn"}
    rows: list[tuple[str, list[str]]] = []
    for action in plan.actions:
        if action.kind == "spawn":
            sign, verb = ("~", "replace") if action.replica in replaced else ("+", "start")
            before = ends.get(action.replica)
            changed = before.changes if before else ()
            reasons = [] if changed else [before.cause if before else action.cause]
            detail = [
                f"{change.field}: {change.old or '(not set)'} -> {change.new or '(not set)'}" for change in changed
            ]
            if action.not_before is not None:
                detail.append(f"starts in {max(0.0, action.not_before - now):.0f}s")
            where = f"{_place(action.gpus, action.memory_mib)}  port {action.port}"
            rows.append((f"{sign} {action.replica}\0{verb}\0{where}", [*reasons, *detail]))
        elif action.replica not in replaced:
            rows.append((f"- {action.replica}\0{action.kind}\0{action.cause}", []))
    for kept in plan.kept:
        seen = kept.gpus or not kept.launch.gpus
        on = _place(kept.gpus, kept.launch.memory_mib) if seen else f"{', '.join(kept.launch.gpus)} (not seen)"
        place = f"{on}  port {kept.launch.port}"
        rows.append((f"= {kept.launch.replica}\0unchanged\0{place}", []))
    for item in plan.unplaced:
        stays = ["what runs of it now stays as it is"] if item.runs_on else []
        rows.append((f"! {item.replica}\0unplaced\0{item.reason}", stays))
    width = max((len(head.split("\0")[0]) for head, _ in rows), default=0)
    for head, details in rows:
        name, verb, rest = head.split("\0")
        yield f"{name:<{width}}  {verb:<9}  {rest}".rstrip()
        for line in details:
            yield f"{'':<{width}}    {line}"
    if rows:
        yield ""


def _place(gpus: tuple[Gpu, ...], memory_mib: int) -> str:
    if not gpus:
        return "CPU"
    word = "GPU" if len(gpus) == 1 else "GPUs"
    each = " each" if len(gpus) > 1 else ""
    return f"{word} {','.join(str(gpu.index) for gpu in gpus)} ({gpus[0].name})  {gib(memory_mib)}{each}"


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
    if action.waits_for:
        waits.append(f"waits for {action.waits_for}")
    return f"  ({'; '.join(waits)})" if waits else ""


def _gpus(plan: Plan) -> Iterator[str]:
    if not plan.gpus:
        return
    yield "GPUs:"
    width = max(len(f"{item.gpu.index} {item.gpu.name}") for item in plan.gpus)
    for item in plan.gpus:
        label = f"{item.gpu.index} {item.gpu.name}"
        before, after = (bar(taken, told=item.gpu.memory_told) for taken in (item.before, item.after))
        moved = before if before == after else f"{before} -> {after}"
        yield "  ".join(part for part in (f"  {label:<{width}}", moved, _who(item), item.problem) if part)
    yield ""


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
    for text in (*plan.waiting, *plan.notes):
        yield f"note: {text}"
    if plan.waiting or plan.notes:
        yield ""
