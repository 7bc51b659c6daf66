"""Conditions: what is so, why, and since when."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml

from sage_reconcile.core.conditions import keep_since
from sage_reconcile.core.failure import Failure, FailureKind
from sage_reconcile.core.observed import Observed
from sage_reconcile.core.planner import make_plan
from sage_reconcile.core.report import status_document
from tests.plans.world import NOW, world
from tests.reading import desired

FILE = """\
version: 1
host: {concurrent_starts: 1}
engines:
  chat: {model: m, memory: 60GiB}
  code: {model: m, memory: 60GiB}
"""
CHAT = "run: chat/0, gpu: 0, port: 8000"
CODE = "run: code/0, gpu: 1, port: 8001"


TWO = "[H100 80GiB, H100 80GiB]"


def told(*launches: str, file: str = FILE, ran: str = "", gpus: str = TWO, **changed: Any) -> Any:
    """The status of a machine; ``changed`` are fields of its first launch."""
    data = {"gpus": yaml.safe_load(gpus), "launches": [yaml.safe_load(f"{{{launch}}}") for launch in launches]}
    observed = world(data, desired(ran or file), NOW)
    if changed:
        first, *others = observed.launches
        observed = replace(observed, launches=(replace(first, **changed), *others))
    return status(file, observed)


def status(file: str, observed: Observed) -> Any:
    wanted = desired(file)
    return status_document(wanted, observed, make_plan(wanted, observed, NOW), NOW)


def of(document: Any, replica: str = "chat/0") -> dict[str, tuple[str, str, float | None]]:
    rows = [row for engine in document["engines"] for row in engine["replicas"] if row["name"] == replica]
    return {x["type"]: (x["status"], x["reason"], x["since"]) for x in rows[0]["conditions"]}


def test_one_that_serves_is_ready_placed_and_current_since_it_was() -> None:
    assert of(told(f"{CHAT}, age: 1h, ready: 50m", CODE)) == {
        "Ready": ("True", "Answers", NOW - 3000),
        "Placed": ("True", "Running", NOW - 3600),
        "Current": ("True", "AsWritten", NOW - 3600),
    }
    again = told(f"{CHAT}, age: 1h, ready: 50m", CODE, answers_since=NOW - 9)
    assert of(again)["Ready"] == ("True", "Answers", NOW - 9)


@pytest.mark.parametrize(
    ("launch", "ready"),
    [
        (f"{CHAT}, state: loading, age: 5m", ("False", "Starting", NOW - 300)),
        (f"{CHAT}, state: stopping, stopping: 2s, why: REMOVED", ("False", "Stopping", NOW - 2)),
        (f"{CHAT}, state: exited, exit: 1, ended: 3s", ("False", "BackOff", NOW - 3)),
        (f"{CHAT}, state: exited, exit: 1, ended: 3s, failure: wrong flag", ("False", "Stalled", NOW - 3)),
        (f"{CHAT}, state: unproven", ("Unknown", "NotProvenOurs", None)),
        (f"{CHAT}, state: degraded", ("False", "NotAnswering", None)),
    ],
)
def test_why_one_is_not_ready_and_since_when(launch: str, ready: object) -> None:
    assert of(told(launch, CODE))["Ready"] == ready


def test_since_when_one_does_not_answer_is_as_on_record() -> None:
    document = told(f"{CHAT}, state: degraded, ready: 50m", CODE, answers_since=NOW - 7)
    assert of(document)["Ready"] == ("False", "NotAnswering", NOW - 7)


def test_what_a_start_waits_for_has_a_word() -> None:
    lane = told(f"{CHAT}, state: loading, age: 5m")
    assert of(lane, "code/0")["Ready"][:2] == ("False", "WaitingForLane")
    assert of(lane, "code/0")["Placed"] == ("True", "Planned", None)
    only_one = "version: 1\nengines: {code: {model: m, memory: 60GiB}}"
    ends = told(
        "run: chat/0, gpu: 0, port: 8000, state: stopping, stopping: 1s, why: REMOVED",
        file=only_one,
        ran=FILE,
        gpus="[H100 80GiB]",
    )
    assert of(ends, "code/0")["Ready"][:2] == ("False", "WaitingForEnd")
    nowhere = told(f"{CHAT}", gpus="[H100 80GiB]")
    assert of(nowhere, "code/0")["Ready"][:2] == ("False", "NoPlace")
    assert of(nowhere, "code/0")["Placed"][:2] == ("False", "NoPlace")
    no_port = told(file=FILE.replace("concurrent_starts: 1", "ports: 8000-8000"))
    assert of(no_port, "code/0")["Placed"][:2] == ("False", "NoPort")
    ended = f"{CHAT}, state: exited, exit: 137, ended: 2s, age: 1h, ready: 50m"
    held = told(ended, CODE, gpus="[{gpu: H100 80GiB, used: 50GiB}, H100 80GiB]")
    assert of(held)["Ready"][:2] == ("False", "WaitingForMemory")
    simulated = told(gpus="[{gpu: H100 80GiB, simulated: true}]")
    assert of(simulated)["Placed"][:2] == ("False", "CannotStartHere")


def test_one_that_does_not_run_what_its_entry_says_is_not_current() -> None:
    bigger = FILE.replace("chat: {model: m, memory: 60GiB}", "chat: {model: m, memory: 70GiB}")
    assert of(told(CHAT, CODE, file=bigger, ran=FILE))["Current"][:2] == ("False", "Outdated")
    too_big = bigger.replace("70GiB", "90GiB")
    assert of(told(CHAT, CODE, file=too_big, ran=FILE))["Current"][:2] == ("False", "NoPlaceForChange")
    assert of(told(CHAT, CODE, file=too_big, ran=FILE))["Ready"][:2] == ("True", "Answers")


def test_an_edited_entry_is_pending_and_no_longer_stalled() -> None:
    loading = f"{CODE}, state: loading, age: 1m"  # so that it cannot start at once
    bad = f"{CHAT}, state: exited, exit: 2, ended: 3s, failure: wrong flag"
    before = told(bad, loading)
    assert before["engines"][0]["replicas"][0]["phase"] == "Stalled"
    document = told(bad, loading, file=FILE.replace("60GiB", "50GiB", 1), ran=FILE)
    assert document["engines"][0]["replicas"][0]["phase"] == "Pending"


def test_since_when_is_kept_while_nothing_changes_and_never_the_time_of_asking() -> None:
    first, second, third = (told(CHAT, gpus="[H100 80GiB]") for _ in range(3))
    keep_since(first, {}, NOW)
    assert of(first, "code/0")["Placed"] == ("False", "NoPlace", NOW)
    keep_since(second, first, NOW + 60)
    assert of(second, "code/0") == of(first, "code/0")
    keep_since(third, {"engines": [{"replicas": [{"name": "code/0"}]}]}, None)
    assert of(third, "code/0")["Placed"] == ("False", "NoPlace", None)
    placed = told(CHAT, CODE)
    keep_since(placed, second, NOW + 90)
    assert of(placed, "code/0")["Placed"] == ("True", "Running", NOW - 3600)


def test_an_ended_one_of_a_class_that_may_get_better_is_no_longer_ready_since_its_end() -> None:
    may = Failure(FailureKind.PORT_TAKEN, can_recover=True)
    document = told(f"{CHAT}, state: exited, exit: 1, ended: 3s", CODE, failure=may)
    assert of(document)["Ready"] == ("False", "BackOff", NOW - 3)
