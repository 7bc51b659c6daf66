"""Real processes, folders and servers for the tests of what touches the machine."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from sage_reconcile.host import processes
from sage_reconcile.host.processes import LAUNCH_VARIABLE, ProcessId
from sage_reconcile.host.records import Record

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
LAUNCH = "1a2b3c4d"


def eventually(look: Callable[[], T], what: str = "", within_s: float = 30.0) -> T:
    """Looks until what is seen is true, and gives it back."""
    ends = time.monotonic() + within_s
    while not (seen := look()):
        assert time.monotonic() < ends, f"not seen in {within_s} s: {what or look}"
        time.sleep(0.002)
    return seen


def record(launch_id: str = LAUNCH, **changed: Any) -> Record:
    """A record of this boot in which everything has a value."""
    values: dict[str, Any] = {
        "id": launch_id,
        "engine_name": "chat",
        "index": 0,
        "spec": {},
        "secret_marks": {},
        "gpus": [],
        "memory_mib": 0,
        "port": 8000,
        "bind": "127.0.0.1",
        "created_at": 1000.0,
        "boot_id": processes.boot_id(),
    }
    return Record(**{**values, **changed})


class Launched:
    """A launch started as the product starts it: ``/bin/sh`` code as the leader."""

    def __init__(self, folder: Path, code: str, launch_id: str = LAUNCH, argv: list[str] | None = None) -> None:
        self.log = folder / f"{launch_id}.log"
        self.run_file = folder / f"{launch_id}.run"
        environ = {**os.environ, LAUNCH_VARIABLE: launch_id}
        words = argv or ["/bin/sh", "-c", code]
        self.shell = processes.spawn("chat/0", words, environ, folder=folder, log=self.log, run_file=self.run_file)
        self.record = record(launch_id)

    def run(self) -> processes.Run:
        return processes.read_run(self.run_file)

    def leader(self) -> ProcessId:
        """The leader, once it has become what it is to be."""
        return eventually(lambda: self.run().leader, "the shell wrote who leads")

    def said(self, text: str) -> None:
        """Waits until the log holds this text."""
        eventually(lambda: text in self.log.read_text(), f"{text!r} in the log")

    def members(self) -> list[int]:
        return [stat.pid for stat in session_members(self.shell.pid)]

    def end(self) -> None:
        """Kills what is left of the session."""
        for _ in range(100):
            left = [*self.members(), *([self.shell.pid] if self.shell.poll() is None else [])]
            if not left:
                break
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.shell.wait()
        self.shell.wait()


@contextmanager
def launched(folder: Path, code: str, launch_id: str = LAUNCH, argv: list[str] | None = None) -> Iterator[Launched]:
    made = Launched(folder, code, launch_id, argv)
    try:
        yield made
    finally:
        made.end()


@contextmanager
def stranger(*words: str, **environ: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is not ours, in a session of its own; it has to be there, unharmed, at the end.

    Whatever it started in its session ends with it.
    """
    process = subprocess.Popen(words or ("sleep", "600"), env={**os.environ, **environ}, start_new_session=True)
    try:
        yield process
        assert process.poll() is None, "a stranger was harmed"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def zombie() -> subprocess.Popen[bytes]:
    """A child that has ended and was not waited for."""
    child = subprocess.Popen(["true"])
    eventually(lambda: (stat := processes.read_stat(child.pid)) and stat.state == "Z", "a zombie")
    return child


def shell(code: str) -> str:
    """Python code as words of a shell."""
    return f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}"


def session_members(session: int) -> list[processes.Stat]:
    """The running processes of a session, without the one that leads it."""
    return [stat for stat in processes.scan() if stat.session == session and stat.pid != session and stat.running]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
