"""The host's own memory: how much there is, how much can be had, and how much of it a process has for itself."""

from __future__ import annotations

from pathlib import Path

from sage_reconcile.core.observed import HostMemory

_MIB = 1 << 20


def read(root: Path = Path("/")) -> HostMemory | None:
    """The memory of the machine, or of the cgroup that we and what we start are in where it may have less.

    None where it cannot be read. ``root`` is where ``/proc`` and ``/sys`` are, as far as cgroups (version 2) go.
    """
    import psutil  # noqa: PLC0415 - 40 ms of every start, and wanted only where engines use the host's memory

    try:
        machine = psutil.virtual_memory()
    except (OSError, psutil.Error, ValueError):
        return None
    total, available = machine.total, machine.available
    for limit, used in _limits(root):
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return HostMemory(total // _MIB, available // _MIB)


def _limits(root: Path) -> list[tuple[int, int]]:
    """The limit of our cgroup, and of each above it, in bytes, with what is used of it; those that have one.

    What only caches files there is not used: the kernel drops it before anything has to end.
    """
    found = []
    for folder in _cgroups(root):
        limit, current = _number(folder / "memory.max"), _number(folder / "memory.current")
        if limit is not None and current is not None:
            found.append((limit, max(0, current - _cached(folder / "memory.stat"))))
    return found


def _cgroups(root: Path) -> list[Path]:
    """The folder of our cgroup and those above it; in a container its own is often all that is seen."""
    lines = _text(root / "proc/self/cgroup").splitlines()
    path = next((line[3:] for line in lines if line.startswith("0::/")), None)
    if path is None:
        return []
    top = root / "sys/fs/cgroup"
    folder = top / path.lstrip("/")
    return [folder, *(parent for parent in folder.parents if parent == top or top in parent.parents)]


def _cached(stat: Path) -> int:
    words = (line.split() for line in _text(stat).splitlines())
    return sum(int(value) for name, value in words if name == "inactive_file")


def _number(path: Path) -> int | None:
    """The number in a file; None where it is missing, or says ``max``."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""


def held_mib(pids: list[int]) -> int:
    """What these processes have for themselves, rounded up: what they share, libraries above all, is left out.

    One that has ended holds nothing.
    """
    import psutil  # noqa: PLC0415 - see read

    held = 0
    for pid in pids:
        try:
            memory = psutil.Process(pid).memory_info()
        except psutil.Error:
            continue
        held += max(0, memory.rss - memory.shared)
    return -(-held // _MIB)
