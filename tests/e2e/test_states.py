"""Phases, back-off and events of a daemon with real processes."""

from __future__ import annotations

import json
import os
import signal
import stat
from typing import Any

import jsonschema

from tests.e2e.box import REPOSITORY, Box

BIG = "runtime: simulator, model: a/b-7B, memory: 81GiB"
SIMULATED = "runtime: simulator, model: a/b-7B, memory: 20GiB"
FLAG = f"bad: {{{SIMULATED}, args: {{max-modellen: 8}}}}"
LOOPS = f"loops: {{{SIMULATED}, args: {{simulate-fail: oom}}}}"


def spawns(box: Box, replica: str) -> int:
    lines = [json.loads(line) for line in box.daemon_log().splitlines() if line.startswith("{")]
    return sum(line["event"] == "spawn" and line["replica"] == replica for line in lines)


def phase(box: Box, replica: str) -> str | None:
    row = box.replicas().get(replica)
    return row["phase"] if row else None


def ready(row: dict[str, Any]) -> dict[str, Any]:
    return next(condition for condition in row["conditions"] if condition["type"] == "Ready")


def test_a_wrong_flag_stalls_at_once_and_only_an_edit_or_a_person_releases_it(box: Box) -> None:
    """Another engine fails for what may get better, and is tried again meanwhile."""
    box.write(f"{FLAG}\n{LOOPS}")
    box.start_daemon()
    row = box.until("stalled", lambda: phase(box, "bad/0") == "Stalled" and box.replicas()["bad/0"])
    assert "this vLLM has no flag `max-modellen` (in `args`)" in row["reason"]
    assert row["failure"]["line"] == "unrecognized arguments: --max-modellen"
    assert (ready(row)["reason"], ready(row)["since"]) == ("Stalled", row["exit"]["at"])
    assert row["next_try_at"] is None
    text = box.run("status")
    assert "not tried again until its entry changes, or with `apply`" in text
    box.until("the other one is tried again", lambda: spawns(box, "loops/0") > 1)
    assert spawns(box, "bad/0") == 1
    text = box.run("apply", "--yes", expect=1)
    assert "bad/0 is Stalled: ended: exit 2: wrong flag" in text
    assert spawns(box, "bad/0") == 2, "a person asked"
    box.write(f"bad: {{{SIMULATED}}}")
    box.until("an edit releases it", lambda: set(box.ready()) == {"bad/0"})


def test_a_restart_of_the_daemon_ends_no_back_off_and_releases_nothing(box: Box) -> None:
    box.write(f"{FLAG}\n{LOOPS}")
    daemon = box.start_daemon()
    box.until("both failed", lambda: (phase(box, "bad/0"), phase(box, "loops/0")) == ("Stalled", "BackOff"))
    due = box.replicas()["loops/0"]["next_try_at"]
    daemon.kill()
    daemon.wait()
    before = spawns(box, "loops/0"), spawns(box, "bad/0")
    box.start_daemon()
    box.until("the next one is at work", lambda: box.status()["daemon"])
    box.until("it is tried again in its time", lambda: spawns(box, "loops/0") > before[0])
    last = max((r for r in box.records() if r["engine_name"] == "loops"), key=lambda r: r["created_at"])
    assert last["created_at"] >= due
    assert last["failures"] >= 1
    assert spawns(box, "bad/0") == before[1]


def told(box: Box, *words: str) -> list[dict[str, Any]]:
    """The events, each as its schema says."""
    found = [json.loads(line) for line in box.run("events", *words, "-o", "json").splitlines()]
    schema = json.loads((REPOSITORY / "schemas/event.schema.json").read_text(encoding="utf-8"))
    for event in found:
        jsonschema.validate(event, schema)
    return found


def types(box: Box, *words: str) -> list[str]:
    return [event["type"] for event in told(box, *words)]


def test_events_tell_the_life_of_an_engine_and_of_the_daemons_that_saw_it(box: Box) -> None:
    """Started, killed while no daemon looks, told and healed by the next one, stopped by an edit."""
    box.write(f"chat: {{{SIMULATED}}}\nother: {{{SIMULATED}}}")
    daemon = box.start_daemon()
    before = box.until("ready", lambda: len(box.ready()) == 2 and box.ready())
    box.until("told", lambda: types(box, "chat") == ["spawn", "ready"])
    daemon.kill()
    daemon.wait()
    os.kill(before["chat/0"], signal.SIGKILL)
    second = box.start_daemon()
    box.until("healed", lambda: len(box.ready()) == 2 and box.ready()["chat/0"] != before["chat/0"])
    box.until("told", lambda: types(box, "chat")[-1] == "ready")
    turns = [turn for turn in types(box, "chat") if turn not in ("reap", "adopted")]
    assert turns == ["spawn", "ready", "failed", "spawn", "ready"]
    assert types(box, "other/0") == ["spawn", "ready", "adopted"]
    failed = next(event for event in told(box, "chat") if event["type"] == "failed")
    launches = {event["launch"] for event in told(box, "chat")}
    assert (failed["by"], failed["pid"], failed["replica"]) == ("daemon", second.pid, "chat/0")
    assert failed["details"]["exit_code"] == 137
    assert failed["launch"] in launches
    assert len(launches) == 2
    assert {event["pid"] for event in told(box)} == {daemon.pid, second.pid}
    box.write(f"chat: {{{SIMULATED}}}")
    box.until("other is gone", lambda: types(box, "other")[-1] == "stopped")
    second.send_signal(signal.SIGTERM)
    second.wait()
    assert types(box)[-1] == "daemon-ended"
    assert stat.S_IMODE((box.state / "events.jsonl").stat().st_mode) == 0o600
    text = box.run("events", "chat/0", "-n", "1")
    assert text.split()[2:4] == ["ready", "chat/0"]
    assert box.run("events", "--since", "0s") == ""
    assert "nobody has no events" in box.run("events", "nobody", expect=1)


def test_apply_tells_events_too_and_files_that_are_refused_are_among_them(box: Box) -> None:
    box.write(FLAG)
    box.run("apply", "--yes", expect=1)
    assert types(box) == ["file-accepted", "spawn", "failed", "stalled"]
    assert {event["by"] for event in told(box)} == {"apply"}
    box.start_daemon()
    box.until("at work", lambda: box.status()["daemon"])
    box.write(f"bad: {{{SIMULATED}, replicas: many}}")
    box.until("refused", lambda: types(box)[-1] == "file-refused")
    assert "expected a whole number" in box.run("events", "-n", "1")
    assert types(box).count("stalled") == 1, "a daemon that comes later does not tell it again"


def test_events_are_followed(box: Box) -> None:
    box.write(f"chat: {{{SIMULATED}}}")
    follower = box.start("events", "-f", "-o", "json")
    box.run("apply", "--yes")
    box.until("it is told", lambda: box.daemon_log().count('"type": "ready"') == 1)
    assert follower.poll() is None
    assert box.daemon_log().count('"type": "spawn"') == 1


def test_wait_ends_when_all_is_ready_and_says_why_it_cannot_be(box: Box) -> None:
    box.write(f"chat: {{{SIMULATED}}}")
    assert "nobody reconciles" in box.run("wait", "chat", expect=1)
    box.start_daemon()
    box.until("it is at work", lambda: box.status()["daemon"])
    box.run("wait", "chat", "--timeout", "1m")
    first = box.ready()
    box.write(f"chat: {{{SIMULATED}, args: {{max-model-len: 512}}}}\n{FLAG}\nbig: {{{BIG}}}")
    box.run("wait", "chat", "--timeout", "1m")
    assert box.ready()["chat/0"] != first["chat/0"], "not the revision before"
    assert "bad/0 is Stalled: ended: exit 2: wrong flag" in box.run("wait", "bad/0", expect=1)
    text = box.run("wait", "big", "--for=ready", expect=1)
    assert "needs 81.0GiB" in text
    assert "bad/0 is Stalled" in box.run("wait", "--all", expect=1)
    box.write(f"chat: {{{SIMULATED}, replicas: many}}")
    assert "expected a whole number" in box.run("wait", "chat", expect=1)
    box.write(LOOPS)
    box.run("wait", "chat", "--for", "deleted", "--timeout", "1m")
    box.run("wait", "bad", "--for=stopped", "--timeout", "1m")
    box.until("it failed", lambda: phase(box, "loops/0") == "BackOff")
    text = box.run("wait", "loops", "--timeout", "0.1s", expect=124)
    assert text.startswith("timed out after 0.1s: loops/0 is ")
    for words in (("wait",), ("wait", "chat", "--all"), ("wait", "chat", "--for=x"), ("wait", "a", "--timeout=x")):
        box.run(*words, expect=64)


def test_wait_without_a_daemon_waits_for_what_loads_by_itself(box: Box) -> None:
    box.write(f"chat: {{{SIMULATED}, args: {{simulate-load-seconds: 15}}}}")
    apply = box.start("apply", "--yes")
    box.until("it loads", lambda: any(record["leader"] for record in box.records()))
    apply.send_signal(signal.SIGINT)
    apply.wait()
    assert "chat is ready." in box.run("wait", "chat", "--timeout", "1m")
