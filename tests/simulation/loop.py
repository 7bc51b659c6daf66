"""An event loop whose clock is the world's: where a real one sleeps, the world goes on."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Any

from tests.simulation.files_seam import SEAT, Crash, machine
from tests.simulation.seam import SimulatedFileWatcher
from tests.simulation.world import Violation

_MOST_AT_ONCE = 1000


class SimulatedLoop(asyncio.BaseEventLoop):
    """``idle`` is called each time before the world goes on."""

    def __init__(self, idle: Callable[[], None]) -> None:
        super().__init__()
        self._selector = self
        self._idle = idle
        self._readers: dict[int, asyncio.Handle] = {}
        self._signals: dict[int, asyncio.Handle] = {}
        self._asked = machine().asked
        self._at_once = 0

    def time(self) -> float:
        return machine().now

    def add_reader(self, descriptor: int, callback: Callable[..., Any], *arguments: Any) -> None:
        self._readers[descriptor] = asyncio.Handle(callback, arguments, self)

    def remove_reader(self, descriptor: int) -> bool:
        return self._readers.pop(descriptor, None) is not None

    def add_signal_handler(self, number: int, callback: Callable[..., Any], *arguments: Any) -> None:
        self._signals[number] = asyncio.Handle(callback, arguments, self)

    def select(self, timeout: float | None) -> list[int]:
        """What has happened: descriptors of processes that ended."""
        self._at_once = self._at_once + 1 if timeout == 0 else 0
        if self._at_once > _MOST_AT_ONCE:
            raise Violation("the daemon goes round without ever waiting")
        if timeout == 0:
            return self._ended()
        self._idle()
        if timeout is None:
            raise Violation("the daemon waits for nothing")
        machine().advance(timeout, self._interrupted)
        return self._ended()

    def _interrupted(self) -> bool:
        world = machine()
        if SEAT.pid not in world.processes or world.processes[SEAT.pid].zombie:
            raise Crash
        if world.stirred:
            world.stirred = False
            if SimulatedFileWatcher.current and world.manners.notices_files:
                self.call_soon(SimulatedFileWatcher.current.changed)
                return True
        if world.asked != self._asked:
            self._asked = world.asked
            self._ready.append(self._signals[signal.SIGHUP])
            return True
        return bool(self._ended())

    def _ended(self) -> list[int]:
        processes = machine().processes
        ended = []
        for number in self._readers:
            found = SEAT.descriptors[number]
            process = processes.get(found.pid)
            if process is None or process.zombie or process.inode != found.inode:
                ended.append(number)
        return ended

    def _process_events(self, event_list: list[int]) -> None:
        for number in event_list:
            if number in self._readers:
                self._ready.append(self._readers[number])

    def _write_to_self(self) -> None:
        pass
