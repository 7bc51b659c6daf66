"""Phases, back-off and events of a daemon with real processes."""

from __future__ import annotations

import json
from typing import Any

from tests.e2e.box import Box

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
    row = box.replicas()["loops/0"]
    assert row["next_try_at"] == due or spawns(box, "loops/0") > before[0]
    box.until("it is tried again in its time", lambda: spawns(box, "loops/0") > before[0])
    records = {record["engine_name"]: record for record in box.records()}
    assert records["loops"]["created_at"] >= due
    assert records["loops"]["failures"] == 1
    assert spawns(box, "bad/0") == before[1]
