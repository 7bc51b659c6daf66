"""Updates with real processes: one replica at a time, and back to what worked where the new revision does not."""

from __future__ import annotations

from itertools import pairwise

from tests.e2e.box import Box

ONE = "gpus: [{name: H100-80GB, memory: 80GiB}]"
ENTRY = "runtime: simulator, model: a/b-7B, memory: 20GiB"
THREE = f"chat: {{{ENTRY}, replicas: 3"
BAD = "args: {simulate-fail: exit}"


def test_three_replicas_are_replaced_one_after_another_and_all_serve_meanwhile(box: Box) -> None:
    box.write(f"{THREE}}}", ONE)
    box.start_daemon()
    box.until("three are ready", lambda: len(box.ready()) == 3)
    old = {row["id"]: row for row in box.records()}
    box.write(f"{THREE}, args: {{seed: 7}}}}", ONE)

    def replaced() -> bool:
        rows = box.replicas()
        assert len([row for row in rows.values() if row["phase"] == "Ready"]) == 3
        return not box.json("diff", expect=None)["actions"] and not {row["launch"] for row in rows.values()} & set(old)

    box.until("all are of the new revision", replaced)
    new = sorted((row for row in box.records() if row["id"] not in old), key=lambda row: row["created_at"])
    assert [row["index"] for row in new] == [0, 1, 2]
    assert all(row["predecessor"] in old for row in new)
    for before, after in pairwise(new):
        assert before["ready_at"] <= after["created_at"]


def test_a_full_box_stops_first_and_a_bad_revision_goes_back_while_others_keep_their_pid(box: Box) -> None:
    full = "runtime: simulator, model: a/b-7B, memory: 40GiB"
    chat, other = f"chat: {{{full}", f"other: {{{full}}}"
    box.write(f"{chat}}}\n{other}", ONE)
    box.start_daemon()
    box.until("both are ready", lambda: len(box.ready()) == 2)
    before = box.ready()
    box.write(f"{chat}, args: {{seed: 7}}}}\n{other}", ONE)
    box.until("the good one is ready", lambda: box.ready().get("chat/0", before["chat/0"]) != before["chat/0"])
    good = box.ready()
    box.write(f"{chat}, {BAD}}}\n{other}", ONE)
    shown = box.until(
        "rolled back",
        lambda: "was rolled back to the one before" in (text := box.run("diff", expect=None)) and text,
    )
    assert "edit its entry, or `apply` tries it again" in shown
    box.until("the one before serves again", lambda: len(box.ready()) == 2)
    after = box.ready()
    assert after["other/0"] == before["other/0"]
    assert after["chat/0"] != good["chat/0"]
    running = next(row for row in box.records() if row["leader"] and row["leader"][0] == after["chat/0"])
    assert running["spec"]["args"] == {"seed": 7}
    assert any("was rolled back" in note for note in box.status()["notes"])
    assert not box.status()["converged"]
    box.write(f"{chat}, args: {{seed: 8}}}}\n{other}", ONE)
    box.until("an edit is tried", lambda: box.status()["converged"])
    assert box.ready()["other/0"] == before["other/0"]
    assert "rolled back" not in box.run("diff")


def test_a_bad_revision_takes_no_replica_down_where_there_is_room_and_apply_tries_it_again(box: Box) -> None:
    box.write(f"{THREE}}}", ONE)
    box.run("apply", "--yes")
    before = box.ready()
    assert len(before) == 3
    box.write(f"{THREE}, {BAD}}}", ONE)
    told = box.run("apply", "--yes", expect=1)
    assert "was rolled back to the one before" in told
    assert box.ready() == before
    failed = [row["id"] for row in box.records() if row["ended"]]
    assert len(failed) == 1
    assert "1. stop" not in box.run("diff", expect=2)
    box.run("apply", "--yes", expect=1)
    again = [row["id"] for row in box.records() if row["ended"]]
    assert len(again) == 1
    assert again != failed
    assert box.ready() == before
