"""The state folder: who works with it, which file it follows, and what was last seen to be good.

::

    lock              held by the one who reconciles; says who that is
    agreed.json       word for the daemon of the plan to which a person agreed, until it has read it
    events.jsonl      what happened, and events.1.jsonl before it   (journal.py)
    generation.json   how often the file has changed, and its digest
    held.json         the content of the file that the daemon holds back until a person confirms it
    last-good.yaml    the last content of the file that was valid
    measured.json     what past starts took                        (learned.py)
    status.json       what the one who reconciles last reported
    launches/         a record and a run file for each launch      (records.py)
    logs/             a log for each launch
    tmp/              a folder for each launch's sockets and temporary files
    simulated-gpus/   who holds what of the simulated GPUs
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sage_reconcile.errors import LockHeld, StateError
from sage_reconcile.host import processes
from sage_reconcile.host.records import DRAFT, write_atomically

_SUBFOLDERS = ("launches", "logs", "tmp", "simulated-gpus")
_LOOKED_AT_S = 0.25
"""Who only looks whether the lock is held has it for a moment: so long it is tried again."""


def default_folder(environ: Mapping[str, str]) -> Path:
    """``$STATE_DIRECTORY`` (systemd), else ``/var/lib/sage-reconcile`` for root, else the XDG state folder."""
    if given := environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    if os.geteuid() == 0:
        return Path("/var/lib/sage-reconcile")
    base = environ.get("XDG_STATE_HOME") or str(Path(environ.get("HOME") or Path.home()) / ".local/state")
    return Path(base) / "sage-reconcile"


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that reconciles with a state folder. ``role`` is ``daemon``, ``apply`` or ``down``."""

    pid: int
    start_ticks: int
    role: str
    file: str
    since: float

    def text(self) -> str:
        """Who it is, for a message."""
        return f"{self.role} (pid {self.pid}, following {self.file})"


@dataclass(frozen=True, slots=True)
class Word:
    """To what a person agreed: this content of the file, with these values, this plan, and moves or not.

    ``values`` is ``core.resolve.values_mark`` for the daemon's pid, ``plan`` the ``mark()`` of the plan.
    """

    digest: str
    values: str
    plan: str
    allow_moves: bool = False


@dataclass(frozen=True, slots=True)
class Held:
    """A content of the file that is not in force until it is confirmed: what it would stop, and since when."""

    digest: str
    file: str
    replicas: tuple[str, ...]
    running: int
    guard: str
    since: float


def held_document(held: Held | None) -> dict[str, Any] | None:
    """What ``status -o json`` tells of it."""
    if held is None:
        return None
    return {"replicas": list(held.replicas), "running": held.running, "guard": held.guard, "since": held.since}


def this_process(role: str, file: Path) -> Holder:
    """This process, as the one who reconciles."""
    me = processes.read_stat(os.getpid())
    return Holder(os.getpid(), me.start_ticks if me else 0, role, str(file), time.time())


class StateFolder:
    """The paths of a state folder and its small files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None
        self._drafts: list[Path] = []

    @property
    def launches(self) -> Path:
        """Where the records are."""
        return self.path / "launches"

    @property
    def measured(self) -> Path:
        """Where it is kept what past starts took."""
        return self.path / "measured.json"

    @property
    def events(self) -> Path:
        """Where it is kept what happened."""
        return self.path / "events.jsonl"

    @property
    def simulated_gpus(self) -> Path:
        """Where simulated GPUs keep their books."""
        return self.path / "simulated-gpus"

    def log(self, engine_name: str, index: int, created_at: float, launch_id: str) -> Path:
        """Where a launch logs; names sort by time."""
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(created_at))
        return self.path / "logs" / f"{engine_name}.{index}" / f"{stamp}-{launch_id}.log"

    def temporary(self, launch_id: str) -> Path:
        """The folder that a launch has for itself."""
        return self.path / "tmp" / launch_id

    def create(self) -> None:
        """Makes what is missing; only its owner can look inside.

        Raises:
            StateError: it cannot be made, or others may write there.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.path.stat().st_mode & 0o002:
                raise StateError(
                    f"{self.path}: everyone may write there, and so decide what is started; take that from them with "
                    f"chmod o-w {self.path}, or choose another with --state-dir"
                )
            for name in _SUBFOLDERS:
                (self.path / name).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StateError(
                f"{error.filename or self.path}: cannot be made: {error.strerror}; choose another with --state-dir"
            ) from error

    def take_lock(self, holder: Holder) -> None:
        """Takes the lock for this process's life, and clears away what a killed holder left half written.

        Raises:
            LockHeld: someone else has it; the message says who.
            StateError: the folder cannot be written.
        """
        self.create()
        try:
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateError(f"{self.path / 'lock'}: {error.strerror}; choose another with --state-dir") from error
        try:
            self._lock_alone(descriptor)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps({name: getattr(holder, name) for name in Holder.__slots__}).encode())
        except OSError as error:
            os.close(descriptor)
            raise StateError(f"{self.path / 'lock'}: {error.strerror}") from error
        except LockHeld:
            os.close(descriptor)
            raise
        self._lock = descriptor
        self._drafts = [draft for folder in (self.path, self.launches) for draft in folder.glob(f".*{DRAFT}")]
        self.sweep()

    def sweep(self) -> None:
        """Removes what a killed holder left half written; what cannot be removed is tried again the next time."""
        left = []
        for draft in self._drafts:
            try:
                draft.unlink(missing_ok=True)
            except OSError:
                left.append(draft)
        self._drafts = left

    def _lock_alone(self, descriptor: int) -> None:
        deadline = time.monotonic() + _LOOKED_AT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise
            else:
                return
            if time.monotonic() >= deadline:
                other = self.holder()
                who = other.text() if other else "another process"
                raise LockHeld(f"{self.path} is in use by {who}; stop it first, or use another --state-dir")
            time.sleep(0.01)

    def release_lock(self) -> None:
        """Gives the lock back."""
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def holder(self) -> Holder | None:
        """Who holds the lock now; None where nobody does, or it cannot be known."""
        try:
            descriptor = os.open(self.path / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return self._read_holder(descriptor)
        finally:
            os.close(descriptor)
        return None

    @staticmethod
    def _read_holder(descriptor: int) -> Holder | None:
        for _ in range(50):  # it writes who it is right after it took the lock
            text = os.pread(descriptor, 65536, 0)
            try:
                return Holder(**json.loads(text))
            except (ValueError, TypeError):
                time.sleep(0.01)
        return None

    def read_json(self, name: str) -> dict[str, Any]:
        """A small file of the folder; empty where it is missing or unreadable."""
        try:
            data = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return data if isinstance(data, dict) else {}

    def write_json(self, name: str, data: Mapping[str, object]) -> None:
        """Replaces a small file of the folder.

        Raises:
            StateError: it cannot be written.
        """
        write_atomically(self.path / name, json.dumps(data))

    def leave_word(self, word: Word) -> None:
        """Leaves word for the daemon of what a person agreed to.

        Raises:
            StateError: the state folder cannot be written.
        """
        self.write_json("agreed.json", asdict(word))

    def take_word(self) -> Word | None:
        """What a person agreed to; None where nobody left word. The word is taken away."""
        told = self.read_json("agreed.json")
        with contextlib.suppress(OSError):
            (self.path / "agreed.json").unlink()
        try:
            return Word(**told)
        except TypeError:
            return None

    def hold(self, held: Held) -> None:
        """Puts on record that this content is held back.

        Raises:
            StateError: it cannot be written.
        """
        self.write_json("held.json", asdict(held))

    def held(self, file: Path, digest: str) -> Held | None:
        """Whether this content is held back; one that was accepted is not, whatever a crash left behind."""
        told = self.read_json("held.json")
        if (told.get("file"), told.get("digest")) != (str(file), digest) or self.generation(digest)[1]:
            return None
        try:
            return Held(**{**told, "replicas": tuple(told["replicas"])})
        except (KeyError, TypeError):
            return Held(digest, str(file), (), 0, "", 0.0)

    def generation(self, digest: str) -> tuple[int, bool]:
        """The number of this content of the file, and whether it is the one that was last acted on."""
        known = self.read_json("generation.json")
        number = known.get("generation", 0)
        number = number if isinstance(number, int) else 0
        return (number, True) if known.get("digest") == digest else (number + 1, False)

    def accept(self, file: Path, digest: str, content: str) -> int:
        """Takes note that this content is valid and in force; returns its generation.

        Raises:
            StateError: it cannot be written.
        """
        number, known = self.generation(digest)
        if not known or self.read_json("generation.json").get("file") != str(file):
            write_atomically(self.path / "last-good.yaml", content)
            self.write_json("generation.json", {"generation": number, "digest": digest, "file": str(file)})
        with contextlib.suppress(OSError):
            (self.path / "held.json").unlink(missing_ok=True)
        return number
