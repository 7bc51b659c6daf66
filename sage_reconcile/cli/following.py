"""Carrying a plan out and telling how it goes: here, or by the daemon that follows the file."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

from sage_reconcile.cli import rendering
from sage_reconcile.core.report import status_document
from sage_reconcile.core.resolve import values_mark
from sage_reconcile.core.spec import Desired
from sage_reconcile.core.units import printable
from sage_reconcile.errors import SageReconcileError
from sage_reconcile.host import logs, processes
from sage_reconcile.host.state import Holder, StateFolder, this_process
from sage_reconcile.reconcile import Pass

_LOG_LINES = 15
_POLL_S = 0.05


def settle_here(
    path: Path,
    state: StateFolder,
    desired: Desired,
    text: str | None,
    *,
    role: str = "apply",
    allow_moves: bool = False,
) -> dict[str, Any]:
    """Reconciles in this process until all is settled; returns the last status document.

    ``text`` is the content of the file, taken as the one in force; None where the file does not matter.

    Raises:
        LockHeld: somebody else reconciles with this state folder.
    """
    from sage_reconcile.daemon import Passes, settle

    state.take_lock(this_process(role, path))
    progress = rendering.Progress()
    last: dict[str, Any] = {}

    def on_pass(result: Pass) -> None:
        nonlocal last
        last = status_document(desired, result.observed, result.plan, result.now)
        for action, reason in result.failed:
            rendering.error(f"{action.kind} {action.replica}: {reason}")
        progress.show(last)

    async def work() -> None:
        passes = Passes(state, path.parent, os.environ)
        try:
            await settle(passes, desired, on_pass, allow_moves=allow_moves)
        finally:
            passes.close()

    try:
        if text is not None:
            state.accept(path, desired.digest, text)
        asyncio.run(work())
    except KeyboardInterrupt:
        print("\nInterrupted. What was started goes on; `sage-reconcile status` shows it.", file=sys.stderr)
        raise
    finally:
        state.release_lock()
    for engine in last.get("engines", ()):
        for replica in engine["replicas"]:
            replica["next_try_at"] = None  # nobody is left who would try
    return last


def follow_daemon(state: StateFolder, daemon: Holder, desired: Desired, *, allow_moves: bool = False) -> dict[str, Any]:
    """Has the daemon read the file again and retry what failed, and follows it until all is settled.

    Raises:
        SageReconcileError: the daemon ended, or refuses the file.
    """
    asked_before = state.read_json("status.json").get("asked", 0)
    begun = time.time()
    if allow_moves:
        state.allow_moves(desired.digest)
    if not processes.send(processes.ProcessId(daemon.pid, daemon.start_ticks), signal.SIGHUP):
        state.moves_allowed()  # nobody has heard it: no later daemon shall take it for leave
        raise SageReconcileError(f"the daemon (pid {daemon.pid}) has ended; try again")
    print(f"The daemon (pid {daemon.pid}) does it.")
    progress = rendering.Progress()
    while True:
        told = state.read_json("status.json")
        if told.get("pid") == daemon.pid and told.get("asked", 0) > asked_before:
            if told["file_error"]:
                raise SageReconcileError(told["file_error"])
            if "engines" in told:
                progress.show(told)
                _same_file(told, desired, daemon)
                if told["converged"] or _nothing_moves(told, begun):
                    return told
        if not processes.alive(processes.ProcessId(daemon.pid, daemon.start_ticks)):
            raise SageReconcileError(f"the daemon (pid {daemon.pid}) has ended; engines that run go on running")
        time.sleep(_POLL_S)


def _same_file(told: dict[str, Any], desired: Desired, daemon: Holder) -> None:
    if told["digest"] != desired.digest:
        raise SageReconcileError("the file has changed since the plan was made; run apply again")
    if told["values"] != values_mark(desired, str(daemon.pid)):
        raise SageReconcileError(
            "the daemon sees other values of the environment or of an env_file than this command, so it "
            "has another plan; run apply with its values, or restart the daemon with these"
        )


def _nothing_moves(told: dict[str, Any], begun: float) -> bool:
    """Whether what is not ready cannot become so before another try: it failed since we began, or has no place."""
    for engine in told["engines"]:
        for replica in engine["replicas"]:
            ended = (replica["exit"] or {}).get("at") or 0
            failed = replica["phase"] == "BackOff" and ended >= begun
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
        _show_failure(replica)
    counts = [f"{len(unplaced)} cannot be placed or started"] if unplaced else []
    counts += [f"{len(broken)} not ready"] if broken else []
    rendering.error("not everything is as the file says: " + ", ".join(counts or ["changes are left"]))
    return 3 if unplaced and not broken else 1


def _show_failure(replica: dict[str, Any]) -> None:
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
