"""An independent judge of plans. It shares no code with what makes them, and believes nothing they say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from sage_reconcile.core.check_memory import all_before, gpu_memory, host_memory, is_stopping, taken
from sage_reconcile.core.check_rollout import as_rolled_back, takes_over, updates
from sage_reconcile.core.observed import Gpu, Launch, Life, Observed
from sage_reconcile.core.plan import Action, Plan
from sage_reconcile.core.spec import Desired, Engine


def check_plan(desired: Desired, observed: Observed, plan: Plan) -> list[str]:
    """Everything that is wrong with a plan; an empty list where it is safe and complete.

    Safe: no GPU over its memory at any step, no port given twice, no start before what it
    replaces has gone, nothing touched that is not proven ours. Complete: every replica that is wanted
    is kept, started or refused with a reason, exactly once.
    """
    desired, wrong = as_rolled_back(desired, observed, plan)
    return [
        *wrong,
        *updates(desired, observed, plan),
        *_order(plan),
        *_targets(observed, plan),
        *_complete(desired, plan),
        *gpu_memory(desired, observed, plan),
        *host_memory(desired, observed, plan),
        *_neighbours(desired, observed, plan),
        *_spawns(desired, plan),
        *_one_process(observed, plan),
        *_links(desired, observed, plan),
        *_ports(desired, observed, plan),
        *_starts_after_stops(observed, plan),
    ]


def _order(plan: Plan) -> Iterator[str]:
    seen: set[str] = set()
    never = {action.id for action in plan.actions if action.blocked}
    replaced = {action.replica for action in plan.actions if action.changes}
    for action in plan.actions:
        if action.id in seen:
            yield f"two actions are called {action.id}"
        for before in action.after:
            if before not in seen:
                yield f"{action.id} comes after {before}, which does not come before it"
            if before in never:
                yield f"{action.id} comes after {before}, which is never done"
        if action.blocked and action.replica in replaced:
            yield f"{action.id} is never done, and what runs would end for it"
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


def _spawns(desired: Desired, plan: Plan) -> Iterator[str]:
    engines = {engine.name: engine for engine in desired.engines}
    for action in plan.actions:
        if action.kind == "spawn":
            yield from _one_spawn(action, engines)


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
    cannot = spec.runtime != "simulator" and any(gpu.simulated for gpu in action.gpus)
    if cannot and not action.blocked:
        yield f"{action.id} would run a real engine on simulated GPUs"
    if action.blocked and not cannot:
        yield f"{action.id} is held off, and nothing stands in its way"
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
            if here and launch.life is not Life.EXITED and launch.id not in ended and not is_stopping(launch):
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
    staying = [x for x in observed.launches if x.life is not Life.EXITED and x.id not in ended and not is_stopping(x)]
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
    others = taken(gpu, launches, {launch.id for launch in launches})
    return others > 64 or any(process.launch is None for process in gpu.processes)


def _links(desired: Desired, observed: Observed, plan: Plan) -> Iterator[str]:
    """Whether the ranks of what starts can reach each other over links that are good enough."""
    good = {"nvlink": {"nvlink"}, "numa": {"nvlink", "pix", "pxb", "phb", "node"}}
    near: dict[str, dict[str, list[str]]] = {kind: {} for kind in good}
    for kind, pair in [(kind, pair) for pair, link in observed.links.items() for kind in good if link in good[kind]]:
        for uuid in pair:
            near[kind].setdefault(uuid, []).extend(pair - {uuid})
    engines = {engine.name: engine.spec for engine in desired.engines}
    for action in plan.actions:
        spec = engines.get(_engine_name(action)) if action.kind == "spawn" else None
        if spec is None or spec.link == "any" or not action.gpus:
            continue
        reached: set[str] = set()
        todo = [action.gpus[0].uuid]
        while todo:
            step = todo.pop()
            if step not in reached:
                reached.add(step)
                todo += near[spec.link].get(step, ())
        if not {gpu.uuid for gpu in action.gpus} <= reached:
            yield f"{action.id} is split over GPUs that are not linked by {spec.link}"


def _engine_name(action: Action) -> str:
    return action.replica.rpartition("/")[0]


def _ports(desired: Desired, observed: Observed, plan: Plan) -> Iterator[str]:
    ended = {action.launch for action in plan.actions if action.kind != "spawn"}
    spawns = [action for action in plan.actions if action.kind == "spawn"]
    if not spawns:
        return
    holding = [launch for launch in observed.launches if launch.life is not Life.EXITED]
    staying = [launch for launch in holding if launch.id not in ended and not is_stopping(launch)]
    ports = Counter(port for launch in staying for port in (launch.port, *launch.inner_ports))
    spawned = {port for action in spawns for port in (action.port, *action.inner_ports)}
    ports.update(port for action in spawns for port in (action.port, *action.inner_ports))
    for port, count in sorted(ports.items()):
        if count > 1 and port in spawned:
            yield f"port {port} would be used {count} times"
    ours = {port for launch in holding for port in (launch.port, *launch.inner_ports)}
    for port in sorted(({port.number for port in observed.ports} - ours) & spawned):
        yield f"port {port} is in use by something that is not ours"
    low, high = (int(text) for text in desired.host.inner_ports.split("-"))
    real = {engine.name for engine in desired.engines if engine.spec.runtime == "vllm"}
    for action in spawns:
        inner = list(action.inner_ports)
        if bool(inner) != (_engine_name(action) in real):
            yield f"{action.id} gets {len(inner)} inner ports, and vLLM alone takes some"
        if inner and (inner != list(range(inner[0], inner[0] + len(inner))) or inner[0] < low or inner[-1] > high):
            yield f"{action.id} gets inner ports that are not in a row or not in {low}-{high}"


def _starts_after_stops(observed: Observed, plan: Plan) -> Iterator[str]:
    """Whatever shares the replica, a port or a GPU with a start, and ends, must have ended before it.

    But for what it takes over from: that ends after it, and they share no more than the name.
    """
    actions = {action.id: action for action in plan.actions}
    acting = {action.launch: action for action in plan.actions if action.kind != "spawn"}
    by_key: dict[object, list[Launch]] = {}
    for launch in observed.launches:
        if launch.life is not Life.EXITED and (launch.id in acting or is_stopping(launch)):
            for key in (launch.replica, launch.port, *launch.inner_ports, *launch.gpus):
                by_key.setdefault(key, []).append(launch)
    for action in plan.actions:
        if action.kind == "spawn":
            keys = (action.replica, action.port, *action.inner_ports, *(gpu.uuid for gpu in action.gpus))
            sharing = {launch.id: launch for key in keys for launch in by_key.get(key, ())}
            yield from _one_start(action, sharing.values(), acting, actions)


def _one_start(
    action: Action, sharing: Iterable[Launch], acting: dict[str, Action], actions: dict[str, Action]
) -> Iterator[str]:
    before = all_before(action, actions)
    for launch in sharing:
        ending = acting.get(launch.id)
        if launch.id == action.predecessor:
            serves = ending is not None and action.id in all_before(ending, actions)
            yield from takes_over(action, launch, ending, serves=serves)
        elif ending is None and not action.waits_for:
            yield f"{action.id} does not wait for {launch.replica}, which is still stopping"
        elif ending is not None and ending.id not in before:
            yield f"{action.id} does not come after {ending.id}"
    if action.predecessor and action.predecessor not in acting:
        yield f"{action.id} takes over from {action.predecessor}, which does not end"
