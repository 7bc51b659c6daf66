"""Any box, any file, anything running: what every plan must hold to."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import combinations, count

import hypothesis.strategies as st
from hypothesis import HealthCheck, given, settings

from sage_reconcile.core.check import check_plan
from sage_reconcile.core.drift import changes
from sage_reconcile.core.lifecycle import StopCause
from sage_reconcile.core.observed import (
    ComputeMode,
    Exit,
    Gpu,
    GpuProcess,
    HostMemory,
    Launch,
    Life,
    Link,
    Observed,
    Port,
)
from sage_reconcile.core.plan import Action, Plan
from sage_reconcile.core.plan_text import plan_text
from sage_reconcile.core.planner import make_plan
from sage_reconcile.core.resolve import secret_marks
from sage_reconcile.core.spec import Desired, Engine
from tests.plans.test_golden import shuffled
from tests.reading import desired

NOW = 1_000_000.0
GIB = 1024
SIZES = ("20GiB", "39.9GiB", "40GiB", "40.1GiB", "79GiB", "80GiB", "30%", "auto", "1GiB")
NAMES = ("a", "b", "c", "d")
MODELS = ("llama-8b", "mystery")


@dataclass(frozen=True)
class World:
    ran: str
    text: str
    desired: Desired = field(repr=False)
    observed: Observed
    moves: bool = False

    def plan(self, now: float = NOW) -> Plan:
        return make_plan(self.desired, self.observed, now, allow_moves=self.moves)


def one_of(*values: str) -> st.SearchStrategy[str]:
    return st.sampled_from(values)


@st.composite
def entries(draw: st.DrawFn) -> str:
    fields = [f"model: {draw(one_of(*MODELS))}", f"memory: {draw(one_of(*SIZES))}"]
    optional = {
        "replicas": one_of("0", "1", "2", "3"),
        "tensor_parallel_size": one_of("2", "4"),
        "priority": one_of("-1", "5"),
        "data_parallel_size": st.just("2"),
        "args": one_of("{seed: 1}", "{seed: 2}", "{cpu-offload-gb: 6}"),
        "env": one_of("{TOKEN: one}", "{TOKEN: two}"),
        "runtime": st.just("simulator"),
        "stop_timeout": one_of("2s", "10m"),
        "spread": st.just("gpu"),
        "link": one_of("nvlink", "numa"),
        "exclusive": st.just("true"),
        "movable": st.just("true"),
        "preemption": st.just("lower"),
        "startup_timeout": one_of("10s", "2h"),
        "max_unavailable": one_of("1", "2"),
        "max_surge": one_of("0", "2"),
        "rollback": one_of("off", "auto"),
    }
    for name, values in optional.items():
        if draw(st.integers(0, 3)) == 0:
            fields.append(f"{name}: {draw(values)}")
    text = ", ".join(fields)
    if draw(st.integers(0, 5)) == 0 and "%" not in text:
        text += ", device: cpu"
    elif draw(st.integers(0, 5)) == 0 and "_parallel" not in text:
        text += f", gpus: [{draw(one_of('0', '1', '0, 1', 'GPU-2', '7'))}]"
    return text


@st.composite
def files(draw: st.DrawFn) -> str:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=4))
    lines = []
    for number, name in enumerate(names):
        fixed = f", port: {8000 + 4 * number}" if draw(st.integers(0, 4)) == 0 else ""
        lines.append(f"  {name}: {{{draw(entries())}{fixed}}}")
    host = draw(one_of("{}", "{headroom: 1GiB}", "{exclude: [0]}", "{ports: 8000-8005}", "{inner_ports: 20000-20029}"))
    engines = "\n" + "\n".join(lines) if lines else " {}"
    return f"version: 1\nhost: {host}\nengines:{engines}\n"


@st.composite
def gpus(draw: st.DrawFn, index: int, simulated: bool) -> Gpu:
    name, gib = draw(st.sampled_from([("H100", 80), ("H100", 80), ("A100", 80), ("A100", 40), ("L4", 24)]))
    return Gpu(
        f"GPU-{index}",
        index,
        name,
        f"0000:{draw(st.integers(0, 3)):02x}:{index:02x}.0",
        gib * GIB,
        memory_reserved_mib=draw(st.sampled_from([0, 0, 512])),
        problem=draw(st.sampled_from(["", "", "", "", "Xid 79"])),
        compute_mode=draw(st.sampled_from([None, *ComputeMode, ComputeMode.DEFAULT])),
        simulated=simulated,
    )


inner_blocks = st.builds(
    lambda first, count: range(first, first + count), st.integers(19995, 20030), st.sampled_from([0, 2, 8, 8, 8])
)


@st.composite
def launches(draw: st.DrawFn, number: int, ran: Desired, box: list[Gpu]) -> Launch:
    engine = draw(st.sampled_from(ran.engines))
    launch_id = f"launch-{number}"
    life = draw(st.sampled_from([Life.ALIVE] * 6 + list(Life)))
    on = draw(st.lists(st.sampled_from([*(gpu.uuid for gpu in box), "GPU-gone"]), unique=True, max_size=3))
    created = NOW - draw(st.sampled_from([1.0, 60.0, 5000.0]))
    ready_at = draw(st.sampled_from([None, created + 30, created + 30]))
    stopping = draw(st.sampled_from([None, None, None, NOW - 1, NOW - 100, NOW + 50]))
    left = life in (Life.EXITED, Life.LEFTOVER)
    return Launch(
        id=launch_id,
        engine_name=engine.name,
        index=draw(st.integers(0, 3)),
        spec=engine.record,
        secret_marks=secret_marks(engine.secrets, launch_id),
        gpus=tuple(on) if engine.spec.device == "cuda" else (),
        memory_mib=draw(st.sampled_from([1, 20, 40])) * GIB if on else 0,
        host_memory_mib=draw(st.sampled_from([0, 0, 6, 20])) * GIB,
        host_held_mib=draw(st.sampled_from([0, 0, 500, 7 * GIB])),
        port=8000 + draw(st.integers(0, 9)),
        bind="127.0.0.1",
        life=life,
        created_at=created,
        pid=100 + number,
        ready=life is Life.ALIVE and ready_at is not None and draw(st.booleans()),
        ready_at=ready_at,
        stopping_since=stopping,
        stop_cause=draw(st.sampled_from(list(StopCause))) if stopping is not None else "",
        exit=Exit(draw(st.sampled_from([0, 1, None])), draw(st.sampled_from([NOW - 1, NOW - 100, NOW + 1e6, None])))
        if left
        else None,
        failures=draw(st.integers(0, 4)),
        inner_ports=draw(inner_blocks),
    )


@st.composite
def processes(draw: st.DrawFn, gpu: Gpu, found: list[Launch]) -> Gpu:
    """What runs on a GPU: of ours, some told and some not, and of strangers."""
    pids = count(1)
    listed = []
    for launch in found:
        if gpu.uuid in launch.gpus or draw(st.integers(0, 9)) == 0:
            for _ in range(draw(st.integers(0, 2))):
                held = draw(st.sampled_from([None, 1, 10 * GIB, launch.memory_mib]))
                listed.append(GpuProcess(next(pids), held, launch=launch.id))
    if draw(st.integers(0, 2)) == 0:
        listed.append(
            GpuProcess(
                next(pids), draw(st.sampled_from([None, 1, 30 * GIB])), "alice", "python", graphics=draw(st.booleans())
            )
        )
    used = sum(process.memory_mib or 0 for process in listed) + draw(st.sampled_from([0, 0, 300, 20 * GIB]))
    return replace(gpu, processes=tuple(listed), memory_used_mib=used)


@st.composite
def linked(draw: st.DrawFn, box: list[Gpu]) -> dict[frozenset[str], Link]:
    """Islands of two or four, some links inside them lost, and whatever joins the rest; not every link is told."""
    size = draw(st.sampled_from([2, 4]))
    found = {}
    for one, other in combinations(box, 2):
        inside = [Link.NVLINK, Link.NVLINK, Link.PIX]
        outside = [Link.NODE, Link.SYS, None]
        link = draw(st.sampled_from(inside if one.index // size == other.index // size else outside))
        if link is not None:
            found[frozenset((one.uuid, other.uuid))] = link
    return found


@st.composite
def host_memories(draw: st.DrawFn, found: list[Launch]) -> HostMemory | None:
    total = draw(st.sampled_from([None, 16, 48, 64, 128]))
    if total is None:
        return None
    held = sum(launch.host_held_mib for launch in found if launch.holds) + draw(st.sampled_from([0, 300, 8 * GIB]))
    return HostMemory(total * GIB, max(0, total * GIB - held))


@st.composite
def worlds(draw: st.DrawFn, busy: bool = True) -> World:
    text = draw(files())
    ran_text = text if draw(st.booleans()) else draw(files())
    ran = read_once(ran_text)
    simulated = draw(st.integers(0, 9)) == 0
    width = draw(st.one_of(st.integers(0, 8), st.sampled_from([12, 16])))
    box = [draw(gpus(index, simulated)) for index in range(width)]
    found: list[Launch] = []
    if busy and ran.engines:
        found = [draw(launches(number, ran, box)) for number in range(draw(st.integers(0, 6)))]
    box = [draw(processes(gpu, found)) for gpu in box]
    ports = draw(st.lists(st.integers(8000, 8006), unique=True, max_size=2))
    ports += draw(st.lists(st.integers(20000, 20029), unique=True, max_size=2))
    links = {} if draw(st.booleans()) else draw(linked(box))
    observed = Observed(
        tuple(box),
        tuple(found),
        tuple(Port(port, "nginx") for port in ports),
        links=links,
        host_memory=draw(host_memories(found)),
    )
    return World(ran_text, text, read_once(text), observed, moves=draw(st.booleans()))


EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "60"))
"""More of them than the default are drawn anew each time."""

many = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES <= 60
)
read_once = lru_cache(maxsize=4096)(desired)


@many
@given(worlds())
def test_every_plan_is_safe_and_complete(world: World) -> None:
    plan = world.plan()
    assert check_plan(world.desired, world.observed, plan) == []
    kept = {item.launch.replica for item in plan.kept}
    spawned = {action.replica for action in plan.actions if action.kind == "spawn"}
    refused = {item.replica for item in plan.unplaced}
    wanted = {replica for engine in world.desired.engines for replica in engine.replicas()}
    assert kept | spawned | refused == wanted
    assert not (kept & spawned)
    assert not (spawned & refused)
    assert all(item.runs_on == (item.replica in kept) for item in plan.unplaced)
    acted = [action.launch for action in plan.actions if action.kind != "spawn"]
    assert len(acted) == len(set(acted)), "nothing is ended twice"


@many
@given(worlds())
def test_the_same_gives_the_same_whatever_the_order_in_which_it_is_told(world: World) -> None:
    first = plan_text(world.plan(), NOW)
    assert plan_text(replace(world, desired=desired(world.text)).plan(), NOW) == first
    for seed in range(3):
        assert plan_text(replace(world, observed=shuffled(world.observed, seed)).plan(), NOW) == first


ROOM = (StopCause.MOVED, StopCause.DISPLACED)


def asked_to_leave(world: World, launch: Launch, action: Action) -> bool:
    """Whether somebody allowed it: the user, its own entry, or a higher priority whose entry may displace it."""
    engine = world.desired.engine(launch.engine_name)
    assert engine is not None
    succeeded = any(other.predecessor == launch.id for other in world.observed.launches)
    if action.stop_cause is StopCause.MOVED:
        return world.moves or engine.spec.movable or succeeded
    above = (other.spec for other in world.desired.engines if other.spec.preemption == "lower")
    return any(spec.priority > engine.spec.priority for spec in above)


@many
@given(worlds())
def test_what_runs_unchanged_is_never_touched(world: World) -> None:
    plan = world.plan()
    acted = {action.launch for action in plan.actions if action.kind != "spawn"}
    room = {action.launch: action for action in plan.actions if action.stop_cause in ROOM}
    for launch in world.observed.launches:
        if launch.id in room:
            assert asked_to_leave(world, launch, room[launch.id])
            continue
        engine = world.desired.engine(launch.engine_name)
        alone = sum(other.replica == launch.replica and other.holds for other in world.observed.launches) == 1
        if launch.life is not Life.ALIVE or launch.stopping_since is not None or engine is None or not alone:
            continue
        unchanged = launch.index < engine.spec.replicas and not changes(
            world.desired, engine, launch, world.observed.gpus, world.observed.links
        )
        in_time = launch.ready_at is not None or launch.created_at + engine.spec.startup_timeout > NOW
        if unchanged and in_time:
            assert launch.id not in acted
            assert launch in [item.launch for item in plan.kept]
        else:
            assert launch.id in acted or any(item.replica == launch.replica for item in plan.unplaced)


@many
@given(worlds())
def test_no_stranger_is_touched(world: World) -> None:
    plan = world.plan()
    touched = {action.launch for action in plan.actions} | set(plan.forget)
    for launch in world.observed.launches:
        if launch.life in (Life.UNPROVEN, Life.INTENT):
            assert launch.id not in touched


@many
@given(worlds(busy=False))
def test_the_order_of_the_file_decides_only_between_equals(world: World) -> None:
    """What has the only highest priority is placed whatever stands before it."""
    engines = world.desired.engines
    if not engines:
        return
    turned = replace(world.desired, engines=tuple(reversed(engines)))
    for engine in engines:
        if all(engine.spec.priority > other.spec.priority for other in engines if other is not engine):
            first = placed_of(world.plan(), engine)
            assert placed_of(make_plan(turned, world.observed, NOW), engine) == first


def placed_of(plan: Plan, engine: Engine) -> dict[str, tuple[str, ...]]:
    return {
        action.replica: tuple(gpu.uuid for gpu in action.gpus)
        for action in plan.actions
        if action.replica in engine.replicas()
    }


def applied(world: World, plan: Plan, at: float) -> Observed:
    """The machine after a plan was carried out and every start became ready; stops asked for before have ended too."""
    gone = {action.launch for action in plan.actions if action.kind != "spawn"} | set(plan.forget)
    gone |= {launch.id for launch in world.observed.launches if launch.stopping_since is not None and launch.holds}
    gone -= {item.launch.id for item in plan.kept}
    found = []
    for launch in world.observed.launches:
        if launch.life is Life.UNPROVEN:
            found.append(launch)
        elif launch.id not in gone and launch.life is not Life.EXITED:
            ready = launch.ready_at or at
            found.append(
                replace(launch, life=Life.ALIVE, ready=True, ready_at=ready, stopping_since=None, stop_cause="")
            )
    for action in plan.actions:
        if action.kind == "spawn":
            engine = world.desired.engine(action.replica.rpartition("/")[0])
            assert engine is not None
            engine = action.revision or engine
            new = f"new {action.replica} {at}"
            found.append(
                Launch(
                    id=new,
                    engine_name=engine.name,
                    index=int(action.replica.rpartition("/")[2]),
                    spec=engine.record,
                    secret_marks=secret_marks(engine.secrets, new),
                    gpus=tuple(gpu.uuid for gpu in action.gpus),
                    memory_mib=action.memory_mib,
                    port=action.port,
                    inner_ports=action.inner_ports,
                    host_memory_mib=action.host_memory_mib,
                    bind=world.desired.host.bind,
                    life=Life.ALIVE,
                    created_at=at,
                    ready=True,
                    ready_at=at,
                )
            )
    host = world.observed.host_memory
    freed = sum(x.host_held_mib for x in world.observed.launches if x.id in gone and x.holds)
    return replace(
        world.observed,
        gpus=tuple(without(gpu, gone) for gpu in world.observed.gpus),
        launches=tuple(found),
        host_memory=host and replace(host, available_mib=host.available_mib + freed),
    )


def without(gpu: Gpu, gone: set[str]) -> Gpu:
    freed = sum(process.memory_mib or 0 for process in gpu.processes if process.launch in gone)
    left = tuple(process for process in gpu.processes if process.launch not in gone)
    return replace(gpu, processes=left, memory_used_mib=gpu.memory_used_mib - freed)


def running(observed: Observed) -> dict[str, Launch]:
    return {launch.replica: launch for launch in observed.launches if launch.life is Life.ALIVE}


@many
@given(worlds())
def test_a_plan_that_was_carried_out_leaves_exactly_what_is_wanted_and_nothing_to_do(world: World) -> None:
    plan, at = world.plan(), NOW
    for _ in range(12):
        if not plan.queued or plan.making_room or any(x.life is Life.INTENT for x in world.observed.launches):
            break
        at += 1000
        world = replace(world, observed=applied(world, plan, at))
        plan = world.plan(at)
        assert check_plan(world.desired, world.observed, plan) == []
    later = applied(world, plan, at + 1000)
    refused = {item.replica for item in plan.unplaced}
    wanted = {replica for engine in world.desired.engines for replica in engine.replicas()}
    intents = {launch.replica for launch in world.observed.launches if launch.life is Life.INTENT}
    unproven = {launch.replica for launch in world.observed.launches if launch.life is Life.UNPROVEN}
    untold = any(process.memory_mib is None for gpu in world.observed.gpus for process in gpu.processes)
    if intents or untold or plan.making_room:
        return  # what they come to is told by a later look only
    runs = running(later)
    assert wanted - refused <= runs.keys()
    assert runs.keys() - unproven <= wanted
    for replica, launch in runs.items():
        engine = world.desired.engine(launch.engine_name)
        assert engine is not None
        assert replica in refused or not changes(world.desired, engine, launch, later.gpus, later.links)
    second = replace(world, observed=later).plan(at + 2000)
    assert check_plan(world.desired, later, second) == []
    if second.making_room:
        return  # what has got ready may be asked to move only now
    assert not second.actions, plan_text(second, at + 2000)
    assert {item.replica for item in second.unplaced} == refused
    assert not second.waiting


@many
@given(worlds())
def test_no_port_is_ever_given_twice(world: World) -> None:
    """Nor one that a stranger has, nor one that something of ours still has which stays or may."""
    plan = world.plan()
    ending = {action.launch for action in plan.actions if action.kind != "spawn"}
    ending |= {launch.id for launch in world.observed.launches if launch.life is Life.ALIVE and launch.stopping_since}
    holding = [launch for launch in world.observed.launches if launch.life is not Life.EXITED]
    taken = {port for launch in holding if launch.id not in ending for port in (launch.port, *launch.inner_ports)}
    taken |= {port.number for port in world.observed.ports} - {
        port for launch in holding for port in (launch.port, *launch.inner_ports)
    }
    for action in plan.actions:
        if action.kind == "spawn":
            given_now = {action.port, *action.inner_ports}
            assert len(given_now) == 1 + len(action.inner_ports)
            assert not given_now & taken, action.id
            taken |= given_now
