"""The state folder is damaged, full, read-only, of another boot or version: nothing is lost, and it is said."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sage_reconcile.host import processes
from tests.e2e.box import Box

SIMULATED = "runtime: simulator, model: a/b-7B"
ON_CPU = f"{SIMULATED}, device: cpu"
TWO = f"chat: {{{ON_CPU}}}\ncode: {{{ON_CPU}}}"
NO_GPU = "gpus: none"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")


def events(box: Box, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in box.daemon_log().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == name]


def end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.kill()
    daemon.wait()


def two(box: Box) -> dict[str, int]:
    """Two engines under a daemon."""
    box.write(TWO, NO_GPU)
    box.start_daemon()
    return dict(box.until("both are ready", lambda: len(box.ready()) == 2 and box.ready()))


@pytest.mark.parametrize("content", [b"", b"\0" * 300, b"{", b"[1]", b"half", b"folder"])
def test_a_damaged_record_is_named_and_what_it_describes_left_alone_and_counted(box: Box, content: bytes) -> None:
    box.write(f"chat: {{{SIMULATED}, memory: 30GiB}}", "gpus: [{name: H100, memory: 80GiB, count: 1}]")
    box.start_daemon()
    old = box.until("ready", box.ready)["chat/0"]
    family = set(box.processes())
    (record,) = (box.state / "launches").glob("*.json")
    if content == b"folder":
        record.unlink()
        record.mkdir()
    else:
        record.write_bytes(record.read_bytes()[:200] if content == b"half" else content)
    box.daemons[-1].send_signal(signal.SIGHUP)
    new = box.until("one that is known runs", lambda: {k: v for k, v in box.ready().items() if v != old})
    document = box.status()
    assert any(str(record) in note and "left alone" in note for note in document["notes"])
    (gpu,) = document["gpus"]
    assert gpu["unmanaged_mib"] >= 29 * 1024
    assert {row["pid"] for row in gpu["unmanaged"]} & family, "who holds it is named"
    box.write("", "gpus: [{name: H100, memory: 80GiB, count: 1}]")
    box.until("what is known can be stopped", lambda: not box.replicas())
    assert new["chat/0"] not in box.processes()
    assert family <= set(box.processes()), "what cannot be proven was never touched"


def test_records_of_another_boot_are_history_and_everything_is_started_once(box: Box) -> None:
    before = two(box)
    end(box.daemons[-1])
    for pid in box.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    box.until("nothing runs", lambda: not box.processes())
    for path in (box.state / "launches").glob("*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "boot_id": "the boot before"}))
    box.start_daemon()
    after = box.until("both are back", lambda: len(box.ready()) == 2 and box.ready())
    assert set(after) == set(before)
    assert len(events(box, "spawn")) == 4
    assert len([record for record in box.records() if not record["ended"]]) == 2


@pytest.mark.parametrize("version", ["before", "after"])
def test_what_another_version_started_is_ours_with_full_control(box: Box, version: str) -> None:
    """The version before knew less of a launch, a later one knows more; both prove what they started."""
    before = two(box)
    box.daemons[-1].send_signal(signal.SIGTERM)
    box.daemons[-1].wait()
    later = ("members", "inner_port", "inner_count", "predecessor", "destination", "log_path", "restarts", "failures")
    for path in (box.state / "launches").glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if version == "before":
            record = {key: value for key, value in record.items() if key not in later}
            record["leader"][2] = 0
            record["spec"] = {"model": "a/b-7B", "runtime": "simulator", "device": "cpu"}
            record["spec"] |= {"served_model_name": [record["engine_name"]]}
        else:
            record |= {"version": 7, "invented_later": {"a": [1]}}
            record["spec"]["invented_later"] = True
        path.write_text(json.dumps(record))
    for name in ("generation.json", "status.json"):
        (box.state / name).unlink()
    box.start_daemon()
    box.until("the next one is at work", lambda: len(events(box, "file accepted")) == 2)
    box.until("all are adopted", lambda: box.status()["converged"])
    assert box.ready() == before
    os.kill(before["chat/0"], signal.SIGKILL)
    box.until("an end is seen", lambda: len(box.ready()) == 2 and box.ready() != before)
    box.write(f"chat: {{{ON_CPU}}}", NO_GPU)
    box.until("and it can be stopped", lambda: set(box.replicas()) == {"chat/0"})
    assert before["code/0"] not in box.processes()


def test_of_daemons_that_start_at_once_one_works_and_the_others_say_who(box: Box) -> None:
    box.write(TWO, NO_GPU)
    daemons = [box.start_daemon() for _ in range(4)]
    box.until("three have given up", lambda: sum(daemon.poll() is not None for daemon in daemons) == 3)
    (one,) = [daemon for daemon in daemons if daemon.poll() is None]
    assert {daemon.returncode for daemon in daemons if daemon is not one} == {75}
    assert box.daemon_log().count(f"in use by daemon (pid {one.pid}, following {box.file})") == 3
    box.until("both are ready", lambda: len(box.ready()) == 2)
    assert len(events(box, "spawn")) == 2


@contextmanager
def mounts(box: Box, *commands: str) -> Iterator[None]:
    """A mount namespace for the commands of a box."""
    box.state.mkdir(mode=0o700, exist_ok=True)
    script = " && ".join([*commands, "echo up", "exec sleep 600"]).format(state=box.state)
    with subprocess.Popen(["unshare", "--mount", "/bin/sh", "-c", script], stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"up\n"
        box.prefix = ["nsenter", f"--target={holder.pid}", "--mount", f"--wd={box.folder}"]

        box.state = Path(f"/proc/{holder.pid}/root{box.state}")
        try:
            yield
        finally:
            box.clean()
            holder.kill()


def test_a_state_folder_that_can_no_more_be_written_changes_nothing_until_it_can(box: Box) -> None:
    box.without("dac_override", "dac_read_search")
    before = two(box)
    folders = [box.state, *(path for path in box.state.iterdir() if path.is_dir())]
    for folder in folders:
        folder.chmod(0o500)
    os.kill(before["chat/0"], signal.SIGKILL)
    box.until("it is said", lambda: "cannot be written: Permission denied" in str(events(box, "pass failed")))
    box.write(f"{TWO}\nmore: {{{ON_CPU}}}", NO_GPU)
    assert box.ready()["code/0"] == before["code/0"], "who only looks can look"
    assert "in use by daemon" in box.run("run", expect=75)
    assert len(events(box, "spawn")) == 2, "nothing is started that could not be put on record"
    assert box.daemons[0].poll() is None
    for folder in folders:
        folder.chmod(0o700)
    box.daemons[0].send_signal(signal.SIGHUP)
    after = box.until("all is as the file says", lambda: len(box.ready()) == 3 and box.ready())
    assert after["code/0"] == before["code/0"]
    assert len(events(box, "spawn")) == 4


@needs_root
def test_in_a_read_only_state_folder_one_can_look_and_is_told_why_no_more(box: Box) -> None:
    box.write(TWO, NO_GPU)
    box.run("apply", "--yes")
    with mounts(box, "mount --bind {state} {state}", "mount -o remount,ro,bind {state}"):
        assert len(box.ready()) == 2
        box.run("diff")
        box.write(f"chat: {{{ON_CPU}}}", NO_GPU)
        for command in (["run"], ["apply", "--yes"], ["down", "--yes"]):
            text = box.run(*command, expect=1)
            assert "lock: Read-only file system; choose another with --state-dir" in text
        assert len(box.ready()) == 2


@needs_root
def test_a_full_disk_loses_nothing_and_what_was_to_be_done_is_done_when_there_is_room(box: Box) -> None:
    with mounts(box, "mount -t tmpfs -o size=400k,mode=700 none {state}"):
        before = two(box)
        filler = box.state / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        os.kill(before["chat/0"], signal.SIGKILL)
        box.until("it is said", lambda: "No space left on device" in box.daemon_log())
        box.write(f"chat: {{{ON_CPU}}}", NO_GPU)
        box.daemons[0].send_signal(signal.SIGHUP)
        box.until("it has looked again", lambda: len(events(box, "pass failed")) > 1)
        assert len(events(box, "spawn")) == 2
        assert box.daemons[0].poll() is None
        for record in (box.state / "launches").glob("*.json"):
            json.loads(record.read_text(encoding="utf-8"))
        end(box.daemons[0])
        daemon = box.start_daemon()
        box.until(
            "a new one says so too, or goes on", lambda: daemon.poll() is not None or len(events(box, "started")) == 2
        )
        filler.unlink()
        if daemon.poll() is not None:
            assert daemon.returncode == 1
            daemon = box.start_daemon()
        daemon.send_signal(signal.SIGHUP)
        box.until("all is as the file says", lambda: set(box.ready()) == {"chat/0"} == set(box.replicas()))
        assert before["code/0"] not in box.processes()


WANDERS = """
import http.server, os, subprocess, sys
os.setsid()
away = "import os, time; os.setsid(); time.sleep(600)"
def one_more():
    child = subprocess.Popen([sys.executable, "-c", away], env={})
    open(f"wanders.{os.getpid()}", "a").write(f"{child.pid} ")
one_more()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/more":
            one_more()
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_an_engine_that_goes_into_sessions_of_its_own_is_ended_whole(box: Box) -> None:
    (box.folder / "wanders.py").write_text(WANDERS, encoding="utf-8")
    box.write(f"odd: {{runtime: command, command: '{sys.executable} wanders.py {{port}}', device: cpu}}", NO_GPU)
    box.start_daemon()
    pid = box.until("ready", box.ready)["odd/0"]

    def family(pid: int) -> list[int]:
        return [pid, *map(int, (box.folder / f"wanders.{pid}").read_text(encoding="utf-8").split())]

    def recorded() -> set[int]:
        return {member[0] for record in box.records() for member in record["members"]}

    port = box.replicas()["odd/0"]["port"]
    urllib.request.urlopen(f"http://127.0.0.1:{port}/more", timeout=10).close()
    assert len(family(pid)) == 3, "one left the session before it was ready, one after"
    old = [processes.identify(one) for one in family(pid)]

    def seen() -> bool:
        box.daemons[-1].send_signal(signal.SIGHUP)
        return set(family(pid)[1:]) <= recorded()

    box.until("a later look has seen them", seen, every_s=0.5)
    try:
        os.kill(pid, signal.SIGKILL)
        new = box.until("it is back", lambda: box.ready() if box.ready() != {"odd/0": pid} else None)["odd/0"]
        assert not any(process and processes.alive(process) for process in old), "what it left was reaped before"
        old = [processes.identify(one) for one in family(new)]
        box.write("", NO_GPU)
        box.until("it is gone", lambda: not box.replicas())
        assert not any(process and processes.alive(process) for process in old)
    finally:
        for process in old:
            if process:
                processes.kill_all([process])
