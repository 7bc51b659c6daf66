"""The benchmarks run and yield numbers. How large those are is for their table to show, not for a test."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.benchmarks import cold_diff, core_pass, edit_to_exec, idle, placement
from tests.benchmarks.figures import Figure, p99, table


@pytest.mark.parametrize(
    "measure",
    [
        lambda: core_pass.measure(counts=(3,), rounds=2),
        lambda: edit_to_exec.measure(edits=1, count=1, beside=False),
        lambda: cold_diff.measure(rounds=1, count=1, beside=False),
        lambda: placement.measure(boxes=2, checked=0, count=5),
        lambda: idle.measure(seconds=0.2, count=1, beside=False, quiet_s=0),
    ],
    ids=["core_pass", "edit_to_exec", "cold_diff", "placement", "idle"],
)
def test_a_benchmark_yields_numbers(measure: Callable[[], list[Figure]]) -> None:
    figures = measure()
    assert figures
    assert all(figure.measured > 0 for figure in figures), table(figures)


def test_the_table_says_what_misses_its_target() -> None:
    text = table(
        [Figure("one", 5.0, "ms", 10.0), Figure("two", 15.0, "ms", 10.0, "other 3 ms"), Figure("three", 1, "/s")]
    )
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["one", "5", "ms", "<", "10", "ok"],
        ["two", "15", "ms", "<", "10", "MISSED", "other", "3", "ms"],
        ["three", "1", "/s"],
    ]


def test_p99_of_few_values_is_the_largest() -> None:
    assert p99([3.0, 1.0, 2.0]) == 3.0
    assert p99(list(range(1, 201))) == 198
