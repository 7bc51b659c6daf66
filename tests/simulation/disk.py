"""A disk: what is written is seen at once, and survives a loss of power only if it was flushed.

Files are nodes, names lead to nodes, as in Unix. A folder's names are flushed apart from the content of its files.
"""

from __future__ import annotations

import errno
import os
import posixpath
from dataclasses import dataclass, field

BOOT_ID = "/proc/sys/kernel/random/boot_id"


def failing(number: int, path: str) -> OSError:
    """The error that the kernel gives; OSError makes the right subclass of it."""
    return OSError(number, os.strerror(number), path)


@dataclass
class Node:
    number: int
    folder: bool
    mode: int
    changed_at: float
    content: bytes = b""
    flushed: bytes | None = None
    """What a loss of power leaves; None where nothing was ever flushed."""


@dataclass
class Disk:
    nodes: dict[int, Node] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    flushed_names: dict[str, int] = field(default_factory=dict)
    full: bool = False
    read_only: bool = False
    next_number: int = 100

    def node(self, path: str) -> Node:
        parent = posixpath.dirname(path)
        if path not in self.names:
            holder = self.nodes.get(self.names.get(parent, 0))
            raise failing(errno.ENOTDIR if holder is not None and not holder.folder else errno.ENOENT, path)
        return self.nodes[self.names[path]]

    def exists(self, path: str) -> bool:
        return path in self.names

    def children(self, path: str) -> list[str]:
        if not self.node(path).folder:
            raise failing(errno.ENOTDIR, path)
        start = path.rstrip("/") + "/"
        return sorted(
            name[len(start) :] for name in self.names if name.startswith(start) and "/" not in name[len(start) :]
        )

    def may_change(self, path: str, *, grows: bool = False) -> None:
        """Only the file system that holds the state folder has faults; the file of the user is on another."""
        if path.startswith(("/etc", "/proc")):
            return
        if self.read_only:
            raise failing(errno.EROFS, path)
        if grows and self.full:
            raise failing(errno.ENOSPC, path)

    def make(self, path: str, mode: int, now: float, *, folder: bool = False) -> Node:
        self.node(posixpath.dirname(path))
        if path in self.names:
            raise failing(errno.EEXIST, path)
        self.may_change(path, grows=True)
        node = Node(self.next_number, folder, mode, now)
        self.next_number += 1
        self.nodes[node.number] = node
        self.names[path] = node.number
        if folder:
            self.flushed_names[path] = node.number
        return node

    def write(self, node: Node, content: bytes, now: float, path: str) -> None:
        self.may_change(path, grows=len(content) > 0)
        node.content += content
        node.changed_at = now

    def truncate(self, node: Node, size: int, now: float, path: str) -> None:
        self.may_change(path)
        node.content = node.content[:size]
        node.changed_at = now

    def rename(self, path: str, target: str) -> None:
        number = self.node(path).number
        self.may_change(path)
        if target in self.names and self.nodes[self.names[target]].folder:
            raise failing(errno.EISDIR, target)
        del self.names[path]
        self.names[target] = number

    def unlink(self, path: str) -> None:
        if self.node(path).folder:
            raise failing(errno.EISDIR, path)
        self.may_change(path)
        del self.names[path]

    def remove_folder(self, path: str) -> None:
        if self.children(path):
            raise failing(errno.ENOTEMPTY, path)
        self.may_change(path)
        del self.names[path]
        self.flushed_names.pop(path, None)

    def flush(self, path: str, node: Node) -> None:
        """``fsync``: of a file its content, of a folder its names."""
        if not node.folder:
            node.flushed = node.content
            return
        inside = {name: number for name, number in self.names.items() if posixpath.dirname(name) == path}
        gone = [name for name in self.flushed_names if posixpath.dirname(name) == path and name not in inside]
        for name in gone:
            del self.flushed_names[name]
        self.flushed_names |= inside

    def lose_power(self, *, names_kept: bool) -> None:
        """All content that was never flushed is gone; names that were not are too, unless they happened to be."""
        if not names_kept:
            self.names = dict(self.flushed_names)
        for node in self.nodes.values():
            if not node.folder:
                node.content = node.flushed or b""
                node.flushed = node.content
        self.flushed_names = dict(self.names)
