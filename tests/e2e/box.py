"""A machine of one's own for an end-to-end test: a folder, a state folder, ports, and the real command line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
_DEADLINE_S = 60.0


class Box:
    """Commands run as a user runs them; everything they start is ended by ``clean``."""

    def __init__(self, folder: Path, ports: str) -> None:
        self.folder = folder
        self.file = folder / "engines.yaml"
        self.state = folder / "s"
        self.ports = ports
        self.environ = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SAGE_RECONCILE", "CUDA"))},
            "SAGE_RECONCILE_FILE": str(self.file),
            "SAGE_RECONCILE_STATE_DIR": str(self.state),
            "PYTHONPATH": str(REPOSITORY),
            "NO_COLOR": "1",
            "HF_HUB_OFFLINE": "1",
            "XDG_CACHE_HOME": str(folder / "cache"),  # what hubs told others is none of its business
        }
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.prefix: list[str] = []
        self._seen: set[str] = set()

    def without(self, *capabilities: str) -> None:
        """Keeps what root starts from now on from these capabilities."""
        if os.geteuid() == 0:
            self.prefix = ["setpriv", "--bounding-set", ",".join(f"-{name}" for name in capabilities), "--"]

    def write(self, engines: str, host: str = "gpus: [{name: H100-80GB, memory: 80GiB, count: 2}]") -> None:
        """Replaces the file as editors do: another file, renamed."""
        temporary = self.file.with_suffix(".new")
        inner = "\n".join(f"  {line}" for line in [f"ports: {self.ports}", *host.splitlines()])
        body = "\n".join(f"  {line}" for line in engines.splitlines()) if engines.strip() else ""
        text = f"version: 1\nhost:\n{inner}\nengines:{'' if body else ' {}'}\n{body}\n"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.file)

    def run(self, *words: str, expect: int | None = 0, stdin: str | None = None, **environ: str) -> str:
        """Runs a command to its end; returns what it printed."""
        done = subprocess.run(
            [*self.prefix, sys.executable, "-m", "sage_reconcile", *words],
            cwd=self.folder,
            env={**self.environ, **environ},
            capture_output=True,
            text=True,
            timeout=300,
            input=stdin or "",
            check=False,
        )
        text = done.stdout + done.stderr
        assert not any(line.startswith("Traceback") for line in done.stderr.splitlines()), text
        assert expect is None or done.returncode == expect, f"exit {done.returncode}, expected {expect}\n{text}"
        return text

    def json(self, *words: str, expect: int | None = 0) -> Any:
        """Runs a command with ``-o json``; returns what it printed, read."""
        text = self.run(*words, "-o", "json", expect=expect)
        return json.loads(text[text.index("{") :])

    def status(self) -> Any:
        """``status -o json``."""
        return self.json("status")

    def replicas(self) -> dict[str, Any]:
        """The replicas of the status by name."""
        return {row["name"]: row for engine in self.status()["engines"] for row in engine["replicas"]}

    def ready(self) -> dict[str, int]:
        """The pids of the replicas that are ready."""
        return {name: row["pid"] for name, row in self.replicas().items() if row["phase"] == "Ready"}

    def ready_with(self, **environ: str) -> dict[str, int]:
        """The same where the file needs variables."""
        text = self.run("status", "-o", "json", **environ)
        rows = [row for engine in json.loads(text)["engines"] for row in engine["replicas"]]
        return {row["name"]: row["pid"] for row in rows if row["phase"] == "Ready"}

    def start_daemon(self, **environ: str) -> subprocess.Popen[bytes]:
        """``run`` in the background."""
        return self.start("run", **environ)

    def start(self, *words: str, **environ: str) -> subprocess.Popen[bytes]:
        """A command in the background."""
        with (self.folder / "daemon.log").open("ab") as log:
            daemon = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "sage_reconcile", *words],
                cwd=self.folder,
                env={**self.environ, **environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.daemons.append(daemon)
        return daemon

    def daemon_log(self) -> str:
        """What daemons logged."""
        return (self.folder / "daemon.log").read_text(encoding="utf-8")

    def records(self) -> list[dict[str, Any]]:
        """The records as they are on disk."""
        rows = []
        for path in (self.state / "launches").glob("[!.]*.json"):
            with contextlib.suppress(FileNotFoundError):
                rows.append(json.loads(path.read_text(encoding="utf-8")))
        return rows

    def processes(self) -> dict[int, str]:
        """Every running process that any launch of this box started, by its mark; pid -> command."""
        found: dict[int, str] = {}
        launches = {path.stem for path in (self.state / "launches").glob("[!.]*.json")}
        self._seen |= launches
        marks = {f"SAGE_RECONCILE_LAUNCH={launch}".encode() for launch in self._seen}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            with contextlib.suppress(OSError):
                environment = (entry / "environ").read_bytes().split(b"\0")
                state = (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
                if state not in "ZX" and marks & set(environment):
                    found[int(entry.name)] = (entry / "comm").read_text(encoding="utf-8").strip()
        return found

    def until(
        self, what: str, holds: Callable[[], Any], deadline_s: float = _DEADLINE_S, *, every_s: float = 0.05
    ) -> Any:
        """Waits until something holds; fails with the state of the box where it never does."""
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            answer = holds()
            if answer:
                return answer
            time.sleep(every_s)
        log = self.daemon_log() if self.daemons else ""
        raise AssertionError(f"never: {what}\n{self.run('status', expect=None)}\n{log}")

    def clean(self) -> None:
        """Ends daemons by pid, then everything marked as started from here."""
        for daemon in self.daemons:
            if daemon.poll() is None:
                daemon.kill()
            daemon.wait()
        for _ in range(50):
            left = self.processes()
            if not left:
                return
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


def free_ports(count: int = 40) -> str:
    """A range of ports nobody listens on, apart for each test worker."""
    worker = int((os.environ.get("PYTEST_XDIST_WORKER") or "gw0")[2:])
    base = 20000 + worker * 3000 + (os.getpid() % 20) * 100
    for low in range(base, base + 2900, count):
        if all(_is_free(port) for port in range(low, low + count)):
            return f"{low}-{low + count - 1}"
    raise AssertionError("no range of free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def box(folder: Path) -> Iterator[Box]:
    """A box for one test."""
    made = Box(folder, free_ports())
    try:
        yield made
    finally:
        made.clean()
