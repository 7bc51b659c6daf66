"""Whether the kernel killed a process for want of memory: its own log where it may be read, else the cgroup's count."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

_KMSG = Path("/dev/kmsg")
_MOST_LINES = 100_000
_FIRST_NAMESPACE = 0xEFFFFFFC
"""The inode of the pid namespace in which the machine started (``PROC_PID_INIT_INO``)."""
_KILLED = re.compile(
    r"^\d+,\d+,(?P<at>\d+),[^;]*;"
    r"(?P<said>(?:Out of memory|Memory cgroup out of memory): Killed process (?P<pid>\d+) \(.*)"
)


def killed(pids: Collection[int], since_s: float = 0.0, kmsg: Path = _KMSG) -> str:
    """The kernel's line about one of these that it killed for want of memory; empty where it tells of none.

    Lines from before ``since_s`` (seconds since boot) are about others that had these pids. In a container the kernel
    speaks of the host's pids, which say nothing here.
    """
    if kmsg == _KMSG and not _pids_are_the_kernels():
        return ""
    try:
        descriptor = os.open(kmsg, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    found = ""
    try:
        for _ in range(_MOST_LINES):
            try:
                record = os.read(descriptor, 8192)  # of the kernel's log one record at a time
            except BrokenPipeError:
                continue  # that record was overwritten meanwhile; the next read goes on behind it
            if not record:
                break
            for line in record.decode("utf-8", errors="replace").split("\n"):
                match = _KILLED.search(line)
                if match and int(match["pid"]) in pids and int(match["at"]) >= since_s * 1e6:
                    found = match["said"]
    except OSError:  # BlockingIOError: that was the last
        pass
    finally:
        os.close(descriptor)
    return found


def _pids_are_the_kernels() -> bool:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino == _FIRST_NAMESPACE
    except OSError:
        return False


def kills(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """How many processes of our cgroup, and of those inside it, the kernel has killed for want of memory."""
    try:
        line = next(x for x in proc.read_text(encoding="utf-8").splitlines() if x.startswith("0::"))
        events = (root / line[3:].lstrip("/") / "memory.events").read_text(encoding="ascii")
    except (OSError, StopIteration, ValueError):
        return 0
    match = re.search(r"^oom_kill (\d+)$", events, re.MULTILINE)
    return int(match[1]) if match else 0
