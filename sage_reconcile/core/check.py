"""An independent judge of plans. It shares no code with what makes them, and believes nothing they say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from sage_reconcile.core.observed import Gpu, Launch, Life, Observed
from sage_reconcile.core.plan import Action, Plan
from sage_reconcile.core.spec import Desired, Engine


def check_plan(desired: Desired, observed: Observed, plan: Plan) -> list[str]:
    """Everything that is wrong with a plan; an empty list where it is safe and complete.

    Safe: no GPU over its memory at any step, no two replicas on one port, no start before what it
    replaces has gone, nothing touched that is not proven ours. Complete: every replica that is wanted
    is kept, started or refused with a reason, exactly once.
    """
    return [
        *_order(plan),
        *_targets(observed, plan),
        *_complete(desired, plan),
        *_memory(desired, observed, plan),
        *_neighbours(desired, observed, plan),
        *_one_process(observed, plan),
        *_links(desired, observed, plan),
        *_ports(observed, plan),
        *_starts_after_stops(observed, plan),
    ]


def _order(plan: Plan) -> Iterator[str]:
    seen: set[str] = set()
    for action in plan.actions:
        if action.id in seen:
            yield f"two actions are called {action.id}"
        for before in action.after:
            if before not in seen:
                yield f"{action.id} comes after {before}, which does not come before it"
        seen.add(action.id)


def _targets(observed: Observed, plan: Plan) -> Iterator[str]:
    launches = {launch.id: launch for launch in observed.launches}
    allowed = {
        "stop": {Life.ALIVE},
        "kill": {Life.ALIVE},
        "reap": {Life.LEFTOVER},
    }
    for action in plan.actions:
        if action.kind == "spawn":
            continue
        launch = launches.get(action.launch)
        if launch is None:
            yield f"{action.id} acts on a launch that was not observed"
        elif launch.life not in allowed[action.kind]:
            yield f"{action.id} acts on a launch that is {launch.life}"
        elif action.kind == "kill" and launch.stopping_since is None:
            yield f"{action.id} kills a replica that was never asked to stop"
        elif action.kind == "stop" and action.stop_cause is None:
            yield f"{action.id} does not say why"
    for launch_id in plan.forget:
        if launch_id not in launches or launches[launch_id].life is not Life.EXITED:
            yield f"the record of {launch_id} would be dropped while it may still run"


def _complete(desired: Desired, plan: Plan) -> Iterator[str]:
    wanted = Counter(f"{engine.name}/{index}" for engine in desired.engines for index in range(engine.spec.replicas))
    told = Counter(kept.launch.replica for kept in plan.kept)
    told.update(action.replica for action in plan.actions if action.kind == "spawn")
    told.update(item.replica for item in plan.unplaced if not item.runs_on)
    for replica in wanted | told:
        if wanted[replica] != told[replica]:
            yield f"{replica} is wanted {wanted[replica]} times and planned {told[replica]} times"
    for item in plan.unplaced:
        if not item.reason:
            yield f"{item.replica} is refused without a reason"


def _memory(desired: Desired, observed: Observed, plan: Plan) -> Iterator[str]:
    """Adds up, for each GPU, what stays and what comes; only what the plan ends may be left out."""
    ended = {action.launch for action in plan.actions if action.kind != "spawn"}
    stopping = {launch.id for launch in observed.launches if _is_stopping(launch)}
    engines = {engine.name: engine for engine in desired.engines}
    gpus = {gpu.uuid: gpu for gpu in observed.gpus}
    spawns = [action for action in plan.actions if action.kind == "spawn"]
    touched = {gpu.uuid for action in spawns for gpu in action.gpus}
    for uuid in sorted(touched - gpus.keys()):
        yield f"a replica would start on {uuid}, which is not there"
    for uuid in sorted(touched & gpus.keys()):
        gpu = gpus[uuid]
        new = [action for action in spawns if uuid in {used.uuid for used in action.gpus}]
        taken = _taken(gpu, observed.launches, ended | stopping)
        total = taken + gpu.memory_reserved_mib + desired.host.headroom + sum(action.memory_mib for action in new)
        if total > gpu.memory_total_mib:
            yield f"GPU {gpu.index} would hold {total} MiB of {gpu.memory_total_mib} MiB"
        if gpu.problem or gpu.index in desired.host.exclude or uuid in desired.host.exclude:
            yield f"GPU {gpu.index} takes nothing new, but {new[0].id} is placed there"
    for action in spawns:
        yield from _one_spawn(action, engines)


def _taken(gpu: Gpu, launches: tuple[Launch, ...], gone: set[str]) -> int:
    """MiB on a GPU that the plan does not end: our promises or holdings, whichever is larger, and strangers'."""
    ours = seen = 0
    for launch in launches:
        if launch.life is Life.EXITED:
            continue
        told = [process.memory_mib for process in gpu.processes if process.launch == launch.id]
        promise = launch.memory_mib if gpu.uuid in launch.gpus else 0
        held = sum(mib for mib in told if mib is not None)
        seen += max(held, promise) if None in told else held
        ours += 0 if launch.id in gone else max(held, promise)
    return ours + max(0, gpu.memory_used_mib - seen)


def _one_spawn(action: Action, engines: Mapping[str, Engine]) -> Iterator[str]:
    name = _engine_name(action)
    if name not in engines:
        yield f"{action.id} starts an engine that is not in the file"
        return
    spec = engines[name].spec
    if len({gpu.uuid for gpu in action.gpus}) != spec.gpu_count:
        yield f"{action.id} gets {len(action.gpus)} GPUs and takes {spec.gpu_count}"
    if len({gpu.name for gpu in action.gpus}) > 1:
        yield f"{action.id} is split over GPUs of different models"
    if spec.runtime != "simulator" and any(gpu.simulated for gpu in action.gpus):
        yield f"{action.id} would run a real engine on simulated GPUs"
    if spec.gpus != "auto" and any(gpu.index not in spec.gpus and gpu.uuid not in spec.gpus for gpu in action.gpus):
        yield f"{action.id} is placed off the GPUs that its entry names"


def _neighbours(desired: Desired, observed: Observed, plan: Plan) -> Iterator[str]:
    """Who starts beside whom: nothing beside an exclusive replica, and two of an engine that is spread nowhere."""
    engines = {engine.name: engine.spec for engine in desired.engines}
    ended = {action.launch for action in plan.actions if action.kind != "spawn"}
    starting = [action for action in plan.actions if action.kind == "spawn" and _engine_name(action) in engines]
    for gpu in observed.gpus:
        told = {process.launch for process in gpu.processes}
        there: list[tuple[str, str, bool]] = []
        for launch in observed.launches:
            here = gpu.uuid in launch.gpus or launch.id in told
            if here and launch.life is not Life.EXITED and launch.id not in ended and not _is_stopping(launch):
                alone = launch.spec.get("exclusive") is True
                alone |= launch.engine_name in engines and engines[launch.engine_name].exclusive
                there.append((launch.replica, launch.engine_name, alone))
        for action in starting:
            if gpu.uuid not in {used.uuid for used in action.gpus}:
                continue
            name = _engine_name(action)
            yield from (
                f"{action.id} is placed beside {other}, which is exclusive" for other, _, alone in there if alone
            )
            if engines[name].exclusive and (there or _has_strangers(gpu, observed.launches)):
                yield f"{action.id} is exclusive, and GPU {gpu.index} is not free of others"
            if engines[name].spread == "gpu":
                yield from (f"{action.id} is placed on a GPU of {other}" for other, owner, _ in there if owner == name)
            there.append((action.replica, name, engines[name].exclusive))


def _one_process(observed: Observed, plan: Plan) -> Iterator[str]:
    """Who starts on a GPU on which one process at a time may compute: one, after all that compute there ended."""
    ended = {action.launch for action in plan.actions if action.kind != "spawn"}
    staying = [x for x in observed.launches if x.life is not Life.EXITED and x.id not in ended and not _is_stopping(x)]
    gone = {launch.id for launch in observed.launches} - {launch.id for launch in staying}
    for gpu in observed.gpus:
        starting = [a for a in plan.actions if a.kind == "spawn" and gpu.uuid in {used.uuid for used in a.gpus}]
        if gpu.compute_mode != "exclusive-process" or not starting:
            continue
        there = [launch for launch in staying if gpu.uuid in launch.gpus]
        computing = [process for process in gpu.processes if process.launch not in gone and not process.graphics]
        if there or computing or len(starting) > 1:
            yield f"GPU {gpu.index} serves one process at a time, and {starting[-1].id} would not be alone there"


def _has_strangers(gpu: Gpu, launches: tuple[Launch, ...]) -> bool:
    """Whether somebody else is on a GPU; an idle driver may show a few MiB as used, 64 at the most."""
    others = _taken(gpu, launches, {launch.id for launch in launches})
    return others > 64 or any(process.launch is None for process in gpu.processes)


def _links(desired: Desired, observed: Observed, plan: Plan) -> Iterator[str]:
    """Whether the ranks of what starts can reach each other over links that are good enough."""
    good = {"nvlink": {"nvlink"}, "numa": {"nvlink", "pix", "pxb", "phb", "node"}}
    engines = {engine.name: engine.spec for engine in desired.engines}
    for action in plan.actions:
        spec = engines.get(_engine_name(action)) if action.kind == "spawn" else None
        if spec is None or spec.link == "any" or not action.gpus:
            continue
        reached = {action.gpus[0].uuid}
        pairs = [set(pair) for pair, link in observed.links.items() if link.value in good[spec.link]]
        while more := [pair for pair in pairs if len(pair & reached) == 1]:
            reached.update(*more)
        if not {gpu.uuid for gpu in action.gpus} <= reached:
            yield f"{action.id} is split over GPUs that are not linked by {spec.link}"


def _engine_name(action: Action) -> str:
    return action.replica.rpartition("/")[0]


def _ports(observed: Observed, plan: Plan) -> Iterator[str]:
    ended = {action.launch for action in plan.actions if action.kind != "spawn"}
    holding = [launch for launch in observed.launches if launch.life is not Life.EXITED]
    staying = [launch for launch in holding if launch.id not in ended and not _is_stopping(launch)]
    ports = Counter(launch.port for launch in staying)
    spawned = [action.port for action in plan.actions if action.kind == "spawn"]
    ports.update(spawned)
    for port, count in sorted(ports.items()):
        if count > 1 and port in spawned:
            yield f"port {port} would be used {count} times"
    strangers = {port.number for port in observed.ports} - {launch.port for launch in holding}
    for port in sorted(strangers & set(spawned)):
        yield f"port {port} is in use by something that is not ours"


def _starts_after_stops(observed: Observed, plan: Plan) -> Iterator[str]:
    """Whatever shares the replica, the port or a GPU with a start, and ends, must have ended before it."""
    actions = {action.id: action for action in plan.actions}
    acting = {action.launch: action for action in plan.actions if action.kind != "spawn"}
    relevant = [
        launch
        for launch in observed.launches
        if launch.life is not Life.EXITED and (launch.id in acting or _is_stopping(launch))
    ]
    by_key: dict[object, list[Launch]] = {}
    for launch in relevant:
        for key in (launch.replica, launch.port, *launch.gpus):
            by_key.setdefault(key, []).append(launch)
    for action in plan.actions:
        if action.kind != "spawn":
            continue
        before = _all_before(action, actions)
        for key in (action.replica, action.port, *(gpu.uuid for gpu in action.gpus)):
            for launch in by_key.get(key, ()):
                ending = acting.get(launch.id)
                if ending is None and not action.waits_for:
                    yield f"{action.id} does not wait for {launch.replica}, which is still stopping"
                if ending is not None and ending.id not in before:
                    yield f"{action.id} does not come after {ending.id}"


def _is_stopping(launch: Launch) -> bool:
    """Whether it will be gone; of what cannot be proven ours nobody knows, whatever it was asked before."""
    return launch.life is Life.ALIVE and launch.stopping_since is not None


def _all_before(action: Action, actions: dict[str, Action]) -> set[str]:
    before: set[str] = set()
    todo = list(action.after)
    while todo:
        step = todo.pop()
        if step not in before:
            before.add(step)
            todo += actions[step].after if step in actions else ()
    return before
