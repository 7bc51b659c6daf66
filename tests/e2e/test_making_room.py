"""Moves and displacement with real processes: proposed, allowed, carried out, and nobody without service."""

from __future__ import annotations

from tests.e2e.box import Box

SIMULATED = "runtime: simulator, model: a/b-7B"
ONE = f"one: {{{SIMULATED}, memory: 30GiB"
TWO = f"two: {{{SIMULATED}, memory: 30GiB"
LARGE = f"large: {{{SIMULATED}, memory: 60GiB}}"
APART = f"{ONE}, gpus: [0]}}\n{TWO}, gpus: [1]}}"


def the_old_one_served_until_the_new_one_was_ready(box: Box, old_pid: int) -> None:
    rows = {row["id"]: row for row in box.records() if row["engine_name"] == "one"}
    new = next(row for row in rows.values() if row["predecessor"])
    old = rows[new["predecessor"]]
    assert old["leader"][0] == old_pid
    assert old["stop_cause"] == "moved to make room"
    assert old["stopping_since"] >= new["ready_at"]


def test_a_move_is_proposed_with_its_cost_and_made_only_with_leave(box: Box) -> None:
    box.write(APART)
    box.run("apply", "--yes")
    before = box.ready()
    box.write(f"{ONE}}}\n{TWO}, gpus: [1]}}\n{LARGE}")
    shown = box.run("diff", expect=3)
    assert "Proposal: large/0 gets in if 1 replica moves:" in shown
    assert "one/0  GPU 0 -> GPU 1  no downtime: starts there first (its last start took" in shown
    assert "large/0 gets in" in box.run("apply", "--yes", expect=3)
    assert box.ready() == before
    assert "1 to start, 0 to replace, 1 to move" in box.run("diff", "--allow-moves", expect=2)
    box.run("apply", "--yes", "--allow-moves")
    after = box.ready()
    assert after.keys() == {"one/0", "two/0", "large/0"}
    assert after["two/0"] == before["two/0"]
    assert after["one/0"] != before["one/0"]
    gpus = {name: [gpu["index"] for gpu in row["gpus"]] for name, row in box.replicas().items()}
    assert gpus == {"one/0": [1], "two/0": [1], "large/0": [0]}
    the_old_one_served_until_the_new_one_was_ready(box, before["one/0"])
    assert "0 to start, 0 to replace, 0 to stop, 3 unchanged" in box.run("diff")


def test_the_daemon_moves_what_is_movable_and_apply_gives_it_leave_for_more(box: Box) -> None:
    box.write(APART)
    box.start_daemon()
    box.until("both are ready", lambda: len(box.ready()) == 2)
    before = box.ready()
    box.write(f"{ONE}, movable: true}}\n{TWO}, gpus: [1]}}\n{LARGE}")
    box.until("all are ready", lambda: len(box.ready()) == 3)
    assert box.ready()["two/0"] == before["two/0"]
    the_old_one_served_until_the_new_one_was_ready(box, before["one/0"])
    box.write(APART)
    box.until("apart again", lambda: set(box.ready()) == {"one/0", "two/0"} and not box.json("diff")["actions"])
    box.write(f"{ONE}}}\n{TWO}, gpus: [1]}}\n{LARGE}")
    box.until("refused", lambda: box.replicas().get("large/0", {}).get("unplaced"))
    assert "large/0" not in box.ready()
    shown = box.run("apply", "--yes", "--allow-moves")
    assert "does it" in shown
    assert len(box.ready()) == 3
    assert not (box.state / "agreed.json").exists()


def test_a_lower_priority_gives_way_where_the_file_says_so_and_comes_back(box: Box) -> None:
    host = "gpus: [{name: H100-80GB, memory: 80GiB}]"
    low = f"low: {{{SIMULATED}, memory: 60GiB}}"
    box.write(low, host)
    box.start_daemon()
    box.until("low is ready", lambda: set(box.ready()) == {"low/0"})
    box.write(f"{low}\ntop: {{{SIMULATED}, memory: 40GiB, priority: 1}}", host)
    box.until("top is refused", lambda: box.replicas().get("top/0", {}).get("unplaced"))
    assert set(box.ready()) == {"low/0"}
    box.write(f"{low}\ntop: {{{SIMULATED}, memory: 40GiB, priority: 1, preemption: lower}}", host)
    box.until("top is ready", lambda: set(box.ready()) == {"top/0"})
    assert "needs 60.0GiB" in box.replicas()["low/0"]["reason"]
    box.write(low, host)
    box.until("low is back", lambda: set(box.ready()) == {"low/0"})
