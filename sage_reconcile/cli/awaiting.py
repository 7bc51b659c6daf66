"""``wait``: for scripts, until an engine is ready or gone, or cannot become so, or the time is over."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from sage_reconcile.cli import rendering
from sage_reconcile.cli.commands import file_path, read_status, state_folder
from sage_reconcile.core.awaiting import Goal, Verdict, verdict
from sage_reconcile.core.guard import held_text
from sage_reconcile.core.units import printable
from sage_reconcile.errors import FileFaults, SageReconcileError
from sage_reconcile.host import files
from sage_reconcile.host.state import Holder, StateFolder

TIMED_OUT = 124
"""As ``timeout`` ends."""
_LOOK_S = 0.2
"""So often the daemon's report is read, which costs next to nothing."""
_LOOK_HERE_S = 1.0
"""So often the machine is looked at where no daemon reports."""


def wait(given: Path | None, state_dir: Path | None, name: str, goal: Goal, timeout_s: float) -> int:
    """``wait``: 0 when it has come, 1 where it cannot, 124 when the time is over."""
    path, state = file_path(given), state_folder(state_dir)
    deadline = time.monotonic() + timeout_s
    while True:
        holding = state.holder()
        by_daemon = holding is not None and holding.role == "daemon"
        found = _told(path, state, holding, name, goal) if by_daemon else _seen(path, state, holding, name, goal)
        if found.come:
            print(f"{name or 'everything'} is {goal}.")
            return 0
        why = printable(found.why)
        if found.hopeless:
            rendering.error(why)
            return 1
        left = deadline - time.monotonic()
        if left <= 0:
            print(f"timed out after {timeout_s:g}s: {why}", file=sys.stderr)
            return TIMED_OUT
        time.sleep(min(left, _LOOK_S if by_daemon else _LOOK_HERE_S))


def _told(path: Path, state: StateFolder, daemon: Holder | None, name: str, goal: Goal) -> Verdict:
    """As the daemon reports, once it has taken in the file as it is now."""
    told = state.read_json("status.json")
    if daemon is None or told.get("pid") != daemon.pid:
        return Verdict(why="the daemon has not looked yet")
    if daemon.file != str(path):
        raise SageReconcileError(f"the daemon (pid {daemon.pid}) follows {daemon.file}, not {path}; name it with -f")
    try:
        digest = files.load(path, os.environ).desired.digest
    except FileFaults as error:
        if told.get("file_error"):
            return Verdict(hopeless=True, why=str(error))
        digest = str(told.get("digest"))  # it has variables of the file that we do not have
    held = state.held(path, digest)
    if held is not None:
        why = held_text(held.replicas, held.running, held.guard)
        return Verdict(hopeless=True, why=f"the file is held back: {why}; confirm it with `sage-reconcile apply`")
    if told.get("digest") != digest or "engines" not in told:
        return Verdict(why="the daemon has not taken in the file as it is now")
    return verdict(told, name, goal, reconciled=True)


def _seen(path: Path, state: StateFolder, holding: Holder | None, name: str, goal: Goal) -> Verdict:
    """As it is now, where no daemon tells."""
    document: dict[str, Any] = read_status(path, state)
    if document["file_error"]:
        return Verdict(hopeless=True, why=document["file_error"])
    return verdict(document, name, goal, reconciled=holding is not None)
