"""The host's memory, from the file to the processes that hold it, with the simulator in vLLM's place."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import jsonschema

from tests.e2e.box import Box
from tests.test_examples import schema

SIMULATED = "runtime: simulator, model: a/b-7B, device: cpu"
HOST = "gpus: none"


def checked(document: Any, name: str) -> Any:
    jsonschema.validate(document, schema(name), cls=jsonschema.Draft202012Validator)
    return document


def test_what_a_size_promises_is_kept_shown_and_given_back(box: Box) -> None:
    """Two engines with a size and one without; the daemon adopts them; what ends is promised to nobody any more."""
    box.write(
        f"one: {{{SIMULATED}, memory: 600MiB}}\ntwo: {{{SIMULATED}, memory: 400MiB}}\nfree: {{{SIMULATED}}}", HOST
    )
    plan = checked(box.json("diff", expect=2), "plan")
    assert [action["host_memory_mib"] for action in plan["actions"]] == [600, 400, 0]
    before, after = (plan["host_memory"][f"promised_{when}_mib"] for when in ("before", "after"))
    assert (before, after) == (0, 1000)
    text = box.run("apply", "--yes")
    assert "CPU  0.6GiB" in text
    assert "Host memory:" in text
    status = checked(box.status(), "status")
    rows = {row["name"]: row for engine in status["engines"] for row in engine["replicas"]}
    assert {name: row["host_memory_mib"] for name, row in rows.items()} == {"one/0": 600, "two/0": 400, "free/0": 0}
    assert status["host_memory"]["promised_mib"] == 1000
    assert 0 < rows["one/0"]["host_held_mib"] < 600, "a real process has some of its own"
    assert rows["free/0"]["host_held_mib"] == 0, "nobody looks for it"
    assert "Host memory: " in box.run("status")
    box.write(f"one: {{{SIMULATED}, memory: 600MiB}}", HOST)
    box.run("apply", "--yes")
    assert box.status()["host_memory"]["promised_mib"] == 600
    box.write(f"free: {{{SIMULATED}}}", HOST)
    box.run("apply", "--yes")
    assert checked(box.status(), "status")["host_memory"] is None
    assert "Host memory" not in box.run("diff")


def test_what_does_not_fit_is_refused_with_numbers_and_takes_nothing(box: Box) -> None:
    box.write(f"one: {{{SIMULATED}, memory: 600MiB}}", HOST)
    total = box.json("diff", expect=2)["host_memory"]["total_mib"]
    box.write(f"one: {{{SIMULATED}, memory: 600MiB}}\nlarge: {{{SIMULATED}, memory: {total}MiB}}", HOST)
    text = box.run("apply", "--yes", expect=3)
    assert f"! large/0  unplaced   needs {total / 1024:.1f}GiB of host memory; " in text
    assert "(one/0 0.6GiB, " in text
    assert "kept back 2.0GiB" in text or total < 20 * 1024
    assert set(box.ready()) == {"one/0"}
    [replica] = checked(box.json("explain", "large", expect=3), "explain")["replicas"]
    assert replica["host_memory"]["need_mib"] == total
    assert "GiB too little (one/0 0.6GiB, " in replica["host_memory"]["verdict"]
    assert "Host memory: needs 0.6GiB, " in box.run("explain", "one")


def test_a_lower_priority_gives_its_memory_to_a_higher_one(box: Box) -> None:
    box.write(f"low: {{{SIMULATED}, memory: 600MiB}}", HOST)
    told = box.json("diff", expect=2)["host_memory"]
    most = told["free_after_mib"] + 600 - 512  # others come and go
    box.run("apply", "--yes")
    urgent = f"urgent: {{{SIMULATED}, memory: {most}MiB, priority: 1, preemption: lower}}"
    box.write(f"low: {{{SIMULATED}, memory: 600MiB}}\n{urgent}", HOST)
    box.run("apply", "--yes", expect=3)
    assert set(box.ready()) == {"urgent/0"}


def test_the_daemon_adopts_a_promise_and_keeps_it_over_a_restart_of_the_engine(box: Box) -> None:
    box.write(f"one: {{{SIMULATED}, memory: 600MiB}}", HOST)
    box.run("apply", "--yes")
    pid = box.ready()["one/0"]
    box.start_daemon()
    box.until("the daemon has adopted it", lambda: box.status()["daemon"] and box.ready().get("one/0") == pid)
    os.kill(pid, signal.SIGKILL)
    box.until("another is ready", lambda: box.ready().get("one/0", pid) != pid)
    assert box.status()["host_memory"]["promised_mib"] == 600
    assert {record["host_memory_mib"] for record in box.records()} == {600}
    told = json.loads((box.state / "status.json").read_text())
    assert told["host_memory"] is None, "what changes at every look is not written down"
