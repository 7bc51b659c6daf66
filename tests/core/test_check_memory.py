"""The judge of plans and the host's memory: good plans pass, and a plan broken in one way is caught for that."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml

from sage_reconcile.core.check import check_plan
from sage_reconcile.core.observed import HostMemory, Observed
from sage_reconcile.core.plan import Plan
from sage_reconcile.core.planner import make_plan
from sage_reconcile.core.spec import Desired
from tests.plans.world import NOW, world
from tests.reading import desired

RAN = """
version: 1
defaults: {runtime: command, device: cpu, command: "serve {port}"}
engines:
  stays: {memory: 4GiB}
  gone: {memory: 6GiB}
  going: {memory: 2GiB}
"""
FILE = """
version: 1
defaults: {device: cpu}
engines:
  stays: {runtime: command, command: "serve {port}", memory: 4GiB}
  small: {runtime: command, command: "serve {port}", memory: 2GiB}
  large: {runtime: command, command: "serve {port}", memory: 7GiB}
  real: {model: m, memory: 6GiB}
"""
WORLD = """
host: 24GiB, 21GiB available
launches:
  - {run: stays/0, port: 8000, id: stays, host_holds: 1GiB}
  - {run: gone/0, port: 8001, id: gone, host_holds: 1GiB}
  - {run: going/0, port: 8002, id: going, state: stopping, ready: 1h, stopping: 3s, why: REMOVED}
"""


@pytest.fixture
def wanted() -> Desired:
    return desired(FILE)


@pytest.fixture
def machine() -> Observed:
    return world(yaml.safe_load(WORLD), desired(RAN), NOW)


@pytest.fixture
def plan(wanted: Desired, machine: Observed) -> Plan:
    """Free are 24 - 2 kept back - 1 of others - 12 promised = 9 GiB; 15 are asked for, 6 and 2 come back."""
    found = make_plan(wanted, machine, NOW)
    assert check_plan(wanted, machine, found) == []
    told = {action.id: (action.after, action.waits_for, action.host_memory_mib) for action in found.actions}
    assert told == {
        "stop gone/0 gone": ((), "", 6144),
        "spawn small/0": ((), "", 2048),
        "spawn large/0": ((), "", 7168),
        "spawn real/0": (("stop gone/0 gone",), "going/0 to end", 6144),
    }
    return found


def having(plan: Plan, action_id: str, **values: Any) -> Plan:
    assert any(action.id == action_id for action in plan.actions)
    actions = tuple(replace(action, **values) if action.id == action_id else action for action in plan.actions)
    return replace(plan, actions=actions)


def test_a_start_before_the_end_of_what_has_its_memory(plan: Plan, wanted: Desired, machine: Observed) -> None:
    assert check_plan(wanted, machine, having(plan, "spawn real/0", after=())) == [
        "the host would hold 28672 MiB of 24576 MiB after spawn real/0"
    ]


def test_what_is_stopping_is_there_for_a_start_that_does_not_wait(
    plan: Plan, wanted: Desired, machine: Observed
) -> None:
    assert check_plan(wanted, machine, having(plan, "spawn real/0", waits_for="")) == []
    tight = replace(machine, host_memory=HostMemory(23 * 1024, 20 * 1024))
    late = having(plan, "spawn large/0", after=("stop gone/0 gone",))
    assert check_plan(wanted, tight, late) == []
    assert check_plan(wanted, tight, having(late, "spawn real/0", waits_for="")) == [
        "the host would hold 24576 MiB of 23552 MiB after spawn real/0"
    ]


def test_others_and_what_is_kept_back_count(plan: Plan, wanted: Desired, machine: Observed) -> None:
    room = 24 - 2 - 1 - 4 - 15
    assert room == 2
    full = replace(machine, host_memory=HostMemory(24 * 1024, (21 - room) * 1024))
    assert check_plan(wanted, full, having(plan, "spawn large/0", after=("stop gone/0 gone",), waits_for="x")) == []
    over = replace(machine, host_memory=HostMemory(24 * 1024, (21 - room) * 1024 - 1))
    told = check_plan(wanted, over, having(plan, "spawn large/0", after=("stop gone/0 gone",), waits_for="x"))
    assert told == ["the host would hold 24577 MiB of 24576 MiB after spawn real/0"]
    smaller = replace(machine, host_memory=HostMemory(10 * 1024, 10 * 1024))
    assert "the host would hold 13312 MiB of 10240 MiB after spawn small/0" not in check_plan(wanted, smaller, plan)
    assert f"the host would hold {1024 + 12288 + 2048} MiB of 10240 MiB after spawn small/0" in check_plan(
        wanted, smaller, plan
    )


def test_held_beyond_the_promise_counts(plan: Plan, wanted: Desired, machine: Observed) -> None:
    grown = tuple(replace(x, host_held_mib=7 * 1024) if x.id == "stays" else x for x in machine.launches)
    told = check_plan(wanted, replace(machine, launches=grown, host_memory=HostMemory(24 * 1024, 15 * 1024)), plan)
    assert told[-1] == "the host would hold 25600 MiB of 24576 MiB after spawn real/0"


@pytest.mark.parametrize(("ready_at", "fits"), [(NOW - 9, True), (None, False)])
def test_what_sizes_itself_counts_with_what_it_holds_once_it_is_ready(
    plan: Plan, wanted: Desired, machine: Observed, ready_at: float | None, *, fits: bool
) -> None:
    by_hand = tuple(
        replace(x, spec={**x.spec, "memory": "manual"}, host_memory_mib=20 * 1024, ready_at=ready_at)
        if x.id == "stays"
        else x
        for x in machine.launches
    )
    told = check_plan(wanted, replace(machine, launches=by_hand), plan)
    assert any("the host would hold" in text for text in told) is not fits


def test_nothing_is_counted_where_the_hosts_memory_is_not_known(plan: Plan, wanted: Desired, machine: Observed) -> None:
    unknown = replace(machine, host_memory=None)
    assert check_plan(wanted, unknown, having(plan, "spawn real/0", after=())) == []


def test_what_is_promised_is_what_the_entry_says(plan: Plan, wanted: Desired, machine: Observed) -> None:
    assert check_plan(wanted, machine, having(plan, "spawn small/0", host_memory_mib=1)) == [
        "spawn small/0 is promised 1 MiB of the host, and its entry says 2GiB"
    ]


@pytest.mark.parametrize(("action", "gib"), [("spawn small/0", 1), ("spawn real/0", 0)])
def test_vllm_and_nobody_else_is_told_a_cache(
    plan: Plan, wanted: Desired, machine: Observed, action: str, gib: int
) -> None:
    assert check_plan(wanted, machine, having(plan, action, kv_space_gib=gib)) == [
        f"{action} is told a KV cache of {gib} GiB"
    ]


def test_a_cache_as_large_as_the_promise(machine: Observed) -> None:
    wanted = desired("version: 1\nengines: {real: {model: m, device: cpu, tensor_parallel_size: 2}}\n")
    plan = make_plan(wanted, machine, NOW)
    assert check_plan(wanted, machine, plan) == []
    assert check_plan(wanted, machine, having(plan, "spawn real/0", kv_space_gib=4)) == []
    assert check_plan(wanted, machine, having(plan, "spawn real/0", kv_space_gib=5)) == [
        "spawn real/0 is told a KV cache as large as all that it is promised"
    ]
