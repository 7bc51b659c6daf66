"""All benchmarks, one table."""

from __future__ import annotations

from tests.benchmarks import cold_diff, core_pass, edit_to_exec, idle, placement
from tests.benchmarks.figures import Figure, show


def measure() -> list[Figure]:
    return [
        figure
        for benchmark in (edit_to_exec.measure, core_pass.measure, cold_diff.measure, idle.measure, placement.measure)
        for figure in benchmark()
    ]


if __name__ == "__main__":
    show(measure)
