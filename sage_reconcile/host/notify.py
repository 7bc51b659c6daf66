"""Tells systemd how it goes: ready, reloading, stopping, alive (sd_notify; see ``man sd_notify``)."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping


class Notifier:
    """The service manager that started this process, if one did; else all of this does nothing.

    ``watchdog_s`` is how long it waits for word before it takes this process for hung; None where it does not watch.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self.watchdog_s = _watchdog_s(environ) if address else None
        self._status = ""
        self._ready = False

    def alive(self, status: str) -> None:
        """A pass has come to its end: ready from the first on, and the watchdog is fed."""
        words = [] if self._ready else ["READY=1"]
        words += ["WATCHDOG=1"] if self.watchdog_s else []
        words += [f"STATUS={status}"] if status != self._status else []
        self._ready, self._status = True, status
        if words:
            self._send(words)

    def reloading(self) -> None:
        """The file is about to be read again because someone asked; the end of the next pass is the end of that."""
        if self._ready:
            self._ready = False
            self._send(["RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"])

    def stopping(self) -> None:
        """This process ends."""
        self._send(["STOPPING=1", "STATUS=ended; the engines go on running"])

    def _send(self, words: list[str]) -> None:
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            connection.connect(self._address)
            connection.send("\n".join(words).encode())


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    """The time of the watchdog in seconds, where it watches this very process."""
    told, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    meant = not pid or pid == str(os.getpid())
    return int(told) / 1e6 if told.isdecimal() and int(told) and meant else None
