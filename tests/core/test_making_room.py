"""Moves and displacement carried to their end, pass after pass, on a machine that does what it is told."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest

from sage_reconcile.core.check import check_plan
from sage_reconcile.core.lifecycle import StopCause
from sage_reconcile.core.observed import Exit, Gpu, GpuProcess, Launch, Life, Observed
from sage_reconcile.core.plan import Action, Plan
from sage_reconcile.core.planner import make_plan
from sage_reconcile.core.spec import Desired
from tests.reading import desired

GIB = 1024
NOW = 1_000_000.0


@dataclass
class Machine:
    """Two steps to get ready, one to end; ``fails`` are replicas whose starts fail from now on."""

    wanted: Desired
    gpus: int
    launches: dict[str, Launch] = field(default_factory=dict)
    now: float = NOW
    fails: frozenset[str] = frozenset()
    displaced: set[str] = field(default_factory=set)
    stopped_first: set[str] = field(default_factory=set)
    _ids: int = 0

    def run(self, replica: str, *gpus: int, port: int, ready_s: float = 60.0) -> None:
        name, _, index = replica.rpartition("/")
        engine = self.wanted.engine(name)
        assert engine is not None
        self._ids += 1
        self.launches[f"l{self._ids}"] = Launch(
            id=f"l{self._ids}",
            engine_name=name,
            index=int(index),
            spec=engine.record,
            secret_marks={},
            gpus=tuple(f"GPU-{gpu}" for gpu in gpus),
            memory_mib=int(engine.spec.memory.amount),
            port=port,
            bind="127.0.0.1",
            life=Life.ALIVE,
            created_at=NOW - 5000,
            pid=self._ids,
            ready=True,
            ready_at=NOW - 5000 + ready_s,
        )

    def observed(self) -> Observed:
        held: dict[str, list[GpuProcess]] = {f"GPU-{index}": [] for index in range(self.gpus)}
        for launch in self.launches.values():
            if launch.holds:
                for uuid in launch.gpus:
                    held[uuid].append(GpuProcess(launch.pid or 0, launch.memory_mib, launch=launch.id))
        gpus = tuple(
            Gpu(
                uuid,
                index,
                "H100",
                f"0000:{index:02x}",
                80 * GIB,
                memory_used_mib=sum(process.memory_mib or 0 for process in held[uuid]),
                processes=tuple(held[uuid]),
            )
            for index, uuid in enumerate(held)
        )
        for gpu in gpus:
            assert gpu.memory_used_mib <= gpu.memory_total_mib, f"GPU {gpu.index} is overbooked"
        return Observed(gpus, tuple(self.launches.values()))

    def plan(self, *, allow_moves: bool = True, tried: frozenset[str] | None = None) -> Plan:
        observed = self.observed()
        found = make_plan(self.wanted, observed, self.now, allow_moves=allow_moves, tried=tried)
        assert check_plan(self.wanted, observed, found) == []
        return found

    def step(self, *, allow_moves: bool = True) -> Plan:
        """One pass, and what comes of it until the next one."""
        plan = self.plan(allow_moves=allow_moves)
        first = {action.predecessor for action in plan.actions if action.predecessor}
        for action in plan.actions:
            if action.stop_cause is StopCause.DISPLACED:
                self.displaced.add(action.replica)
            if action.stop_cause is StopCause.MOVED and action.now and action.launch not in first:
                old = self.launches[action.launch]
                others = [x for x in self.launches.values() if x.predecessor == old.id and x.ready]
                self.stopped_first |= set() if others else {action.replica}
        self.now += 10
        for launch in list(self.launches.values()):
            self._goes_on(launch)
        for action in plan.actions:
            if action.now:
                self._carry_out(action)
        for launch_id in plan.forget:
            del self.launches[launch_id]
        return plan

    def _goes_on(self, launch: Launch) -> None:
        if launch.life is not Life.ALIVE:
            return
        if launch.stopping_since is not None:
            self.launches[launch.id] = replace(launch, life=Life.EXITED, ready=False, exit=Exit(0, self.now))
        elif not launch.ready and launch.replica in self.fails:
            self.launches[launch.id] = replace(launch, life=Life.EXITED, exit=Exit(1, self.now))
        elif not launch.ready:
            self.launches[launch.id] = replace(launch, ready=True, ready_at=self.now)

    def _carry_out(self, action: Action) -> None:
        if action.kind != "spawn":
            launch = self.launches[action.launch]
            self.launches[launch.id] = replace(
                launch,
                stopping_since=self.now,
                stop_cause=str(action.stop_cause),
                ready=False,
                destination=tuple(gpu.uuid for gpu in action.goes_to),
            )
            return
        name = action.replica.rpartition("/")[0]
        ports = {launch.port for launch in self.launches.values() if launch.holds}
        assert action.port not in ports, f"{action.id} on a port that is taken"
        self.run(action.replica, *(gpu.index for gpu in action.gpus), port=action.port)
        new = self.launches[f"l{self._ids}"]
        assert new.engine_name == name
        self.launches[new.id] = replace(
            new,
            created_at=self.now,
            ready=False,
            ready_at=None,
            predecessor=action.predecessor,
            failures=action.failures,
        )

    def serving(self) -> set[str]:
        return {launch.replica for launch in self.launches.values() if launch.ready}

    def settle(self, *, allow_moves: bool = True, steps: int = 60) -> list[set[str]]:
        """Passes until nothing is left to do; who served after each of them."""
        served = []
        for _ in range(steps):
            plan = self.step(allow_moves=allow_moves)
            served.append(self.serving())
            if not (plan.actions or plan.waiting):
                return served
        raise AssertionError("it never comes to rest")


def box(entries: str, gpus: int) -> Machine:
    lines = "\n".join(f"  {line}" for line in entries.strip().splitlines())
    return Machine(desired(f"version: 1\nhost: {{ports: 8000-8099}}\nengines:\n{lines}\n"), gpus)


ONE_TWO_LARGE = "one: {model: a, memory: 30GiB}\ntwo: {model: b, memory: 30GiB}\nlarge: {model: c, memory: 60GiB}"


def test_a_move_ends_with_everything_running_and_nobody_ever_without_service() -> None:
    machine = box(ONE_TWO_LARGE, 2)
    machine.run("one/0", 0, port=8000)
    machine.run("two/0", 1, port=8001)
    served = machine.settle()
    assert served[-1] == {"one/0", "two/0", "large/0"}
    assert all(step >= {"one/0", "two/0"} for step in served)
    assert sum(launch.holds for launch in machine.launches.values()) == 3


def test_without_leave_nothing_moves() -> None:
    machine = box(ONE_TWO_LARGE, 2)
    machine.run("one/0", 0, port=8000)
    machine.run("two/0", 1, port=8001)
    plan = machine.step(allow_moves=False)
    assert plan.actions == ()
    assert [proposal.replica for proposal in plan.proposals] == ["large/0"]


def test_a_successor_that_fails_costs_nothing_and_is_not_tried_again() -> None:
    machine = box(ONE_TWO_LARGE, 2)
    machine.run("one/0", 0, port=8000)
    machine.run("two/0", 1, port=8001)
    machine.fails = frozenset({"one/0", "two/0"})
    served = machine.settle()
    assert all(step == {"one/0", "two/0"} for step in served)
    tries = [launch for launch in machine.launches.values() if launch.predecessor]
    assert sorted(launch.replica for launch in tries) == ["one/0", "two/0"]


def test_a_move_that_failed_is_told_and_is_tried_again_once_by_each_apply() -> None:
    machine = box(ONE_TWO_LARGE.replace("30GiB}", "30GiB, gpus: [1]}", 2).replace("[1]", "[0, 1]", 1), 2)
    machine.run("one/0", 0, port=8000)
    machine.run("two/0", 1, port=8001)
    machine.fails = frozenset({"one/0"})
    machine.settle()
    told = machine.plan()
    assert not told.actions
    assert any(note.startswith("one/0: its start elsewhere failed (exit 1)") for note in told.notes)
    assert next(action.id for action in machine.plan(tried=frozenset()).actions) == "spawn one/0"
    assert not machine.plan(tried=frozenset({"one/0"})).actions, "it was tried by this very apply"


def test_of_moves_that_do_the_one_without_downtime_is_made_then_the_one_that_starts_fastest() -> None:
    for engines, seconds, moved in (
        (ONE_TWO_LARGE, (60.0, 600.0), "one/0"),
        (ONE_TWO_LARGE, (600.0, 60.0), "two/0"),
        (ONE_TWO_LARGE.replace("30GiB}", "30GiB, port: 8000}", 1), (60.0, 600.0), "two/0"),
    ):
        machine = box(engines, 2)
        machine.run("one/0", 0, port=8000, ready_s=seconds[0])
        machine.run("two/0", 1, port=8001, ready_s=seconds[1])
        assert machine.plan().moved() == {moved}


def test_of_equals_who_came_last_gives_way() -> None:
    machine = box(
        "low: {model: a, memory: 60GiB}\nlate: {model: b, memory: 60GiB}\n"
        "top: {model: c, memory: 60GiB, priority: 1, preemption: lower}",
        2,
    )
    machine.run("low/0", 0, port=8000)
    machine.run("late/0", 1, port=8001)
    gone = [action.replica for action in machine.plan().actions if action.stop_cause is StopCause.DISPLACED]
    assert gone == ["late/0"]


def test_two_that_change_places_both_serve_in_the_end_and_only_one_of_them_stops() -> None:
    machine = box(
        "left: {model: a, memory: 60GiB}\nright: {model: b, memory: 30GiB}\n"
        "large: {model: c, memory: 50GiB, gpus: [0]}",
        2,
    )
    machine.run("left/0", 0, port=8000, ready_s=600)
    machine.run("right/0", 1, port=8001, ready_s=60)
    served = machine.settle()
    assert served[-1] == {"left/0", "right/0", "large/0"}
    assert all("left/0" in step for step in served)


def test_leave_that_is_withdrawn_half_way_loses_nobody() -> None:
    """As after a crash of the daemon that was asked: what was stopped comes back, what was started first goes on."""
    for given in range(8):
        machine = box(
            "left: {model: a, memory: 60GiB}\nright: {model: b, memory: 30GiB}\n"
            "large: {model: c, memory: 50GiB, gpus: [0], priority: 5}",
            2,
        )
        machine.run("left/0", 0, port=8000, ready_s=600)
        machine.run("right/0", 1, port=8001, ready_s=60)
        for _ in range(given):
            machine.step()
        served = machine.settle(allow_moves=False)
        assert served[-1] >= {"left/0", "right/0"}, given
        running = [launch.replica for launch in machine.launches.values() if launch.holds]
        assert len(running) == len(set(running)), given


def test_who_is_displaced_waits_until_there_is_room_again() -> None:
    machine = box("low: {model: a, memory: 80GiB}\ntop: {model: c, memory: 40GiB, priority: 1, preemption: lower}", 1)
    machine.run("low/0", 0, port=8000)
    assert machine.settle(allow_moves=False)[-1] == {"top/0"}
    machine.wanted = desired("version: 1\nhost: {ports: 8000-8099}\nengines:\n  low: {model: a, memory: 80GiB}\n")
    assert machine.settle(allow_moves=False)[-1] == {"low/0"}


def test_nobody_is_displaced_where_a_move_is_enough() -> None:
    machine = box(
        "low: {model: a, memory: 30GiB, movable: true}\nbottom: {model: b, memory: 30GiB, priority: -9}\n"
        "top: {model: c, memory: 60GiB, priority: 1, preemption: lower}",
        2,
    )
    machine.run("low/0", 0, port=8000)
    machine.run("bottom/0", 1, port=8001)
    assert machine.settle(allow_moves=False)[-1] == {"low/0", "bottom/0", "top/0"}
    assert not machine.displaced


def test_a_move_is_not_made_for_one_that_gets_in_without_it() -> None:
    machine = box("one: {model: a, memory: 30GiB, movable: true}\ntwo: {model: b, memory: 50GiB}", 2)
    machine.run("one/0", 0, port=8000)
    assert {action.id for action in machine.plan().actions} == {"spawn two/0"}


@pytest.mark.parametrize("seed", [*range(60), 556])  # in the last one somebody waits long to come back
def test_any_full_box_comes_to_rest_with_all_that_the_plan_promised(seed: int) -> None:
    """Random boxes, random files: whoever ran still runs, unless displaced; whom the plan lets in is let in."""
    rng = random.Random(seed)
    gpus = rng.choice([2, 3, 4, 8])
    lines, running = [], []
    free = [80] * gpus
    for number in range(rng.randint(gpus, 3 * gpus)):
        count = rng.choice([1, 1, 1, 2])
        size = rng.choice([10, 15, 20, 30, 40])
        fits = [gpu for gpu in range(gpus) if free[gpu] >= size]
        if len(fits) < count:
            continue
        on = rng.sample(fits, count)
        for gpu in on:
            free[gpu] -= size
        extra = rng.choice(["", ", priority: -1", f", port: {9000 + number}", ", movable: true"])
        lines.append(f"e{number}: {{model: m, memory: {size}GiB, tensor_parallel_size: {count}{extra}}}")
        running.append((f"e{number}/0", on))
    for number in range(rng.randint(1, 2)):
        extra = rng.choice(["", ", priority: 3, preemption: lower"])
        lines.append(f"new{number}: {{model: m, memory: {rng.choice([50, 60, 70])}GiB{extra}}}")
    machine = box("\n".join(lines), gpus)
    for port, (replica, on) in enumerate(running, 8000):
        fixed = machine.wanted.engine(replica[:-2])
        assert fixed is not None
        machine.run(
            replica, *on, port=port if fixed.spec.port == "auto" else fixed.spec.port, ready_s=rng.randint(1, 9)
        )
    allow = rng.random() < 0.7
    first = machine.plan(allow_moves=allow)
    promised = {name for engine in machine.wanted.engines for name in engine.replicas()}
    promised -= {item.replica for item in first.unplaced}
    served = machine.settle(allow_moves=allow)
    assert {replica for replica, _ in running} | promised <= served[-1] | machine.displaced
    assert not machine.plan(allow_moves=allow).making_room
    starts = [launch.replica for launch in machine.launches.values() if launch.created_at >= NOW]
    assert max(map(starts.count, starts), default=0) <= 2
    stopped = {name for name, _ in running} - set.intersection(*served)
    assert stopped <= machine.displaced | machine.stopped_first
