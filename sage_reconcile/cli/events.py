"""``events``: what happened, to whom, and why."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer

from sage_reconcile.cli import rendering
from sage_reconcile.cli.commands import state_folder
from sage_reconcile.core.events import BAD, selected
from sage_reconcile.core.units import printable
from sage_reconcile.errors import NotFound
from sage_reconcile.host.journal import Journal

_POLL_S = 0.2


def events(name: str, state_dir: Path | None, since_s: float | None, *, lines: int, follow: bool, as_json: bool) -> int:
    """Prints the last events, of all or of one engine or replica, and goes on as more come.

    Raises:
        NotFound: there is nothing of this name.
    """
    journal = Journal(state_folder(state_dir).events)
    steps = journal.follow()
    everything = next(steps)
    since = 0.0 if since_s is None else time.time() - since_s
    if name and not follow and not any(selected(event, name, 0.0) for event in everything):
        known = dict.fromkeys(str(event["engine"]) for event in everything if event.get("engine"))
        told = f"there are some of {', '.join(known)}" if known else "there are none at all yet"
        raise NotFound(f"{name} has no events in {journal.path}; {told}")
    found = [event for event in everything if selected(event, name, since)]
    _show(found[-lines:] if lines else [], as_json=as_json)
    while follow:
        time.sleep(_POLL_S)
        _show((event for event in next(steps) if selected(event, name, 0.0)), as_json=as_json)
    return 0


def _show(found: Iterable[Mapping[str, Any]], *, as_json: bool) -> None:
    for event in found:
        print(json.dumps(event) if as_json else _line(event))
    sys.stdout.flush()


def _line(event: Mapping[str, Any]) -> str:
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["at"]))
    kind = f"{event['type']:<13}"
    if event["type"] in BAD and rendering.colours(sys.stdout):
        kind = typer.style(kind, fg="red")
    return f"{stamp}  {kind}  {event.get('replica') or '-':<16}  {printable(str(event.get('message') or ''))}".rstrip()
