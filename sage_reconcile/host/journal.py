"""The events on disk: a JSON line each, at most two files of 1 MiB, 0600.

Whoever reconciles appends. A crash may leave half a line at the end: it is closed with the next one, and whoever
reads passes over what is no event. A disk that is full loses events and holds up nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

LIMIT_BYTES = 1 << 20


class Journal:
    """The events of one state folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.older = path.with_name(f"{path.stem}.1{path.suffix}")

    def append(self, events: Sequence[dict[str, Any]]) -> str:
        """Adds events; returns why they are lost where they are."""
        lines = "".join(f"{json.dumps(event)}\n" for event in events).encode()
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                size = os.fstat(descriptor).st_size
                torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
                written = os.write(descriptor, b"\n" + lines if torn else lines)
            finally:
                os.close(descriptor)
            if size + written >= LIMIT_BYTES:
                self.path.replace(self.older)
        except OSError as error:
            return f"{self.path}: {error.strerror}"
        return ""

    def read(self) -> list[dict[str, Any]]:
        """All events that are kept, the oldest first."""
        return [event for path in (self.older, self.path) for event in _events(_content(path))]

    def follow(self) -> Iterator[list[dict[str, Any]]]:
        """All events that are kept, then, with each step, those that were added since."""
        kept, left = _events(_content(self.older)), b""
        file = _opened(self.path)
        try:
            while True:
                content = left + (file.read() if file else b"")
                whole = content.rfind(b"\n") + 1
                yield [*kept, *_events(content[:whole])]
                kept, left = [], content[whole:]
                if file is None or not _is(self.path, file):
                    if file is not None:  # it was put away: first what came before that
                        kept, left = _events(left + file.read()), b""
                        kept += [] if _is(self.older, file) else _events(_content(self.older))
                        file.close()
                    file = _opened(self.path)
        finally:
            if file is not None:
                file.close()


def _opened(path: Path) -> BinaryIO | None:
    try:
        return path.open("rb")
    except OSError:
        return None


def _is(path: Path, file: BinaryIO) -> bool:
    """Whether this is the file that is there."""
    try:
        return path.stat().st_ino == os.fstat(file.fileno()).st_ino
    except OSError:
        return False


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _events(content: bytes) -> list[dict[str, Any]]:
    found = []
    for line in content.split(b"\n"):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("type"), str):
            found.append(event)
    return found
