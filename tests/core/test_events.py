"""What a pass has to tell: everything once, also over the end of the one who tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import yaml

from sage_reconcile.core.events import Event, EventType, Told, selected
from sage_reconcile.core.observed import Gpu, Observed
from sage_reconcile.core.plan import Action
from sage_reconcile.core.planner import make_plan
from tests.plans.world import NOW, world
from tests.reading import desired

FILE = "version: 1\nengines:\n  chat: {model: m, memory: 60GiB}\n"
CHAT = "run: chat/0, gpu: 0, port: 8000, id: one, age: 1m"
READY = f"{CHAT}, ready: 20s"


def machine(*launches: str, gpus: str = "[H100 80GiB]", ran: str = FILE) -> Observed:
    data = {"gpus": yaml.safe_load(gpus), "launches": [yaml.safe_load(f"{{{launch}}}") for launch in launches]}
    return world(data, desired(ran), NOW)


def news(told: Told, observed: Observed, file: str = FILE, done: Sequence[str] = (), **rest: Any) -> list[Event]:
    """``done`` are the kinds of actions of the plan that were carried out."""
    plan = make_plan(desired(file), observed, NOW)
    carried_out = [replace(x, launch=x.launch or "two") for x in plan.actions if x.kind in done]
    return told.news(observed, plan, NOW, carried_out, **rest)


def types(events: Sequence[Event]) -> list[str]:
    return [event.type.value for event in events]


def on_disk(events: Sequence[Event]) -> list[dict[str, Any]]:
    return [
        {"type": x.type.value, "launch": x.launch, "replica": x.replica, "details": dict(x.details)} for x in events
    ]


def test_the_life_of_a_replica_is_told_turn_by_turn_and_each_turn_once() -> None:
    told = Told()
    [spawned] = news(told, machine(), done=["spawn"])
    assert (spawned.type, spawned.replica, spawned.engine, spawned.launch) == ("spawn", "chat/0", "chat", "two")
    assert spawned.message == "GPU 0, port 8000: wanted, and not running"
    mine = CHAT.replace("one", "two")
    assert news(told, machine(f"{mine}, state: loading")) == []
    [ready] = news(told, machine(f"{mine}, ready: 20s"))
    assert (ready.type, ready.message, ready.launch) == ("ready", "40s after its start", "two")
    assert news(told, machine(f"{mine}, ready: 20s")) == []
    hangs = machine(f"{mine}, ready: 20s, state: degraded")
    assert types(news(told, hangs)) == ["not-ready"]
    assert news(told, hangs) == []
    assert [event.message for event in news(told, machine(f"{mine}, ready: 20s"))] == ["it answers again"]
    gone = "version: 1\nengines: {}\n"
    [stop] = news(told, machine(f"{mine}, ready: 20s"), gone, done=["stop"])
    assert (stop.type, stop.launch, stop.details["cause"]) == ("stop", "two", "its engine is not in the file")
    assert news(told, machine(f"{mine}, ready: 20s, state: stopping, stopping: 1s, why: REMOVED"), gone) == []
    [over] = news(told, machine(f"{mine}, ready: 20s, state: exited, exit: 0, ended: 1s, why: REMOVED"), gone)
    assert (over.type, over.message) == ("stopped", "no longer wanted (exit 0)")
    assert news(told, machine(f"{mine}, ready: 20s, state: exited, exit: 0, ended: 1s, why: REMOVED"), gone) == []


def test_a_failure_tells_its_class_and_what_follows_from_it() -> None:
    told = Told([{"type": "spawn", "launch": "one", "replica": "chat/0"}])
    failed, back_off = news(told, machine(f"{CHAT}, state: exited, exit: 1, ended: 1s, failure: port taken"))
    assert (failed.type, failed.message) == ("failed", "exit 1: port taken")
    assert (failed.details["class"], failed.details["exit_code"], failed.details["failures"]) == ("port taken", 1, 1)
    assert back_off.type == "back-off"
    assert NOW + 7 <= back_off.details["next_try_at"] <= NOW + 9
    told = Told([{"type": "spawn", "launch": "one", "replica": "chat/0"}])
    bad = machine(f"{CHAT}, state: exited, exit: 2, ended: 1s, failure: wrong flag")
    assert types(news(told, bad)) == ["failed", "stalled"]
    assert news(told, bad) == []
    told = Told([{"type": "ready", "launch": "one", "replica": "chat/0"}])
    healed = machine(f"{READY}, state: exited, exit: 137, ended: 1s")
    assert types(news(told, healed, done=["spawn"])) == ["failed", "spawn"], "tried again at once"


def test_whoever_comes_next_adopts_and_tells_what_happened_meanwhile_and_nothing_twice() -> None:
    first = Told()
    kept = [*news(first, machine(), done=["spawn"])]
    mine = READY.replace("one", "two")
    kept += news(first, machine(mine))
    next_one = Told(on_disk(kept), adopts=True)
    [adopted] = news(next_one, machine(mine))
    assert (adopted.type, adopted.launch, adopted.details) == ("adopted", "two", {"pid": 5000})
    assert news(next_one, machine(mine)) == []
    died = machine(f"{mine}, state: exited, exit: 137, ended: 1s")
    assert types(news(Told(on_disk(kept), adopts=True), died)) == ["failed"]
    hangs = machine(f"{mine}, state: degraded")
    assert types(news(Told(on_disk(kept), adopts=True), hangs)) == ["adopted", "not-ready"]
    assert news(Told(on_disk(kept)), machine(mine)) == [], "who does not adopt"


def test_what_was_over_before_anything_was_told_is_not_news() -> None:
    old = machine(f"{CHAT}, state: exited, exit: 1, ended: 9h")
    assert news(Told(adopts=True), old) == []
    told = Told(adopts=True)
    assert types(news(told, machine(READY))) == ["adopted"]
    assert news(told, machine(READY)) == []


def test_what_has_no_place_is_told_once_until_it_has_one() -> None:
    told = Told()
    [event] = news(told, machine(gpus="[H100 40GiB]"))
    assert (event.type, event.replica) == ("unplaced", "chat/0")
    assert "needs 60.0GiB" in event.message
    assert news(told, machine(gpus="[H100 40GiB]")) == []
    again = Told(on_disk([event]))
    assert news(again, machine(gpus="[H100 40GiB]")) == []
    assert news(again, machine()) == []
    assert types(news(again, machine(gpus="[H100 40GiB]"))) == ["unplaced"]


def test_a_gpu_is_lost_once_and_back_once_also_for_the_next_one() -> None:
    lost = "[{gpu: H100 80GiB, lost: fell off the bus}]"
    told = Told()
    [event] = news(told, machine(gpus=lost), "version: 1\nengines: {}\n")
    assert (event.type, event.message, event.details) == (
        "gpu-lost",
        "GPU 0: fell off the bus",
        {"gpu": "GPU-0"},
    )
    none = "version: 1\nengines: {}\n"
    assert news(told, machine(gpus=lost), none) == []
    following = Told(on_disk([event]))
    assert news(following, machine(gpus=lost), none) == []
    [back] = news(following, machine(), none)
    assert (back.type, back.details) == ("gpu-back", {"gpu": "GPU-0"})
    assert news(following, machine(), none) == []
    assert news(Told(on_disk([event, back])), machine(), none) == []


def test_a_gpu_that_is_not_listed_any_more_is_lost_to_what_runs_there() -> None:
    told = Told()
    news(told, machine(READY))
    without = replace(machine(READY), gpus=())
    assert types(news(told, without)) == ["gpu-lost"]
    assert news(told, without) == []
    assert types(news(told, machine(READY))) == ["gpu-back"]


def test_who_gives_way_or_moves_is_told_beside_the_stop() -> None:
    file = """\
version: 1
engines:
  top: {model: m, memory: 60GiB, priority: 9, preemption: lower}
  chat: {model: m, memory: 60GiB}
"""
    told = Told()
    news(told, machine(READY))
    observed = machine(READY, ran=file)
    events = news(told, observed, file, done=["stop"])
    assert types(events) == ["unplaced", "stop", "displaced"] or types(events) == ["stop", "displaced"]
    assert {event.launch for event in events if event.type != EventType.UNPLACED} == {"one"}


def test_what_could_not_be_done_is_told() -> None:
    action = Action("spawn chat/0", "spawn", "chat/0", "wanted")
    events = news(Told(), machine(READY), could_not=[(action, "no such program")])
    assert [(x.type, x.message) for x in events] == [("action-failed", "spawn: no such program")]
    assert events[0].details == {"kind": "spawn", "reason": "no such program"}


def test_damaged_events_teach_nothing_and_break_nothing() -> None:
    Told([{}, {"type": "ready"}, {"type": "spawn", "launch": 7}, {"type": "gpu-lost", "details": "x"}, {"type": 3}])


def test_events_are_selected_by_engine_or_replica_and_age() -> None:
    event = {"engine": "chat", "replica": "chat/0", "at": 100.0}
    assert selected(event, "", 100.0)
    assert selected(event, "chat", 0)
    assert selected(event, "chat/0", 0)
    assert not selected(event, "chat/1", 0)
    assert not selected(event, "", 100.1)
    assert not selected({**event, "at": None}, "", 0)


def test_a_gpu_that_only_takes_nothing_new_is_not_lost() -> None:
    gpu = Gpu("GPU-0", 0, "H100", "", 81920, problem="compute mode prohibited")
    assert types(news(Told(), Observed((gpu,)), "version: 1\nengines: {}\n")) == []
