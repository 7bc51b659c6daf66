"""Whether the kernel killed a process for want of memory: its own log where it may be read, else the cgroup's count."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

_KMSG = Path("/dev/kmsg")
_MOST_LINES = 100_000
_KILLED = re.compile(r"(?:Out of memory|[Mm]emory cgroup out of memory): Killed process (\d+) \(")


def killed(pids: Collection[int], kmsg: Path = _KMSG) -> str:
    """The kernel's line about one of these that it killed for want of memory; empty where it tells of none."""
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
                if match and int(match[1]) in pids:
                    found = line.partition(";")[2] or line
    except OSError:  # BlockingIOError: that was the last
        pass
    finally:
        os.close(descriptor)
    return found


def kills(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """How many processes of our cgroup, and of those inside it, the kernel has killed for want of memory."""
    try:
        line = next(x for x in proc.read_text(encoding="utf-8").splitlines() if x.startswith("0::"))
        events = (root / line[3:].lstrip("/") / "memory.events").read_text(encoding="ascii")
    except (OSError, StopIteration, ValueError):
        return 0
    match = re.search(r"^oom_kill (\d+)$", events, re.MULTILINE)
    return int(match[1]) if match else 0
