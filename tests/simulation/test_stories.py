"""Every story, with a crash, a loss of power or a fault at every effect, and with a share of all pairs of crashes.

``python -m tests.simulation --pairs`` takes all pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from tests.simulation import chance, exploring
from tests.simulation.files_seam import Undisturbed
from tests.simulation.manners import Machine
from tests.simulation.running import Run
from tests.simulation.seam import installed
from tests.simulation.stories import BY_NAME, STORIES, Story

PAIRS = 0.01
"""The share of all pairs that is tried here: the same ones each time."""


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    with installed():
        yield


def nothing_wrong(tally: exploring.Tally) -> None:
    trace = "\n".join(tally.traces[0][-120:]) if tally.traces else ""
    assert not tally.wrong, "\n".join([*tally.wrong[:10], trace])
    assert tally.points > 5, "a story without effects shows nothing"


every_story = pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)


@every_story
def test_killed_at_every_effect_the_next_daemon_ends_in_the_same_place(story: Story) -> None:
    nothing_wrong(exploring.crashes(story))


@pytest.mark.parametrize("story", [story for story in STORIES if story.boots], ids=lambda story: story.name)
def test_without_power_from_any_effect_on_it_comes_up_again(story: Story) -> None:
    nothing_wrong(exploring.crashes(story, "power lost"))


@every_story
def test_any_effect_may_fail(story: Story) -> None:
    nothing_wrong(exploring.faults(story))


@every_story
def test_killed_twice(story: Story) -> None:
    tally = exploring.pairs(story, PAIRS)
    assert not tally.wrong, "\n".join([*tally.wrong[:10], *tally.traces[0][-120:]])


@dataclass
class Intruding(Undisturbed):
    """A second daemon is started after each effect."""

    counts: Counter[str] = field(default_factory=Counter)

    def after(self, what: str, path: str) -> None:
        chance.intrude(self.counts)


@pytest.mark.parametrize("name", ["first start", "replace", "a leader is killed"])
def test_a_second_daemon_is_told_to_go_at_any_moment(name: str) -> None:
    intruding = Intruding()
    Run(BY_NAME[name].begin(), intruding).to_rest()
    assert intruding.counts["second daemons"] > 50


def test_a_move_starts_elsewhere_before_it_ends_here() -> None:
    """The story moves what it says, and so its crash points are those of a move."""
    going = Run(BY_NAME["a move, started elsewhere first"].begin(), Undisturbed())
    machine = going.to_rest()
    code = [launch for launch in machine.launches.values() if launch.replica == "code/0"]
    assert len(code) == 2
    assert code[0].gpus != code[1].gpus
    trace = "\n".join(machine.trace)
    assert trace.index(f"{code[1].id} is ready") < trace.index(f"signal 15 to {code[0].leader}")


@dataclass
class Counting(Undisturbed):
    kinds: Counter[str] = field(default_factory=Counter)

    def before(self, what: str, path: str, torn: Callable[[Machine], None] | None) -> None:
        self.kinds[what] += 1


def test_every_kind_of_effect_is_a_crash_point() -> None:
    counting = Counting()
    for story in (BY_NAME["first start"], BY_NAME["replace"], BY_NAME["an engine is removed"]):
        Run(story.begin(), counting).to_rest()
    assert counting.kinds.keys() >= {
        "create",
        "write",
        "fsync",
        "rename",
        "unlink",
        "mkdir",
        "rmdir",
        "spawn",
        "signal",
    }
