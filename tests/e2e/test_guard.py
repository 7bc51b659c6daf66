"""A file that stops more than half of what runs is held back by the daemon until a person confirms it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from sage_reconcile.host import documents
from tests.e2e.box import REPOSITORY, Box

SIMULATED = "runtime: simulator, model: a/b-7B, device: cpu"
FOUR = "\n".join(f"{name}: {{{SIMULATED}}}" for name in ("chat", "code", "embed", "rank"))
ALL = {"chat/0", "code/0", "embed/0", "rank/0"}
HOST = "gpus: none"


def events(box: Box, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in box.daemon_log().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == name]


def four(box: Box) -> dict[str, int]:
    """Four engines under a daemon."""
    box.write(FOUR, HOST)
    box.start_daemon()
    box.until("all are ready", lambda: set(box.ready()) == ALL)
    return box.ready()


def held(box: Box) -> Any:
    return box.status()["held_back"]


def test_an_emptied_file_is_held_back_shown_and_goes_on_when_confirmed(box: Box) -> None:
    before = four(box)
    box.write("", HOST)
    box.until("it is held back", lambda: events(box, "file held back"))
    document = box.status()
    schema = json.loads((REPOSITORY / "schemas/status.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(document, schema, cls=jsonschema.Draft202012Validator)
    told = document["held_back"]
    assert (set(told["replicas"]), told["running"], told["guard"]) == (ALL, 4, "50%")
    assert (document["generation"], document["observed_generation"], document["converged"]) == (2, 1, False)
    text = box.run("status")
    assert "is held back: it would stop 4 of the 4 running replicas (chat/0, code/0, embed/0, rank/0)" in text
    assert "sage-reconcile apply" in text
    os.kill(before["code/0"], signal.SIGKILL)
    box.until("what was in force heals", lambda: set(box.ready()) == ALL and box.ready() != before)
    assert box.ready()["chat/0"] == before["chat/0"]
    assert "the daemon holds this back" in box.run("diff", expect=2)
    assert "say --yes" in box.run("apply", expect=1)
    assert set(box.ready()) == ALL
    box.run("apply", "--yes")
    assert box.replicas() == {}
    assert not box.processes()
    assert box.status()["held_back"] is None
    assert len(events(box, "file held back")) == 1, "it is told once"


def test_a_restart_forgets_neither_what_is_held_back_nor_what_was_confirmed(box: Box) -> None:
    four(box)
    box.write(f"chat: {{{SIMULATED}}}", HOST)
    box.until("it is held back", lambda: held(box))
    box.daemons[-1].kill()
    box.daemons[-1].wait()
    assert held(box), "also while no daemon runs"
    for pid in box.processes():
        os.kill(pid, signal.SIGKILL)  # as at a reboot: nothing runs any more that would be stopped
    box.until("all are gone", lambda: not box.processes())
    daemon = box.start_daemon()
    box.until("what was in force before is started again", lambda: set(box.ready()) == ALL)
    assert held(box)
    box.run("apply", "--yes")
    assert set(box.ready()) == {"chat/0"}
    daemon.kill()
    daemon.wait()
    box.start_daemon()
    box.until("the next one is at work", lambda: len(events(box, "file accepted")) >= 3)
    assert held(box) is None
    assert set(box.ready()) == {"chat/0"}


def test_a_daemon_that_is_killed_while_it_does_what_was_confirmed_goes_on_with_it(box: Box) -> None:
    """The confirmation is on disk before the first stop."""
    stubborn = "\n".join(f"{name}: {{{SIMULATED}, replicas: 2, stop_timeout: 60s}}" for name in ("chat", "code"))
    box.write(stubborn, HOST)
    daemon = box.start_daemon()
    box.until("all are ready", lambda: len(box.ready()) == 4)
    box.write("", HOST)
    box.until("it is held back", lambda: held(box))
    pids = [row["pid"] for row in box.replicas().values()]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # so that none ends at once
    asking = box.start("apply", "--yes")
    box.until("one is told to stop", lambda: events(box, "stop"))
    daemon.kill()
    daemon.wait()
    asking.wait()
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    box.start_daemon()
    box.until("all are gone", lambda: not box.replicas())
    assert held(box) is None


def test_what_is_held_back_ends_when_the_file_is_mended(box: Box) -> None:
    before = four(box)
    box.write("", HOST)
    box.until("it is held back", lambda: held(box))
    box.write(FOUR, HOST)
    box.until("it is as before", lambda: held(box) is None and box.status()["converged"])
    assert box.ready() == before
    box.write("", HOST)
    box.until("it is held back again", lambda: held(box))


@pytest.mark.parametrize(("guard", "left"), [("off", 0), ("75%", 1), ("3", 1)])
def test_the_file_says_what_is_normal_here(box: Box, guard: str, left: int) -> None:
    four(box)
    box.write("", HOST)
    box.until("it is held back", lambda: held(box))
    names = sorted(ALL)[:left]
    box.write("\n".join(f"{name[:-2]}: {{{SIMULATED}}}" for name in names), f"{HOST}\nguard: {guard}")
    box.until("what is left runs", lambda: set(box.replicas()) == set(names))
    assert held(box) is None


def test_what_is_replaced_comes_back_and_is_not_held_back(box: Box) -> None:
    before = four(box)
    box.write(FOUR.replace("}", ", args: {max-model-len: 512}}"), HOST)
    box.until(
        "all are replaced", lambda: set(box.ready()) == ALL and not set(box.ready().values()) & set(before.values())
    )
    assert not events(box, "file held back")


def test_half_may_go_and_the_last_one_too(box: Box) -> None:
    four(box)
    for names in (["chat", "code"], ["chat"], []):
        box.write("\n".join(f"{name}: {{{SIMULATED}}}" for name in names), HOST)
        box.until("they are gone", lambda names=names: set(box.replicas()) == {f"{name}/0" for name in names})
    assert not events(box, "file held back")


def test_a_first_file_for_engines_that_another_file_started_is_held_back_too(box: Box) -> None:
    box.write(FOUR, HOST)
    box.run("apply", "--yes")
    before = box.ready()
    other = box.folder / "other.yaml"
    other.write_text("version: 1\nengines: {}\n", encoding="utf-8")
    box.environ["SAGE_RECONCILE_FILE"] = str(other)
    box.start_daemon()
    box.until("it is held back", lambda: events(box, "file held back"))
    assert set(box.processes()) >= set(before.values())
    box.run("apply", "--yes")
    assert not box.processes()


def _deleted(file: Path) -> None:
    file.unlink()


def _emptied(file: Path) -> None:
    file.write_text("", encoding="utf-8")


def _blank(file: Path) -> None:
    file.write_bytes(b"\0" * file.stat().st_size)  # what a crash of the machine leaves of a file that grew


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere.yaml")


def _circle(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("damage", [_deleted, _emptied, _blank, _folder, _dangling, _circle, _pipe])
def test_a_file_that_is_no_file_any_more_stops_nothing_and_is_named(box: Box, damage: Any) -> None:
    before = four(box)
    damage(box.file)
    box.until("it is refused", lambda: events(box, "file refused"))
    document = box.status()
    assert str(box.file) in document["file_error"]
    assert box.ready() == before
    os.kill(before["chat/0"], signal.SIGKILL)
    box.until("the last good content stays in force", lambda: set(box.ready()) == ALL)
    box.daemons[-1].kill()
    box.daemons[-1].wait()
    box.start_daemon()
    box.until("also over a restart", lambda: len(events(box, "started")) == 2 and len(events(box, "file refused")) == 2)
    assert set(box.ready()) == ALL
    if box.file.is_dir():
        box.file.rmdir()
    box.write(f"{FOUR}\nlast: {{{SIMULATED}}}", HOST)
    box.until("mended", lambda: set(box.ready()) == ALL | {"last/0"})


def test_a_file_that_may_not_be_read_any_more_stops_nothing(box: Box) -> None:
    """Permissions do not count for root; so without that privilege."""
    box.without("dac_override", "dac_read_search")
    four(box)
    box.file.chmod(0o000)
    os.kill(box.daemons[-1].pid, signal.SIGHUP)
    box.until("it is refused", lambda: events(box, "file refused"))
    assert "may not read it" in str(events(box, "file refused")[0]["faults"])
    assert len(box.processes()) > 0
    pids = {record["leader"][0] for record in box.records() if not record["ended"]}
    assert len(pids) == 4
    os.kill(min(pids), signal.SIGKILL)
    box.until("the last good content stays in force", lambda: len(events(box, "spawn")) == 5)
    box.file.chmod(0o644)
    os.kill(box.daemons[-1].pid, signal.SIGHUP)
    box.until("mended", lambda: len(events(box, "file accepted")) >= 2)


def test_a_file_written_byte_by_byte_ends_where_it_should_and_loses_nothing_on_the_way(box: Box) -> None:
    """Every half of it is read by the daemon, told to look."""
    before = four(box)
    text = box.file.read_text(encoding="utf-8") + f"  last: {{{SIMULATED}}}\n"
    for cut in range(0, len(text), max(1, len(text) // 40)):
        box.file.write_text(text[:cut], encoding="utf-8")
        os.kill(box.daemons[-1].pid, signal.SIGHUP)
        asked = json.loads((box.state / "status.json").read_text(encoding="utf-8"))["asked"]
        box.until(
            "it has looked", lambda asked=asked: json.loads((box.state / "status.json").read_text())["asked"] > asked
        )
    box.file.write_text(text, encoding="utf-8")
    digest = documents.read(box.file).digest
    box.until(
        "the whole is in force",
        lambda: json.loads((box.state / "generation.json").read_text(encoding="utf-8"))["digest"] == digest,
    )
    box.until("all run", lambda: set(box.ready()) == ALL | {"last/0"})
    survivors = {name for name, pid in before.items() if box.ready()[name] == pid}
    assert len(survivors) >= 2, "never were more than half of them stopped"
