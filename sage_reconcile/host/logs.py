"""The logs of launches: their last lines, how many are kept, how large they grow."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

KEPT = 5
"""Logs kept of each replica, the newest first."""
LIMIT_BYTES = 64 << 20
_KEEP_BYTES = 16 << 20
_TAIL_BYTES = 64 << 10
_START_BYTES = 8 << 20


def tail(path: Path, count: int, most_bytes: int = _TAIL_BYTES) -> list[str]:
    """The last lines; progress bars (carriage returns) count as lines. Empty where there is no log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - most_bytes))
            content = file.read()
    except OSError:
        return []
    return _lines(content)[-count:]


def start(path: Path) -> list[str]:
    """The lines of a start: the first 8 MiB of a log. Empty where there is none."""
    try:
        with path.open("rb") as file:
            return _lines(file.read(_START_BYTES))
    except OSError:
        return []


def _lines(content: bytes) -> list[str]:
    return content.decode("utf-8", errors="replace").replace("\r", "\n").rstrip("\n").split("\n")


def newest(folder: Path) -> list[Path]:
    """The logs of a replica, the newest first."""
    return sorted(folder.glob("*.log"), reverse=True)


def prune(folder: Path) -> None:
    """Removes all but the newest logs of a replica; one that cannot be removed stays until the next start."""
    for path in newest(folder)[KEPT:]:
        remove(path)


def remove(path: Path) -> None:
    """Removes a log; one that cannot be removed stays."""
    with contextlib.suppress(OSError):
        path.unlink()


def limit(path: Path) -> None:
    """Cuts a log that has grown past its limit down to its end.

    Writers append and so do we, so nobody writes over another; a line that comes in this very moment may be lost.
    """
    try:
        if path.stat().st_size <= LIMIT_BYTES:
            return
        with path.open("rb") as file, path.open("ab", buffering=0) as out:
            file.seek(-_KEEP_BYTES, os.SEEK_END)
            end = file.read()
            out.truncate(0)
            out.write(b"[the beginning of this log was cut off]\n" + end[end.find(b"\n") + 1 :])
    except OSError:
        return
