"""The same programs under our daemon and under supervisor, each edited through its own file.

An edit is done when the file has its new content under its own name; how long the engine took to begin
is told by the engine itself (``engine.c``).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tests.e2e.box import REPOSITORY, Box, free_ports

SUPERVISOR = "4.3.0"
_DEADLINE_S = 60.0


def environment(folder: Path) -> dict[str, str]:
    """Ours, with the bytecode of all programs kept in a folder of the benchmark: cold, but not compiled anew."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SAGE_RECONCILE", "PYTHON"))}
    return inherited | {"PYTHONPYCACHEPREFIX": str(folder / "bytecode"), "PYTHONPATH": str(REPOSITORY), "NO_COLOR": "1"}


def build_engine(folder: Path) -> Path:
    """The engine, compiled."""
    engine, source = folder / "engine", Path(__file__).with_name("engine.c")
    subprocess.run(["gcc", "-O2", "-static", "-o", str(engine), str(source)], check=True)
    return engine


def supervisor_folder() -> Path | None:
    """Where supervisor's programs are; installed at the first call. None where it cannot be, and it says why."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sage-reconcile"
    venv = cache / f"supervisor-{SUPERVISOR}"
    done = venv / ".complete"
    if not done.exists():
        shutil.rmtree(venv, ignore_errors=True)
        try:
            subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
            subprocess.run(
                [venv / "bin/pip", "install", "-q", f"supervisor=={SUPERVISOR}", "setuptools<81"], check=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"without supervisor: {error}", file=sys.stderr)
            return None
        done.touch()
    return venv / "bin"


@dataclass
class Fleet:
    """Programs by name, each with a token; another token is a changed program."""

    folder: Path
    engine: Path
    tokens: dict[str, str]
    stamps: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.stamps = self.folder / "stamps"

    def began(self, name: str, token: str) -> float | None:
        """When the program of that name and token began, in seconds of CLOCK_MONOTONIC."""
        for line in self._lines():
            if line[:2] == [name, token]:
                return int(line[3]) / 1e9
        return None

    def pids(self) -> dict[int, str]:
        """The programs that run, by pid, found through what they wrote."""
        running = {}
        for line in self._lines():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{line[2]}/exe").readlink() == self.engine:
                    running[int(line[2])] = line[0]
        return running

    def _lines(self) -> list[list[str]]:
        text = self.stamps.read_text(encoding="ascii") if self.stamps.exists() else ""
        return [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]

    def save(self, path: Path, text: str) -> float:
        """Replaces the file as editors do; returns the moment right before it had its new content."""
        new = path.with_suffix(".new")
        new.write_text(text, encoding="utf-8")
        at = time.monotonic()
        new.replace(path)
        return at

    def kill(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Edited(Protocol):
    """A fleet whose file can be edited."""

    tokens: dict[str, str]

    def edit(self) -> float: ...
    def settled(self) -> bool: ...
    def began(self, name: str, token: str) -> float | None: ...


class Ours(Fleet):
    """The daemon, by its own command line."""

    def start(self, ports: str) -> None:
        self.box = Box(self.folder, ports)
        self.box.environ |= environment(self.folder.parent)
        self.box.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        self.edit()
        self.daemon = self.box.start_daemon()
        until("the engines of the daemon are ready", self.settled)

    def text(self) -> str:
        low = self.box.ports
        lines = ["version: 1", "host:", "  gpus: none", f"  ports: {low}", "defaults:", "  device: cpu", "engines:"]
        for name, token in self.tokens.items():
            command = f"{self.engine} {self.stamps} {{name}} {token} {{port}}"
            lines += [f"  {name}:", "    runtime: command", f'    command: "{command}"']
        return "\n".join(lines) + "\n"

    def edit(self) -> float:
        """Saves the file with the programs as they shall be."""
        return self.save(self.box.file, self.text())

    def settled(self) -> bool:
        """Whether the daemon says so, and it is so."""
        try:
            told = json.loads((self.box.state / "status.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return told["converged"] and sorted(self.pids().values()) == sorted(self.tokens)

    def close(self) -> None:
        self.box.clean()
        self.kill()


class Supervisor(Fleet):
    """supervisord, told of an edit by ``supervisorctl update``."""

    programs: Path

    def start(self, programs: Path, ports: str) -> None:
        self.programs = programs
        self.first_port = int(ports.split("-", maxsplit=1)[0])
        self.numbers: dict[str, int] = {}
        self.environ = environment(self.folder.parent)
        self.environ.pop("PYTHONPATH")
        self.file = self.folder / "supervisord.conf"
        self._save()
        with (self.folder / "supervisord.log").open("ab") as log:
            command = [self.programs / "supervisord", "-n", "-c", self.file]
            self.daemon = subprocess.Popen(command, cwd=self.folder, env=self.environ, stdout=log, stderr=log)
        until("the programs of supervisor run", self.settled)

    def text(self) -> str:
        socket = self.folder / "sock"
        lines = ["[unix_http_server]", f"file={socket}"]
        lines += ["[supervisord]", f"childlogdir={self.folder}", "logfile=/dev/null", "logfile_maxbytes=0"]
        lines += [f"pidfile={self.folder / 'pid'}", "[supervisorctl]", f"serverurl=unix://{socket}"]
        lines += ["[rpcinterface:supervisor]"]
        lines += ["supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface"]
        for name, token in self.tokens.items():
            number = self.numbers.setdefault(name, len(self.numbers))
            command = f"{self.engine} {self.stamps} {name} {token} {self.first_port + number}"
            lines += [f"[program:{name}]", f"command={command}", "startsecs=0", "redirect_stderr=true"]
        return "\n".join(lines) + "\n"

    def _save(self) -> float:
        return self.save(self.file, self.text())

    def edit(self) -> float:
        """Saves the file, and has supervisor read it."""
        at = self._save()
        self.ctl("update")
        return at

    def ctl(self, *words: str) -> None:
        subprocess.run(self.ctl_command(*words), env=self.environ, stdout=subprocess.DEVNULL, check=True)

    def ctl_command(self, *words: str) -> list[str]:
        return [str(self.programs / "supervisorctl"), "-c", str(self.file), *words]

    def settled(self) -> bool:
        return sorted(self.pids().values()) == sorted(self.tokens)

    def close(self) -> None:
        self.daemon.terminate()
        try:
            self.daemon.wait(20)
        except subprocess.TimeoutExpired:
            self.daemon.kill()
            self.daemon.wait()
        self.kill()


def until(what: str, holds: Callable[[], object], pause_s: float = 0.01) -> None:
    """Waits until something holds. The pause is for the measured, who share the cores with us."""
    end = time.monotonic() + _DEADLINE_S
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"never: {what}")
        time.sleep(pause_s)


@contextlib.contextmanager
def fleets(count: int, *, beside: bool = True) -> Iterator[tuple[Ours, Supervisor | None]]:
    """``count`` programs under our daemon and as many under supervisor (None where there is none), all running."""
    with tempfile.TemporaryDirectory(prefix="sr-") as name, contextlib.ExitStack() as cleaning:
        folder = Path(name)
        engine = build_engine(folder)
        low, high = (int(part) for part in free_ports(4 * count + 20).split("-"))
        middle = (low + high + 1) // 2
        tokens = {f"engine-{number}": "first" for number in range(count)}
        ours = Ours(folder / "ours", engine, dict(tokens))
        cleaning.callback(ours.close)
        ours.start(f"{low}-{middle - 1}")
        supervisor = None
        if beside and (programs := supervisor_folder()):
            supervisor = Supervisor(folder / "supervisor", engine, dict(tokens))
            cleaning.callback(supervisor.close)
            supervisor.start(programs, f"{middle}-{high}")
        yield ours, supervisor
