"""A revision on record becomes an engine again, or it is said why not."""

from __future__ import annotations

from sage_reconcile.core.check import check_plan
from sage_reconcile.core.observed import Exit, Launch, Life
from sage_reconcile.core.plan import Plan
from sage_reconcile.core.planner import make_plan
from sage_reconcile.core.resolve import secret_marks
from sage_reconcile.core.rollback import never_worked, revision_of
from sage_reconcile.core.spec import Engine
from tests.plans.world import NOW, world
from tests.reading import desired, read

ENTRIES = (
    "model: m",
    "model: m, memory: all, tensor_parallel_size: 2, gpus: [0, GPU-1], link: numa, port: 9000",
    "model: m, memory: 30%, context: 8k, served_model_name: a, args: {seed: 1, chat-template: '${KEY}', stop: [x]}",
    "model: m, memory: auto, concurrency: 4, env: {TOKEN: '${KEY}', PLAIN: 'yes'}, startup_timeout: 5m",
    "runtime: command, command: 'serve --key ${KEY} {port}', memory: 10GiB",
    "model: '${KEY}', runtime: simulator, device: cpu, python: /opt/p, env_file: a.env",
)


def engine(entry: str, key: str = "secret", file_value: str = "1") -> Engine:
    text = f"version: 1\nengines:\n  chat: {{{entry}}}\n"
    found, faults = read(text, {"KEY": key}, {"a.env": {"A": file_value}})
    assert faults == []
    return found.engines[0]


def launch(of: Engine, **values: object) -> Launch:
    fields = {
        "id": "one",
        "engine_name": "chat",
        "index": 0,
        "spec": of.record,
        "secret_marks": secret_marks(of.secrets, "one"),
        "gpus": (),
        "memory_mib": 0,
        "port": 8000,
        "bind": "127.0.0.1",
        "life": Life.EXITED,
        "created_at": 0.0,
    }
    return Launch(**{**fields, **values})


def test_every_revision_comes_back_as_it_was() -> None:
    for entry in ENTRIES:
        old = engine(entry)
        found = revision_of(old, launch(old))
        assert isinstance(found, Engine), (entry, found)
        assert found.spec == old.spec, entry
        assert found.record == old.record, entry
        assert found.env == old.env, entry
        assert found.secrets == old.secrets, entry
        assert found.shown.model_dump(mode="json") == old.record, entry


def test_what_restarts_nobody_is_as_the_entry_says_now() -> None:
    old, new = engine("model: m, stop_timeout: 5s"), engine("model: n, stop_timeout: 9s, replicas: 3, rollback: off")
    found = revision_of(new, launch(old))
    assert isinstance(found, Engine)
    assert (found.spec.model, found.spec.stop_timeout, found.spec.replicas) == ("m", 9.0, 3)
    assert (found.record["model"], found.record["replicas"]) == ("m", 3)


def test_a_hidden_value_that_is_another_now_is_lost() -> None:
    for entry, path in ((ENTRIES[3], "env.TOKEN"), (ENTRIES[2], "args.chat-template"), (ENTRIES[4], "command")):
        told = revision_of(engine(entry, key="another"), launch(engine(entry)))
        assert isinstance(told, str)
        assert path in told
        assert "secret" not in told
    assert isinstance(revision_of(engine(ENTRIES[5], file_value="2"), launch(engine(ENTRIES[5]))), str)
    assert isinstance(revision_of(engine("model: m"), launch(engine(ENTRIES[3]))), str)
    assert isinstance(revision_of(engine(ENTRIES[3]), launch(engine("model: m"))), Engine)


def test_a_record_that_cannot_be_read_is_no_revision() -> None:
    old = engine("model: m")
    told = revision_of(old, launch(old, spec={**old.record, "runtime": "of another version"}))
    assert isinstance(told, str)
    assert "cannot be read" in told


def test_only_a_start_that_failed_tells_of_its_revision() -> None:
    old = engine("model: m")
    assert never_worked(launch(old, exit=Exit(1, 5.0)))
    assert never_worked(launch(old, exit=Exit(0, 5.0), stop_cause="not ready in time"))
    assert never_worked(launch(old, life=Life.ALIVE, stopping_since=5.0, stop_cause="not ready in time"))
    assert not never_worked(launch(old, exit=Exit(None, 5.0))), "a machine that was switched off tells nothing"
    assert not never_worked(launch(old, exit=Exit(1, 5.0), ready_at=3.0))
    assert not never_worked(launch(old, exit=Exit(0, 5.0), stop_cause="no longer wanted"))
    assert not never_worked(launch(old, life=Life.ALIVE))


def test_off_is_a_word_though_yaml_reads_it_as_no() -> None:
    assert desired("version: 1\nengines:\n  chat: {model: m, rollback: off}\n").engines[0].spec.rollback == "off"


OLD = "version: 1\nengines:\n  chat: {model: m, memory: 60GiB}\n"
NEW = "version: 1\nengines:\n  chat: {model: m, memory: 60GiB, args: {seed: 2}}\n"
GOOD = {"run": "chat/0", "gpu": 0, "port": 8000, "id": "good", "state": "exited", "ready": "1h", "why": "CHANGED"}
BAD = {"run": "chat/0", "gpu": 0, "port": 8000, "id": "bad", "age": "50s", "now": True}
ENDED = {"state": "exited", "exit": 2, "ended": "5s"}
BACK = {"run": "chat/0", "gpu": 0, "port": 8000, "id": "back", "age": "4s"}


def planned(*launches: dict[str, object], tried: frozenset[str] | None = None) -> Plan:
    new = desired(NEW)
    observed = world({"gpus": ["H100 80GiB"], "launches": list(launches)}, desired(OLD), NOW, new)
    found = make_plan(new, observed, NOW, tried=tried)
    assert check_plan(new, observed, found) == []
    return found


def test_the_records_that_a_rollback_needs_are_kept_and_no_others() -> None:
    assert planned(GOOD, {**BAD, "state": "loading"}).forget == ()
    failed_start = planned(GOOD, {**BAD, **ENDED})
    assert (failed_start.forget, failed_start.rollbacks[0].good) == ((), "good")
    back = planned(GOOD, {**BAD, **ENDED}, {**BACK, "ready": "1s"})
    assert (back.forget, back.rollbacks[0].good) == (("good",), "back")
    crashed = planned({**BAD, **ENDED}, {**BACK, "ready": "2s", "state": "exited", "exit": 1, "ended": "1s"})
    assert (crashed.forget, crashed.rollbacks[0].failed) == ((), "bad")


def test_what_was_ready_once_is_not_rolled_back() -> None:
    assert planned(GOOD, {**BAD, **ENDED, "ready": "30s"}).rollbacks == ()


def test_who_asks_again_has_the_failure_forgotten_and_after_the_try_it_counts() -> None:
    again = planned(GOOD, {**BAD, **ENDED}, tried=frozenset())
    assert (again.rollbacks, again.forget) == ((), ("bad",))
    tried = planned(GOOD, {**BAD, **ENDED}, tried=frozenset({"chat/0"}))
    assert [(x.kind, x.now, x.revision is not None) for x in tried.actions] == [("spawn", True, True)]
    failed_too = {**BACK, "state": "exited", "exit": 1, "ended": "1s"}
    assert not planned(GOOD, {**BAD, **ENDED}, failed_too, tried=frozenset({"chat/0"})).actions[0].now
