"""What a benchmark yields, and the table that shows it."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One line of the table. ``target`` is an upper limit in the same unit; ``beside`` are other programs' numbers."""

    what: str
    measured: float
    unit: str
    target: float | None = None
    beside: str = ""


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def p99(values: Sequence[float]) -> float:
    """The value that 99 of 100 do not exceed; of few values the largest."""
    ordered = sorted(values)
    return ordered[max(0, -(-99 * len(ordered) // 100) - 1)]


def machine() -> str:
    """What else the machine is doing: numbers from a busy one say little."""
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{os.cpu_count()} cores, load {load}"


def table(figures: Sequence[Figure]) -> str:
    rows = [("WHAT", "MEASURED", "TARGET", "", "BESIDE")]
    for figure in figures:
        target, verdict = "", ""
        if figure.target is not None:
            target, verdict = f"< {_number(figure.target)}", "ok" if figure.measured < figure.target else "MISSED"
        rows.append((figure.what, f"{_number(figure.measured)} {figure.unit}", target, verdict, figure.beside))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def show(measure: Callable[[], list[Figure]]) -> None:
    """Runs one benchmark and prints its table."""
    print(f"before: {machine()}", flush=True)
    figures = measure()
    print(table(figures))
    print(f"after: {machine()}", flush=True)
