"""All benchmarks, one table."""

from __future__ import annotations

from tests.benchmarks import cold_diff, core_pass, edit_to_exec, idle, moves, placement
from tests.benchmarks.figures import Figure, show


def measure() -> list[Figure]:
    rooms = (edit_to_exec, core_pass, cold_diff, idle, placement, moves)
    return [figure for room in rooms for figure in room.measure()]


if __name__ == "__main__":
    show(measure)
