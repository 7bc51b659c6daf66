"""Telling what happens, once: to the log of this process and to the events in the state folder."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from sage_reconcile.core.events import BAD, VERSION, Event, EventType, Told
from sage_reconcile.core.observed import Observed
from sage_reconcile.core.plan import Action, Plan
from sage_reconcile.host.journal import Journal
from sage_reconcile.host.state import StateFolder

_LOGGED = {EventType.DAEMON_STARTED: "started", EventType.DAEMON_ENDED: "ended"}


class Teller:
    """One who reconciles, and tells of it. ``by`` is its role; without a ``log`` only the events are written."""

    def __init__(self, state: StateFolder, by: str, log: Any = None) -> None:  # noqa: ANN401 - see log.configure
        self.log = log
        self._by = by
        self._journal = Journal(state.events)
        self._told = Told(self._journal.read(), adopts=by == "daemon")
        self._pass = 0
        self._lost = ""

    def begin_pass(self) -> None:
        """What is told from now on is of another pass."""
        self._pass += 1

    def tell_pass(
        self,
        observed: Observed,
        plan: Plan,
        now: float,
        done: Sequence[Action],
        could_not: Sequence[tuple[Action, str]],
    ) -> None:
        """Tells what a pass saw and did."""
        self._tell(self._told.news(observed, plan, now, done, could_not), now)

    def tell(self, kind: EventType, message: str = "", **details: object) -> None:
        """Tells one thing that is about no replica."""
        self._tell([Event(kind, message, details=details)], time.time())

    def _tell(self, events: Sequence[Event], now: float) -> None:
        if not events:
            return
        for event in events:
            self._log(event)
        lost = self._journal.append([self._document(event, now) for event in events])
        if lost and lost != self._lost and self.log is not None:
            self.log.error("events not written", error=lost)
        self._lost = lost

    def _log(self, event: Event) -> None:
        if self.log is None:
            return
        about = {"replica": event.replica, "launch": event.launch, "message": event.message}
        write = self.log.error if event.type in BAD else self.log.info
        words = _LOGGED.get(event.type, event.type.replace("-", " "))
        write(words, **{name: text for name, text in about.items() if text}, **event.details)

    def _document(self, event: Event, now: float) -> dict[str, Any]:
        return {
            "version": VERSION,
            "at": now,
            "type": event.type.value,
            "by": self._by,
            "pid": os.getpid(),
            "pass": self._pass,
            "engine": event.engine,
            "replica": event.replica,
            "launch": event.launch,
            "message": event.message,
            "details": dict(event.details),
        }
