"""What a plan carries besides its text: what the executor writes into the records, and which of them it drops."""

from __future__ import annotations

from typing import Any

import yaml

from sage_reconcile.core.lifecycle import StopCause
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
    assert changed.actions[0].stop_cause is StopCause.CHANGED
    assert [change.field for change in changed.actions[0].changes] == ["memory"]
    assert plan(f"{running}, state: loading, age: 10m").actions[0].stop_cause is StopCause.STARTUP_TIMEOUT


def test_a_first_start_begins_to_count() -> None:
    action = only(plan())
    assert (action.restarts, action.failures, action.not_before) == (0, 0, None)


def test_a_start_after_a_failure_counts_on() -> None:
    action = only(plan("run: chat/0, gpu: 0, port: 8000, state: exited, exit: 1, ended: 5s, restarts: 4, failures: 2"))
    assert (action.restarts, action.failures, action.not_before) == (5, 3, NOW + 35)
    assert action.cause == "it failed (exit 1)"


def test_a_start_after_a_stop_keeps_its_restarts_and_forgets_its_failures() -> None:
    action = only(plan("run: chat/0, gpu: 0, port: 8000, state: exited, why: REMOVED, restarts: 4, failures: 2"))
    assert (action.restarts, action.failures, action.not_before) == (4, 0, None)


def test_an_edited_entry_begins_anew() -> None:
    old = FILE.replace("20GiB", "30GiB")
    ended = "run: chat/0, gpu: 0, port: 8000, state: exited, exit: 1, ended: 5s, restarts: 4, failures: 2"
    action = only(plan(ended, ran=old))
    assert (action.restarts, action.failures, action.not_before) == (0, 0, None)
    spawn = plan("run: chat/0, gpu: 0, port: 8000, restarts: 4", ran=old).actions[1]
    assert (spawn.cause, spawn.restarts) == ("its entry changed", 0)


def test_a_start_that_took_too_long_counts_as_a_failure_from_when_it_is_stopped() -> None:
    stop, spawn = plan("run: chat/0, gpu: 0, port: 8000, state: loading, age: 11m, failures: 1").actions
    assert stop.cause == "not ready after 600s (`startup_timeout`)"
    assert (spawn.cause, spawn.failures, spawn.not_before) == ("it failed (not ready in time)", 2, NOW + 20)
    stopping = "run: chat/0, gpu: 0, port: 8000, state: stopping, stopping: 9s, age: 11m, why: STARTUP_TIMEOUT"
    kill, spawn = plan(stopping).actions
    assert (kill.kind, spawn.failures, spawn.not_before) == ("kill", 1, NOW + 10)


def test_a_person_who_applies_does_not_wait_for_a_back_off_but_tries_once() -> None:
    failed = "run: chat/0, gpu: 0, port: 8000, state: exited, exit: 1, ended: 1s, failures: 3"
    again = only(plan(failed, tried=frozenset()))
    assert (again.now, again.not_before, again.failures) == (True, None, 4)
    assert not only(plan(failed, tried=frozenset({"chat/0"}))).now


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
