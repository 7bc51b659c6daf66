"""The command ``gpu``: the inventory as a table, and how the GPUs are joined."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sage_reconcile.cli import commands, rendering
from sage_reconcile.core.gpu_report import gpu_document
from sage_reconcile.core.host_spec import HostSpec
from sage_reconcile.core.memory import Occupancy
from sage_reconcile.core.plan_text import bar
from sage_reconcile.core.spec import Desired
from sage_reconcile.core.units import printable
from sage_reconcile.errors import FileFaults
from sage_reconcile.host import files
from sage_reconcile.host.local import LocalHost


def gpu(given: Path | None, state_dir: Path | None, as_json: bool, *, topology: bool) -> int:
    """``gpu``."""
    path, state = commands.file_path(given), commands.state_folder(state_dir)
    file_error, stays = "", ""
    try:
        desired = files.load(path, os.environ).desired
    except FileFaults as error:
        last = commands.last_good(path, state)
        desired = last or Desired(HostSpec(), ())
        file_error = str(error)
        stays = "what was valid last is taken" if last else "so no headroom and no exclusion is known"
    document = {
        "file": str(path),
        "file_error": file_error,
        **gpu_document(desired.host, LocalHost(state, path.parent, os.environ).observe(desired)),
    }
    if as_json:
        print(json.dumps(document, indent=2))
        return 0
    if file_error:
        what = "is not valid (see `sage-reconcile validate`)" if path.exists() else "is not there"
        rendering.note(f"{commands.short(path)} {what}, {stays}")
    _show(document)
    if topology and document["gpus"]:
        print()
        _show_topology(document)
    return 0


def _show(document: Mapping[str, Any]) -> None:
    gpus = document["gpus"]
    if not gpus:
        print("No GPUs" + (f": {printable(document['note'])}" if document["note"] else "."))
        return
    heads = ("GPU", "MODEL", "MEMORY", "FREE", *rendering.LOAD_HEADS, "STATE", "ON IT")
    rows = [
        (
            str(row["index"]),
            row["name"] + (" (simulated)" if row["simulated"] else ""),
            _bar(row),
            rendering.gib(row["memory_free_mib"]),
            *rendering.load(row),
            _state(row),
            ", ".join(_on_it(row)) or "-",
        )
        for row in gpus
    ]
    rendering.table(heads, rows)
    for row in gpus:
        if row["problem"]:
            print(f"  GPU {row['index']}: {printable(row['problem'])}")
    print("# ours, + not ours, - reserve and headroom, . free")
    if document["note"]:
        print(f"note: {printable(document['note'])}")


def _bar(row: Mapping[str, Any]) -> str:
    ours = tuple((x["replica"], max(x["promised_mib"], x["held_mib"] or 0)) for x in row["engines"])
    kept_back = row["memory_reserved_mib"] + row["memory_headroom_mib"]
    taken = Occupancy(row["memory_total_mib"] or 0, kept_back, ours, row["unmanaged_mib"] or 0)
    return bar(taken, told=row["memory_used_mib"] is not None)


def _state(row: Mapping[str, Any]) -> str:
    """In a word or two; a problem is told in full below the table."""
    words = ["faulty" if row["faulty"] else "takes nothing new"] if row["problem"] else []
    return ", ".join([*words, *(["excluded"] if row["excluded"] else [])]) or "ok"


def _on_it(row: Mapping[str, Any]) -> list[str]:
    ours = [f"{x['replica']} {rendering.gib(max(x['promised_mib'], x['held_mib'] or 0))}" for x in row["engines"]]
    named = sum(process["memory_mib"] or 0 for process in row["unmanaged"])
    unnamed = (row["unmanaged_mib"] or 0) - named
    strangers = [rendering.stranger(process) for process in row["unmanaged"]]
    if unnamed >= 1024 or (unnamed > 0 and not strangers):
        strangers.append(f"not told of whom {rendering.gib(unnamed)}")
    return [*ours, *strangers]


def _show_topology(document: Mapping[str, Any]) -> None:
    """The matrix of ``nvidia-smi topo -m``."""
    gpus = document["gpus"]
    links = {frozenset(link["between"]): link for link in document["links"]}
    names = [f"GPU{row['index']}" for row in gpus]
    rows = [
        (
            name,
            *(_link(row, other, links) for other in gpus),
            _known(row["numa_node"]),
            _known(row["compute_capability"]),
        )
        for name, row in zip(names, gpus, strict=True)
    ]
    rendering.table(("", *names, "NUMA", "COMPUTE"), rows)
    print(
        "X itself, NV# that many NVLinks, PIX one PCIe bridge at most, PXB several, PHB the CPU's host bridge, "
        "NODE several of those in one NUMA node, SYS between NUMA nodes, ? not known"
    )


def _link(row: Mapping[str, Any], other: Mapping[str, Any], links: Mapping[frozenset[str], Mapping[str, Any]]) -> str:
    if row is other:
        return "X"
    link = links.get(frozenset((row["uuid"], other["uuid"])))
    if link is None:
        return "?"
    return f"NV{_known(link['nvlinks'], '?')}" if link["link"] == "nvlink" else str(link["link"]).upper()


def _known(value: object, unknown: str = "-") -> str:
    return unknown if value is None else str(value)
