"""How much memory a GPU has left, and who has the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sage_reconcile.core.memory import (
    Occupancy,
    launches_by_gpu,
    occupancy,
)
from sage_reconcile.core.observed import Gpu, GpuProcess, Launch, Life, Observed
from sage_reconcile.core.promise import Known, promised_mib
from sage_reconcile.core.spec import EngineSpec

GIB = 1024
CARD = Gpu("GPU-0", 0, "H100", "0000:00:00.0", 80 * GIB)


def spec(**fields: Any) -> EngineSpec:
    return EngineSpec.model_validate({"model": "m"} | fields)


def launch(name: str = "a", **fields: Any) -> Launch:
    known: dict[str, Any] = {
        "id": name,
        "engine_name": name,
        "index": 0,
        "spec": {},
        "secret_marks": {},
        "gpus": ("GPU-0",),
        "memory_mib": 40 * GIB,
        "port": 8000,
        "bind": "127.0.0.1",
        "life": Life.ALIVE,
        "created_at": 0.0,
    }
    return Launch(**known | fields)


def card(*processes: GpuProcess, used: int | None = None, **fields: Any) -> Gpu:
    told = sum(process.memory_mib or 0 for process in processes)
    return replace(CARD, processes=processes, memory_used_mib=told if used is None else used, **fields)


@pytest.mark.parametrize(
    ("memory", "fits"),
    [("20GiB", 4), ("39.9GiB", 2), ("40GiB", 2), ("40.1GiB", 1), ("79GiB", 1), ("80GiB", 1), ("80.1GiB", 0)],
)
def test_how_many_fit_an_80_gib_card(memory: str, fits: int) -> None:
    need = promised_mib(spec(memory=memory), CARD, Known())
    assert need is not None
    launches: list[Launch] = []
    while len(launches) <= fits and occupancy(CARD, launches, 0).free_mib >= need:
        launches.append(launch(f"a{len(launches)}", memory_mib=need))
    assert len(launches) == fits


def test_an_empty_card_is_free_but_for_what_is_kept_back() -> None:
    reserved = replace(CARD, memory_reserved_mib=512)
    assert occupancy(reserved, [], 1024) == Occupancy(80 * GIB, 1536, (), 0)
    assert occupancy(reserved, [], 1024).free_mib == 80 * GIB - 1536


@pytest.mark.parametrize(("held", "counts"), [(0, 40), (12, 40), (40, 40), (45, 45)])
def test_ours_count_with_the_larger_of_promised_and_held(held: int, counts: int) -> None:
    gpu = card(GpuProcess(1, held * GIB, launch="a"))
    taken = occupancy(gpu, [launch("a")], 0)
    assert (taken.ours, taken.unmanaged_mib) == ((("a/0", counts * GIB),), 0)
    assert taken.free_mib == (80 - counts) * GIB


def test_several_processes_of_one_launch_are_one_holding() -> None:
    gpu = card(GpuProcess(1, 30 * GIB, launch="a"), GpuProcess(2, 15 * GIB, launch="a"))
    assert occupancy(gpu, [launch("a")], 0).ours == (("a/0", 45 * GIB),)


def test_strangers_count_with_what_they_hold_whoever_they_are() -> None:
    gpu = card(GpuProcess(1, 40 * GIB, launch="a"), GpuProcess(2, 7 * GIB))
    assert occupancy(gpu, [launch("a")], 0).unmanaged_mib == 7 * GIB
    assert occupancy(card(used=9 * GIB), [], 0).unmanaged_mib == 9 * GIB, "also where no process is listed"
    ended = card(GpuProcess(1, 9 * GIB, launch="gone"))
    assert occupancy(ended, [], 0).unmanaged_mib == 9 * GIB, "also what a launch that is over still holds"


def test_a_holding_that_is_not_told_is_taken_for_the_promise() -> None:
    gpu = card(GpuProcess(1, None, launch="a"), used=45 * GIB)
    taken = occupancy(gpu, [launch("a")], 0)
    assert (taken.promised_mib, taken.unmanaged_mib) == (40 * GIB, 5 * GIB)
    partly = card(GpuProcess(1, None, launch="a"), GpuProcess(2, 10 * GIB, launch="a"), used=45 * GIB)
    assert occupancy(partly, [launch("a")], 0) == taken


def test_less_used_than_assumed_is_nobody_elses_memory() -> None:
    gpu = card(GpuProcess(1, None, launch="a"), used=10 * GIB)
    assert occupancy(gpu, [launch("a")], 0).unmanaged_mib == 0


def test_what_leaves_gives_back_its_promise_and_its_holding() -> None:
    gpu = card(GpuProcess(1, 45 * GIB, launch="a"), GpuProcess(2, 7 * GIB))
    after = occupancy(gpu, [launch("a")], 0, leaving=frozenset({"a"}))
    assert (after.ours, after.unmanaged_mib, after.free_mib) == ((), 7 * GIB, 73 * GIB)


def test_a_launch_holding_where_it_was_not_placed_counts_with_what_it_holds() -> None:
    gpu = card(GpuProcess(1, 3 * GIB, launch="a"))
    assert occupancy(gpu, [launch("a", gpus=("GPU-1",))], 0).ours == (("a/0", 3 * GIB),)


def test_free_memory_is_never_negative() -> None:
    assert occupancy(card(used=79 * GIB), [launch("a")], 0).free_mib == 0


def test_launches_are_on_the_gpus_they_were_given_and_on_those_where_they_are_seen() -> None:
    gpus = (card(GpuProcess(1, 3 * GIB, launch="b")), replace(CARD, uuid="GPU-1", index=1))
    a, b = launch("a", gpus=("GPU-0", "GPU-1")), launch("b", gpus=("GPU-1", "GPU-9"))
    ended = launch("c", life=Life.EXITED)
    on = launches_by_gpu(Observed(gpus, (ended, b, a)))
    assert on == {"GPU-0": [a, b], "GPU-1": [a, b]}


@pytest.mark.parametrize("life", [life for life in Life if life is not Life.EXITED])
def test_whatever_may_still_run_holds_its_memory(life: Life) -> None:
    assert launches_by_gpu(Observed((CARD,), (launch("a", life=life),)))["GPU-0"]
