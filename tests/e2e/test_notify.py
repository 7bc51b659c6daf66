"""What the daemon tells the service manager that started it: ready, reloading, alive, stopping."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.box import Box

SIMULATED = "runtime: simulator, model: a/b-7B, device: cpu"
ONE = f"chat: {{{SIMULATED}}}"
TWO = f"{ONE}\ncode: {{{SIMULATED}}}"
HOST = "gpus: none"
WATCHDOG_USEC = "1500000"


class Manager:
    """A service manager's end of the socket."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self._socket.setblocking(False)
        self.address = address
        self.told: list[dict[str, str]] = []

    def words(self, name: str) -> list[str]:
        """All values of one variable so far, in order."""
        with contextlib.suppress(BlockingIOError):
            while True:
                text = self._socket.recv(65536).decode()
                self.told.append(dict(line.split("=", 1) for line in text.splitlines()))
        return [told[name] for told in self.told if name in told]

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(name="manager", params=["path", "abstract"])
def _manager(request: pytest.FixtureRequest, box: Box) -> Iterator[Manager]:
    path = str(box.folder / "notify")
    manager = Manager(path if request.param == "path" else f"@{path}")
    with contextlib.closing(manager):
        yield manager


@pytest.fixture(name="one_manager")
def _one_manager(box: Box) -> Iterator[Manager]:
    with contextlib.closing(Manager(f"@{box.folder}/notify")) as manager:
        yield manager


def test_ready_comes_with_the_first_pass_and_stopping_with_the_end(box: Box, manager: Manager) -> None:
    box.write(ONE, HOST)
    daemon = box.start_daemon(NOTIFY_SOCKET=manager.address)
    box.until("ready", lambda: manager.words("READY"))
    assert box.records(), "the first pass had started what is wanted"
    assert manager.told[0]["STATUS"].startswith("0 of 1 replicas ready")
    box.until("counts", lambda: "1 of 1 replicas ready; generation 1" in manager.words("STATUS"))
    assert not manager.words("WATCHDOG"), "nobody watches"
    assert not manager.words("STOPPING")
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(20) == 0
    assert manager.words("STOPPING") == ["1"]
    assert manager.words("READY") == ["1"]


def test_no_engine_is_told_of_the_manager(box: Box, one_manager: Manager) -> None:
    box.write(ONE, HOST)
    own = {"WATCHDOG_USEC": WATCHDOG_USEC, "INVOCATION_ID": "0" * 32, "JOURNAL_STREAM": "8:1"}
    box.start_daemon(NOTIFY_SOCKET=one_manager.address, **own)
    pid = box.until("ready", box.ready)["chat/0"]
    environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    names = {entry.partition(b"=")[0].decode() for entry in environ}
    assert not names & {"NOTIFY_SOCKET", *own}
    assert "HF_HUB_OFFLINE" in names


def test_an_idle_daemon_feeds_its_watchdog_and_writes_no_line(box: Box, one_manager: Manager) -> None:
    box.write(TWO, HOST)
    box.start_daemon(NOTIFY_SOCKET=one_manager.address, WATCHDOG_USEC=WATCHDOG_USEC)
    box.until("both are ready", lambda: any(s.startswith("2 of 2") for s in one_manager.words("STATUS")))
    lines, fed, statuses = box.daemon_log(), len(one_manager.words("WATCHDOG")), len(one_manager.words("STATUS"))
    box.until("six passes", lambda: len(one_manager.words("WATCHDOG")) >= fed + 6)
    assert box.daemon_log() == lines
    assert len(one_manager.words("STATUS")) == statuses


def test_a_watchdog_of_another_process_is_not_fed(box: Box, one_manager: Manager) -> None:
    box.write(ONE, HOST)
    box.start_daemon(NOTIFY_SOCKET=one_manager.address, WATCHDOG_USEC=WATCHDOG_USEC, WATCHDOG_PID="1")
    box.until("ready", lambda: "1 of 1 replicas ready; generation 1" in one_manager.words("STATUS"))
    assert not one_manager.words("WATCHDOG")


def test_a_pass_that_hangs_is_not_fed(box: Box, one_manager: Manager) -> None:
    """Its process and threads are alive; but a read in the pass never ends."""
    box.write(ONE, HOST)
    daemon = box.start_daemon(NOTIFY_SOCKET=one_manager.address, WATCHDOG_USEC=WATCHDOG_USEC)
    box.until("ready", lambda: "1 of 1 replicas ready; generation 1" in one_manager.words("STATUS"))
    engines = set(box.processes())
    os.mkfifo(box.state / "endless")
    (box.state / "endless").rename(box.state / "generation.json")
    box.write(TWO, HOST)
    box.until("it reads what never ends", lambda: "wait_for_partner" in waits_in(daemon.pid))
    fed = len(one_manager.words("WATCHDOG"))
    time.sleep(2 * int(WATCHDOG_USEC) / 1e6)  # an idle daemon feeds it six times in that
    assert len(one_manager.words("WATCHDOG")) == fed
    daemon.send_signal(signal.SIGABRT)
    assert daemon.wait(20) == -signal.SIGABRT
    assert "in read_json" in box.daemon_log(), "the log shows where it hung"
    assert engines <= set(box.processes())


def waits_in(pid: int) -> str:
    return Path(f"/proc/{pid}/wchan").read_text(encoding="ascii")


def test_reload_is_over_when_the_pass_is(box: Box, one_manager: Manager) -> None:
    box.write(ONE, HOST)
    box.start_daemon(NOTIFY_SOCKET=one_manager.address)
    box.until("ready", box.ready)
    begun = one_manager.words("READY")
    box.write(TWO, HOST)
    text = box.run("reload", "--wait")
    told = json.loads((box.state / "status.json").read_text(encoding="utf-8"))
    assert "of 2 replicas ready" in text
    assert "generation 2" in text
    assert len(box.records()) == 2, "what is new is on record by then"
    assert [engine["name"] for engine in told["engines"]] == ["chat", "code"]
    assert len(one_manager.words("READY")) == len(begun) + 1
    reloading = [n for n, told in enumerate(one_manager.told) if "RELOADING" in told]
    ready = [n for n, told in enumerate(one_manager.told) if "READY" in told]
    assert len(reloading) == 1
    assert ready[0] < reloading[0] < ready[1]
    assert int(one_manager.told[reloading[0]]["MONOTONIC_USEC"]) > 0


def test_reload_tells_of_a_file_that_is_refused_or_held_back(box: Box) -> None:
    box.write("\n".join(f"{name}: {{{SIMULATED}}}" for name in ("a", "b", "c")), HOST)
    box.start_daemon()
    box.until("ready", lambda: len(box.ready()) == 3)
    good = box.file.read_text(encoding="utf-8")
    box.write(f"a: {{{SIMULATED}, replicas: many}}", HOST)
    text = box.run("reload", "--wait", expect=1)
    assert "expected a whole number" in text
    assert "What was in force before stays." in text
    box.write("", HOST)
    text = box.run("reload", "--wait", expect=1)
    assert "held back" in text
    assert "sage-reconcile apply" in text
    box.file.write_text(good, encoding="utf-8")
    box.run("reload", "--wait")
    assert len(box.ready()) == 3
    assert "was told" in box.run("reload")


def test_reload_without_a_daemon_says_so(box: Box) -> None:
    box.write(ONE, HOST)
    assert "no daemon works with" in box.run("reload", "--wait", expect=1)


def test_reload_tells_of_a_pass_that_failed(box: Box) -> None:
    """The status cannot be written either, until the folder is whole again: then it comes."""
    box.write(ONE, HOST)
    box.start_daemon()
    box.until("ready", box.ready)
    (box.state / "launches").rename(box.state / "away")
    (box.state / "launches").write_text("", encoding="utf-8")
    try:
        assert "the pass failed: " in box.run("reload", "--wait", expect=1)
    finally:
        (box.state / "launches").unlink()
        (box.state / "away").rename(box.state / "launches")


def test_every_line_about_a_replica_names_its_engine(box: Box) -> None:
    box.write(ONE, HOST)
    box.start_daemon()
    box.until("ready", box.ready)
    lines: list[dict[str, Any]] = [json.loads(line) for line in box.daemon_log().splitlines()]
    about = [line for line in lines if "replica" in line]
    assert {line["event"] for line in about} == {"spawn", "ready"}
    assert {line["engine"] for line in about} == {"chat"}


def test_the_journal_is_told_the_level_of_each_line(box: Box) -> None:
    box.write(f"chat: {{{SIMULATED}, replicas: many}}", HOST)
    (box.folder / "daemon.log").touch()
    log = (box.folder / "daemon.log").stat()
    daemon = box.start_daemon(JOURNAL_STREAM=f"{log.st_dev}:{log.st_ino}")
    box.until("it is refused", lambda: "file refused" in box.daemon_log())
    lines = [line.split(">", 1) for line in box.daemon_log().splitlines()]
    levels = {json.loads(text)["event"]: level for level, text in lines}
    assert levels["started"] == "<6"
    assert levels["file refused"] == "<3"
    daemon.kill()
