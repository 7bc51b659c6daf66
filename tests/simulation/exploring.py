"""A story with a crash, or a fault, at every effect of the daemon; and with two crashes at every pair of effects."""

from __future__ import annotations

import errno
import hashlib
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.simulation.disk import failing
from tests.simulation.files_seam import SEAT, Undisturbed
from tests.simulation.manners import Machine
from tests.simulation.running import RESTART_S, Run, copied
from tests.simulation.stories import Story
from tests.simulation.world import Violation

ERRORS = {
    "create": errno.ENOSPC,
    "write": errno.ENOSPC,
    "mkdir": errno.ENOSPC,
    "fsync": errno.EIO,
    "rename": errno.EROFS,
    "unlink": errno.EROFS,
    "rmdir": errno.EROFS,
    "truncate": errno.EIO,
    "spawn": errno.EAGAIN,
}
"""How each effect fails where it fails; a signal does not."""


@dataclass
class Moment:
    """The world at one effect. ``torn`` tells that the effect was half done."""

    number: int
    what: str
    world: bytes
    torn: bool = False

    def text(self) -> str:
        return f"{'in the middle of' if self.torn else 'after'} effect {self.number} ({self.what})"


@dataclass
class Recording(Undisturbed):
    """Keeps a copy of the world after each effect, and in the middle of those that can be half done."""

    keep: Callable[[int], bool] = lambda _: True
    moments: list[Moment] = field(default_factory=list)
    count: int = 0

    def before(self, what: str, path: str, torn: Callable[[Machine], None] | None) -> None:
        self.count += 1
        if torn is None or not self.keep(self.count):
            return
        world = copied(pickle.dumps(SEAT.machine))
        try:
            torn(world)
        except OSError:
            return
        self.moments.append(Moment(self.count, f"{what} {path}", pickle.dumps(world), torn=True))

    def after(self, what: str, path: str) -> None:
        if self.keep(self.count):
            self.moments.append(Moment(self.count, f"{what} {path}", pickle.dumps(SEAT.machine)))


@dataclass
class Failing(Undisturbed):
    """One effect fails; which error it gives depends on what it is."""

    number: int
    count: int = 0
    what: str = ""

    def before(self, what: str, path: str, torn: Callable[[Machine], None] | None) -> None:
        self.count += 1
        if self.count == self.number and what in ERRORS:
            self.what = f"{what} {path}"
            SEAT.machine.disk_failed = True
            raise failing(ERRORS[what], path)


@dataclass
class Tally:
    """What was explored."""

    runs: int = 0
    points: int = 0
    effects: int = 0
    wrong: list[str] = field(default_factory=list)
    traces: list[list[str]] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.runs += other.runs
        self.points += other.points
        self.effects += other.effects
        self.wrong += other.wrong
        self.traces += other.traces


def killed(moment: Moment) -> Machine:
    """The daemon is killed there, and started again a moment later."""
    world = copied(moment.world)
    world.say(f"CRASH {moment.text()}")
    world.end(world.daemon_pid, 137)
    world.advance(RESTART_S if moment.number % 2 else 0.001)
    return world


def unplugged(moment: Moment) -> Machine:
    """The machine loses power there, and comes back."""
    world = copied(moment.world)
    world.say(f"POWER LOST {moment.text()}")
    world.reboot(power_lost=True, names_kept=bool(moment.number % 2))
    return world


WAYS: dict[str, Callable[[Moment], Machine]] = {"killed": killed, "power lost": unplugged}


def _rest(tally: Tally, told: str, run: Run) -> bool:
    tally.runs += 1
    try:
        run.to_rest()
    except (Violation, OSError, AssertionError, LookupError) as error:
        tally.wrong.append(f"{told}: {type(error).__name__}: {error}")
        tally.traces.append(run.machine.trace)
        return False
    return True


def undisturbed(story: Story, tally: Tally) -> list[Moment]:
    """The story as it goes without a crash; every effect of it."""
    recording = Recording()
    world = story.begin()
    recording.moments.append(Moment(0, "begin", pickle.dumps(world)))
    _rest(tally, story.name, Run(world, recording, limit_s=story.limit_s))
    tally.effects += recording.count
    return recording.moments


def crashes(story: Story, way: str = "killed") -> Tally:
    """Every single crash point of a story."""
    tally = Tally()
    for moment in undisturbed(story, tally):
        tally.points += 1
        _rest(
            tally, f"{story.name}, {way} {moment.text()}", Run(WAYS[way](moment), Undisturbed(), limit_s=story.limit_s)
        )
    return tally


def faults(story: Story) -> Tally:
    """Every effect of a story fails once."""
    tally = Tally()
    effects = max(moment.number for moment in undisturbed(story, tally))
    for number in range(1, effects + 1):
        failing_once = Failing(number)
        tally.points += 1
        _rest(tally, f"{story.name}, effect {number} fails", Run(story.begin(), failing_once, limit_s=story.limit_s))
    return tally


def pairs(story: Story, share: float = 1.0) -> Tally:
    """Every pair of crash points, or a share of them that is always the same: a second crash on the way back."""
    tally = Tally()
    share = math.sqrt(share)  # of the first crashes, and of the second ones after each of these
    for first in undisturbed(story, tally):
        recording = Recording()
        told = f"{story.name}, killed {first.text()}"
        if not _chosen(told, share):
            continue
        if not _rest(tally, told, Run(killed(first), recording, steady_s=1.0, limit_s=story.limit_s)):
            continue
        for second in recording.moments:
            if not _chosen(f"{told} {second.text()}", share):
                continue
            tally.points += 1
            _rest(
                tally,
                f"{told}, then killed {second.text()}",
                Run(killed(second), Undisturbed(), steady_s=1.0, limit_s=story.limit_s),
            )
    return tally


def _chosen(text: str, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") < share * 2**32


def explored(stories: Iterator[Story]) -> Tally:
    whole = Tally()
    for story in stories:
        for tally in (
            *(crashes(story, way) for way in WAYS if story.boots or way == "killed"),
            faults(story),
            pairs(story),
        ):
            whole.add(tally)
    return whole
