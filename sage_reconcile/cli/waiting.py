"""Waiting until the daemon has done for one engine what the file asks."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from sage_reconcile.cli import following, rendering
from sage_reconcile.core.guard import held_text
from sage_reconcile.core.report import status_document
from sage_reconcile.errors import SageReconcileError
from sage_reconcile.host import files, processes
from sage_reconcile.host.local import LocalHost
from sage_reconcile.host.state import Holder, StateFolder
from sage_reconcile.reconcile import look

_POLL_S = 0.1


def wait_for(
    path: Path, state: StateFolder, daemon: Holder, engine_name: str, *, quiet: bool
) -> tuple[int, dict[str, Any] | None]:
    """Until an engine is as the file says, or cannot become so; the exit code, and the engine's status.

    Whoever edits the file meanwhile changes what is waited for.

    Raises:
        SageReconcileError: the daemon ended, refuses the file, or holds it back.
    """
    begun, progress = time.time(), rendering.Progress()
    while True:
        told = state.read_json("status.json")
        loaded = files.load(path, os.environ)
        if told.get("pid") == daemon.pid and told.get("file_error"):
            raise SageReconcileError(told["file_error"])
        if held := state.held(path, loaded.desired.digest):
            why = held_text(held.replicas, held.running, held.guard)
            raise SageReconcileError(
                f"the file is changed, and the daemon holds it back: {why}. If that is meant, `sage-reconcile apply` "
                "has it done"
            )
        if told.get("pid") == daemon.pid and told.get("digest") == loaded.desired.digest:
            seen = look(LocalHost(state, path.parent, os.environ), loaded.desired)
            document = status_document(loaded.desired, seen.observed, seen.plan, seen.now)
            mine = [row for row in document["engines"] if row["name"] == engine_name]
            if not quiet:
                progress.show({"engines": mine})
            under_way = any(action.replica.rpartition("/")[0] == engine_name for action in seen.plan.actions)
            row = mine[0] if mine else None
            if not under_way and _is_there(row):
                return 0, row
            if row and following.nothing_moves({**told, "engines": [row]}, begun):
                return _failed(row, quiet=quiet), row
        if not processes.alive(processes.ProcessId(daemon.pid, daemon.start_ticks)):
            raise SageReconcileError(
                f"the daemon (pid {daemon.pid}) has ended; the file is changed: `sage-reconcile apply` does the rest"
            )
        time.sleep(_POLL_S)


def _is_there(row: dict[str, Any] | None) -> bool:
    return row is None or (row["ready"] == row["desired"] == len(row["replicas"]))


def _failed(row: dict[str, Any], *, quiet: bool) -> int:
    broken = [replica for replica in row["replicas"] if replica["phase"] != "Ready"]
    for replica in () if quiet else broken:
        following.show_failure(replica)
    return 3 if broken and all(replica["unplaced"] for replica in broken) else 1
