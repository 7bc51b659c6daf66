"""The product's file calls, led to the disk of the world. Every change is an effect: it may fail, or be the last."""

from __future__ import annotations

import errno
import fcntl
import fnmatch
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any, Protocol, Self

from tests.simulation.disk import Node, failing
from tests.simulation.manners import Machine, stat_line
from tests.simulation.world import Description

EFFECT_S = 0.0002
"""So long an effect takes: meanwhile things happen."""


class Crash(BaseException):
    """The daemon is killed at this moment."""


class Director(Protocol):
    """Who decides what becomes of an effect."""

    def before(self, what: str, path: str, torn: Callable[[Machine], None] | None) -> None:
        """May raise an ``OSError`` for the effect to fail with, or ``Crash``."""

    def after(self, what: str, path: str) -> None:
        """May raise ``Crash``."""


class Undisturbed:
    """Every effect succeeds."""

    def before(self, what: str, path: str, torn: Callable[[Machine], None] | None) -> None:
        pass

    def after(self, what: str, path: str) -> None:
        pass


@dataclass
class Descriptor:
    """``kind`` is file, folder, pidfd or memory."""

    kind: str
    path: str = ""
    node: int = 0
    description: int = 0
    position: int = 0
    pid: int = 0
    inode: int = 0
    content: bytes = b""


@dataclass
class Seat:
    """The process that runs the product's code just now."""

    machine: Machine
    pid: int = 0
    director: Director = field(default_factory=Undisturbed)
    descriptors: dict[int, Descriptor] = field(default_factory=dict)
    next_descriptor: int = 3

    def add(self, descriptor: Descriptor) -> int:
        number, self.next_descriptor = self.next_descriptor, self.next_descriptor + 1
        self.descriptors[number] = descriptor
        return number

    def wait(self, seconds: float) -> None:
        """Time passes; who is killed meanwhile does nothing more."""
        self.machine.advance(seconds)
        process = self.machine.processes.get(self.pid)
        if process is None or process.zombie:
            raise Crash

    def effect(
        self, what: str, path: str, act: Callable[[], Any], torn: Callable[[Machine], None] | None = None
    ) -> Any:
        self.director.before(what, path, torn)
        self.wait(EFFECT_S)
        result = act()
        self.machine.say(f"  {what} {path}")
        self.director.after(what, path)
        return result


SEAT = Seat(Machine())


def machine() -> Machine:
    return SEAT.machine


def told(node: Node) -> Any:
    """What ``stat`` tells."""
    kind = stat.S_IFDIR if node.folder else stat.S_IFREG
    ns = int(node.changed_at * 1e9)
    return SimpleNamespace(
        st_mode=kind | node.mode,
        st_size=len(node.content),
        st_mtime=node.changed_at,
        st_mtime_ns=ns,
        st_ctime_ns=ns,
        st_ino=node.number,
        st_dev=1,
    )


def proc_file(path: str) -> bytes:
    """A file below /proc/PID."""
    _, _, pid, name = path.split("/")
    process = machine().processes.get(int(pid))
    if process is None:
        raise failing(errno.ENOENT, path)
    return stat_line(process).encode() if name == "stat" else process.environ


class SimulatedPath(PurePosixPath):
    """``pathlib.Path`` on the disk of the world."""

    def _node(self) -> Node:
        return machine().disk.node(str(self))

    def read_bytes(self) -> bytes:
        path = str(self)
        if path.startswith("/proc/") and path.split("/")[2].isdecimal():
            return proc_file(path)
        node = self._node()
        if node.folder:
            raise failing(errno.EISDIR, path)
        return node.content

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def stat(self) -> Any:
        return told(self._node())

    def exists(self) -> bool:
        return machine().disk.exists(str(self))

    def is_file(self) -> bool:
        return self.exists() and not self._node().folder

    def is_symlink(self) -> bool:
        return False

    def unlink(self, *, missing_ok: bool = False) -> None:
        if missing_ok and not self.exists():
            return
        SEAT.effect("unlink", str(self), lambda: machine().disk.unlink(str(self)))

    def replace(self, target: SimulatedPath) -> None:
        SEAT.effect("rename", str(target), lambda: machine().disk.rename(str(self), str(target)))

    def mkdir(self, mode: int = 0o777, *, parents: bool = False, exist_ok: bool = False) -> None:
        if self.exists():
            if exist_ok and self._node().folder:
                return
            raise failing(errno.EEXIST, str(self))
        if parents and not self.parent.exists():
            self.parent.mkdir(parents=True, exist_ok=True)
        SEAT.effect("mkdir", str(self), lambda: machine().disk.make(str(self), mode, machine().wall, folder=True))

    def iterdir(self) -> Iterator[SimulatedPath]:
        return iter([self / name for name in machine().disk.children(str(self))])

    def glob(self, pattern: str) -> Iterator[SimulatedPath]:
        if not self.exists():
            return iter(())
        return iter([path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern)])

    def open(self, mode: str = "r", buffering: int = -1) -> SimulatedFile:
        flags = {"rb": os.O_RDONLY, "ab": os.O_WRONLY | os.O_APPEND | os.O_CREAT}[mode]
        return SimulatedFile(OS.open(self, flags, 0o600), mode)


class SimulatedFile:
    """What ``open`` and ``os.fdopen`` give; text waits in a buffer until it is flushed or closed."""

    def __init__(self, descriptor: int, mode: str) -> None:
        self.descriptor = descriptor
        self.text = "b" not in mode
        self.buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if not isinstance(error, Crash):
            self.flush()
        OS.close(self.descriptor)

    def fileno(self) -> int:
        return self.descriptor

    def read(self, size: int = -1) -> bytes:
        found = SEAT.descriptors[self.descriptor]
        content = machine().disk.nodes[found.node].content[found.position :]
        content = content if size < 0 else content[:size]
        found.position += len(content)
        return content

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> None:
        OS.lseek(self.descriptor, offset, whence)

    def write(self, content: str | bytes) -> None:
        self.buffer += content.encode() if isinstance(content, str) else content

    def flush(self) -> None:
        content, self.buffer = self.buffer, b""
        if content:
            OS.write(self.descriptor, content)


class SimulatedOs:
    """The calls of ``os`` that the product makes; another one is an ``AttributeError`` and so is noticed."""

    path = os.path
    pathsep = os.pathsep
    strerror = staticmethod(os.strerror)

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("O_", "SEEK_")):
            return getattr(os, name)
        raise AttributeError(f"the simulated system has no os.{name}")

    def getpid(self) -> int:
        return SEAT.pid

    def getppid(self) -> int:
        return 1

    def geteuid(self) -> int:
        return 0

    def open(self, path: PurePosixPath | str, flags: int, mode: int = 0o777) -> int:
        disk, name = machine().disk, str(path)
        if disk.exists(name):
            node = disk.node(name)
            if flags & os.O_EXCL:
                raise failing(errno.EEXIST, name)
            if node.folder:
                if flags & (os.O_WRONLY | os.O_RDWR):
                    raise failing(errno.EISDIR, name)
                return SEAT.add(Descriptor("folder", name, node.number))
            if flags & os.O_TRUNC:
                SEAT.effect("truncate", name, lambda: disk.truncate(node, 0, machine().wall, name))
            elif flags & (os.O_WRONLY | os.O_RDWR):
                disk.may_change(name)
        elif flags & os.O_CREAT:
            node = SEAT.effect("create", name, lambda: disk.make(name, mode, machine().wall))
        else:
            raise failing(errno.ENOENT, name)
        number = machine().number()
        machine().descriptions[number] = Description(node.number, name, bool(flags & os.O_APPEND), {SEAT.pid})
        return SEAT.add(Descriptor("file", name, node.number, number))

    def close(self, descriptor: int) -> None:
        found = SEAT.descriptors.pop(descriptor)
        if found.kind == "file" and found.description in machine().descriptions:
            machine().close(found.description, SEAT.pid)

    def fdopen(self, descriptor: int, mode: str, encoding: str = "utf-8") -> SimulatedFile:
        return SimulatedFile(descriptor, mode)

    def write(self, descriptor: int, content: bytes) -> int:
        found = SEAT.descriptors[descriptor]
        if found.kind == "memory":
            found.content += content
            return len(content)
        half = content[: len(content) // 2]

        def torn(world: Machine) -> None:
            world.disk.write(world.disk.nodes[found.node], half, world.wall, found.path)

        disk = machine().disk
        SEAT.effect(
            "write",
            found.path,
            lambda: disk.write(disk.nodes[found.node], content, machine().wall, found.path),
            torn,
        )
        return len(content)

    def pread(self, descriptor: int, size: int, offset: int) -> bytes:
        return machine().disk.nodes[SEAT.descriptors[descriptor].node].content[offset : offset + size]

    def lseek(self, descriptor: int, offset: int, whence: int) -> None:
        found = SEAT.descriptors[descriptor]
        size = len(found.content) if found.kind == "memory" else len(machine().disk.nodes[found.node].content)
        found.position = max(0, {os.SEEK_SET: 0, os.SEEK_END: size}[whence] + offset)

    def fsync(self, descriptor: int) -> None:
        found = SEAT.descriptors[descriptor]
        disk = machine().disk
        SEAT.effect("fsync", found.path, lambda: disk.flush(found.path, disk.nodes[found.node]))

    def ftruncate(self, descriptor: int, size: int) -> None:
        found = SEAT.descriptors[descriptor]
        disk = machine().disk
        SEAT.effect(
            "truncate",
            found.path,
            lambda: disk.truncate(disk.nodes[found.node], size, machine().wall, found.path),
        )

    def fstat(self, descriptor: int) -> Any:
        found = SEAT.descriptors[descriptor]
        if found.kind == "pidfd":
            return SimpleNamespace(st_dev=9, st_ino=found.inode if machine().manners.inodes else 7)
        return told(machine().disk.nodes[found.node])

    def scandir(self, path: PurePosixPath | str) -> list[Any]:
        name = str(path)
        if name == "/proc":
            return [SimpleNamespace(name=str(pid), path=f"/proc/{pid}") for pid in sorted(machine().processes)]
        return [SimpleNamespace(name=child) for child in machine().disk.children(name)]

    def pidfd_open(self, pid: int) -> int:
        process = machine().processes.get(pid)
        if process is None:
            raise failing(errno.ESRCH, "")
        return SEAT.add(Descriptor("pidfd", pid=pid, inode=process.inode))

    def eventfd(self, value: int) -> int:
        """What has no inode of its own, as a pidfd on older kernels."""
        return SEAT.add(Descriptor("pidfd", inode=7))

    def memfd_create(self, name: str) -> int:
        return SEAT.add(Descriptor("memory", name))


OS = SimulatedOs()


class SimulatedFcntl:
    """``flock``: a lock belongs to the open file, and so to all who inherited it."""

    LOCK_EX, LOCK_SH, LOCK_NB = fcntl.LOCK_EX, fcntl.LOCK_SH, fcntl.LOCK_NB

    def flock(self, descriptor: int, operation: int) -> None:
        found = SEAT.descriptors[descriptor]
        mine = machine().descriptions[found.description]
        exclusive = bool(operation & fcntl.LOCK_EX)
        for other in machine().descriptions.values():
            if other is not mine and other.node == mine.node and (other.lock == "EX" or (other.lock and exclusive)):
                assert operation & fcntl.LOCK_NB, f"waits for ever for the lock on {found.path}"
                raise failing(errno.EWOULDBLOCK, found.path)
        mine.lock = "EX" if exclusive else "SH"


def remove_tree(path: SimulatedPath, *, ignore_errors: bool) -> None:
    """``shutil.rmtree``, a name at a time."""
    assert ignore_errors
    if not path.exists():
        return
    try:
        for child in list(path.iterdir()):
            child.unlink()
        SEAT.effect("rmdir", str(path), lambda: machine().disk.remove_folder(str(path)))
    except OSError:
        return
