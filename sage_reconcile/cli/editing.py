"""What ``engine start|stop|restart|scale|set`` have in common: the file is edited, and who follows it is told."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sage_reconcile.cli import asking, commands, rendering
from sage_reconcile.core.changes import Change, Present
from sage_reconcile.core.drift import differences
from sage_reconcile.core.plan_text import plan_text
from sage_reconcile.core.report import plan_document
from sage_reconcile.core.units import printable
from sage_reconcile.errors import EditRefused
from sage_reconcile.host.edits import Edited, edit
from sage_reconcile.host.local import LocalHost
from sage_reconcile.host.state import Holder, StateFolder
from sage_reconcile.reconcile import Pass, look

VERSION = 1


@dataclass(frozen=True, slots=True)
class Asked:
    """A verb, and how it shall go. ``decide`` gives the name of the engine, and what has to be written."""

    verb: str
    decide: Callable[[Present], tuple[str, Sequence[Change]]]
    wait: bool = False
    dry_run: bool = False
    as_json: bool = False


def edit_file(asked: Asked, given: Path | None, state_dir: Path | None) -> int:
    """Edits the file as a verb asks, tells what came of it, and waits for it where that is asked for."""
    path, state = commands.file_path(given), commands.state_folder(state_dir)
    holding = state.holder()
    daemon = holding if holding and holding.role == "daemon" and holding.file == str(path) else None
    if asked.wait and daemon is None:
        raise EditRefused(
            f"nothing was written: {_nobody(path, holding)}, so waiting would never end; leave out --wait, and let "
            "`sage-reconcile apply` do it, or start the daemon with `sage-reconcile run`"
        )
    name = ""

    def decide(present: Present) -> Sequence[Change]:
        nonlocal name
        name, found = asked.decide(present)
        return found

    edited = edit(path, os.environ, decide, write=not asked.dry_run)
    document = _document(edited, name, state, daemon, asked)
    if asked.dry_run:
        return _show_try(asked, edited, document, path, state)
    if not asked.as_json:
        _tell(asked, document)
    if daemon is None and edited.is_change:
        rendering.note(
            f"{_nobody(path, holding)}; nothing changes on the machine until `sage-reconcile apply`, or "
            "`sage-reconcile run`"
        )
    code = 0
    if asked.wait and daemon is not None:
        from sage_reconcile.cli.waiting import wait_for

        code, document["status"] = wait_for(path, state, daemon, name, quiet=asked.as_json)
    if asked.as_json:
        print(json.dumps(document, indent=2))
    return code


def _nobody(path: Path, holding: Holder | None) -> str:
    if holding is None:
        return f"no daemon follows {commands.short(path)}"
    if holding.role == "daemon":
        return f"the daemon (pid {holding.pid}) follows {holding.file}, not {commands.short(path)}"
    return f"{holding.text()} is at work with what the file said before, and no daemon follows it"


def _document(edited: Edited, name: str, state: StateFolder, daemon: Holder | None, asked: Asked) -> dict[str, Any]:
    before, after = edited.before.desired.engine(name), edited.after.desired.engine(name)
    found = differences(before, after) if after is not None else ()
    return {
        "version": VERSION,
        "file": str(edited.path),
        "engine": name,
        "changed": edited.is_change,
        "dry_run": asked.dry_run,
        "added": before is None and after is not None,
        "removed": before is not None and after is None,
        "changes": [{"field": one.field, "old": one.old, "new": one.new} for one in found],
        "difference": edited.difference() if edited.is_change else "",
        "generation": state.generation(edited.after.desired.digest)[0],
        "daemon": {"pid": daemon.pid, "since": daemon.since} if daemon else None,
        "plan": None,
        "status": None,
    }


def _tell(asked: Asked, document: dict[str, Any]) -> None:
    """For people what has changed; scripts get nothing, or the name that was made."""
    name = document["engine"]
    if not sys.stdout.isatty():
        if asked.verb == "start":
            print(name)
        return
    if document["removed"]:
        print(f"{name}: taken out of the file")
    elif not document["changed"]:
        print(f"{name}: the file says so already")
    for change in document["changes"]:
        old = "" if document["added"] else f"{change['old'] or '(not set)'} -> "
        print(f"{name}: {change['field']}: {printable(old + (change['new'] or '(not set)'))}")


def _show_try(asked: Asked, edited: Edited, document: dict[str, Any], path: Path, state: StateFolder) -> int:
    desired = edited.after.desired
    host = LocalHost(state, path.parent, os.environ, hub=asking.hub_for(desired, path.parent))
    seen: Pass = look(host, desired, tried=commands.tried(state))
    code = commands.UNPLACED if seen.plan.unplaced else 0
    if asked.as_json:
        print(json.dumps({**document, "plan": plan_document(seen.plan)}, indent=2))
        return code
    if not edited.is_change:
        print(f"{document['engine']}: the file says so already.\n")
    for line in document["difference"].splitlines():
        rendering.show_difference(line)
    if document["difference"]:
        print()
    rendering.show_plan(plan_text(seen.plan, seen.now))
    return code
