"""Plans, tables and progress for people."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import typer

from sage_reconcile.core.units import printable

_COLOURS = {"+": "green", "-": "red", "~": "yellow", "!": "magenta"}
_PHASES = {"Ready": "green", "Starting": "yellow", "Stopping": "yellow", "Pending": "magenta"}
_PHASES |= dict.fromkeys(("BackOff", "Stalled", "Degraded"), "red")

_LIVE = {"utilization_percent": "%", "temperature_c": "C", "power_w": "W"}
LOAD_HEADS = ("UTIL", "TEMP", "POWER")


def colours(stream: TextIO) -> bool:
    """Whether colours are wanted: on a terminal, and NO_COLOR is not set (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def show_plan(text: str) -> None:
    """Prints the text of a plan, its lines coloured by their sign."""
    for raw in text.rstrip("\n").split("\n"):
        line = printable(raw)
        colour = _COLOURS.get(line[:1]) if line[1:2] == " " and colours(sys.stdout) else None
        print(typer.style(line, fg=colour) if colour else line)


def show_difference(line: str) -> None:
    """Prints a line of a unified diff in its colour."""
    colour = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1]) if colours(sys.stdout) else None
    print(typer.style(printable(line), fg=colour) if colour else printable(line))


def error(message: str) -> None:
    """Prints an error where it belongs."""
    prefix = typer.style("error:", fg="red", bold=True) if colours(sys.stderr) else "error:"
    print(f"{prefix} {message}", file=sys.stderr)


def note(message: str) -> None:
    """Prints something to know that is no result."""
    print(f"note: {printable(message)}", file=sys.stderr)


def show_status(document: Mapping[str, Any], now: float) -> None:
    """Prints engines, replicas and GPUs as tables."""
    replicas = [(engine, replica) for engine in document["engines"] for replica in engine["replicas"]]
    if replicas:
        show_replicas(replicas, now)
    else:
        print("No engine runs, and none is wanted.")
    if document["gpus"]:
        print()
        _gpu_table(document["gpus"])
    if host := document.get("host_memory"):  # a daemon of an older version tells none
        taken = {name: gib(host[f"{name}_mib"]) for name in ("promised", "unmanaged", "kept_back", "free", "total")}
        print(
            f"\nHost memory: {taken['free']} of {taken['total']} free (promised {taken['promised']}, "
            f"others {taken['unmanaged']}, kept back {taken['kept_back']})"
        )
    for text in document["notes"]:
        print(f"note: {printable(text)}")


def show_replicas(replicas: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], now: float | None = None) -> None:
    """Prints replicas, each with its engine, as a table, and below it why some are not ready."""
    now = time.time() if now is None else now
    rows = [
        (
            replica["name"],
            str(engine["model"] or ""),
            replica["phase"] + (f" ({replica['stage']})" if replica["stage"] else ""),
            ",".join("?" if gpu["index"] is None else str(gpu["index"]) for gpu in replica["gpus"]) or "-",
            _memory(replica),
            _held(replica),
            str(replica["port"] or "-"),
            str(replica["pid"] or "-"),
            str(replica["restarts"]),
            _age(now - replica["started_at"]) if replica["started_at"] else "-",
        )
        for engine, replica in replicas
    ]
    heads = ("REPLICA", "MODEL", "PHASE", "GPUS", "MEMORY", "HOLDS", "PORT", "PID", "RESTARTS", "SINCE")
    table(heads, rows)
    for _, replica in replicas:
        if reason := _reason(replica, now):
            print(f"  {replica['name']}: {printable(reason)}")
        if memory := _measured(replica):
            print(f"  {replica['name']}: {memory}")


def _memory(replica: Mapping[str, Any]) -> str:
    """Of each GPU; of the host where it has none."""
    return gib((replica["memory_mib"] if replica["gpus"] else replica.get("host_memory_mib")) or None)


def _held(replica: Mapping[str, Any]) -> str:
    held = replica["memory"]["held_mib"] if replica["memory"] else None
    return "-" if held is None else gib(held)


def _measured(replica: Mapping[str, Any]) -> str:
    """What was measured of a replica that is ready, beside what was estimated before; empty where one is not known."""
    memory = replica["memory"] or {}
    before, seen = memory.get("estimated"), memory.get("measured")
    if replica["phase"] != "Ready" or not (before and seen):
        return ""
    pairs = (
        ("weights", "weights_mib", gib),
        ("beside its KV cache", "beside_kv_mib", gib),
        ("tokens in it", "kv_tokens", "{:,}".format),
    )
    told = (
        f"{name} {show(seen[key])} (estimated {show(before[key])})"
        for name, key, show in pairs
        if seen[key] and before[key]
    )
    return ", ".join(told)


def _reason(replica: Mapping[str, Any], now: float) -> str:
    reason = str(replica["reason"])
    if replica["phase"] == "Stalled":
        reason += "; not tried again until its entry changes, or with `apply`"
    if replica["next_try_at"] is not None:
        reason += f"; next try in {max(0.0, replica['next_try_at'] - now):.0f}s"
    return reason


def _gpu_table(gpus: Sequence[Mapping[str, Any]]) -> None:
    live = any(value is not None for gpu in gpus for value in map(gpu.get, _LIVE))
    rows = []
    for gpu in gpus:
        state = (gpu["problem"], "excluded" if gpu["excluded"] else "", ", ".join(map(stranger, gpu["unmanaged"])))
        rows.append(
            (
                str(gpu["index"]),
                gpu["name"] + (" (simulated)" if gpu["simulated"] else ""),
                *(gib(gpu[f"memory_{kind}_mib"]) for kind in ("total", "promised", "used", "free")),
                gib(gpu["unmanaged_mib"]),
                *(load(gpu) if live else ()),
                "; ".join(text for text in state if text),
            )
        )
    heads = ("GPU", "MODEL", "TOTAL", "PROMISED", "USED", "FREE", "UNMANAGED")
    table((*heads, *(LOAD_HEADS if live else ()), ""), rows)


def gib(mib: int | None) -> str:
    """MiB as GiB; ``-`` where it is not known."""
    return "-" if mib is None else f"{mib / 1024:.1f}GiB"


def load(gpu: Mapping[str, Any]) -> tuple[str, ...]:
    """Utilisation, temperature and power of a GPU; ``-`` what is not known."""
    values = ((gpu.get(name), unit) for name, unit in _LIVE.items())
    return tuple("-" if value is None else f"{value:.0f}{unit}" for value, unit in values)


def stranger(process: Mapping[str, Any]) -> str:
    """``pid 812 alice python 12.0GiB``: a process on a GPU that is not ours."""
    held = process["memory_mib"]
    size = "? MiB" if held is None else f"{held}MiB" if held < 1024 else gib(held)
    return " ".join(part for part in (f"pid {process['pid']}", process["user"], process["command"], size) if part)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they must be, on one line each whatever the terminal's width: fit for grep and cut."""
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, show_edge=False, header_style="bold")
    for head in heads:
        grid.add_column(head, no_wrap=True, overflow="ignore")
    shown = [[printable(cell) for cell in row] for row in rows]
    for row in shown:
        grid.add_row(*(Text(cell, style=_PHASES.get(cell.split(" ")[0], "")) for cell in row))
    wide = max(sum(max(cell_len(row[i]) for row in [heads, *shown]) + 2 for i in range(len(heads))), 20)
    Console(width=wide, no_color=not colours(sys.stdout), highlight=False).print(grid)


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f}{unit}"
    return f"{max(0.0, seconds):.0f}s"


class Progress:
    """Tells by line how replicas come along: from status documents, each change once."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._told: dict[str, tuple[str, ...]] = {}
        self._spawned: set[str] = set()

    def show(self, document: Mapping[str, Any]) -> None:
        """Prints what has changed since the last document."""
        for engine in document["engines"]:
            for replica in engine["replicas"]:
                now = (
                    replica["phase"],
                    replica["stage"],
                    replica["reason"],
                    str(replica["launch"]),
                    str(replica["pid"]),
                )
                before = self._told.get(replica["name"])
                if before == now:
                    continue
                self._told[replica["name"]] = now
                if before is None and replica["phase"] == "Ready":
                    continue  # was ready before we came
                if words := self._words(replica):
                    print(f"{self._stamp()}  {replica['name']:<20} {words}", flush=True)
        running = {replica["name"] for engine in document["engines"] for replica in engine["replicas"]}
        for name in self._told.keys() - running:
            del self._told[name]
            print(f"{self._stamp()}  {name:<20} stopped", flush=True)

    def _stamp(self) -> str:
        return f"{time.monotonic() - self._begun:6.1f}s"

    def _words(self, replica: Mapping[str, Any]) -> str:
        words = str(replica["phase"]).lower()
        if replica["phase"] == "Starting" and replica["launch"] not in self._spawned:
            if not replica["pid"]:
                return ""
            self._spawned.add(replica["launch"])
            gpus = ",".join(str(gpu["index"]) for gpu in replica["gpus"])
            words = f"spawned, pid {replica['pid']}, {f'GPU {gpus}' if gpus else 'CPU'}, port {replica['port']}"
        elif replica["phase"] == "Starting" and not replica["stage"]:
            words = "loading"
        if replica["stage"]:
            words += f": {replica['stage']}"
        if replica["phase"] == "Ready":
            words += f" at {replica['endpoint']}"
        if replica["phase"] == "Degraded" and replica["reason"]:
            words += f": {printable(replica['reason'])}"
        if replica["phase"] in ("Pending", "BackOff", "Stalled"):
            told = replica["reason"] and (replica["phase"] != "Pending" or replica["unplaced"])
            words = f"{words}: {printable(replica['reason'])}" if told else ""
        return words
