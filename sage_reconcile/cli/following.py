"""Carrying a plan out and telling how it goes: here, or by the daemon that follows the file."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sage_reconcile.cli import rendering
from sage_reconcile.core.events import EventType
from sage_reconcile.core.report import status_document
from sage_reconcile.core.resolve import values_mark
from sage_reconcile.core.spec import Desired
from sage_reconcile.core.units import printable
from sage_reconcile.errors import SageReconcileError, StalePlan
from sage_reconcile.host import files, logs, processes
from sage_reconcile.host.state import Holder, StateFolder, Word, this_process
from sage_reconcile.reconcile import Pass
from sage_reconcile.telling import Teller

_LOG_LINES = 15
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Shown:
    """A plan that was shown: of which content of the file, and what it does. ``text`` is None for no content at all."""

    path: Path
    desired: Desired
    text: str | None
    mark: str
    allow_moves: bool = False


_REFUSED = {
    "file": "the daemon has read another content of the file since the plan was shown",
    "plan": "the machine has changed since the plan was shown",
}


def settle_here(state: StateFolder, shown: Shown, *, role: str = "apply") -> dict[str, Any]:
    """Reconciles in this process until all is settled; returns the last status document.

    Raises:
        StalePlan: file or machine are not as they were when the plan was shown; nothing was done.
        LockHeld: somebody else reconciles with this state folder.
    """
    state.take_lock(this_process(role, shown.path))
    teller = Teller(state, role)
    progress = rendering.Progress()
    last: dict[str, Any] = {}

    def on_pass(result: Pass) -> None:
        nonlocal last
        last = status_document(shown.desired, result.observed, result.plan, result.now)
        teller.tell_pass(result.observed, result.plan, result.now, result.done, result.failed)
        teller.begin_pass()
        for action, reason in result.failed:
            rendering.error(f"{action.kind} {action.replica}: {reason}")
        progress.show(last)

    def agreed(seen: Pass) -> bool:
        if seen.plan.mark() != shown.mark:
            return False
        if shown.text is not None:
            _accept(state, shown, shown.text, teller)
        return True

    try:
        _same_content(shown)
        if asyncio.run(_settled(state, shown, on_pass, agreed)).withheld:
            raise StalePlan(_REFUSED["plan"])
    except KeyboardInterrupt:
        print("\nInterrupted. What was started goes on; `sage-reconcile status` shows it.", file=sys.stderr)
        raise
    finally:
        state.release_lock()
    for engine in last.get("engines", ()):
        for replica in engine["replicas"]:
            replica["next_try_at"] = None  # nobody is left who would try
    return last


def _accept(state: StateFolder, shown: Shown, text: str, teller: Teller) -> None:
    known = state.generation(shown.desired.digest)[1]
    number = state.accept(shown.path, shown.desired.digest, text)
    if not known:
        count = len(shown.desired.engines)
        teller.tell(EventType.FILE_ACCEPTED, f"generation {number}", generation=number, engines=count)


async def _settled(
    state: StateFolder, shown: Shown, on_pass: Callable[[Pass], None], agreed: Callable[[Pass], bool]
) -> Pass:
    from sage_reconcile.daemon import Passes, settle

    passes = Passes(state, shown.path.parent, os.environ)
    try:
        return await settle(passes, shown.desired, on_pass, allow_moves=shown.allow_moves, may=agreed)
    finally:
        passes.close()


def _same_content(shown: Shown) -> None:
    """The file as it is now must be the one that was shown, with the same values from elsewhere."""
    if shown.text is None:
        return
    now = files.load(shown.path, os.environ).desired
    if (now.digest, values_mark(now, "")) != (shown.desired.digest, values_mark(shown.desired, "")):
        raise StalePlan("the file has changed since the plan was shown")


def follow_daemon(state: StateFolder, daemon: Holder, shown: Shown) -> dict[str, Any]:
    """Has the daemon read the file again, do what was shown and retry what failed; follows it until all is settled.

    Raises:
        StalePlan: the daemon would do another thing than what was shown, and did nothing that nobody agreed to.
        SageReconcileError: the daemon ended, or refuses the file.
    """
    asked_before = state.read_json("status.json").get("asked", 0)
    begun = time.time()
    desired = shown.desired
    state.leave_word(Word(desired.digest, values_mark(desired, str(daemon.pid)), shown.mark, shown.allow_moves))
    if not processes.send(processes.ProcessId(daemon.pid, daemon.start_ticks), signal.SIGHUP):
        state.take_word()  # nobody has heard it: no later daemon shall take it for leave
        raise SageReconcileError(f"the daemon (pid {daemon.pid}) has ended; try again")
    progress, heard = rendering.Progress(), False
    while True:
        told = state.read_json("status.json")
        if _has_heard(told, daemon, asked_before) and not told.get("trouble"):
            if told["file_error"]:
                raise SageReconcileError(told["file_error"])
            _same_plan(told, desired, begun=heard)
            if not heard:
                print(f"The daemon (pid {daemon.pid}) does it.")
                heard = True
            if "engines" in told:
                progress.show(told)
                if told["converged"] or nothing_moves(told, begun):
                    return told
        _still_there(daemon)
        time.sleep(_POLL_S)


def _has_heard(told: dict[str, Any], daemon: Holder, asked_before: int) -> bool:
    """Whether this daemon has ended a pass that began after it was asked."""
    return bool(told.get("pid") == daemon.pid and told.get("asked", 0) > asked_before)


def _still_there(daemon: Holder) -> None:
    if not processes.alive(processes.ProcessId(daemon.pid, daemon.start_ticks)):
        raise SageReconcileError(f"the daemon (pid {daemon.pid}) has ended; engines that run go on running")


def reload_daemon(state: StateFolder, *, wait: bool) -> dict[str, Any] | None:
    """Has the daemon read the file again and retry what waits; returns what it tells after the pass that did it.

    Returns None at once where nobody waits.

    Raises:
        SageReconcileError: no daemon is there, or it ended meanwhile.
    """
    daemon = state.holder()
    if daemon is None or daemon.role != "daemon":
        who = f"it is in use by {daemon.text()}" if daemon else "start one with `sage-reconcile run`"
        raise SageReconcileError(f"no daemon works with {state.path}; {who}")
    told = state.read_json("status.json")
    asked_before = told.get("asked", 0) if told.get("pid") == daemon.pid else 0
    if not processes.send(processes.ProcessId(daemon.pid, daemon.start_ticks), signal.SIGHUP):
        raise SageReconcileError(f"the daemon (pid {daemon.pid}) has ended; engines that run go on running")
    while wait:
        told = state.read_json("status.json")
        if _has_heard(told, daemon, asked_before):
            return told
        _still_there(daemon)
        time.sleep(_POLL_S)
    return None


def _same_plan(told: dict[str, Any], desired: Desired, *, begun: bool) -> None:
    if told["refused"] == "values":
        raise SageReconcileError(
            "the daemon sees other values of the environment or of an env_file than this command, so it "
            "has another plan; run apply with its values, or restart the daemon with these"
        )
    if not begun and told["refused"]:
        raise StalePlan(_REFUSED[told["refused"]])
    if told["digest"] != desired.digest:
        raise SageReconcileError("the file has changed since the plan was made; run apply again")


def nothing_moves(told: dict[str, Any], begun: float) -> bool:
    """Whether what is not ready cannot become so before another try: it failed since we began, or has no place."""
    if told["busy"]:
        return False
    for engine in told["engines"]:
        for replica in engine["replicas"]:
            ended = (replica["exit"] or {}).get("at") or 0
            failed = replica["phase"] in ("BackOff", "Stalled") and ended >= begun
            if not (replica["phase"] in ("Ready", "Degraded") or failed or replica["unplaced"]):
                return False
    return True


def conclude(document: dict[str, Any], program: str) -> int:
    """Prints how it ended, as it is; returns the exit code."""
    print()
    rendering.show_status(document, time.time())
    replicas = [replica for engine in document["engines"] for replica in engine["replicas"]]
    if document["converged"]:
        _show_use(document, program)
        return 0
    unplaced = [replica for replica in replicas if replica["unplaced"]]
    broken = [r for r in replicas if r["phase"] != "Ready" and not r["unplaced"]]
    for replica in broken:
        show_failure(replica)
    counts = [f"{len(unplaced)} cannot be placed or started"] if unplaced else []
    counts += [f"{len(broken)} not ready"] if broken else []
    rendering.error("not everything is as the file says: " + ", ".join(counts or ["changes are left"]))
    return 3 if unplaced and not broken else 1


def show_failure(replica: dict[str, Any]) -> None:
    """Prints why a replica is not ready, and the end of its log."""
    reason = f": {printable(replica['reason'])}" if replica["reason"] else ""
    print(f"\n{replica['name']} is {replica['phase']}{reason}", file=sys.stderr)
    failure = replica.get("failure")  # a daemon of an earlier version tells none
    if failure and failure["line"] and failure["line"] not in replica["reason"]:
        print(f"  {printable(failure['line'])}", file=sys.stderr)
    lines = logs.tail(Path(replica["log"]), _LOG_LINES) if replica["log"] else []
    if lines:
        print(f"The last lines of {replica['log']}:", file=sys.stderr)
        for line in lines:
            print(f"  {line}", file=sys.stderr)


def _show_use(document: dict[str, Any], program: str) -> None:
    ready = [(engine, r) for engine in document["engines"] for r in engine["replicas"] if r["phase"] == "Ready"]
    if not ready:
        return
    engine, replica = ready[0]
    body = {"model": engine["served_model_name"], "messages": [{"role": "user", "content": "Hello!"}]}
    print("\nTry it:")
    print(
        f"  curl -s {replica['endpoint']}/v1/chat/completions -H 'Content-Type: application/json' "
        f"-d {shlex.quote(json.dumps(body))}"
    )
    print("Stop it all:")
    print(f"  {program.format('down')} --yes")
