"""The command ``explain``: why a replica is where it is, or nowhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sage_reconcile.cli import asking, commands, rendering
from sage_reconcile.core.explain import Explanation, HostVerdict, Verdict, explain
from sage_reconcile.core.plan_text import breakdown_lines, proposal_lines
from sage_reconcile.core.report import breakdown_document, proposal_document
from sage_reconcile.core.spec import Desired
from sage_reconcile.core.units import printable
from sage_reconcile.errors import NotFound
from sage_reconcile.host import files
from sage_reconcile.host.local import LocalHost
from sage_reconcile.host.models import unread
from sage_reconcile.reconcile import look

VERSION = 1


def explain_name(given: Path | None, state_dir: Path | None, name: str, *, as_json: bool) -> int:
    """``explain``. Ends with 0 where all of it has a place, else with 3.

    Raises:
        NotFound: the file names no engine, and no replica, of that name.
    """
    path, state = commands.file_path(given), commands.state_folder(state_dir)
    desired = files.load(path, os.environ).desired
    engine = desired.engine(name.partition("/")[0])
    if engine is None:
        raise NotFound(f"there is no engine {name.partition('/')[0]!r}; {commands.engines_hint(given)}")
    hub = asking.hub_for(Desired(desired.host, (engine,)), path.parent)
    seen = look(LocalHost(state, path.parent, os.environ, hub=hub), desired, tried=commands.tried(state))
    found = explain(desired, seen.observed, seen.plan, name)
    if not found:
        count = engine.spec.replicas
        has = f"it has {engine.name}/0 to {engine.name}/{count - 1}" if count else "its `replicas` is 0"
        raise NotFound(f"there is no replica {name!r}; {has}")
    if as_json:
        print(json.dumps({"version": VERSION, "replicas": [_document(item) for item in found]}, indent=2))
    else:
        for number, item in enumerate(found):
            print("\n" * bool(number), end="")
            _show(item)
    for text in unread(Desired(desired.host, (engine,)), seen.observed.models):
        rendering.note(text)
    return commands.UNPLACED if not all(item.placed for item in found) else 0


def _show(item: Explanation) -> None:
    for line in (f"{item.replica} {item.outcome}", *(f"  {reason}" for reason in item.why)):
        print(printable(line))
    for line in breakdown_lines(item.made_of) if item.made_of else ():
        print(f"  {line}")
    if item.verdicts:
        print()
        heads = ("GPU", "FREE", "NEEDS", "", "VERDICT")
        rows = [(_label(x), rendering.gib(x.free_mib), _need(x), "->" * x.chosen, x.text) for x in item.verdicts]
        rendering.table(heads, rows)
    if item.host is not None:
        print(f"\nHost memory: needs {rendering.gib(item.host.need_mib)}, {item.host.text}")
    if item.proposal is not None:
        print()
        for line in proposal_lines(item.proposal):
            print(printable(line))


def _label(verdict: Verdict) -> str:
    return f"{verdict.gpu.index} {verdict.gpu.name}"


def _need(verdict: Verdict) -> str:
    return "?" if verdict.need_mib is None else rendering.gib(verdict.need_mib)


def _host(verdict: HostVerdict) -> dict[str, Any]:
    return {"free_mib": verdict.free_mib, "need_mib": verdict.need_mib, "verdict": verdict.text}


def _document(item: Explanation) -> dict[str, Any]:
    return {
        "replica": item.replica,
        "outcome": item.outcome,
        "placed": item.placed,
        "why": list(item.why),
        "gpus": [
            {
                "index": verdict.gpu.index,
                "uuid": verdict.gpu.uuid,
                "name": verdict.gpu.name,
                "free_mib": verdict.free_mib,
                "need_mib": verdict.need_mib,
                "chosen": verdict.chosen,
                "verdict": verdict.text,
            }
            for verdict in item.verdicts
        ],
        "host_memory": None if item.host is None else _host(item.host),
        "made_of": None if item.made_of is None else breakdown_document(item.made_of),
        "proposal": None if item.proposal is None else proposal_document(item.proposal),
    }
