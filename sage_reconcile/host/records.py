"""The durable records of what was started: one JSON file a launch, written before its process exists.

Files are 0600, written whole under another name, flushed to disk and renamed, so that a crash leaves
either the old record or the new one. A field that a record does not have takes its default, and one that
is not known is kept out: records of other versions stay readable.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sage_reconcile.errors import StateError

VERSION = 1
DRAFT = ".tmp"
"""How the name of a file ends that is being written."""


@dataclass(slots=True)
class Record:
    """What is known of one launch. Times are seconds since the epoch; see ``core.observed.Launch``.

    ``leader`` is ``[pid, start ticks, pidfd inode]``; ``members`` are the other processes of the session
    seen when it got ready, in the same form. ``inner_count`` ports from ``inner_port`` on are its inner ones.
    ``failure`` is why it failed, ``kv_tokens`` what its KV cache holds, ``oom_kills`` how many processes the kernel
    had killed for want of memory in our cgroup when it was started, ``kv_bytes`` the size that its KV cache was given.
    ``released`` tells that a person asked for another try since it failed; ``answers`` whether it was ready when last
    looked at, ``answers_since`` since when.
    """

    id: str
    engine_name: str
    index: int
    spec: dict[str, Any]
    secret_marks: dict[str, str]
    gpus: list[str]
    memory_mib: int
    port: int
    bind: str
    created_at: float
    boot_id: str
    version: int = VERSION
    leader: list[int] = field(default_factory=list)
    members: list[list[int]] = field(default_factory=list)
    ready_at: float | None = None
    stopping_since: float | None = None
    stop_cause: str = ""
    ended: bool = False
    exit_code: int | None = None
    ended_at: float | None = None
    restarts: int = 0
    failures: int = 0
    log_path: str = ""
    predecessor: str = ""
    destination: list[str] = field(default_factory=list)
    inner_port: int = 0
    inner_count: int = 0
    failure: dict[str, Any] = field(default_factory=dict)
    kv_tokens: int | None = None
    oom_kills: int = 0
    kv_bytes: int = 0
    host_memory_mib: int = 0
    released: bool = False
    answers: bool = False
    answers_since: float | None = None


_REQUIRED = {"id", "engine_name", "index", "spec", "gpus", "memory_mib", "port"}
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("id", "engine_name", "bind", "boot_id", "stop_cause", "log_path", "predecessor"), (str,)),
    **dict.fromkeys(("index", "memory_mib", "port", "version", "restarts", "failures"), (int,)),
    **dict.fromkeys(("inner_port", "inner_count", "oom_kills", "kv_bytes", "host_memory_mib"), (int,)),
    **dict.fromkeys(("spec", "secret_marks", "failure"), (dict,)),
    **dict.fromkeys(("gpus", "leader", "members", "destination"), (list,)),
    **dict.fromkeys(("ready_at", "stopping_since", "ended_at", "answers_since"), (int, float, type(None))),
    "created_at": (int, float),
    **dict.fromkeys(("ended", "released", "answers"), (bool,)),
    **dict.fromkeys(("exit_code", "kv_tokens"), (int, type(None))),
}


def write_atomically(path: Path, content: str) -> None:
    """Replaces a file as a whole: readers see the old or the new content, also after a crash.

    Raises:
        StateError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{DRAFT}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StateError(
            f"{path}: cannot be written: {error.strerror}; free space there or choose another folder with --state-dir"
        ) from error


class Records:
    """The records in one folder, read afresh each time they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run_file(self, launch_id: str) -> Path:
        """Where the shell of a launch tells of its run."""
        return self.folder / f"{launch_id}.run"

    def load(self) -> tuple[list[Record], list[str]]:
        """All records that can be read, and a sentence for each that cannot."""
        try:
            names = sorted(entry.name for entry in os.scandir(self.folder) if entry.name.endswith(".json"))
        except FileNotFoundError:
            return [], []
        except OSError as error:
            raise StateError(f"{self.folder}: cannot be read: {error.strerror}; run as the user who owns it") from error
        return self._read([name for name in names if not name.startswith(".")])

    def get(self, launch_id: str) -> Record | None:
        """The record of one launch, or None where there is none that can be read."""
        records, _ = self._read([f"{launch_id}.json"])
        return records[0] if records else None

    def _read(self, names: Sequence[str]) -> tuple[list[Record], list[str]]:
        records: list[Record] = []
        problems: list[str] = []
        for name in names:
            try:
                records.append(_parse(json.loads((self.folder / name).read_text(encoding="utf-8")), name))
            except FileNotFoundError:
                continue
            except (OSError, ValueError, TypeError, RecursionError) as error:
                problems.append(
                    f"{self.folder / name}: not a readable record ({error}); what it describes is left alone"
                )
        return records, problems

    def save(self, record: Record) -> None:
        """Writes a record; it is on disk when this returns.

        Raises:
            StateError: it cannot be written.
        """
        write_atomically(self.folder / f"{record.id}.json", json.dumps(asdict(record)))

    def release(self) -> None:
        """Takes note that a person asks for another try of all that has ended.

        Raises:
            StateError: a record cannot be written.
        """
        for record in self.load()[0]:
            if record.ended and not record.released:
                record.released = True
                self.save(record)

    def drop(self, launch_id: str) -> None:
        """Forgets a launch that has ended; the record goes last, so that a crash leaves nothing without one.

        Raises:
            StateError: the folder cannot be written.
        """
        for path in (self.run_file(launch_id), self.folder / f"{launch_id}.json"):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise StateError(
                    f"{path}: cannot be removed: {error.strerror}; make {self.folder} writable again"
                ) from error


def _parse(data: object, name: str) -> Record:
    if not isinstance(data, Mapping):
        raise TypeError("not a JSON object")
    known = {item.name for item in fields(Record)}
    values = {key: value for key, value in data.items() if key in known}
    wrong = _REQUIRED - values.keys() | {key for key, value in values.items() if not _fits(key, value)}
    if wrong:
        raise TypeError(", ".join(f"`{name}`" for name in sorted(wrong)) + " missing or wrong")
    if name != f"{values['id']}.json":
        raise ValueError(f"it is the record of {values['id']!r} under another name")
    defaults = {"secret_marks": {}, "bind": "127.0.0.1", "created_at": 0.0, "boot_id": ""}
    return Record(**{**defaults, **values})


def _fits(name: str, value: object) -> bool:
    kinds = _KINDS[name]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        return False
    if name in ("inner_port", "inner_count"):
        return isinstance(value, int) and 0 <= value <= 65535
    if name == "host_memory_mib":
        return isinstance(value, int) and value >= 0
    if name in ("gpus", "destination"):
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if name == "leader":
        return value == [] or _is_process(value)
    if name == "members":
        return isinstance(value, list) and all(_is_process(item) for item in value)
    return True


def _is_process(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(item) is int for item in value)
