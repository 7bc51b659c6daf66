"""The guard: how much of what runs a new content may stop before a person has to confirm it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from sage_reconcile.core.guard import Stops, held_text, lasting_stops, too_many
from sage_reconcile.core.host_spec import Guard, read_guard
from sage_reconcile.core.observed import Observed
from sage_reconcile.core.plan import Plan
from sage_reconcile.core.planner import make_plan
from sage_reconcile.errors import FileFaults
from sage_reconcile.host import files
from tests.plans.world import NOW, world
from tests.reading import desired

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FOUR = "version: 1\nengines:\n  chat: {model: m, memory: 10GiB, replicas: 3}\n  code: {model: n, memory: 10GiB}\n"
NONE = "version: 1\nengines: {}\n"


def running(*launches: str, ran: str = FOUR) -> Observed:
    found = [yaml.safe_load(f"{{gpu: 0, {launch}}}") for launch in launches]
    return world({"gpus": ["H100 80GiB"], "launches": found}, desired(ran), NOW)


def all_four(**more: str) -> Observed:
    names = ("chat/0", "chat/1", "chat/2", "code/0")
    return running(*(f"run: {name}, port: {8000 + i}{more.get(name[:4], '')}" for i, name in enumerate(names)))


def stops(file: str, observed: Observed) -> Stops:
    return lasting_stops(make_plan(desired(file), observed, NOW), observed)


@pytest.mark.parametrize(
    ("guard", "stopped", "running", "held"),
    [
        *(("50%", 2, 4, False), ("50%", 3, 4, True), ("50%", 2, 3, True), ("50%", 1, 2, False), ("50%", 2, 2, True)),
        *(("50%", 1, 1, False), ("50%", 0, 0, False), ("50%", 0, 9, False), ("0%", 1, 100, True), ("0%", 0, 5, False)),
        *(("100%", 9, 9, False), ("33.4%", 1, 3, False), ("33.3%", 1, 3, True), ("off", 9, 9, False)),
        *((0, 1, 1, True), (0, 0, 5, False), (3, 3, 3, False), (3, 4, 100, True), ("2", 3, 9, True)),
    ],
)
def test_a_share_a_number_or_off(guard: object, stopped: int, running: int, held: bool) -> None:
    names = tuple(f"a/{number}" for number in range(stopped))
    assert too_many(read_guard(guard), Stops(names, running)) is held


def test_what_is_no_longer_named_counts() -> None:
    assert stops(NONE, all_four()) == Stops(("chat/0", "chat/1", "chat/2", "code/0"), 4)
    assert stops(FOUR.replace("replicas: 3", "replicas: 1"), all_four()) == Stops(("chat/1", "chat/2"), 4)
    assert stops(FOUR.replace("code:", "coder:"), all_four()) == Stops(("code/0",), 4), "another name, another engine"


def test_what_comes_back_does_not_count() -> None:
    changed = FOUR.replace("10GiB", "11GiB")
    plan = make_plan(desired(changed), all_four(), NOW)
    assert len([action for action in plan.actions if action.kind == "stop"]) + len(plan.queued) == 4
    assert lasting_stops(plan, all_four()) == Stops((), 4)


def test_what_has_its_place_and_can_never_start_there_does_not_come_back() -> None:
    """Such as an engine that is no simulator on simulated GPUs."""
    changed = make_plan(desired(FOUR.replace("10GiB", "11GiB")), all_four(), NOW)
    blocked = tuple(replace(x, blocked="no such GPU") if x.kind == "spawn" else x for x in changed.actions)
    assert len(lasting_stops(Plan(actions=blocked), all_four()).replicas) == 4


def test_only_what_serves_or_is_about_to_counts_as_running() -> None:
    ended = running(
        "run: chat/0, port: 8000, state: exited, ended: 5s",
        "run: chat/1, port: 8001, state: leftover",
        "run: chat/2, port: 8002, stopping: 1s, why: REMOVED",
        "run: code/0, port: 8003, state: loading, age: 5s",
    )
    assert stops(NONE, ended) == Stops(("code/0",), 1)


def test_one_that_gives_way_and_has_no_other_place_counts() -> None:
    low = "version: 1\nengines:\n  low: {model: m, memory: 50GiB}\n"
    observed = running("run: low/0, port: 8000", ran=low)
    top = low + "  top: {model: n, memory: 50GiB, priority: 1, preemption: lower}\n"
    assert stops(top, observed) == Stops(("low/0",), 1)


def test_the_default_is_half_and_what_may_be_written() -> None:
    assert desired(NONE).host.guard == Guard("percent", 50)
    for written, text in (("off", "off"), ("no", "off"), ("25 %", "25%"), ("3", "3"), ("'0'", "0"), ("12.5%", "12.5%")):
        assert str(desired(f"version: 1\nhost: {{guard: {written}}}\nengines: {{}}\n").host.guard) == text


@pytest.mark.parametrize("written", ["on", "101%", "-1", "-5%", "half", "1.5", "[1]", "{}"])
def test_what_may_not_be_written_is_refused_with_a_remedy(written: str) -> None:
    with pytest.raises(FileFaults, match=r"host\.guard: .*; write "):
        files.load_text(f"version: 1\nhost: {{guard: {written}}}\nengines: {{}}\n", Path("/x/engines.yaml"), {})


def test_it_is_said_who_would_stop() -> None:
    told = held_text(tuple(f"a/{number}" for number in range(10)), 12, "50%")
    assert told.startswith("it would stop 10 of the 12 running replicas (a/0, a/1,")
    assert told.endswith("a/7 and 2 more); `host.guard` is 50%")


def all_of(file: str) -> Observed:
    """Eight GPUs on which everything runs that a file asks for."""
    wanted = desired(file)
    empty = world({"gpus": ["H100 80GiB"] * 8}, wanted, NOW)
    starts = [action for action in make_plan(wanted, empty, NOW).actions if action.kind == "spawn"]
    launches = [
        {"run": x.replica, "gpu": [gpu.index for gpu in x.gpus], "port": x.port, "memory": f"{x.memory_mib}MiB"}
        for x in starts
    ]
    return world({"gpus": ["H100 80GiB"] * 8, "launches": launches}, wanted, NOW)


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("engines.yaml")), ids=lambda path: path.parent.name)
def test_a_file_cut_off_anywhere_is_refused_or_means_what_is_left_of_it(path: Path) -> None:
    """And where what is left would stop more than half of what runs, the guard holds it back."""
    text = path.read_text(encoding="utf-8")
    whole, observed = desired(text), all_of(text)
    names = [engine.name for engine in whole.engines]
    ran = {launch.replica for launch in observed.launches}
    held: dict[tuple[str, ...], bool] = {}
    for cut in range(len(text)):
        try:
            part = files.load_text(text[:cut], path, {}).desired
        except FileFaults:
            continue
        found = [engine.name for engine in part.engines]
        *before, last = names[: len(found)] or [""]
        assert found[:-1] == before, "all but the last are those of the file"
        assert not found or last.startswith(found[-1])
        assert [part.engine(name) for name in before] == [whole.engine(name) for name in before]
        if tuple(found) not in held:
            gone = ran - {replica for engine in part.engines for replica in engine.replicas()}
            stopped = lasting_stops(make_plan(part, observed, NOW), observed)
            assert stopped == Stops(tuple(sorted(gone)), len(ran))
            held[tuple(found)] = too_many(part.host.guard, stopped)
            assert held[tuple(found)] is (len(ran) > 1 and len(gone) * 2 > len(ran))
    assert held, "some cuts leave something that can be read"
    assert len(ran) < 3 or any(held.values())
