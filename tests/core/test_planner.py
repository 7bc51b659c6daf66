"""What a plan carries besides its text: what the executor writes into the records, and which of them it drops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import yaml

from sage_reconcile.core.check import check_plan
from sage_reconcile.core.lifecycle import StopCause
from sage_reconcile.core.observed import GpuProcess, ModelFacts
from sage_reconcile.core.plan import Action, Plan
from sage_reconcile.core.planner import make_plan
from tests.plans.world import NOW, world
from tests.reading import desired

FILE = "version: 1\nengines:\n  chat: {model: m, memory: 20GiB, stop_timeout: 1m, startup_timeout: 10m}\n"
NONE = "version: 1\nengines: {}\n"


def plan(*launches: str, file: str = FILE, ran: str = FILE, **options: Any) -> Plan:
    observed = {"gpus": ["H100 80GiB"], "launches": [yaml.safe_load(f"{{{launch}}}") for launch in launches]}
    return make_plan(desired(file), world(observed, desired(ran), NOW), NOW, **options)


def only(found: Plan) -> Action:
    (action,) = found.actions
    return action


def test_of_a_wanted_replica_only_the_last_record_is_kept() -> None:
    found = plan(
        "run: chat/0, gpu: 0, port: 8000, state: exited, age: 3h, id: oldest",
        "run: chat/0, gpu: 0, port: 8000, state: exited, age: 2h, id: older",
        "run: chat/0, gpu: 0, port: 8000, state: exited, age: 1h, id: last",
    )
    assert found.forget == ("older", "oldest")


def test_the_record_of_what_ended_before_stays_beside_what_runs() -> None:
    running = "run: chat/0, gpu: 0, port: 8000, age: 1h, id: runs"
    assert plan("run: chat/0, gpu: 0, port: 8000, state: exited, age: 2h", running).forget == ()


def test_of_what_is_not_wanted_no_record_is_kept_once_it_has_ended() -> None:
    ended = "run: chat/0, gpu: 0, port: 8000, state: exited, id: ended"
    assert plan(ended, file=NONE).forget == ("ended",)
    assert plan(ended.replace("chat/0", "chat/5")).forget == ("ended",)
    assert plan("run: chat/0, gpu: 0, port: 8000", file=NONE).forget == ()


def test_every_stop_says_why_in_words_that_the_next_pass_understands() -> None:
    running = "run: chat/0, gpu: 0, port: 8000"
    assert only(plan(running, file=NONE)).stop_cause is StopCause.REMOVED
    changed = plan(running, ran=FILE.replace("20GiB", "30GiB"))
    (stop,) = (action for action in changed.actions if action.kind == "stop")
    assert stop.stop_cause is StopCause.CHANGED
    assert [change.field for change in stop.changes] == ["memory"]
    assert plan(f"{running}, state: loading, age: 10m").actions[0].stop_cause is StopCause.STARTUP_TIMEOUT


def test_a_first_start_begins_to_count() -> None:
    action = only(plan())
    assert (action.restarts, action.failures, action.not_before) == (0, 0, None)


def test_a_start_after_a_failure_counts_on() -> None:
    action = only(plan("run: chat/0, gpu: 0, port: 8000, state: exited, exit: 1, ended: 5s, restarts: 4, failures: 2"))
    assert (action.restarts, action.failures) == (5, 3)
    assert NOW + 27 <= (action.not_before or 0) <= NOW + 35
    assert action.cause == "it failed (exit 1)"


def test_a_start_after_a_stop_keeps_its_restarts_and_forgets_its_failures() -> None:
    action = only(plan("run: chat/0, gpu: 0, port: 8000, state: exited, why: REMOVED, restarts: 4, failures: 2"))
    assert (action.restarts, action.failures, action.not_before) == (4, 0, None)


def test_an_edited_entry_begins_anew() -> None:
    old = FILE.replace("20GiB", "30GiB")
    ended = "run: chat/0, gpu: 0, port: 8000, state: exited, exit: 1, ended: 5s, restarts: 4, failures: 2"
    action = only(plan(ended, ran=old))
    assert (action.restarts, action.failures, action.not_before) == (0, 0, None)
    (spawn,) = (x for x in plan("run: chat/0, gpu: 0, port: 8000, restarts: 4", ran=old).actions if x.kind == "spawn")
    assert (spawn.cause, spawn.restarts) == ("its entry changed", 0)


def test_a_start_that_took_too_long_counts_as_a_failure_from_when_it_is_stopped() -> None:
    stop, spawn = plan("run: chat/0, gpu: 0, port: 8000, state: loading, age: 11m, failures: 1").actions
    assert stop.cause == "not ready after 600s (`startup_timeout`)"
    assert (spawn.cause, spawn.failures) == ("it failed (not ready in time)", 2)
    assert NOW + 16 <= (spawn.not_before or 0) <= NOW + 20
    stopping = "run: chat/0, gpu: 0, port: 8000, state: stopping, stopping: 9s, age: 11m, why: STARTUP_TIMEOUT"
    kill, spawn = plan(stopping).actions
    assert (kill.kind, spawn.failures) == ("kill", 1)
    assert NOW + 8 <= (spawn.not_before or 0) <= NOW + 10


def test_a_person_who_applies_does_not_wait_for_a_back_off_but_tries_once() -> None:
    failed = "run: chat/0, gpu: 0, port: 8000, state: exited, exit: 1, ended: 1s, failures: 3"
    again = only(plan(failed, tried=frozenset()))
    assert (again.now, again.not_before, again.failures) == (True, None, 4)
    assert not only(plan(failed, tried=frozenset({"chat/0"}))).now


def test_what_stalled_holds_up_nobody_on_its_gpu() -> None:
    file = FILE + "  code: {model: m, memory: 20GiB}\n"
    bad = "run: chat/0, gpu: 0, port: 8000, state: exited, exit: 2, ended: 1s, failure: wrong flag"
    stalled, other = plan(bad, file=file, ran=file).actions
    assert (stalled.replica, stalled.stalled, stalled.now) == ("chat/0", True, False)
    assert (other.replica, other.now) == ("code/0", True)


def test_what_happened_to_leftovers_is_told() -> None:
    left = "run: chat/0, gpu: 0, port: 8000, state: leftover, ready: 5m, exit: 137, ended: 1s"
    reap, spawn = plan(left).actions
    assert (reap.kind, reap.cause) == ("reap", "its leader ended; other processes of it still run")
    assert (spawn.cause, spawn.not_before) == ("it failed (killed by signal 9)", None), "it had been ready"
    untold = left.replace(", exit: 137, ended: 1s", "")
    assert plan(untold).actions[1].cause == "it failed (its leader ended)"


def test_in_sync_means_nothing_to_do_nothing_under_way_and_nothing_left_out() -> None:
    assert plan("run: chat/0, gpu: 0, port: 8000").in_sync
    assert plan("run: chat/0, gpu: 0, port: 8000, state: loading, age: 1m").in_sync
    assert not plan().in_sync
    assert not plan("run: chat/0, gpu: 0, port: 8000, state: intent").in_sync
    stopping = "run: chat/0, gpu: 0, port: 8000, state: stopping, ready: 5m, stopping: 1s, why: REMOVED"
    assert not plan(stopping, file=NONE).in_sync
    assert not plan(file=FILE.replace("20GiB", "90GiB")).in_sync


def test_only_what_is_both_stopped_and_started_is_replaced() -> None:
    assert plan("run: chat/0, gpu: 0, port: 8000", ran=FILE.replace("20GiB", "30GiB")).replaced() == {"chat/0"}
    assert plan("run: chat/0, gpu: 0, port: 8000", file=NONE).replaced() == frozenset()
    assert plan().replaced() == frozenset()


def test_what_cannot_start_on_this_machine_is_never_due() -> None:
    file = "version: 1\nhost: {gpus: 1xL4}\nengines: {chat: {model: m, memory: 2GiB}}\n"
    wanted = desired(file)
    (action,) = make_plan(wanted, world({"declared": True}, wanted, NOW), NOW).actions
    assert action.blocked
    assert (action.after, action.waits_for, action.now) == ((), "", False)


def machine_with(used: str, *launches: str, file: str, ran: str, now: float = NOW) -> Plan:
    observed = {
        "gpus": [{"gpu": "H100 80GiB", "used": used}],
        "launches": [yaml.safe_load(f"{{{x}}}") for x in launches],
    }
    return make_plan(desired(file), world(observed, desired(ran), NOW), now)


def test_the_record_of_what_was_removed_stays_until_its_own_memory_is_back() -> None:
    ended = "run: chat/0, gpu: 0, port: 8000, state: exited, exit: 0, ended: 2s, id: ended"
    other = "run: chat/1, gpu: 1, port: 8001, state: exited, exit: 0, ended: 2s, id: other, memory: 1GiB"
    assert machine_with("10GiB", ended, other, file=NONE, ran=FILE).forget == ("other",)
    assert machine_with("10GiB", ended, file=NONE, ran=FILE, now=NOW + 28).forget == ("ended",)
    assert machine_with("0GiB", ended, file=NONE, ran=FILE).forget == ("ended",)


def test_the_record_of_what_is_not_all_gone_is_never_dropped() -> None:
    found = plan(
        "run: chat/0, gpu: 0, port: 8000, state: leftover, age: 2h, id: older",
        "run: chat/0, gpu: 0, port: 8001, state: exited, age: 1h, id: newer",
    )
    assert found.forget == ()
    assert found.actions[0].id == "reap chat/0 older"


def test_an_intent_is_kept_only_where_it_is_wanted_and_nothing_runs_in_its_place() -> None:
    intent = "run: chat/0, gpu: 0, port: 8001, state: intent, age: 1s, id: intent"
    found = plan(intent, file=NONE)
    assert (found.kept, found.actions) == ((), ())
    assert found.waiting == ("chat/0: its process is about to start",)
    found = plan("run: chat/0, gpu: 0, port: 8000, age: 1h, id: runs", intent)
    assert [kept.launch.id for kept in found.kept] == ["runs"]


MOVING = "version: 1\nengines:\n  chat: {model: m, memory: 20GiB}\n  next: {model: n, memory: 70GiB}\n"


def moving(successor: str, *more: str, gpus: int = 2, file: str = MOVING, **options: Any) -> Plan:
    """A replica that is moved from GPU 0 to GPU 1."""
    old = "run: chat/0, gpu: 0, port: 8000, age: 1h, id: old"
    new = f"run: chat/0, gpu: 1, port: 8001, id: new, predecessor: old, {successor}"
    launches = [yaml.safe_load(f"{{{launch}}}") for launch in (old, new, *more)]
    wanted = desired(file)
    seen = world({"gpus": ["H100 80GiB"] * gpus, "launches": launches}, wanted, NOW)
    found = make_plan(wanted, seen, NOW, **options)
    assert check_plan(wanted, seen, found) == []
    return found


def test_a_successor_that_is_told_to_stop_takes_over_from_nobody() -> None:
    for state in ("state: loading, age: 9s", "age: 9s"):
        found = moving(f"{state}, stopping: 1s, why: REMOVED")
        assert [kept.launch.id for kept in found.kept] == ["old"]
        assert "old" not in {action.launch for action in found.actions}
        assert not any("elsewhere failed" in note for note in found.notes)


def test_a_move_is_not_tried_again_before_its_last_try_has_ended() -> None:
    more = {"file": MOVING + "  third: {model: t, memory: 20GiB, gpus: [1]}\n", "allow_moves": True}
    third = "run: third/0, gpu: 1, port: 8002, age: 1h, id: third"
    for tried in (None, frozenset[str]()):
        found = moving("age: 9s, stopping: 1s, why: STARTUP_TIMEOUT", third, tried=tried, **more)
        assert not any(action.predecessor for action in found.actions)
    again = moving("age: 9s, state: exited, exit: 1, ended: 1s", third, tried=frozenset(), **more)
    assert [action.predecessor for action in again.actions] == ["old", "", ""]


def test_while_one_is_being_moved_no_other_room_is_made() -> None:
    file = MOVING + "  third: {model: t, memory: 20GiB}\n  last: {model: l, memory: 70GiB}\n"
    third = "run: third/0, gpu: 2, port: 8002, age: 1h, id: third"
    found = moving("state: loading, age: 9s", third, gpus=3, file=file, allow_moves=True)
    assert [action.id for action in found.actions] == ["stop chat/0 old", "spawn next/0"]
    assert found.proposals == ()
    after = moving("age: 9s, stopping: 1s, why: REMOVED", third, gpus=3, file=file, allow_moves=True)
    assert any(action.predecessor for action in after.actions), "as soon as none is on its way"


def test_what_is_still_there_though_the_clock_was_set_back_is_ended_at_once() -> None:
    stopping = "run: chat/0, gpu: 0, port: 8000, stopping: 1s, why: REMOVED"
    assert machine_with("20GiB", stopping, file=NONE, ran=FILE).actions == ()
    assert only(machine_with("20GiB", stopping, file=NONE, ran=FILE, now=NOW - 60)).kind == "kill"


def test_a_stop_tells_what_it_gives_back() -> None:
    action = only(plan("run: chat/0, gpu: 0, port: 8000, inner: 20000-20007", file=NONE))
    assert (action.memory_mib, action.port, action.inner_ports) == (20 * 1024, 8000, range(20000, 20008))


def test_a_start_waits_for_what_loads_on_its_gpu_and_not_for_what_has_been_ready_before() -> None:
    file = FILE + "  next: {model: n, memory: 20GiB}\n"
    running = "run: chat/0, gpu: 0, port: 8000, state: "
    assert only(plan(f"{running}loading, age: 9s", file=file, ran=file)).waits_for == "chat/0 to be ready"
    assert only(plan(f"{running}degraded", file=file, ran=file)).now


def test_what_leaves_makes_room_beside_memory_that_is_not_back_yet() -> None:
    file = "version: 1\nengines:\n  next: {model: n, memory: %dGiB}\n"
    ran = "version: 1\nengines:\n  gone: {model: g, memory: 30GiB}\n  old: {model: o, memory: 30GiB}\n"
    launches = (
        "run: gone/0, gpu: 0, port: 8000, state: exited, exit: 0, ended: 2s, id: gone",
        "run: old/0, gpu: 0, port: 8001, id: old",
    )
    for size, waits_for in ((50, ""), (51, "GPU 0 to give back 30.0GiB that gone/0 held")):
        found = machine_with("60GiB", *launches, file=file % size, ran=ran)
        assert [action.id for action in found.actions] == ["stop old/0 old", "spawn next/0"]
        assert found.actions[1].waits_for == waits_for


def test_a_replica_that_is_moved_keeps_its_restarts() -> None:
    text = MOVING + "  third: {model: t, memory: 20GiB}\n"
    launches = [
        yaml.safe_load("{run: chat/0, gpu: 0, port: 8000, restarts: 3, age: 1h}"),
        yaml.safe_load("{run: third/0, gpu: 1, port: 8001, restarts: 3, age: 1h}"),
    ]
    wanted = desired(text)
    found = make_plan(
        wanted, world({"gpus": ["H100 80GiB"] * 2, "launches": launches}, wanted, NOW), NOW, allow_moves=True
    )
    assert [action.restarts for action in found.actions if action.predecessor] == [3]


def test_what_has_never_been_ready_is_not_moved() -> None:
    text = MOVING + "  third: {model: t, memory: 20GiB}\n"
    for state, moves in (("ready", 1), ("degraded", 1), ("loading", 0)):
        launches = [
            yaml.safe_load(f"{{run: chat/0, gpu: 0, port: 8000, state: {state}, age: 9s}}"),
            yaml.safe_load("{run: third/0, gpu: 1, port: 8001, state: loading, age: 9s}"),
        ]
        wanted = desired(text)
        seen = world({"gpus": ["H100 80GiB"] * 2, "launches": launches}, wanted, NOW)
        found = make_plan(wanted, seen, NOW, allow_moves=True)
        assert sum(bool(action.predecessor) for action in found.actions) == moves


def test_a_start_comes_after_the_end_of_what_holds_its_memory_wherever_that_was_placed() -> None:
    """A process of ours on a GPU that its launch was not given."""
    ran = desired("version: 1\nengines:\n  old: {model: o, memory: 1GiB}\n")
    found = world(
        {"gpus": ["H100 80GiB", "L4 24GiB"], "launches": [{"run": "old/0", "gpu": 1, "port": 8000}]}, ran, NOW
    )
    stray = GpuProcess(77, 70 * 1024, launch=found.launches[0].id)
    gpu = replace(found.gpus[0], processes=(stray,), memory_used_mib=70 * 1024)
    machine = replace(found, gpus=(gpu, found.gpus[1]))
    wanted = desired("version: 1\nengines:\n  new: {model: n, memory: 60GiB}\n")
    plan = make_plan(wanted, machine, NOW)
    assert check_plan(wanted, machine, plan) == []
    assert [(action.kind, action.after) for action in plan.actions] == [
        ("stop", ()),
        ("spawn", (plan.actions[0].id,)),
    ]


TOLD = "what the hub tells of its model"
AUTO = "version: 1\nengines:\n  chat: {model: org/m-7B}\n"


def with_models(file: str, **models: ModelFacts) -> Plan:
    """The plan for one empty GPU, and for the models by the engines that have them."""
    wanted = desired(file)
    known = {engine.spec.model_at: models[engine.name] for engine in wanted.engines if engine.name in models}
    observed = replace(world({"gpus": ["H100 80GiB"], "launches": []}, wanted, NOW), models=known)
    found = make_plan(wanted, observed, NOW)
    assert check_plan(wanted, observed, found) == []
    return found


def test_a_start_waits_for_what_a_hub_is_about_to_tell_and_no_other_does() -> None:
    found = with_models(f"{AUTO}  more: {{model: n, memory: 9GiB}}\n", chat=ModelFacts("", pending=True))
    assert {action.id: action.waits_for for action in found.actions} == {"spawn chat/0": TOLD, "spawn more/0": ""}
    assert [action.id for action in found.actions if action.now] == ["spawn more/0"]
    sized = with_models(f"{AUTO}  more: {{model: org/m-7B, memory: 9GiB}}\n", chat=ModelFacts("", pending=True))
    assert [action.id for action in sized.actions if action.now] == ["spawn more/0"], "its size is told by the file"
    found = with_models(AUTO, chat=ModelFacts("", problem="it is gated"))
    assert only(found).now, "what is not told is guessed from the name"


def test_what_runs_does_not_end_before_the_hub_has_told_what_its_new_model_takes() -> None:
    running = {"run": "chat/0", "gpu": 0, "port": 8000, "age": "1h"}
    observed = world({"gpus": ["H100 80GiB"], "launches": [running]}, desired(FILE), NOW)
    told = ModelFacts("", problem="it is gated")
    for facts, waits_for, now in ((ModelFacts("", pending=True), TOLD, []), (told, "", ["spawn chat/0"])):
        seen = replace(observed, models={"org/m-7B": facts})
        found = make_plan(desired(AUTO), seen, NOW)
        assert check_plan(desired(AUTO), seen, found) == []
        assert [(action.kind, action.waits_for) for action in found.actions] == [
            ("spawn", waits_for),
            ("stop", waits_for),
        ]
        assert [f"{action.kind} {action.replica}" for action in found.actions if action.now] == now


def test_what_is_known_of_one_revision_is_not_said_of_another() -> None:
    file = "version: 1\nengines:\n  a: {model: org/m-7B, args: {revision: v2}}\n  b: {model: org/m-7B}\n"
    found = with_models(file, a=ModelFacts("", pending=True))
    assert {action.replica: action.waits_for for action in found.actions} == {"a/0": TOLD, "b/0": ""}
