"""When a pass is due: the file changed, a process ended, a replica got ready, a time came, a signal asked.

``settle`` runs passes until nothing is left to do (``apply``, ``down``); ``Daemon`` runs them for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sage_reconcile.core.conditions import keep_since
from sage_reconcile.core.events import EventType
from sage_reconcile.core.guard import lasting_stops, too_many
from sage_reconcile.core.observed import Life
from sage_reconcile.core.report import lasting, status_document
from sage_reconcile.core.resolve import values_mark
from sage_reconcile.core.spec import Desired
from sage_reconcile.core.status_line import in_a_line
from sage_reconcile.errors import SageReconcileError, StateError
from sage_reconcile.host.hub import PATIENCE_S, Hub
from sage_reconcile.host.local import LocalHost
from sage_reconcile.host.notify import Notifier
from sage_reconcile.host.probes import Prober
from sage_reconcile.host.state import StateFolder, Word, held_document
from sage_reconcile.host.watch import ExitWatcher, FileWatcher
from sage_reconcile.in_force import InForce
from sage_reconcile.reconcile import Pass, run_pass
from sage_reconcile.telling import Teller

RESYNC_S = 30.0
"""A pass at least this often, for what no event tells (a GPU that filled up, a link that was changed elsewhere)."""
_ENDING_S = 0.05
_ENDING_SLOWEST_S = 1.0
_AFTER_FAILURE_S = 5.0
_WATCHDOG_SHARE = 3
"""Passes for each time that a watchdog waits: one may be late."""
_NOT_AT_ONCE = ("kill", "reap")


class Passes:
    """A host with all that wakes it: probes, ends of processes, times that come."""

    def __init__(
        self,
        state: StateFolder,
        folder: Path,
        environ: Mapping[str, str],
        *,
        asks_hubs: bool = False,
        resync_s: float = RESYNC_S,
    ) -> None:
        self._resync_s = resync_s
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()
        self.prober = Prober(time.monotonic, self.wake_from_thread)
        self.hub = Hub(environ, asks=asks_hubs, patience_s=PATIENCE_S, changed=self.wake_from_thread)
        self.host = LocalHost(state, folder, environ, self.prober, self.hub)
        self._exits = ExitWatcher(self._loop, self._woken.set)
        self._endings = 0

    def wake(self) -> None:
        """Makes the next pass due now."""
        self._woken.set()

    def wake_from_thread(self) -> None:
        """The same, from another thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._woken.set)

    def run(
        self,
        desired: Desired,
        tried: frozenset[str] | None = None,
        *,
        allow_moves: bool = False,
        may: Callable[[Pass], bool] | None = None,
    ) -> Pass:
        """One pass; from now on the ends of all that runs are watched. See ``run_pass`` for ``may``."""
        self._woken.clear()
        result = run_pass(self.host, desired, tried=tried, allow_moves=allow_moves, may=may)
        self._exits.follow(self.host.watched())
        return result

    async def wait(self, result: Pass | None) -> None:
        """Until the next pass is due."""
        deadline = self._loop.time() + (self._resync_s if result is None else self._due_in(result))
        while (left := deadline - self._loop.time()) > 0:
            probe_in = max(0.0, self.prober.ask() - time.monotonic())
            with contextlib.suppress(TimeoutError):
                # not wait_for: in Python 3.11 it loses a Ctrl-C that comes with the event
                async with asyncio.timeout(min(left, probe_in + 0.001)):
                    await self._woken.wait()
                return

    def _due_in(self, result: Pass) -> float:
        if any(action.kind not in _NOT_AT_ONCE for action in result.done):
            return 0.0
        times = [self._resync_s]
        if result.failed:
            times.append(_AFTER_FAILURE_S)
        if any(action.kind in _NOT_AT_ONCE for action in result.plan.actions) or result.plan.waiting:
            self._endings += 1
            times.append(min(_ENDING_S * 1.1**self._endings, _ENDING_SLOWEST_S))
        else:
            self._endings = 0
        if any(launch.life is Life.ALIVE and launch.ready_at is None for launch in result.observed.launches):
            times.append(1.0)  # its log may tell of another stage
        times += [action.not_before - result.now for action in result.plan.actions if action.not_before is not None]
        return max(0.005, min(times))

    def close(self) -> None:
        """Stops watching; whatever runs goes on running."""
        self._exits.close()
        self.prober.close()
        self.hub.close()


async def settle(
    passes: Passes,
    desired: Desired,
    on_pass: Callable[[Pass], None],
    *,
    allow_moves: bool = False,
    may: Callable[[Pass], bool] | None = None,
) -> Pass:
    """Runs passes until everything desired is ready, or what is not cannot become so without another try.

    Each replica is started at most once. ``may`` is asked about the first plan; on a no that is all.
    """
    tried: frozenset[str] = frozenset()
    while True:
        result = passes.run(desired, tried, allow_moves=allow_moves, may=may)
        if result.withheld:
            return result
        may = None
        tried |= {action.replica for action in result.done if action.kind == "spawn"}
        tried |= {action.replica for action, _ in result.failed if action.kind == "spawn"} - result.untried
        on_pass(result)
        if _settled(result, tried):
            return result
        await passes.wait(result)


def _settled(result: Pass, tried: frozenset[str]) -> bool:
    if any(action.kind != "spawn" for action, _ in result.failed):
        return True  # it could not even be written down that something shall end
    if result.done or result.plan.waiting:
        return False
    left = [action for action in result.plan.actions if not action.blocked]
    if any(action.kind != "spawn" or action.replica not in tried for action in left):
        return False
    return all(kept.launch.ready or kept.launch.ready_at is not None for kept in result.plan.kept)


def _is_busy(result: Pass) -> bool:
    """Whether more follows by itself: something was done, ends, or is about to take over from what still serves."""
    taking_over = (
        launch.predecessor and launch.holds and launch.ready_at is None and launch.stopping_since is None
        for launch in result.observed.launches
    )
    return bool(result.done or result.plan.waiting) or any(taking_over)


class Daemon:
    """Keeps the machine as the file says, until it is told to end; the engines go on running after that."""

    def __init__(self, file: Path, state: StateFolder, environ: Mapping[str, str], log: Any) -> None:  # noqa: ANN401
        self.state = state
        self.environ = environ
        self.log = log
        self.teller = Teller(state, "daemon", log)
        self.content = InForce(file, state, environ, self.teller)
        self._notifier = Notifier(environ)
        self._resync_s = min(RESYNC_S, (self._notifier.watchdog_s or RESYNC_S * _WATCHDOG_SHARE) / _WATCHDOG_SHARE)
        self._asked = 0
        self._retry_now = False
        self._word: Word | None = None
        self._refused = ""
        self._moves_for = ""
        self._over = False
        self._told: dict[str, Any] = {}
        self._told_all = False
        self._trouble = ""

    async def run(self) -> None:
        """Runs until SIGTERM or SIGINT. SIGHUP reads the file again and ends all back-off."""
        file = self.content.file
        loop = asyncio.get_running_loop()
        passes = Passes(self.state, file.parent, self.environ, asks_hubs=True, resync_s=self._resync_s)
        watcher = FileWatcher(file, lambda: self._stirred(passes))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, passes)
        loop.add_signal_handler(signal.SIGHUP, self._ask, passes)
        self.state.take_word()  # meant for a daemon that is no more
        about = {"file": str(file), "state": str(self.state.path), "pid": os.getpid()}
        self.teller.tell(EventType.DAEMON_STARTED, f"follows {file}", **about)
        self.content.restore()
        try:
            while not self._over:
                watcher.refresh()
                result = self._pass(passes)
                self._notifier.alive(in_a_line(self._told, self._trouble))
                if not self._over:
                    await passes.wait(result)
        finally:
            self._notifier.stopping()
            watcher.close()
            passes.close()
        self.teller.tell(EventType.DAEMON_ENDED, "engines are left running", engines="left running")

    def _stirred(self, passes: Passes) -> None:
        """Something happened near the file; most of it, in a busy folder, has nothing to do with it."""
        if self.content.stirred():
            passes.wake_from_thread()

    def _end(self, passes: Passes) -> None:
        self._over = True
        passes.wake()

    def _ask(self, passes: Passes) -> None:
        self._asked += 1
        self._notifier.reloading()
        self._retry_now = True
        self._refused = ""
        self._word = self.state.take_word()
        self.content.read_again()
        passes.wake()

    def _pass(self, passes: Passes) -> Pass | None:
        self.teller.begin_pass()
        self._trouble = ""
        try:
            self.content.read()
            result = self._carried_out(passes)
            if result is None or self.content.desired is None:
                self._tell({})
                return None
            passes.host.tidy()
            self.state.sweep()
        except SageReconcileError as error:
            self._trouble = str(error)
            self.log.error("pass failed", error=self._trouble)  # noqa: TRY400 - the message says it all
            self._tell(self._told)
            return None
        self._log(result)
        document = status_document(self.content.desired, result.observed, result.plan, result.now)
        keep_since(document, self._told or self.state.read_json("status.json"), result.now)
        self._tell({**lasting(document), "busy": _is_busy(result)})
        return result

    def _carried_out(self, passes: Passes) -> Pass | None:
        """A pass with what is offered, unless the guard holds it back; else with what is in force, if anything is."""
        content, word, self._word = self.content, self._word, None
        tried: frozenset[str] | None = None
        if self._retry_now:
            passes.host.records.release()  # what cannot be tried again in this very pass is so in a later one
            tried, self._retry_now = frozenset(), False
        if word is not None:
            result = self._agreed(passes, word)
            if result is not None:
                return result
            tried = None  # what was agreed to is another thing: as if nobody had asked
        elif content.offered and not content.held:
            result = passes.run(content.offered.desired, tried, may=self._unguarded)
            if not result.withheld:
                return result
        if content.desired is None:
            return None
        result = passes.run(content.desired, tried, allow_moves=self._moves_for == content.desired.digest)
        if not (result.plan.making_room or result.plan.waiting):
            self._moves_for = ""
        return result

    def _unguarded(self, seen: Pass) -> bool:
        """Puts what is offered in force, or holds it back where it stops too much of what runs."""
        stops = lasting_stops(seen.plan, seen.observed)
        if too_many(seen.desired.host.guard, stops):
            self.content.hold(stops, seen.now)
            return False
        self.content.accept()
        return True

    def _agreed(self, passes: Passes, word: Word) -> Pass | None:
        """A pass to whose very plan a person agreed; None, and nothing done, where it would be another."""
        wanted = self.content.latest
        if wanted is None or self.content.error or wanted.digest != word.digest:
            self._refused = "file"
        elif values_mark(wanted, str(os.getpid())) != word.values:
            self._refused = "values"
        if self._refused or wanted is None:
            return None

        def same(seen: Pass) -> bool:
            if seen.plan.mark() != word.plan:
                return False
            if self.content.offered:
                self.content.accept()
            return True

        result = passes.run(wanted, frozenset(), allow_moves=word.allow_moves, may=same)
        if result.withheld:
            self._refused = "plan"
            return None
        self._moves_for = word.digest if word.allow_moves else ""
        return result

    def _log(self, result: Pass) -> None:
        self.teller.tell_pass(result.observed, result.plan, result.now, result.done, result.failed)
        for reason in result.not_forgotten:
            self.log.error("record not dropped", reason=reason)

    def _tell(self, document: dict[str, Any]) -> None:
        """Writes the status for those who follow, where it says something new."""
        content = self.content
        told = {
            **document,
            "pid": os.getpid(),
            "asked": self._asked,
            "refused": self._refused,
            "trouble": self._trouble,
            "generation": content.generation,
            "digest": content.desired.digest if content.desired else "",
            "values": values_mark(content.desired, str(os.getpid())) if content.desired else "",
            "file_error": content.error,
            "held_back": held_document(content.held),
        }
        if told == self._told and self._told_all:
            return
        self._told, self._told_all = told, False
        try:
            self.state.write_json("status.json", told)
        except StateError as error:
            self.log.error("status not written", error=str(error))  # noqa: TRY400 - nor here
        else:
            self._told_all = True
