"""The judge's part about updates: that no more is down at once than the entry allows, and who may be rolled back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sage_reconcile.core.lifecycle import StopCause
from sage_reconcile.core.observed import Launch, Life, Observed
from sage_reconcile.core.plan import Action, Plan
from sage_reconcile.core.spec import EFFECTS, Desired, Effect


def as_rolled_back(desired: Desired, observed: Observed, plan: Plan) -> tuple[Desired, list[str]]:
    """The file with the revisions that the plan goes back to in place of what failed; and what is wrong with that."""
    launches = {launch.id: launch for launch in observed.launches}
    engines = {engine.name: engine for engine in desired.engines}
    restarts = [name for name, effect in EFFECTS.items() if effect is Effect.RESTART and name != "restarted"]
    wrong: list[str] = []
    for found in plan.rollbacks:
        engine, revision = engines.get(found.engine_name), found.revision
        good, failed = launches.get(found.good), launches.get(found.failed)
        if engine is None or good is None or failed is None or engine.spec.rollback != "auto":
            wrong.append(f"{found.engine_name} is rolled back, and there is nothing to show for it")
            continue
        if good.ready_at is None or good.engine_name != engine.name:
            wrong.append(f"{found.engine_name} is rolled back to {good.id}, which was never ready")
        if failed.ready_at is not None or failed.engine_name != engine.name:
            wrong.append(f"{found.engine_name} is rolled back for {failed.id}, which has not failed to start")
        if revision is None:
            continue
        if any(name in good.spec and revision.record[name] != good.spec[name] for name in restarts):
            wrong.append(f"{found.engine_name} is rolled back to another revision than that of {good.id}")
        engines[engine.name] = revision
    older = {engine.name for engine in engines.values()} & {x.engine_name for x in plan.rollbacks if x.revision}
    for action in plan.actions:
        name = action.replica.rpartition("/")[0]
        wrongly = action.kind == "spawn" and (action.revision is not None) != (name in older)
        if wrongly or (action.revision is not None and action.revision is not engines.get(name)):
            wrong.append(f"{action.id} starts another revision than the plan says")
    return replace(desired, engines=tuple(engines[engine.name] for engine in desired.engines)), wrong


def updates(desired: Desired, observed: Observed, plan: Plan) -> Iterator[str]:
    """No more replicas of an engine are down for an update than ``max_unavailable``, those counted that are anyway.

    Nobody waits for those that have no place; and what is started first ends nothing before it is ready.
    """
    spawns = {action.predecessor: action for action in plan.actions if action.kind == "spawn" and action.predecessor}
    hopeless = {item.replica for item in plan.unplaced if not item.runs_on}
    hopeless |= {action.replica for action in plan.actions if action.blocked}
    stops = {x.launch: x for x in plan.actions if x.stop_cause is StopCause.CHANGED}
    for engine in desired.engines:
        serving = [x for x in observed.launches if x.engine_name == engine.name and _serves(x)]
        names = {launch.replica for launch in serving}
        down = {name for name in engine.replicas() if name not in names and name not in hopeless}
        stopped = {x.replica for x in serving if x.id in stops and _stops_first(x, stops[x.id], observed, spawns)}
        if stopped and len(down | stopped) > engine.spec.max_unavailable:
            yield (
                f"{', '.join(sorted(down | stopped))} would be down at once for an update, "
                f"and `max_unavailable` is {engine.spec.max_unavailable}"
            )
        beside = sum(x.replica.rpartition("/")[0] == engine.name for x in spawns.values() if x.predecessor in stops)
        if beside > engine.spec.max_surge:
            most = engine.spec.max_surge
            yield f"{beside} replicas of {engine.name} would be started first, and `max_surge` is {most}"
        if engine.spec.spread == "gpu" or engine.spec.exclusive:
            yield from _beside(observed, [x for x in spawns.values() if x.replica in names])
    kept = {item.launch.id for item in plan.kept}
    for item in plan.queued:
        if item.launch.id not in kept:
            yield f"{item.launch.replica} waits for its turn, and does not run until then"


def _serves(launch: Launch) -> bool:
    return launch.life is Life.ALIVE and launch.ready and launch.stopping_since is None


def _stops_first(launch: Launch, stop: Action, observed: Observed, spawns: dict[str, Action]) -> bool:
    """Whether it ends before another process of its replica is ready."""
    if launch.id in spawns:
        return False
    others = [x for x in observed.launches if x.predecessor == launch.id and x.replica == launch.replica]
    return not (others and stop.waits_for) and not any(
        _serves(x) or (x.ready_at is not None and x.life is Life.ALIVE) for x in others
    )


def _beside(observed: Observed, spawns: list[Action]) -> Iterator[str]:
    """What must be alone on a GPU is not started beside its own old process either."""
    launches = {launch.id: launch for launch in observed.launches}
    for action in spawns:
        old = launches.get(action.predecessor)
        if old is not None and {gpu.uuid for gpu in action.gpus} & set(old.gpus):
            yield f"{action.id} is placed beside its own old process, and must not be"


def takes_over(action: Action, launch: Launch, ending: Action | None, *, serves: bool) -> Iterator[str]:
    """What is started first shares no port with what it takes over from, and when it moves no GPU either.

    ``serves`` tells that the plan ends that one only after it.
    """
    ports = {action.port, *action.inner_ports} & {launch.port, *launch.inner_ports}
    if launch.replica != action.replica or ports:
        yield f"{action.id} takes over from {launch.id}, which is another replica or has the same port"
    moved = ending is not None and not ending.changes
    if moved and {gpu.uuid for gpu in action.gpus} & set(launch.gpus):
        yield f"{action.id} takes over from {launch.id} on a GPU of its own"
    if not serves:
        yield f"{launch.id} does not serve until {action.id} is ready"
