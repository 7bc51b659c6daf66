"""Simulated engines as real processes: starting them, looking at them, and leaving none behind."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from sage_reconcile.simulator import gpus

ROOT = Path(__file__).parents[2]
DEADLINE_S = 30.0
A, B = "GPU-aaaa", "GPU-bbbb"
TOTAL_MIB = 81_559
CHAT = {"model": "m", "messages": [{"role": "user", "content": "one two three"}]}
T = TypeVar("T")
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
# Below the range from which the kernel takes ports for outgoing connections, and each test worker its own.
_ports = itertools.count(20_000 + _worker % 20 * 500 + os.getpid() % 250)


def eventually(look: Callable[[], T], what: str = "", within_s: float = DEADLINE_S) -> T:
    """Look until what is seen is true, and give it back."""
    ends = time.monotonic() + within_s
    while not (seen := look()):
        assert time.monotonic() < ends, f"not seen in {within_s} s: {what or look}"
        time.sleep(0.005)
    return seen


def free_port() -> int:
    for port in _ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError


def stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text[text.rindex(")") + 2 :].split()


def session(leader: int) -> dict[int, str]:
    """The living processes of a session, by pid, with their short names."""
    found = {}
    for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()):
        fields = stat(pid)
        if fields and fields[3] == str(leader) and fields[0] not in "ZX":
            try:
                found[pid] = Path(f"/proc/{pid}/comm").read_text().strip()
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


class Simulated:
    """One simulated engine."""

    def __init__(self, log: Path, arguments: list[str], environ: dict[str, str], port: int) -> None:
        self.port = port
        self.log = log
        command = [sys.executable, "-m", "sage_reconcile.simulator", "--host", "127.0.0.1", "--port", str(port)]
        clean = {key: value for key, value in os.environ.items() if key not in ("SPT_NOENV", "VLLM_API_KEY")}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, *arguments],
                cwd=ROOT,
                env=clean | {"MARKER": "seen", "PYTHONPATH": str(ROOT)} | environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self.process.pid

    def text(self) -> str:
        return self.log.read_text()

    def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
        return self.ask("GET", path, None, headers or {})

    def post(self, path: str, body: object, headers: dict[str, str] | None = None) -> tuple[int, str]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, data, headers or {})

    def ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def health(self) -> int:
        """The status of /health; 0 while nobody listens."""
        try:
            return self.get("/health")[0]
        except ConnectionError:
            return 0

    def metric(self, name: str) -> float:
        lines = [line for line in self.get("/metrics")[1].splitlines() if line.startswith(f"vllm:{name}{{")]
        return float(lines[0].rpartition(" ")[2])

    def ready(self) -> Simulated:
        def look() -> bool:
            assert self.process.poll() is None, self.text()
            return self.health() == 200

        eventually(look, "ready")
        return self

    def named(self, beginning: str) -> list[int]:
        """The processes of the session with such a short name."""
        return [pid for pid, comm in session(self.pid).items() if comm.startswith(beginning)]

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def ended(self) -> int:
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        """Kill what is left of the session, and see that nothing is."""

        def gone() -> bool:
            for pid in session(self.pid):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            return not session(self.pid)

        eventually(gone, "the session is empty")
        self.process.wait(DEADLINE_S)


class Fleet:
    """Starts simulated engines, on simulated GPUs where there are some."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: list[Simulated] = []

    def start(self, *arguments: str, port: int = 0, **environ: str) -> Simulated:
        words = list(arguments)
        if "--model" not in words:
            words += ["--model", "some/model", "--served-model-name", "m"]
        log = self.folder / f"{len(self.all)}.log"
        self.all.append(Simulated(log, words, environ, port or free_port()))
        return self.all[-1]

    def close(self) -> None:
        for simulated in self.all:
            simulated.close()


def fleet(folder: Path) -> Iterator[Fleet]:
    made = Fleet(folder)
    try:
        yield made
    finally:
        made.close()


def on(folder: Path, *uuids: str) -> dict[str, str]:
    return {gpus.ENVIRONMENT: str(folder), "CUDA_VISIBLE_DEVICES": ",".join(uuids)}


class Asking(threading.Thread):
    """A request in a thread of its own."""

    def __init__(self, simulated: Simulated, body: dict[str, object] | None = None) -> None:
        super().__init__(daemon=True)
        self.simulated, self.body = simulated, body or CHAT
        self.status, self.text = 0, ""
        self.start()

    def run(self) -> None:
        try:
            self.status, self.text = self.simulated.post("/v1/chat/completions", self.body)
        except OSError as error:
            self.text = str(error)

    def answered(self) -> int:
        self.join(DEADLINE_S)
        assert not self.is_alive()
        return self.status
