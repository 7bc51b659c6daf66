"""The daemon with real processes: it follows the file, heals what dies, ends without ending engines, adopts."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from tests.e2e.box import Box

SIMULATED = "runtime: simulator, model: a/b-7B, memory: 20GiB"
ONE = f"chat: {{{SIMULATED}}}"
TWO = f"{ONE}\ncode: {{{SIMULATED}}}"


def events(box: Box, name: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in box.daemon_log().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == name]


def test_saves_of_every_kind_are_followed(box: Box) -> None:
    """In place, by rename, and by the symlink swap of a ConfigMap."""
    box.write(ONE)
    text = {1: box.file.read_text(encoding="utf-8")}
    box.write(TWO)
    text[2] = box.file.read_text(encoding="utf-8")
    box.file.write_text(text[1], encoding="utf-8")
    box.start_daemon()
    box.until("the first engine is ready", lambda: set(box.ready()) == {"chat/0"})
    box.file.write_text(text[2], encoding="utf-8")
    box.until("in place", lambda: set(box.ready()) == {"chat/0", "code/0"})
    box.write(ONE)
    box.until("rename", lambda: set(box.replicas()) == {"chat/0"})
    for number, content in ((1, text[1]), (2, text[2])):
        (box.folder / f"..data{number}").mkdir()
        (box.folder / f"..data{number}/engines.yaml").write_text(content, encoding="utf-8")
    link, new = box.folder / "..data", box.folder / "..new"
    link.symlink_to("..data1")
    (box.folder / "link").symlink_to("..data/engines.yaml")
    (box.folder / "link").rename(box.file)
    box.until("still one", lambda: set(box.ready()) == {"chat/0"})
    new.symlink_to("..data2")
    new.rename(link)
    box.until("symlink swap", lambda: set(box.ready()) == {"chat/0", "code/0"}, 15)


def test_a_burst_of_saves_is_one_pass(box: Box) -> None:
    box.write("")
    box.start_daemon()
    box.until("the daemon is up", lambda: events(box, "file accepted"))
    for count in range(20):
        box.write(f"{ONE}\nextra-{count}: {{{SIMULATED}, replicas: 0}}")
    box.write(TWO)
    box.until("both are ready", lambda: set(box.ready()) == {"chat/0", "code/0"})
    assert len(events(box, "file accepted")) <= 4
    assert len(events(box, "spawn")) == 2


def test_an_invalid_file_changes_nothing_and_is_reported_until_mended(box: Box) -> None:
    box.write(ONE)
    box.start_daemon()
    before = box.until("ready", box.ready)
    box.write(f"chat: {{{SIMULATED}, replicas: many}}")
    box.until("the daemon refuses it", lambda: events(box, "file refused"))
    text = box.run("status")
    assert "expected a whole number, got the text 'many'" in text
    assert box.ready() == before
    assert box.status()["file_error"]
    os.kill(before["chat/0"], signal.SIGKILL)
    box.until("the last good file stays in force", lambda: box.ready() and box.ready() != before)
    box.write(TWO)
    box.until("mended", lambda: set(box.ready()) == {"chat/0", "code/0"})
    assert not box.status()["file_error"]


def test_a_deleted_file_stops_nothing(box: Box) -> None:
    box.write(ONE)
    box.start_daemon()
    before = box.until("ready", box.ready)
    box.file.unlink()
    box.until("it is reported", lambda: events(box, "file refused"))
    assert box.ready() == before


def test_an_engine_that_dies_is_started_again_without_leftovers(box: Box) -> None:
    box.write(f"chat: {{{SIMULATED}, tensor_parallel_size: 2}}")
    box.start_daemon()
    pid = box.until("ready", box.ready)["chat/0"]
    old = set(box.processes())
    os.kill(pid, signal.SIGKILL)
    new = box.until("healed", lambda: box.ready() if box.ready() != {"chat/0": pid} else None)
    assert new["chat/0"] != pid
    assert not old & set(box.processes())
    assert box.replicas()["chat/0"]["restarts"] == 1


def test_a_crash_loop_does_not_spin(box: Box) -> None:
    box.write(f"bad: {{{SIMULATED}, args: {{simulate-fail: oom}}}}")
    box.start_daemon()
    box.until("it failed", lambda: events(box, "spawn") and box.replicas()["bad/0"]["phase"] == "BackOff")
    time.sleep(3)
    assert len(events(box, "spawn")) == 1
    assert box.replicas()["bad/0"]["next_try_at"] > time.time()
    box.write(f"bad: {{{SIMULATED}}}")
    box.until("an edit ends the back-off", lambda: set(box.ready()) == {"bad/0"})


def test_the_end_of_the_daemon_is_not_the_end_of_engines_and_the_next_adopts_them(box: Box) -> None:
    box.write(TWO)
    daemon = box.start_daemon()
    before = box.until("ready", lambda: len(box.ready()) == 2 and box.ready())
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(20) == 0
    assert box.ready() == before
    os.kill(before["code/0"], signal.SIGKILL)
    box.start_daemon()
    after = box.until("code is back", lambda: len(box.ready()) == 2 and box.ready())
    assert after["chat/0"] == before["chat/0"]
    assert after["code/0"] != before["code/0"]
    spawn = next(event for event in events(box, "spawn")[2:] if event["replica"] == "code/0")
    assert spawn["cause"] == "it failed (killed by signal 9)", "its exit is known though nobody was there"
    box.write(ONE)
    box.until("an adopted engine can be stopped", lambda: set(box.replicas()) == {"chat/0"})


def test_a_killed_daemon_loses_nothing(box: Box) -> None:
    box.write(TWO)
    daemon = box.start_daemon()
    before = box.until("ready", lambda: len(box.ready()) == 2 and box.ready())
    daemon.kill()
    daemon.wait()
    box.start_daemon()
    box.until("the new one is at work", lambda: len(events(box, "file accepted")) == 2)
    assert box.ready() == before


def test_a_second_daemon_says_who_holds_the_lock(box: Box) -> None:
    box.write(ONE)
    daemon = box.start_daemon()
    box.until("ready", box.ready)
    text = box.run("run", expect=75)
    assert f"daemon (pid {daemon.pid}, following {box.file})" in text
    other = box.folder / "other.yaml"
    other.write_text("version: 1\nengines: {}\n", encoding="utf-8")
    assert "in use by daemon" in box.run("apply", "--yes", "-f", str(other), expect=75)
    assert "would start them again" in box.run("down", "--yes", expect=75)


def test_apply_has_the_daemon_do_the_work_and_follows_it(box: Box) -> None:
    box.write(ONE)
    daemon = box.start_daemon()
    box.until("ready", box.ready)
    box.write(TWO)
    text = box.run("apply", "--yes")
    assert f"The daemon (pid {daemon.pid}) does it" in text
    assert set(box.ready()) == {"chat/0", "code/0"}
    box.write(f"{TWO}\nbad: {{{SIMULATED}, args: {{simulate-fail: load}}}}")
    text = box.run("apply", "--yes", expect=1)
    assert "bad/0 is Stalled" in text
    assert "Engine core initialization failed" in text


def test_generation_tells_whether_an_edit_was_taken_up(box: Box) -> None:
    box.write(ONE)
    box.run("apply", "--yes")
    first = box.status()
    assert first["generation"] == first["observed_generation"] == 1
    box.write(TWO)
    edited = box.status()
    assert (edited["generation"], edited["observed_generation"], edited["converged"]) == (2, 1, False)
    box.run("apply", "--yes")
    assert box.status()["observed_generation"] == 2


def test_state_is_for_its_owner_only(box: Box) -> None:
    box.write(ONE)
    box.run("apply", "--yes")
    for path in [box.state, *box.state.rglob("*")]:
        if path.is_dir() or path.is_file():
            assert not Path(path).stat().st_mode & 0o077 or "simulated-gpus/" in str(path), path


def test_apply_does_not_claim_a_plan_that_the_daemon_does_not_have(box: Box) -> None:
    """The daemon was started with another value of a variable; status works without it too."""
    box.write(f"chat: {{{SIMULATED}, env: {{TOKEN: '${{TOKEN}}'}}}}")
    box.start_daemon(TOKEN="one")
    before = box.until("ready, also to one who has not the variable", box.ready)
    assert "the daemon sees other values" in box.run("apply", "--yes", expect=1, TOKEN="two")
    box.run("apply", "--yes", TOKEN="one")
    assert box.ready() == before
    assert box.status()["gpus"]


def test_links_on_the_way_to_the_file_are_followed(box: Box) -> None:
    """`current -> release-1`, and the file is `current/engines.yaml`."""
    for number, engines in ((1, ONE), (2, TWO)):
        box.write(engines)
        (box.folder / f"release-{number}").mkdir()
        box.file.rename(box.folder / f"release-{number}/engines.yaml")
    (box.folder / "current").symlink_to("release-1")
    box.file = box.folder / "current/engines.yaml"
    box.environ["SAGE_RECONCILE_FILE"] = str(box.file)
    box.start_daemon()
    box.until("one", lambda: set(box.ready()) == {"chat/0"})
    (box.folder / "next").symlink_to("release-2")
    (box.folder / "next").rename(box.folder / "current")
    box.until("two, before the slow resync", lambda: set(box.ready()) == {"chat/0", "code/0"}, 20)


def test_what_was_agreed_with_a_daemon_that_is_no_more_is_no_leave_for_the_next(box: Box) -> None:
    box.write(ONE)
    box.run("apply", "--yes")
    word = box.state / "agreed.json"
    word.write_text('{"digest": "of a plan that was shown long ago"}')
    box.start_daemon()
    box.until("the daemon is up", lambda: events(box, "file accepted"))
    assert not word.exists()
