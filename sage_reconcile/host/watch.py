"""Tells when ``engines.yaml`` may have changed, and when a process ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from watchfiles import watch

from sage_reconcile.host import processes
from sage_reconcile.host.processes import ProcessId

STEP_MS = 20
"""How long a burst of saves must pause before it counts as over; also how often the watcher looks."""
DEBOUNCE_MS = 200
_MOST_STEPS = 200
SETTLED_MS = 250
"""So long after a watch began it is sure to be in place: what came before is then looked for once."""


class FileWatcher:
    """Watches the folder of a file, and that of what it points to, since editors replace files and links.

    ``changed`` is called from a thread for anything that happens there; it is for the caller to see
    whether the content is another one. A folder that goes away and comes back is taken up by ``refresh``.
    """

    def __init__(self, file: Path, changed: Callable[[], None]) -> None:
        self._file = file
        self._changed = changed
        self._stop = threading.Event()
        self._watched: tuple[tuple[str, int], ...] = ()

    def refresh(self) -> None:
        """Starts watching, or moves to the folders where the file is now."""
        folders = self._folders()
        if folders == self._watched:
            return
        self.close()
        self._stop, self._watched = threading.Event(), folders
        if folders:
            names = [name for name, _ in folders]
            threading.Thread(target=self._run, args=(names, self._stop), name="watch", daemon=True).start()

    def close(self) -> None:
        """Stops watching."""
        self._stop.set()
        self._watched = ()

    def _folders(self) -> tuple[tuple[str, int], ...]:
        found: dict[str, int] = {}
        for folder in (self._file.parent, *_link_folders(self._file)):
            with contextlib.suppress(OSError):
                found[str(folder)] = folder.stat().st_ino
        return tuple(found.items())

    def _run(self, folders: list[str], stop: threading.Event) -> None:
        with contextlib.suppress(FileNotFoundError):  # refresh finds them when they are back
            changes = watch(
                *folders,
                watch_filter=None,
                debounce=DEBOUNCE_MS,
                step=STEP_MS,
                stop_event=stop,
                raise_interrupt=False,
                recursive=False,
                rust_timeout=SETTLED_MS,
                yield_on_timeout=True,
            )
            for number, found in enumerate(changes):
                if found or number == 0:
                    self._changed()


def _link_folders(file: Path) -> list[Path]:
    """The folder of every link on the way to a file, and the one where it ends."""
    folders: list[Path] = []
    here, left = Path("/"), [*file.parts[1:]]
    for _ in range(_MOST_STEPS):
        if not left:
            break
        step = here / left.pop(0)
        if step.is_symlink():
            folders.append(here)
            target = step.readlink()
            left = [*(target.parts[1:] if target.is_absolute() else target.parts), *left]
            here = Path("/") if target.is_absolute() else here
        else:
            here = here.parent if step.name == ".." else step
    return [*folders, here.parent]


class ExitWatcher:
    """Wakes the event loop when a process ends, its child or not, without polling (pidfd)."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ended: Callable[[], None]) -> None:
        self._loop = loop
        self._ended = ended
        self._descriptors: dict[object, int] = {}

    def follow(self, wanted: Mapping[tuple[str, int], ProcessId]) -> None:
        """Watches exactly these processes."""
        for key in self._descriptors.keys() - wanted.keys():
            self._drop(key)
        for key, process in wanted.items():
            if key not in self._descriptors:
                descriptor = processes.open_pidfd(process)
                if descriptor is None:
                    self._loop.call_soon(self._ended)
                    continue
                self._descriptors[key] = descriptor
                self._loop.add_reader(descriptor, self._over, key)

    def close(self) -> None:
        """Stops watching."""
        for key in list(self._descriptors):
            self._drop(key)

    def _over(self, key: object) -> None:
        self._drop(key)
        self._ended()

    def _drop(self, key: object) -> None:
        descriptor = self._descriptors.pop(key)
        self._loop.remove_reader(descriptor)
        os.close(descriptor)
