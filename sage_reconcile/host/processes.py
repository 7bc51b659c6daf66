"""Processes: start one in a session of its own, prove that it is ours, signal it, learn how it ended.

A launch is three things: a *shell* that leads the session, waits, and writes down the exit status; the
*leader* (the server's main process), its child; and whatever the leader starts, all in the same session.
The shell is there because nobody else is when the daemon is down: init would reap the leader and its
exit status with it. It costs under 1 MiB.

Identity is (boot id, pid, start time in clock ticks, pidfd inode where the kernel has one). A pid alone
proves nothing: it is used again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sage_reconcile.errors import SpawnError

LAUNCH_VARIABLE = "SAGE_RECONCILE_LAUNCH"
"""Names the launch in the environment of all its processes: one more proof for those that stay behind."""

# Standard output is the run file, standard error the log. The subshell writes who it is, then becomes the
# leader. Traps (not "ignore", which the leader would inherit) keep the shell alive when the whole group is
# signalled, so that it can write how the leader ended.
_SHELL = """trap : HUP INT QUIT TERM
(read -r line </proc/self/stat && printf '%s\\n' "$line" && exec {command} </dev/null >&2)
printf 'exit %s\\n' "$?"
"""


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process that cannot be mistaken for a later one. ``inode`` is 0 where the kernel has none."""

    pid: int
    start_ticks: int
    inode: int = 0


@dataclass(frozen=True, slots=True)
class Stat:
    """What ``/proc/PID/stat`` says."""

    pid: int
    command: str
    state: str
    parent: int
    session: int
    start_ticks: int

    @property
    def running(self) -> bool:
        """Whether it is more than a zombie."""
        return self.state not in ("Z", "X")


@dataclass(frozen=True, slots=True)
class Run:
    """What the shell of a launch wrote: who the leader is, in which session, how and when it ended."""

    leader: ProcessId | None = None
    session: int = 0
    exit_code: int | None = None
    ended_at: float | None = None


@cache
def boot_id() -> str:
    """Names this boot of the machine; a record of another boot is history."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def parse_stat(text: str) -> Stat | None:
    """A line of ``/proc/PID/stat``; None for anything else. The command may hold spaces and brackets."""
    opening, closing = text.find("("), text.rfind(")")
    fields = text[closing + 2 :].split()
    if opening < 0 or closing < 0 or len(fields) < 20:
        return None
    try:
        return Stat(
            pid=int(text[:opening]),
            command=text[opening + 1 : closing],
            state=fields[0],
            parent=int(fields[1]),
            session=int(fields[3]),
            start_ticks=int(fields[19]),
        )
    except ValueError:
        return None


def read_stat(pid: int) -> Stat | None:
    """The process of that pid now, or None."""
    try:
        return parse_stat(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace"))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def identify(pid: int) -> ProcessId | None:
    """The full identity of a running process, or None where it has ended."""
    stat = read_stat(pid)
    if stat is None or not stat.running:
        return None
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return None
    try:
        inode = os.fstat(descriptor).st_ino if _inodes_tell() else 0
    finally:
        os.close(descriptor)
    again = read_stat(pid)  # between the two reads the pid may have become another process
    return ProcessId(pid, stat.start_ticks, inode) if again and again.start_ticks == stat.start_ticks else None


@cache
def _inodes_tell() -> bool:
    """Whether pidfds have inodes of their own (kernel 6.9); before, they share one with all that has none."""
    nameless = os.eventfd(0)
    try:
        shared = os.fstat(nameless)
    finally:
        os.close(nameless)
    try:
        descriptor = os.pidfd_open(os.getpid())
    except OSError:
        return False
    try:
        own = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return (own.st_dev, own.st_ino) != (shared.st_dev, shared.st_ino)


def alive(process: ProcessId) -> bool:
    """Whether this very process still runs."""
    stat = read_stat(process.pid)
    if stat is None or not stat.running or stat.start_ticks != process.start_ticks:
        return False
    return not (process.inode and _inodes_tell()) or _inode(process.pid) == process.inode


def _inode(pid: int) -> int:
    """The inode of a pidfd of whatever has that pid now; 0 where nothing has."""
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return 0
    try:
        return os.fstat(descriptor).st_ino
    finally:
        os.close(descriptor)


def open_pidfd(process: ProcessId) -> int | None:
    """A descriptor of this very process, or None where it has ended; the caller closes it."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except OSError:
        return None
    if alive(process) and (not process.inode or not _inodes_tell() or os.fstat(descriptor).st_ino == process.inode):
        return descriptor
    os.close(descriptor)
    return None


def send(process: ProcessId, number: signal.Signals) -> bool:
    """Signals this very process, its identity checked again at the last moment; False where it has ended.

    Raises:
        PermissionError: it runs as another user.
    """
    descriptor = open_pidfd(process)
    if descriptor is None:
        return False
    try:
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def scan() -> Iterator[Stat]:
    """All processes of the machine. About 20 ms for 1,000 of them: for seldom use."""
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal() and (stat := read_stat(int(entry.name))) is not None:
            yield stat


def is_marked(pid: int, launch_id: str) -> bool:
    """Whether the environment of a process names this launch."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return f"{LAUNCH_VARIABLE}={launch_id}".encode() in environment.split(b"\0")


def user_and_command(pid: int) -> tuple[str, str]:
    """Who runs a process and what it is called; empty where that cannot be told."""
    import psutil  # noqa: PLC0415 - 40 ms of every start, and needed only where there are strangers

    try:
        process = psutil.Process(pid)
        return process.username(), process.name()
    except psutil.Error:
        return "", ""


def spawn(
    name: str, argv: Sequence[str], environ: Mapping[str, str], *, folder: Path, log: Path, run_file: Path
) -> subprocess.Popen[bytes]:
    """Starts ``argv`` in a session of its own, with output to ``log`` and its run told in ``run_file``.

    ``name`` is what the shell shows in a list of processes.

    Returns the shell that leads the session, for its parent to reap.

    Raises:
        SpawnError: there is no shell, no such folder, no room for its files, or no more processes may be started.
    """
    appending = os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    try:
        with contextlib.ExitStack() as opened:
            run_descriptor = os.open(run_file, os.O_RDWR | os.O_EXCL | appending, 0o600)
            opened.callback(os.close, run_descriptor)
            log_descriptor = os.open(log, os.O_WRONLY | appending, 0o600)
            opened.callback(os.close, log_descriptor)
            script = _script(argv)
            opened.callback(os.close, script)
            # held by the shell for its whole life: tells an interrupted start from one that is under way
            fcntl.flock(run_descriptor, fcntl.LOCK_EX)
            return subprocess.Popen(
                ["/bin/sh", "-s", f"sage-reconcile {name}"],
                stdin=script,
                stdout=run_descriptor,
                stderr=log_descriptor,
                cwd=folder,
                env=dict(environ),
                start_new_session=True,
            )
    except OSError as error:
        raise SpawnError(f"cannot start {argv[0]}: {error.strerror} ({error.filename or folder})") from error


def _script(argv: Sequence[str]) -> int:
    """What the shell reads, in memory: its own command line must not look like the engine's to `pkill -f`."""
    descriptor = os.memfd_create("launch")
    os.write(descriptor, _SHELL.format(command=shlex.join(argv)).encode())
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def read_run(run_file: Path) -> Run:
    """What the shell wrote so far; empty where it wrote nothing yet or the file is gone."""
    try:
        text = run_file.read_text(encoding="utf-8", errors="replace")
        modified = run_file.stat().st_mtime
    except FileNotFoundError:
        return Run()
    lines = text.splitlines()
    leader = parse_stat(lines[0]) if lines else None
    ended = next((line for line in reversed(lines) if line.startswith("exit ")), None)
    code = int(ended[5:]) if ended and ended[5:].isdecimal() else None
    return Run(
        ProcessId(leader.pid, leader.start_ticks) if leader else None,
        leader.session if leader else 0,
        code,
        modified if ended else None,
    )


def under_way(run_file: Path) -> bool:
    """Whether the shell of this launch still runs, by the lock that it holds on its run file."""
    try:
        descriptor = os.open(run_file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return True
    finally:
        os.close(descriptor)
    return False


def kill_all(processes: Sequence[ProcessId], rounds: int = 3) -> None:
    """SIGKILL to each of these very processes; what is gone already, or may not be signalled, is no error."""
    for _ in range(rounds):
        hit = False
        for process in processes:
            with contextlib.suppress(PermissionError):
                hit |= send(process, signal.SIGKILL)
        if not hit:
            return
        time.sleep(0.002)
