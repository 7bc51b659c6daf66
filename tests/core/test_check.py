"""The judge of plans: good plans pass, and a plan broken in one way is caught for that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml

from sage_reconcile.core.check import check_plan
from sage_reconcile.core.observed import GpuProcess, Life, Link, Observed, Port
from sage_reconcile.core.plan import Action, Plan, Unplaced
from sage_reconcile.core.planner import make_plan
from sage_reconcile.core.spec import Desired
from tests.plans.world import NOW, world
from tests.reading import desired

RAN = """
version: 1
engines:
  keep: {model: k, memory: 20GiB}
  change: {model: c, memory: 40GiB}
  gone: {model: g, memory: 30GiB}
  slow: {model: s, memory: 10GiB}
  dead: {model: d, memory: 10GiB}
  over: {model: o, memory: 10GiB}
"""
FILE = """
version: 1
host: {exclude: [3]}
engines:
  keep: {model: k, memory: 20GiB}
  change: {model: c, memory: 40GiB, args: {seed: 1}, max_surge: 0}
  fresh: {model: f, memory: 50GiB}
  pair: {model: p, memory: 10GiB, tensor_parallel_size: 2}
  pinned: {model: q, memory: 10GiB, gpus: [2]}
  huge: {model: h, memory: 90GiB}
"""
WORLD = """
gpus:
  - {gpu: H100 80GiB, strangers: [812 alice python 5GiB]}
  - H100 80GiB
  - {gpu: H100 80GiB, reserve: 1GiB}
  - H100 80GiB
  - A100 80GiB
  - {gpu: H100 80GiB, problem: ECC errors}
ports: {8010: nginx}
launches:
  - {run: keep/0, gpu: 0, port: 8000, id: keep}
  - {run: change/0, gpu: 0, port: 8001, id: change}
  - {run: gone/0, gpu: 1, port: 8002, id: gone}
  - {run: slow/0, gpu: 1, port: 8003, id: slow, state: stopping, ready: 1h, stopping: 5s, why: REMOVED}
  - {run: dead/0, gpu: 2, port: 8004, id: dead, state: leftover, ready: 1h, exit: 137, ended: 1s}
  - {run: over/0, gpu: 2, port: 8005, id: over, state: exited, exit: 0, ended: 1s}
"""


@pytest.fixture
def wanted() -> Desired:
    return desired(FILE)


@pytest.fixture
def machine() -> Observed:
    return world(yaml.safe_load(WORLD), desired(RAN), NOW)


@pytest.fixture
def plan(wanted: Desired, machine: Observed) -> Plan:
    found = make_plan(wanted, machine, NOW)
    assert check_plan(wanted, machine, found) == []
    assert [action.id for action in found.actions] == [
        "reap dead/0 dead",
        "stop change/0 change",
        "stop gone/0 gone",
        "spawn change/0",
        "spawn fresh/0",
        "spawn pair/0",
        "spawn pinned/0",
    ]
    return found


def having(plan: Plan, action_id: str, **values: Any) -> Plan:
    """The plan with one action changed."""
    assert any(action.id == action_id for action in plan.actions)
    actions = tuple(replace(action, **values) if action.id == action_id else action for action in plan.actions)
    return replace(plan, actions=actions)


def action(plan: Plan, action_id: str) -> Action:
    return next(action for action in plan.actions if action.id == action_id)


def test_two_actions_of_one_name(plan: Plan, wanted: Desired, machine: Observed) -> None:
    doubled = replace(plan, actions=(*plan.actions, action(plan, "stop gone/0 gone")))
    assert check_plan(wanted, machine, doubled) == ["two actions are called stop gone/0 gone"]


def test_an_action_after_one_that_comes_later_or_not_at_all(plan: Plan, wanted: Desired, machine: Observed) -> None:
    first = having(plan, "reap dead/0 dead", after=("stop gone/0 gone",))
    assert check_plan(wanted, machine, first) == [
        "reap dead/0 dead comes after stop gone/0 gone, which does not come before it"
    ]
    assert check_plan(wanted, machine, having(plan, "reap dead/0 dead", after=("nothing",))) == [
        "reap dead/0 dead comes after nothing, which does not come before it"
    ]
    assert check_plan(wanted, machine, having(plan, "reap dead/0 dead", after=("reap dead/0 dead",)))


def test_acting_on_what_was_not_observed(plan: Plan, wanted: Desired, machine: Observed) -> None:
    told = check_plan(wanted, machine, having(plan, "stop gone/0 gone", launch="stranger"))
    assert "stop gone/0 gone acts on a launch that was not observed" in told


@pytest.mark.parametrize("life", [Life.UNPROVEN, Life.INTENT, Life.EXITED, Life.LEFTOVER])
def test_stopping_what_is_not_proven_to_be_running_and_ours(
    plan: Plan, wanted: Desired, machine: Observed, life: Life
) -> None:
    launches = tuple(replace(item, life=life) if item.id == "gone" else item for item in machine.launches)
    told = check_plan(wanted, replace(machine, launches=launches), plan)
    assert f"stop gone/0 gone acts on a launch that is {life}" in told


@pytest.mark.parametrize("life", [Life.UNPROVEN, Life.INTENT, Life.EXITED, Life.ALIVE])
def test_reaping_what_is_not_left_over(plan: Plan, wanted: Desired, machine: Observed, life: Life) -> None:
    launches = tuple(replace(item, life=life) if item.id == "dead" else item for item in machine.launches)
    told = check_plan(wanted, replace(machine, launches=launches), plan)
    assert f"reap dead/0 dead acts on a launch that is {life}" in told


def test_killing_what_was_never_asked_to_stop(plan: Plan, wanted: Desired, machine: Observed) -> None:
    assert check_plan(wanted, machine, having(plan, "stop gone/0 gone", kind="kill")) == [
        "stop gone/0 gone kills a replica that was never asked to stop"
    ]


def test_a_stop_without_a_cause(plan: Plan, wanted: Desired, machine: Observed) -> None:
    assert check_plan(wanted, machine, having(plan, "stop gone/0 gone", stop_cause=None)) == [
        "stop gone/0 gone does not say why"
    ]


@pytest.mark.parametrize("launch", ["keep", "dead", "unknown"])
def test_dropping_the_record_of_what_may_still_run(plan: Plan, wanted: Desired, machine: Observed, launch: str) -> None:
    assert plan.forget == ("over",)
    assert check_plan(wanted, machine, replace(plan, forget=("over", launch))) == [
        f"the record of {launch} would be dropped while it may still run"
    ]


def test_a_replica_that_is_forgotten(plan: Plan, wanted: Desired, machine: Observed) -> None:
    assert check_plan(wanted, machine, replace(plan, kept=())) == ["keep/0 is wanted 1 times and planned 0 times"]
    assert check_plan(wanted, machine, replace(plan, unplaced=())) == ["huge/0 is wanted 1 times and planned 0 times"]
    without = replace(plan, actions=tuple(item for item in plan.actions if item.id != "spawn pinned/0"))
    assert check_plan(wanted, machine, without) == ["pinned/0 is wanted 1 times and planned 0 times"]


def test_a_replica_planned_twice(plan: Plan, wanted: Desired, machine: Observed) -> None:
    twice = replace(plan, unplaced=(*plan.unplaced, Unplaced("keep/0", "no room")))
    assert check_plan(wanted, machine, twice) == ["keep/0 is wanted 1 times and planned 2 times"]
    stays = replace(plan, unplaced=(*plan.unplaced, Unplaced("keep/0", "no room", runs_on=True)))
    assert check_plan(wanted, machine, stays) == [], "a refused replacement is one replica that stays"


def test_a_replica_nobody_asked_for(plan: Plan, wanted: Desired, machine: Observed) -> None:
    told = check_plan(wanted, machine, having(plan, "spawn fresh/0", replica="other/0"))
    assert "other/0 is wanted 0 times and planned 1 times" in told
    assert "spawn fresh/0 starts an engine that is not in the file" in told


def test_a_refusal_without_a_reason(plan: Plan, wanted: Desired, machine: Observed) -> None:
    silent = replace(plan, unplaced=tuple(replace(item, reason="") for item in plan.unplaced))
    assert check_plan(wanted, machine, silent) == ["huge/0 is refused without a reason"]


def test_more_memory_than_a_gpu_has(plan: Plan, wanted: Desired, machine: Observed) -> None:
    pinned = action(plan, "spawn pinned/0")
    room = 79 * 1024 - sum(
        item.memory_mib for item in plan.actions if item.kind == "spawn" and machine.gpus[2] in item.gpus
    )
    assert check_plan(wanted, machine, having(plan, "spawn pinned/0", memory_mib=pinned.memory_mib + room)) == []
    assert check_plan(wanted, machine, having(plan, "spawn pinned/0", memory_mib=pinned.memory_mib + room + 1)) == [
        "GPU 2 would hold 81921 MiB of 81920 MiB after spawn pinned/0"
    ]


def test_headroom_and_strangers_count(plan: Plan, wanted: Desired, machine: Observed) -> None:
    room = plan.gpus[0].after.free_mib
    assert 0 < room <= (80 - 5 - 20 - 40) * 1024
    before = replace(wanted, host=wanted.host.model_copy(update={"headroom": room}))
    assert not [text for text in check_plan(before, machine, plan) if text.startswith("GPU 0 ")]
    above = replace(wanted, host=wanted.host.model_copy(update={"headroom": room + 1}))
    assert "GPU 0 would hold 81921 MiB of 81920 MiB after spawn pair/0" in check_plan(above, machine, plan)


def test_what_does_not_end_keeps_its_memory(plan: Plan, wanted: Desired, machine: Observed) -> None:
    first = having(plan, "spawn fresh/0", gpus=(machine.gpus[1],), memory_mib=70 * 1024)
    moved = having(first, "spawn fresh/0", after=("stop gone/0 gone",), waits_for="slow/0 to end")
    assert not [text for text in check_plan(wanted, machine, moved) if "would hold" in text]
    spared = replace(moved, actions=tuple(item for item in moved.actions if item.id != "stop gone/0 gone"))
    assert any("GPU 1 would hold" in text for text in check_plan(wanted, machine, spared))
    too_soon = having(moved, "spawn fresh/0", after=())
    assert any("GPU 1 would hold" in text for text in check_plan(wanted, machine, too_soon))


LATE = """
gpus: [{gpu: H100 80GiB, used: 20GiB}]
launches:
  - {run: keep/0, gpu: 0, port: 8000, id: old, state: exited, exit: 0, ended: 1s}
"""


def test_memory_that_is_not_back_counts_unless_the_start_waits_for_it() -> None:
    """As much as NVML names nobody for, and no more than the ended launch had been promised: 20 GiB."""
    wanted = desired("version: 1\nengines:\n  keep: {model: k, memory: 20GiB, args: {seed: 1}}\n")
    machine = world(yaml.safe_load(LATE), desired(RAN), NOW)
    plan = make_plan(wanted, machine, NOW)
    assert check_plan(wanted, machine, plan) == []
    waiting = having(plan, "spawn keep/0", memory_mib=80 * 1024, waits_for="GPU 0 to give back memory")
    assert check_plan(wanted, machine, waiting) == []
    for values in ({"memory_mib": 80 * 1024 + 1}, {"waits_for": ""}):
        assert ["would hold" in text for text in check_plan(wanted, machine, having(waiting, "spawn keep/0", **values))]
    for gpu in (
        replace(machine.gpus[0], memory_used_mib=20 * 1024 + 1),
        replace(machine.gpus[0], processes=(GpuProcess(9, 1),)),
        replace(machine.gpus[0], processes=(GpuProcess(9, None),)),
    ):
        told = check_plan(wanted, replace(machine, gpus=(gpu,)), waiting)
        assert len(told) == 1
        assert "GPU 0 would hold" in told[0]
    for values, memory_mib in (({"gpus": ("GPU-1",)}, 80 * 1024), ({"life": Life.UNPROVEN}, 60 * 1024)):
        others = replace(machine, launches=(replace(machine.launches[0], **values),))
        told = check_plan(wanted, others, having(waiting, "spawn keep/0", memory_mib=memory_mib))
        assert any("GPU 0 would hold" in text for text in told)


def test_a_start_on_a_gpu_that_takes_nothing_new(plan: Plan, wanted: Desired, machine: Observed) -> None:
    for index in (3, 5):
        assert check_plan(wanted, machine, having(plan, "spawn fresh/0", gpus=(machine.gpus[index],))) == [
            f"GPU {index} takes nothing new, but spawn fresh/0 is placed there"
        ]


def test_a_start_on_a_gpu_that_is_not_there(plan: Plan, wanted: Desired, machine: Observed) -> None:
    gone = replace(machine.gpus[2], uuid="GPU-9")
    assert "a replica would start on GPU-9, which is not there" in check_plan(
        wanted, machine, having(plan, "spawn fresh/0", gpus=(gone,))
    )


def test_too_few_gpus_or_the_same_twice(plan: Plan, wanted: Desired, machine: Observed) -> None:
    one = action(plan, "spawn pair/0").gpus[0]
    for gpus in ((one,), (one, one)):
        assert f"spawn pair/0 gets {len(gpus)} GPUs and takes 2" in check_plan(
            wanted, machine, having(plan, "spawn pair/0", gpus=gpus)
        )


def test_gpus_of_different_models(plan: Plan, wanted: Desired, machine: Observed) -> None:
    gpus = (machine.gpus[2], machine.gpus[4])
    told = check_plan(wanted, machine, having(plan, "spawn pair/0", gpus=gpus))
    assert "spawn pair/0 is split over GPUs of different models" in told


def test_a_real_engine_on_simulated_gpus(plan: Plan, wanted: Desired, machine: Observed) -> None:
    gpu = replace(machine.gpus[2], simulated=True)
    told = check_plan(wanted, machine, having(plan, "spawn pinned/0", gpus=(gpu,)))
    assert told == ["spawn pinned/0 would run a real engine on simulated GPUs"]
    assert check_plan(wanted, machine, having(plan, "spawn pinned/0", gpus=(gpu,), blocked="not there")) == []


def test_what_is_held_off_for_no_reason(plan: Plan, wanted: Desired, machine: Observed) -> None:
    told = check_plan(wanted, machine, having(plan, "spawn pinned/0", blocked="not there"))
    assert told == ["spawn pinned/0 is held off, and nothing stands in its way"]


def test_what_comes_after_something_that_is_never_done(plan: Plan, wanted: Desired, machine: Observed) -> None:
    gpu = replace(machine.gpus[4], simulated=True)
    blocked = having(plan, "spawn fresh/0", gpus=(gpu,), blocked="not there")
    after = (*action(plan, "spawn pinned/0").after, "spawn fresh/0")
    told = check_plan(wanted, machine, having(blocked, "spawn pinned/0", after=after))
    assert "spawn pinned/0 comes after spawn fresh/0, which is never done" in told


def test_what_ends_for_something_that_is_never_done(plan: Plan, wanted: Desired, machine: Observed) -> None:
    gpu = replace(machine.gpus[4], simulated=True)
    told = check_plan(wanted, machine, having(plan, "spawn change/0", gpus=(gpu,), blocked="not there"))
    assert "spawn change/0 is never done, and what runs would end for it" in told


def test_a_pinned_engine_somewhere_else(plan: Plan, wanted: Desired, machine: Observed) -> None:
    told = check_plan(wanted, machine, having(plan, "spawn pinned/0", gpus=(machine.gpus[4],)))
    assert told == ["spawn pinned/0 is placed off the GPUs that its entry names"]


def test_ports(plan: Plan, wanted: Desired, machine: Observed) -> None:
    other = action(plan, "spawn pair/0").port
    assert check_plan(wanted, machine, having(plan, "spawn fresh/0", port=other)) == [
        f"port {other} would be used 2 times"
    ]
    assert check_plan(wanted, machine, having(plan, "spawn fresh/0", port=8000)) == ["port 8000 would be used 2 times"]
    assert check_plan(wanted, machine, having(plan, "spawn fresh/0", port=8010)) == [
        "port 8010 is in use by something that is not ours"
    ]


def test_inner_ports(plan: Plan, wanted: Desired, machine: Observed) -> None:
    mine, other = action(plan, "spawn fresh/0").inner_ports, action(plan, "spawn pair/0").inner_ports
    assert len(mine) == len(other) == 8
    crossing = range(other.stop - 1, other.stop + 7)
    told = f"port {other.stop - 1} would be used 2 times"
    assert told in check_plan(wanted, machine, having(plan, "spawn fresh/0", inner_ports=crossing))
    moved = having(plan, "spawn fresh/0", inner_ports=range(29000, 29008))
    assert check_plan(wanted, machine, moved) == []
    launches = tuple(
        replace(item, inner_ports=range(29004, 29012)) if item.id == "keep" else item for item in machine.launches
    )
    assert check_plan(wanted, replace(machine, launches=launches), moved) == [
        f"port {port} would be used 2 times" for port in range(29004, 29008)
    ]
    used = replace(machine, ports=(*machine.ports, Port(29007)))
    assert check_plan(wanted, used, moved) == ["port 29007 is in use by something that is not ours"]
    launches = tuple(
        replace(item, inner_ports=range(29007, 29008)) if item.id == "gone" else item for item in machine.launches
    )
    assert check_plan(wanted, replace(used, launches=launches), moved) == [
        "spawn fresh/0 does not come after stop gone/0 gone"
    ], "what listens there goes with the one that ends"
    listening = having(plan, "spawn pair/0", port=29003)
    listening = having(listening, "spawn fresh/0", inner_ports=range(29000, 29008))
    assert check_plan(wanted, machine, listening) == ["port 29003 would be used 2 times"]


def test_inner_ports_that_are_none_or_elsewhere(plan: Plan, wanted: Desired, machine: Observed) -> None:
    for inner, told in (
        (range(0), "gets 0 inner ports, and vLLM alone takes some"),
        (range(19999, 20007), "gets inner ports that are not in a row or not in 20000-29999"),
        (range(29993, 30001), "gets inner ports that are not in a row or not in 20000-29999"),
        (range(29000, 29016, 2), "gets inner ports that are not in a row or not in 20000-29999"),
    ):
        moved = having(plan, "spawn fresh/0", inner_ports=inner)
        assert check_plan(wanted, machine, moved)[-1] == f"spawn fresh/0 {told}"
    simulated = crossed(wanted, "fresh: {model: f, memory: 50GiB, runtime: simulator}")
    assert check_plan(simulated, machine, plan) == ["spawn fresh/0 gets 8 inner ports, and vLLM alone takes some"]


def test_a_start_before_what_it_replaces_has_gone(plan: Plan, wanted: Desired, machine: Observed) -> None:
    told = check_plan(wanted, machine, having(plan, "spawn change/0", after=()))
    assert "spawn change/0 does not come after stop change/0 change" in told


def test_a_start_on_a_port_that_is_not_free_yet(plan: Plan, wanted: Desired, machine: Observed) -> None:
    moved = having(plan, "spawn fresh/0", gpus=(machine.gpus[4],), port=8002, after=())
    assert check_plan(wanted, machine, moved) == ["spawn fresh/0 does not come after stop gone/0 gone"]
    after = having(moved, "spawn fresh/0", after=("stop gone/0 gone",))
    assert check_plan(wanted, machine, after) == []


def test_a_start_on_a_gpu_that_is_not_free_yet(plan: Plan, wanted: Desired, machine: Observed) -> None:
    moved = having(plan, "spawn fresh/0", gpus=(machine.gpus[1],), after=("stop gone/0 gone",))
    told = "spawn fresh/0 does not wait for slow/0, which is still stopping"
    assert told in check_plan(wanted, machine, moved)
    waiting = having(moved, "spawn fresh/0", waits_for="slow/0 to end")
    assert told not in check_plan(wanted, machine, waiting)


def test_coming_after_counts_along_a_chain(plan: Plan, wanted: Desired, machine: Observed) -> None:
    pinned = having(plan, "spawn pinned/0", after=("spawn pair/0",))
    assert "reap dead/0 dead" in action(plan, "spawn pair/0").after
    assert check_plan(wanted, machine, pinned) == []


@pytest.mark.parametrize("told", [True, False])
def test_what_stays_counts_with_the_larger_of_promised_and_held(
    plan: Plan, wanted: Desired, machine: Observed, *, told: bool
) -> None:
    """Held beyond the promise takes room; a holding that is not told is taken for the promise, once."""
    first = machine.gpus[0]
    room = plan.gpus[0].after.free_mib
    kept = next(process for process in first.processes if process.launch == "keep")
    more = replace(kept, pid=99, memory_mib=room + 1 if told else None)
    used = first.memory_used_mib + (room + 1 if told else 0)
    gpu = replace(first, processes=(*first.processes, more), memory_used_mib=used)
    expected = ["GPU 0 would hold 81921 MiB of 81920 MiB after spawn pair/0"] if told else []
    assert check_plan(wanted, replace(machine, gpus=(gpu, *machine.gpus[1:])), plan) == expected


@pytest.mark.parametrize("life", [Life.UNPROVEN, Life.INTENT, Life.EXITED, Life.LEFTOVER])
def test_killing_what_is_not_proven_to_be_running_and_ours(wanted: Desired, machine: Observed, life: Life) -> None:
    launches = [
        replace(launch, stopping_since=NOW - 100) if launch.id == "slow" else launch for launch in machine.launches
    ]
    late = replace(machine, launches=tuple(launches))
    plan = make_plan(wanted, late, NOW)
    assert check_plan(wanted, late, plan) == []
    assert "kill slow/0 slow" in [item.id for item in plan.actions]
    now = [replace(launch, life=life) if launch.id == "slow" else launch for launch in launches]
    told = check_plan(wanted, replace(machine, launches=tuple(now)), plan)
    assert f"kill slow/0 slow acts on a launch that is {life}" in told


def crossed(wanted: Desired, entry: str) -> Desired:
    """The same file with another entry for one engine."""
    name = entry.split(":", maxsplit=1)[0]
    other = desired(f"version: 1\nengines: {{{entry}}}\n").engines[0]
    return replace(wanted, engines=tuple(other if engine.name == name else engine for engine in wanted.engines))


def test_beside_an_exclusive_replica(plan: Plan, wanted: Desired, machine: Observed) -> None:
    """Whether the one that runs there says so in its record, or its entry does by now."""
    told = "spawn change/0 is placed beside keep/0, which is exclusive"
    moved = having(plan, "spawn change/0", gpus=(machine.gpus[0],))
    assert check_plan(wanted, machine, moved) == []
    by_entry = crossed(wanted, "keep: {model: k, memory: 20GiB, exclusive: true}")
    assert told in check_plan(by_entry, machine, moved)
    records = tuple(
        replace(item, spec={**item.spec, "exclusive": True}) if item.id == "keep" else item for item in machine.launches
    )
    assert told in check_plan(wanted, replace(machine, launches=records), moved)


def test_an_exclusive_replica_beside_another_or_a_stranger(plan: Plan, wanted: Desired, machine: Observed) -> None:
    alone = crossed(wanted, "fresh: {model: f, memory: 50GiB, exclusive: true}")
    free = having(plan, "spawn fresh/0", gpus=(machine.gpus[4],))
    assert check_plan(alone, machine, free) == []
    beside = having(free, "spawn pinned/0", gpus=(machine.gpus[4],))
    assert "spawn pinned/0 is placed beside fresh/0, which is exclusive" in check_plan(alone, machine, beside)
    used = tuple(replace(gpu, memory_used_mib=100) if gpu.index == 4 else gpu for gpu in machine.gpus)
    told = ["spawn fresh/0 is exclusive, and GPU 4 is not free of others"]
    assert check_plan(alone, replace(machine, gpus=used), free) == told
    idle = tuple(replace(gpu, memory_used_mib=64) if gpu.index == 4 else gpu for gpu in machine.gpus)
    assert check_plan(alone, replace(machine, gpus=idle), free) == []


def test_two_replicas_of_an_engine_that_is_spread(plan: Plan, wanted: Desired, machine: Observed) -> None:
    """One that stays, and one that starts."""
    spread = crossed(wanted, "keep: {model: k, memory: 20GiB, replicas: 2, spread: gpu}")
    second = replace(action(plan, "spawn fresh/0"), id="spawn keep/1", replica="keep/1", port=8050, memory_mib=1)
    second = replace(second, inner_ports=range(29000, 29008))
    for index, told in ((0, ["spawn keep/1 is placed on a GPU of keep/0"]), (4, [])):
        placed = replace(second, gpus=(machine.gpus[index],), after=())
        found = check_plan(spread, machine, replace(plan, actions=(*plan.actions, placed)))
        assert [text for text in found if "is placed on" in text] == told


def test_ranks_that_are_not_linked_as_asked(plan: Plan, wanted: Desired, machine: Observed) -> None:
    one, other = action(plan, "spawn pair/0").gpus
    third = next(gpu for gpu in machine.gpus if gpu not in (one, other))
    near = {frozenset((one.uuid, third.uuid)): Link.NVLINK, frozenset((third.uuid, other.uuid)): Link.NVLINK}
    for link, links, good in (
        ("nvlink", {}, False),
        ("nvlink", {frozenset((one.uuid, other.uuid)): Link.NVLINK}, True),
        ("nvlink", {frozenset((one.uuid, other.uuid)): Link.PIX}, False),
        ("nvlink", near, True),
        ("numa", {frozenset((one.uuid, other.uuid)): Link.NODE}, True),
        ("numa", {frozenset((one.uuid, other.uuid)): Link.SYS}, False),
    ):
        asked = crossed(wanted, f"pair: {{model: p, memory: 10GiB, tensor_parallel_size: 2, link: {link}}}")
        told = [] if good else [f"spawn pair/0 is split over GPUs that are not linked by {link}"]
        assert check_plan(asked, replace(machine, links=links), plan) == told


MOVE = """
version: 1
engines:
  one: {model: a, memory: 30GiB}
  two: {model: b, memory: 30GiB}
  large: {model: c, memory: 60GiB}
"""
MOVE_WORLD = """
gpus: [H100 80GiB, H100 80GiB]
launches:
  - {run: one/0, gpu: 0, port: 8000, id: old}
  - {run: two/0, gpu: 1, port: 8001, id: two}
"""


def test_taking_over_is_judged_at_every_step() -> None:
    wanted = desired(MOVE)
    machine = world(yaml.safe_load(MOVE_WORLD), wanted, NOW)
    plan = make_plan(wanted, machine, NOW, allow_moves=True)
    assert check_plan(wanted, machine, plan) == []
    assert [item.id for item in plan.actions] == ["spawn one/0", "stop one/0 old", "spawn large/0"]

    def told(**values: Any) -> str:
        return "; ".join(check_plan(wanted, machine, having(plan, "spawn one/0", **values)))

    assert "takes over from old, which is another replica or has the same port" in told(port=8000)
    assert "takes over from old on a GPU of its own" in told(gpus=(machine.gpus[0],))
    assert "does not come after stop one/0 old" in told(predecessor="")
    assert "takes over from nobody, which does not end" in told(predecessor="nobody")
    assert "GPU 1 would hold" in told(memory_mib=60 * 1024)
    early = "; ".join(check_plan(wanted, machine, having(plan, "stop one/0 old", after=())))
    assert "old does not serve until spawn one/0 is ready" in early
    beside = having(plan, "spawn large/0", after=())
    assert any("GPU 0 would hold" in text for text in check_plan(wanted, machine, beside))
    stranger = having(plan, "spawn one/0", predecessor="two")
    assert any("which does not end" in text for text in check_plan(wanted, machine, stranger))
    other = "; ".join(check_plan(wanted, machine, having(plan, "spawn large/0", predecessor="old")))
    assert "spawn large/0 takes over from old, which is another replica or has the same port" in other
    inner = next(action.inner_ports for action in plan.actions if action.id == "spawn one/0")
    has = tuple(replace(x, inner_ports=inner[-1:]) if x.id == "old" else x for x in machine.launches)
    meet = "; ".join(check_plan(wanted, replace(machine, launches=has), plan))
    assert "spawn one/0 takes over from old, which is another replica or has the same port" in meet


@pytest.mark.parametrize(
    ("launches", "strangers", "wrong"),
    [
        ("[{run: stay/0, gpu: 0, port: 8000}]", "", "new/0"),
        ("[{run: stay/0, gpu: 0, port: 8000, holds: nothing}]", "", "new/0"),
        ("[{run: stay/0, gpu: 1, port: 8000}]", "", ""),
        ("[{run: stay/0, gpu: 1, port: 8000}]", ", strangers: [812 alice python 1GiB]", "new/0"),
        ("[]", "", "new/0"),
    ],
)
def test_several_where_one_process_may_compute(launches: str, strangers: str, wrong: str) -> None:
    """A plan for a GPU on which many may compute must not pass where one may."""
    engines = "{stay: {model: s, memory: 10GiB, gpus: [0, 1]}, new: {model: n, memory: 10GiB, gpus: [0]}}"
    wanted = desired(f"version: 1\nengines: {engines}\n")
    many, one = (
        world(
            yaml.safe_load(f"gpus: [{{gpu: H100 80GiB, mode: {mode}{strangers}}}, L4 24GiB]\nlaunches: {launches}"),
            wanted,
            NOW,
        )
        for mode in ("default", "exclusive-process")
    )
    plan = make_plan(wanted, many, NOW)
    spawned = [action.replica for action in plan.actions if action.gpus and action.gpus[0].index == 0]
    assert spawned == (["stay/0", "new/0"] if launches == "[]" else ["new/0"])
    told = f"GPU 0 serves one process at a time, and spawn {wrong} would not be alone there"
    assert check_plan(wanted, one, plan) == ([told] if wrong else [])


def test_what_ends_or_only_draws_leaves_a_gpu_for_one_process_free() -> None:
    text = "version: 1\nengines:\n  new: {model: n, memory: 10GiB}\n"
    ran = desired("version: 1\nengines:\n  old: {model: s, memory: 10GiB}\n")
    found = "launches: [{run: old/0, gpu: 0, port: 8000, id: old}]\ngpus: [{gpu: H100 80GiB, mode: exclusive-process}]"
    machine = world(yaml.safe_load(found), ran, NOW)
    draws = GpuProcess(7, 100, "alice", "Xorg", graphics=True)
    gpu = replace(machine.gpus[0], processes=(*machine.gpus[0].processes, draws))
    machine, wanted = replace(machine, gpus=(gpu,)), desired(text)
    plan = make_plan(wanted, machine, NOW)
    assert [action.kind for action in plan.actions] == ["stop", "spawn"]
    assert check_plan(wanted, machine, plan) == []


def test_what_is_stopping_counts_as_gone_for_who_waits_for_it_and_what_is_not_ours_never() -> None:
    text = "version: 1\nengines:\n  keep: {model: k, memory: 80GiB}\n"
    asked = desired(text)
    stopping = (
        "gpus: [H100 80GiB]\nlaunches: [{run: keep/0, gpu: 0, port: 8000, state: %s, stopping: 1s, why: CHANGED}]"
    )
    seen = world(yaml.safe_load(stopping % "ready"), asked, NOW)
    found = make_plan(asked, seen, NOW)
    assert found.actions[0].waits_for == "keep/0 to end"
    assert check_plan(asked, seen, found) == []
    unproven = world(yaml.safe_load(stopping % "unproven"), asked, NOW)
    assert "GPU 0 would hold 163840 MiB of 81920 MiB after spawn keep/0" in check_plan(asked, unproven, found)
