"""A machine with a systemd of its own, booted for a test in namespaces of its own (``boot.sh``).

``python -m tests.systemd.machine`` says whether this machine can boot one, and if not, why.
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
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
BOOT = HERE / "boot.sh"
UNIT = "sage-reconcile.service"
FILE = "/var/lib/engines.yaml"
STATE = "/var/lib/sage-reconcile"
DROP_IN = f"/etc/systemd/system/{UNIT}.d/test.conf"
_PROGRAMS = ("unshare", "nsenter", "setpriv", "systemctl", "journalctl", "systemd-analyze")
_NAMESPACES = ("--mount", "--pid", "--fork", "--cgroup", "--ipc", "--uts", "--net")
_DEADLINE_S = 60.0


def why_not() -> str:
    """Why no systemd can be booted here; empty where one can."""
    if os.geteuid() != 0:
        return "namespaces are root's to make, and this is not root"
    if not Path("/lib/systemd/systemd").exists():
        return "systemd is not installed (apt-get install systemd)"
    if missing := [name for name in _PROGRAMS if shutil.which(name) is None]:
        return f"not installed: {', '.join(missing)}"
    unshared = ["unshare", *_NAMESPACES, "--propagation", "private", "mount", "-t", "tmpfs", "none", "/mnt"]
    done = subprocess.run(unshared, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"namespaces may not be made here: {done.stderr.strip()}"
    probe = _cgroups() / f"boot-sh-probe-{os.getpid()}"
    try:
        probe.mkdir()
        kill = (probe / "cgroup.kill").exists()
        probe.rmdir()
    except OSError as error:
        return f"cgroups may not be made here: {error}"
    return "" if kill else f"{_cgroups()} is no cgroup2 with cgroup.kill (Linux 5.14)"


def _cgroups() -> Path:
    base = Path("/sys/fs/cgroup")
    return base if (base / "cgroup.procs").exists() else base / "unified"


class Machine:
    """A booted systemd; commands run inside, and all of it ends with ``close``."""

    def __init__(self, folder: Path, *also_shown: Path) -> None:
        self._folder = folder
        shown = {str(REPOSITORY), sys.prefix, sys.base_prefix, *map(str, also_shown)} - {"/usr"}
        with (folder / "boot.log").open("wb") as log:
            self._boot = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", BOOT, folder, HERE / "units", *sorted(shown)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.until("it is booted", lambda: self.pid1() and self._asked("systemctl", "is-active", "multi-user.target"))

    def pid1(self) -> int:
        """Its PID 1, as the pid outside; 0 where it is not there yet."""
        try:
            above = (self._folder / "pid").read_text(encoding="ascii").strip()
            return int(Path(f"/proc/{above}/task/{above}/children").read_text(encoding="ascii").split()[0])
        except (FileNotFoundError, IndexError):
            assert self._boot.poll() is None, (self._folder / "boot.log").read_text(encoding="utf-8")
            return 0

    def _asked(self, *words: str) -> bool:
        return subprocess.run(self._inside(words), capture_output=True, check=False).returncode == 0

    def _inside(self, words: tuple[str, ...]) -> list[str]:
        return ["nsenter", "-t", str(self.pid1()), "-a", "--", "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
                "NO_COLOR=1", "SYSTEMD_UNIT_PATH=/etc/systemd/system:/run/units", *words]  # fmt: skip

    def run(self, *words: str, expect: int | None = 0, stdin: str = "") -> str:
        """Runs a command inside to its end; returns what it printed."""
        done = subprocess.run(
            self._inside(words), input=stdin, capture_output=True, text=True, check=False, timeout=_DEADLINE_S
        )
        text = done.stdout + done.stderr
        assert expect is None or done.returncode == expect, f"{words}: exit {done.returncode}\n{text}"
        return text

    def ours(self, *words: str, expect: int | None = 0) -> str:
        """Runs one of our commands inside, as root does."""
        return self.run(sys.executable, "-m", "sage_reconcile", *words, expect=expect)

    def write(self, path: str, text: str) -> None:
        """Replaces a file inside, as editors do."""
        self.run("sh", "-c", 'mkdir -p "$(dirname "$0")" && cat > "$0.new" && mv "$0.new" "$0"', path, stdin=text)

    def engines(self, *names: str) -> None:
        """Has the file name these engines."""
        body = "".join(f"  {name}: {{runtime: simulator, model: a/b-7B, device: cpu}}\n" for name in names)
        self.write(FILE, f"version: 1\nhost: {{gpus: none}}\nengines:{'' if body else ' {}'}\n{body}")

    def install(self, settings: str = "") -> None:
        """Installs and starts the service as a person would, with a drop-in where settings are given."""
        if settings:
            self.write(DROP_IN, f"[Service]\n{settings}\n")
        self.ours("systemd", "install", "--now", "-f", FILE)

    def show(self, name: str) -> str:
        """A property of the service."""
        return self.run("systemctl", "show", "-P", name, UNIT).strip()

    def ready(self) -> dict[str, int]:
        """The pids of the replicas that are ready, by name."""
        text = self.ours("status", "-o", "json", "-f", FILE, "--state-dir", STATE)
        rows = [row for engine in json.loads(text)["engines"] for row in engine["replicas"]]
        return {row["name"]: row["pid"] for row in rows if row["phase"] == "Ready"}

    def all_ready(self, count: int, deadline_s: float = _DEADLINE_S) -> dict[str, int]:
        """The same, once there are so many."""
        wanted = f"{count} of {count} "
        self.until(f"{count} are ready", lambda: self.show("StatusText").startswith(wanted), deadline_s)
        ready = self.ready()
        assert len(ready) == count
        return ready

    def journal(self, *words: str) -> list[dict[str, Any]]:
        """The lines of the service that are ours, read; each with the priority under which the journal has it."""
        text = self.run("journalctl", "-u", UNIT, "-o", "json", "--no-pager", *words)
        entries = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        lines = [entry for entry in entries if str(entry["MESSAGE"]).startswith("{")]
        return [{**json.loads(entry["MESSAGE"]), "priority": entry["PRIORITY"]} for entry in lines]

    def events(self, name: str) -> list[dict[str, Any]]:
        """Those of one kind."""
        return [line for line in self.journal() if line["event"] == name]

    def until(self, what: str, holds: Callable[[], Any], deadline_s: float = _DEADLINE_S) -> Any:
        """Waits until something holds; fails with the state of the service where it never does."""
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            if answer := holds():
                return answer
            time.sleep(0.05)
        log = (self._folder / "boot.log").read_text(encoding="utf-8")
        told = [self.run(*words, expect=None) for words in (("systemctl", "status", UNIT), ("journalctl", "-n50"))]
        raise AssertionError("\n".join([f"never: {what}", log, *told]))

    def close(self) -> None:
        """Ends it, with everything inside."""
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            if pid := self.pid1() if self._boot.poll() is None else 0:
                os.kill(pid, signal.SIGKILL)
        self._boot.terminate()
        self._boot.wait(30)


@contextlib.contextmanager
def machine(*also_shown: Path) -> Iterator[Machine]:
    """A machine for one test, which sees these folders too."""
    with tempfile.TemporaryDirectory(prefix="sr-boot-") as folder:
        made = Machine(Path(folder), *also_shown)
        try:
            yield made
        finally:
            made.close()


if __name__ == "__main__":
    reason = why_not()
    print(f"NOT TESTED under a booted systemd: {reason}" if reason else "A systemd can be booted here for tests.")
