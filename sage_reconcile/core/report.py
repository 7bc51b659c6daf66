"""Plan and status as data for JSON; ``schemas/plan.schema.json`` and ``schemas/status.schema.json`` describe them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from sage_reconcile.core.conditions import Around, conditions
from sage_reconcile.core.gpu_report import gpu_rows, lasting_rows
from sage_reconcile.core.lifecycle import Phase, StopCause, fault_note, gpu_faults, next_try, phase
from sage_reconcile.core.memory_report import host_document, memory_document
from sage_reconcile.core.observed import Gpu, Launch, Life, Observed
from sage_reconcile.core.plan import Action, HostMap, Move, Plan, Proposal
from sage_reconcile.core.plan_text import summary
from sage_reconcile.core.promise import Breakdown
from sage_reconcile.core.spec import Desired, Engine
from sage_reconcile.core.update_report import changes_document, updates_document

VERSION = 1


def plan_document(plan: Plan) -> dict[str, Any]:
    """What ``diff -o json`` prints."""
    return {
        "version": VERSION,
        "in_sync": plan.in_sync,
        "actions": [_action(action) for action in plan.actions],
        "unchanged": [{"replica": kept.launch.replica, **_place(kept.gpus, kept.launch)} for kept in plan.unchanged],
        "unplaced": [
            {
                "replica": item.replica,
                "reason": item.reason,
                "runs_on": item.runs_on,
                "ways": [way._asdict() for way in item.ways],
            }
            for item in plan.unplaced
        ],
        "proposals": [proposal_document(proposal) for proposal in plan.proposals],
        "waiting": list(plan.waiting),
        **updates_document(plan),
        "gpus": [
            {
                **_gpu_ref(item.gpu),
                "name": item.gpu.name,
                "memory_total_mib": item.gpu.memory_total_mib,
                "promised_before_mib": item.before.promised_mib,
                "promised_after_mib": item.after.promised_mib,
                "unmanaged_mib": item.after.unmanaged_mib,
                "free_after_mib": item.after.free_mib,
                "problem": item.problem,
            }
            for item in plan.gpus
        ],
        "host_memory": _host(plan.host) if plan.host else None,
        "notes": list(plan.notes),
        "summary": summary(plan),
    }


def _host(item: HostMap) -> dict[str, Any]:
    return {
        "total_mib": item.after.total_mib,
        "kept_back_mib": item.after.kept_back_mib,
        "promised_before_mib": item.before.promised_mib,
        "promised_after_mib": item.after.promised_mib,
        "unmanaged_mib": item.after.unmanaged_mib,
        "free_after_mib": item.after.free_mib,
    }


def proposal_document(proposal: Proposal) -> dict[str, Any]:
    """What would let a replica in."""
    return {"replica": proposal.replica, "moves": [_move(move) for move in proposal.moves]}


def _move(move: Move) -> dict[str, Any]:
    return {
        "replica": move.launch.replica,
        "from": [_gpu_ref(gpu) for gpu in move.from_gpus],
        "to": [_gpu_ref(gpu) for gpu in move.to_gpus],
        "memory_mib": move.memory_mib,
        "start_first": move.start_first,
        "restart_s": move.restart_s,
    }


def _action(action: Action) -> dict[str, Any]:
    return {
        "id": action.id,
        "kind": action.kind,
        "replica": action.replica,
        "cause": action.cause,
        "after": list(action.after),
        "waits_for": action.waits_for,
        "not_before": action.not_before,
        "start_first": bool(action.predecessor),
        "blocked": action.blocked,
        "changes": changes_document(action.changes),
        "restart_s": action.restart_s,
        "made_of": breakdown_document(action.made_of) if action.made_of else None,
        **_place(action.gpus, action),
    }


def breakdown_document(found: Breakdown) -> dict[str, Any]:
    """What a promise is made of, in MiB of each GPU; on the CPU in MiB of the host."""
    return {
        "parts": {f"{part.name}_mib": part.mib for part in found.parts},
        "part_confidence": {part.name: str(part.confidence) for part in found.parts},
        "confidence": found.confidence,
        "kv_tokens": found.kv_tokens or None,
        "context": found.context or None,
        "requests": found.requests if found.kv_tokens else None,
        "needed_mib": found.needed_mib or None,
        "note": found.note,
    }


def _place(gpus: Sequence[Gpu], has: Action | Launch) -> dict[str, Any]:
    inner = {"first": has.inner_ports.start, "count": len(has.inner_ports)} if has.inner_ports else None
    return {
        "gpus": [_gpu_ref(gpu) for gpu in gpus],
        "memory_mib": has.memory_mib,
        "host_memory_mib": has.host_memory_mib,
        "port": has.port,
        "inner_ports": inner,
    }


def _gpu_ref(gpu: Gpu) -> dict[str, Any]:
    return {"index": gpu.index, "uuid": gpu.uuid}


def status_document(desired: Desired, observed: Observed, plan: Plan, now: float) -> dict[str, Any]:
    """What ``status -o json`` prints of engines and GPUs; who asks adds the file and its generation."""
    launches: dict[str, list[Launch]] = defaultdict(list)
    for launch in observed.launches:
        launches[launch.replica].append(launch)
    engines = [_engine(engine, launches, observed, plan, now) for engine in desired.engines]
    known = {engine.name for engine in desired.engines}
    gone = dict.fromkeys(x.engine_name for x in observed.launches if x.engine_name not in known and x.holds)
    engines += [_gone(name, launches, observed, now) for name in sorted(gone)]
    wanted = sum(engine.spec.replicas for engine in desired.engines)
    ready = sum(entry["ready"] for entry in engines if entry["name"] in known)
    rolled_back = [found.text() for found in plan.rollbacks]
    told = {fault_note(launch, observed) for launch in observed.launches}  # with the replicas
    return {
        "version": VERSION,
        "converged": plan.in_sync and ready == wanted,
        "engines": engines,
        "gpus": gpu_rows(desired.host, observed),
        "host_memory": host_document(observed),
        "notes": [*rolled_back, *plan.waiting, *(note for note in plan.notes if note not in told)],
    }


def lasting(document: Mapping[str, Any]) -> dict[str, Any]:
    """A status without what changes at every look, as for a report that is kept."""
    engines = []
    for engine in document["engines"]:
        rows = [
            {**row, "memory": row["memory"] and {**row["memory"], "held_mib": None}, "host_held_mib": 0}
            for row in engine["replicas"]
        ]
        engines.append({**engine, "replicas": rows})
    return {**document, "engines": engines, "gpus": lasting_rows(document["gpus"]), "host_memory": None}


def _engine(
    engine: Engine, launches: dict[str, list[Launch]], observed: Observed, plan: Plan, now: float
) -> dict[str, Any]:
    wanted = engine.replicas()
    names = [*wanted, *(r for r in _names(engine.name, launches) if r not in wanted)]
    refused = {item.replica: item.reason for item in plan.unplaced}
    refused |= {action.replica: action.blocked for action in plan.actions if action.blocked}
    reasons = {action.replica: _waiting(action) for action in plan.actions if action.kind == "spawn"} | refused
    starts = {action.replica: action for action in plan.actions if action.kind == "spawn"}
    replaced = {action.launch: action for action in plan.actions if action.stop_cause is StopCause.CHANGED}
    runs_on = {item.replica for item in plan.unplaced if item.runs_on}
    moves = {
        action.launch: f"{action.cause}: {_waiting(action)}"
        for action in plan.actions
        if action.stop_cause is StopCause.MOVED and action.waits_for
    }
    moves |= {item.launch.id: f"its update waits for {item.waits_for}" for item in plan.queued}
    replicas = []
    for name in names:
        launch = _current(launches.get(name, ()))
        start = starts.get(name)
        afresh = start is not None and not start.failures
        row = _replica(name, launch, observed, now, wanted=name in wanted, afresh=afresh)
        if row is not None:
            row["unplaced"] = name in refused and not plan.making_room
            if launch is not None and launch.holds and launch.gpus:
                row["memory"] = memory_document(engine, launch, observed)
            if row["phase"] == Phase.PENDING or name in refused:
                row["reason"] = "; ".join(part for part in (row["reason"], reasons.get(name)) if part)
            elif row["launch"] in moves:
                row["reason"] = "; ".join(part for part in (row["reason"], moves[row["launch"]]) if part)
            faults = gpu_faults(launch, observed) if launch and launch.holds else ""
            ends = replaced.get(launch.id) if launch else None
            around = Around(start, ends, refused.get(name, ""), runs_on=name in runs_on, faults=faults)
            row["conditions"] = conditions(Phase(row["phase"]), row["reason"], launch, around)
            replicas.append(row)
    return {
        "name": engine.name,
        "model": engine.shown.model,
        "served_model_name": engine.shown.served_model_name[0],
        "desired": engine.spec.replicas,
        "ready": sum(row["phase"] == Phase.READY and row["name"] in wanted for row in replicas),
        "replicas": replicas,
    }


def _waiting(action: Action) -> str:
    return f"waits for {action.waits_for}" if action.waits_for else ("waits for its turn" if action.after else "")


def _gone(name: str, launches: dict[str, list[Launch]], observed: Observed, now: float) -> dict[str, Any]:
    """An engine that is not in the file and of which something still runs."""
    rows = [_replica(r, _current(launches[r]), observed, now, wanted=False) for r in _names(name, launches)]
    model = next((x.spec.get("model") for r in _names(name, launches) for x in launches[r]), None)
    for row in filter(None, rows):
        launch = _current(launches[row["name"]])
        row["conditions"] = conditions(Phase(row["phase"]), row["reason"], launch, Around())
    return {
        "name": name,
        "model": model,
        "served_model_name": name,
        "desired": 0,
        "ready": 0,
        "replicas": [row for row in rows if row],
    }


def _names(engine_name: str, launches: dict[str, list[Launch]]) -> list[str]:
    found = {x[0].replica: x[0].index for x in launches.values() if x and x[0].engine_name == engine_name}
    return sorted(found, key=lambda replica: found[replica])


def _current(launches: Sequence[Launch]) -> Launch | None:
    """Of several launches of a replica the one that tells most: one that runs, else one that ends, else the last.

    Where one takes over from another, that is the one before until the new one is ready.
    """
    order = {Life.ALIVE: 3, Life.INTENT: 2, Life.LEFTOVER: 1, Life.UNPROVEN: 1, Life.EXITED: 0}
    last = max(launches, key=lambda x: (order[x.life], x.stopping_since is None, x.created_at), default=None)
    if last is None or last.ready_at is not None:
        return last
    serving = (x for x in launches if x.id == last.predecessor and x.life is Life.ALIVE and x.stopping_since is None)
    return next(serving, last)


def _replica(
    name: str, launch: Launch | None, observed: Observed, now: float, *, wanted: bool, afresh: bool = False
) -> dict[str, Any] | None:
    """``afresh``: its next start does not go by how the last one ended."""
    faults = gpu_faults(launch, observed) if launch and launch.holds else ""
    state = phase(launch, wanted=wanted, now=now, faults=faults)
    if state is None:
        return None
    if afresh and state in (Phase.BACKOFF, Phase.STALLED):
        state = Phase.PENDING
    row: dict[str, Any] = {
        "name": name,
        "phase": state.value,
        "reason": "",
        "stage": "",
        "pid": None,
        "port": None,
        "endpoint": None,
        "gpus": [],
        "memory_mib": 0,
        "memory": None,
        "host_memory_mib": 0,
        "host_held_mib": 0,
        "restarts": 0,
        "started_at": None,
        "next_try_at": None,
        "exit": None,
        "failure": None,
        "log": None,
        "launch": None,
        "unplaced": False,
    }
    if launch is None:
        return row
    by_uuid = {gpu.uuid: gpu for gpu in observed.gpus}
    row |= {"restarts": launch.restarts, "log": launch.log_path or None, "launch": launch.id, "stage": launch.stage}
    if launch.exit is not None:
        row["exit"] = {"code": launch.exit.code, "at": launch.exit.at, "text": launch.exit.text()}
    if launch.life is Life.EXITED:
        asked = f" ({launch.stop_cause})" if launch.stop_cause else ""
        row["reason"] = (f"ended: {launch.exit.text()}" if launch.exit else "ended") + asked
        if launch.failure is not None:
            row["failure"] = launch.failure.document()
            row["reason"] = ": ".join(part for part in (row["reason"], launch.failure.summary()) if part)
        if state is Phase.BACKOFF:
            row["next_try_at"] = next_try(launch, now)
        return row
    row |= {
        "pid": launch.pid,
        "port": launch.port,
        "endpoint": f"http://{_reachable(launch.bind)}:{launch.port}",
        "gpus": [{"index": by_uuid[u].index if u in by_uuid else None, "uuid": u} for u in launch.gpus],
        "memory_mib": launch.memory_mib,
        "host_memory_mib": launch.host_memory_mib,
        "host_held_mib": launch.host_held_mib,
        "started_at": launch.created_at,
        "reason": "; ".join(part for part in (launch.stop_cause, faults) if part),
    }
    return row


def _reachable(bind: str) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind, bind)  # noqa: S104 - shown, not bound to
    return f"[{host}]" if ":" in host else host
