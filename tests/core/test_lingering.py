"""Memory that is not back yet: how much of what a GPU shows as used is taken for that of what has just ended there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sage_reconcile.core.memory import MEMORY_RETURN_S, lingering, unexplained_mib
from sage_reconcile.core.observed import Exit, Gpu, GpuProcess, Launch, Life

NOW = 1000.0
GPU = Gpu("GPU-0", 0, "H100", "", 80 * 1024, memory_used_mib=50 * 1024)
ENDED = Launch(
    id="a",
    engine_name="chat",
    index=0,
    spec={},
    secret_marks={},
    gpus=("GPU-0",),
    memory_mib=30 * 1024,
    port=8000,
    bind="127.0.0.1",
    life=Life.EXITED,
    created_at=0.0,
    exit=Exit(0, NOW - 1),
)


def mib(*launches: Launch, gpu: Gpu = GPU, now: float = NOW) -> int:
    found = lingering(gpu, launches, now)
    return found.mib if found else 0


def test_no_more_lingers_than_was_promised_and_no_more_than_is_used_by_nobody() -> None:
    assert mib(ENDED) == 30 * 1024
    assert mib(ENDED, replace(ENDED, id="b")) == 50 * 1024
    assert mib(ENDED, gpu=replace(GPU, memory_used_mib=10)) == 10
    assert mib(ENDED, gpu=replace(GPU, processes=(GpuProcess(7, 45 * 1024),))) == 5 * 1024
    assert mib() == 0
    found = lingering(GPU, (ENDED, replace(ENDED, id="b"), replace(ENDED, id="c", index=1)), NOW)
    assert found is not None
    assert (found.launches, found.replicas) == (frozenset("abc"), ("chat/0", "chat/1"))


def test_it_lingers_for_its_time_and_never_from_the_future() -> None:
    end = NOW - 1
    assert mib(ENDED, now=end) == 30 * 1024
    assert mib(ENDED, now=end + MEMORY_RETURN_S - 0.001) == 30 * 1024
    assert mib(ENDED, now=end + MEMORY_RETURN_S) == 0
    assert mib(ENDED, now=end - 0.001) == 0


@pytest.mark.parametrize(
    "launch",
    [
        replace(ENDED, gpus=("GPU-1",)),
        replace(ENDED, life=Life.LEFTOVER),
        replace(ENDED, exit=None),
        replace(ENDED, exit=Exit(0, None)),
    ],
)
def test_only_what_has_ended_there_and_when_that_is_known_leaves_memory_behind(launch: Launch) -> None:
    assert mib(launch) == 0


def test_where_a_share_is_not_told_nothing_is_known_of_the_rest() -> None:
    assert unexplained_mib(GPU) == 50 * 1024
    assert unexplained_mib(replace(GPU, processes=(GpuProcess(7, 60 * 1024),))) == 0
    for gpu in (replace(GPU, processes=(GpuProcess(7, None),)), replace(GPU, memory_told=False)):
        assert unexplained_mib(gpu) == 0
        assert mib(ENDED, gpu=gpu) == 0
