"""What the kernel says of one process: its memory, the time it has used, how often it was woken."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Reading:
    """Sums over the threads of a process at one moment."""

    at: float
    cpu_s: float
    switches: int


def reading(pid: int) -> Reading:
    """Run time to the nanosecond, and how often a thread was given up or taken off its core."""
    cpu_ns, switches = 0, 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            cpu_ns += int((task / "schedstat").read_text(encoding="ascii").split()[0])
            for line in (task / "status").read_text(encoding="utf-8").splitlines():
                if "ctxt_switches" in line:
                    switches += int(line.split()[1])
    return Reading(time.monotonic(), cpu_ns / 1e9, switches)


def memory_mb(pid: int) -> tuple[float, float]:
    """Resident memory, and the same with what is shared divided among those who share it (RSS, PSS), in MB."""
    sizes = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]:
        name, size = line.split()[:2]
        sizes[name.rstrip(":")] = int(size) * 1024 / 1e6
    return sizes["Rss"], sizes["Pss"]
