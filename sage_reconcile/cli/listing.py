"""``engine list`` and ``engine show``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sage_reconcile.cli import commands, rendering
from sage_reconcile.core.spec import EngineSpec
from sage_reconcile.core.units import printable
from sage_reconcile.errors import FileFaults, NotFound
from sage_reconcile.host import files

VERSION = 1
_OWN = ("version", "file", "file_error", "generation", "observed_generation", "daemon")


def list_engines(given: Path | None, state_dir: Path | None, *, as_json: bool) -> int:
    """``engine list``."""
    status = commands.read_status(commands.file_path(given), commands.state_folder(state_dir))
    document = {key: status[key] for key in (*_OWN, "engines")}
    if as_json:
        print(json.dumps(document, indent=2))
        return 0
    if document["file_error"]:
        rendering.error(f"{document['file_error']}\nWhat was valid last is shown.")
    if not document["engines"]:
        print("The file names no engine, and none runs.")
        return 0
    rows = [
        (
            row["name"],
            str(row["model"] or "-"),
            f"{row['ready']}/{row['desired']}",
            _phases(row),
            ",".join(sorted({str(gpu["index"]) for one in row["replicas"] for gpu in one["gpus"]})) or "-",
            ",".join(str(one["port"]) for one in row["replicas"] if one["port"]) or "-",
        )
        for row in document["engines"]
    ]
    rendering.table(("ENGINE", "MODEL", "READY", "STATE", "GPUS", "PORTS"), rows)
    return 0


def _phases(row: Mapping[str, Any]) -> str:
    """Stopped where none is wanted and none is there; else the phases of its replicas, each once."""
    phases = list(dict.fromkeys(replica["phase"] for replica in row["replicas"]))
    return ", ".join(phases) or ("Stopped" if not row["desired"] else "Pending")


def show_engine(given: Path | None, state_dir: Path | None, name: str, *, as_json: bool) -> int:
    """``engine show``."""
    path, state = commands.file_path(given), commands.state_folder(state_dir)
    status = commands.read_status(path, state)
    row = next((row for row in status["engines"] if row["name"] == name), None)
    if row is None:
        raise NotFound(f"there is no engine {name!r}; {commands.engines_hint(given)}")
    spec = _spec(path, name) if not status["file_error"] else None
    document = {**{key: status[key] for key in _OWN}, "engine": row, "spec": spec}
    if as_json:
        print(json.dumps(document, indent=2))
        return 0
    if status["file_error"]:
        rendering.error(status["file_error"])
    print(f"{name}: {row['ready']} of {row['desired']} ready, in {commands.short(path)}")
    usual = EngineSpec.model_construct().model_dump(mode="json")
    for field, value in (spec or {}).items():
        if value != usual[field]:
            print(f"  {field}: {printable(value if isinstance(value, str) else json.dumps(value))}")
    if spec is None and not status["file_error"]:
        print("  it is not in the file")
    if row["replicas"]:
        print()
        rendering.show_replicas([(row, replica) for replica in row["replicas"]])
    return 0


def _spec(path: Path, name: str) -> dict[str, object] | None:
    try:
        engine = files.load(path, os.environ).desired.engine(name)
    except FileFaults:
        return None
    return {name: value for name, value in engine.record.items() if value is not None} if engine else None
