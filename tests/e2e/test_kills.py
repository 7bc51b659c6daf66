"""Kills of the reconciling process and of engines, at any moment; at length by ``python -m tests.e2e.kills``."""

from __future__ import annotations

import pytest

from tests.e2e.box import Box
from tests.e2e.kills import kill_engines, kill_the_reconciler


@pytest.mark.parametrize(
    ("how", "seed", "count"),
    [("daemon", 1, 15), ("daemon", 2, 15), ("running daemon", 3, 20), ("apply", 4, 10), ("apply", 5, 10)],
)
def test_a_kill_at_any_moment_loses_nothing_doubles_nothing_and_leaves_nothing(
    box: Box, how: str, seed: int, count: int
) -> None:
    stages = kill_the_reconciler(box, how, seed, count)
    assert stages["under way"] >= count // 3, stages


def test_parts_of_engines_that_are_killed_come_back_whole_and_nothing_else_is_touched(box: Box) -> None:
    roles = kill_engines(box, 6, 24)
    assert set(roles) == {"server", "EngineCore", "Worker", "shell"}, roles
