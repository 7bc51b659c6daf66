"""What somebody waits for: it has come, may come, or cannot."""

from __future__ import annotations

from typing import Any

import pytest

from sage_reconcile.core.awaiting import Goal, verdict
from tests.core.test_conditions import CHAT, CODE, FILE, told

STALLED = f"{CHAT}, state: exited, exit: 2, ended: 3s, failure: wrong flag"
LOADING = f"{CHAT}, state: loading, age: 5m"
ONE_GPU = "[H100 80GiB]"


def how(document: Any, name: str = "chat", goal: Goal = Goal.READY, *, reconciled: bool = True) -> tuple[str, str]:
    found = verdict(document, name, goal, reconciled=reconciled)
    assert not (found.come and found.hopeless)
    return ("come" if found.come else "hopeless" if found.hopeless else "late"), found.why


@pytest.mark.parametrize("name", ["chat", "chat/0", ""])
def test_what_is_ready_has_come_whether_anybody_reconciles_or_not(name: str) -> None:
    for reconciled in (True, False):
        assert how(told(CHAT, CODE), name, reconciled=reconciled) == ("come", "")


def test_all_have_to_be_ready_where_all_are_waited_for() -> None:
    document = told(CHAT)
    assert how(document)[0] == "come"
    assert how(document, "")[0] == "late"
    assert how(document, "code/0")[0] == "late"


def test_what_stalled_or_has_no_place_cannot_become_ready() -> None:
    state, why = how(told(STALLED, CODE))
    assert state == "hopeless"
    assert "chat/0 is Stalled: ended: exit 2: wrong flag" in why
    state, why = how(told(CHAT, gpus=ONE_GPU), "code")
    assert state == "hopeless"
    assert "needs 60.0GiB" in why
    assert how(told(f"{CHAT}, state: unproven", CODE))[0] == "hopeless"


def test_what_backs_off_or_loads_may_become_ready() -> None:
    assert how(told(f"{CHAT}, state: exited, exit: 1, ended: 3s", CODE))[0] == "late"
    assert how(told(LOADING, CODE)) == ("late", "chat/0 is Starting")


def test_what_serves_an_old_revision_is_not_ready() -> None:
    bigger = FILE.replace("60GiB", "70GiB", 1)
    state, why = how(told(CHAT, CODE, file=bigger, ran=FILE))
    assert (state, why) == ("late", "chat/0 runs what its entry said before")
    assert how(told(CHAT, CODE, file=bigger.replace("70", "90"), ran=FILE))[0] == "hopeless"


def test_where_nobody_reconciles_only_what_loads_is_waited_for() -> None:
    assert how(told(LOADING, CODE), reconciled=False)[0] == "late"
    state, why = how(told(CODE), reconciled=False)
    assert state == "hopeless"
    assert "nobody reconciles" in why
    assert how(told(LOADING), "", reconciled=False)[0] == "hopeless", "code is not even started"


def test_a_name_that_is_not_there_is_told() -> None:
    assert how(told(CHAT, CODE), "chatt") == ("hopeless", "chatt cannot become ready: there is none of that name")
    assert how(told(CHAT, CODE), "chat/7")[0] == "hopeless"
    zero = "version: 1\nengines: {chat: {model: m, memory: 60GiB, replicas: 0}}"
    assert how(told(file=zero)) == ("hopeless", "chat cannot become ready: `replicas` is 0")


ZERO = FILE.replace("chat: {model: m,", "chat: {model: m, replicas: 0,")
GONE = "version: 1\nengines:\n  code: {model: m, memory: 60GiB}\n"
STOPPING = f"{CHAT}, state: stopping, stopping: 1s, why: REMOVED"


@pytest.mark.parametrize("name", ["chat", "chat/0"])
def test_what_ends_is_stopped_when_nothing_of_it_runs(name: str) -> None:
    assert how(told(STOPPING, CODE, file=ZERO, ran=FILE), name, Goal.STOPPED) == ("late", "chat/0 is Stopping")
    assert how(told(CODE, file=ZERO), name, Goal.STOPPED)[0] == "come"
    state, why = how(told(CHAT, CODE), name, Goal.STOPPED)
    assert (state, why) == ("hopeless", f"{name} is not stopped: its entry says `replicas: 1`")


def test_what_has_an_entry_is_not_deleted() -> None:
    assert how(told(CODE, file=ZERO), "chat", Goal.DELETED)[0] == "hopeless"
    assert how(told(STOPPING, CODE, file=GONE, ran=FILE), "chat", Goal.DELETED)[0] == "late"
    assert how(told(CODE, file=GONE), "chat", Goal.DELETED)[0] == "come"
    assert how(told(CHAT, CODE, file=GONE, ran=FILE), "chat", Goal.DELETED, reconciled=False)[0] == "hopeless"


def test_one_replica_too_many_is_waited_for_by_its_own_name() -> None:
    two = FILE.replace("chat: {model: m,", "chat: {model: m, replicas: 2,")
    second = "run: chat/1, gpu: 1, port: 8002, state: stopping, stopping: 1s, why: REMOVED"
    assert how(told(CHAT, second, ran=two), "chat/1", Goal.STOPPED) == ("late", "chat/1 is Stopping")
    assert how(told(CHAT), "chat/1", Goal.STOPPED)[0] == "come"
