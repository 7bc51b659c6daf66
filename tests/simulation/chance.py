"""Long random stories: what happens, when the daemon is killed and which of its effects fail all come from one seed."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

from tests.simulation.disk import failing
from tests.simulation.entries import Entry
from tests.simulation.exploring import ERRORS
from tests.simulation.files_seam import SEAT, Crash, Undisturbed
from tests.simulation.manners import Machine
from tests.simulation.running import Run, second_daemon
from tests.simulation.stories import Step, Story
from tests.simulation.world import Violation

_NAMES = ("chat", "code", "embed")
_LASTS_S = 60.0
_CRASHES, _FAULTS = 6, 4


@dataclass
class Chance(Undisturbed):
    """Kills the daemon at some effects, loses power at a few, lets some fail, and sends in a second daemon."""

    random: Random
    crashes: int = _CRASHES
    faults: int = _FAULTS
    kept: bytes | None = None
    counts: Counter[str] = field(default_factory=Counter)

    def before(self, what: str, path: str, torn: Callable[[Machine], None] | None) -> None:
        self.counts["effects"] += 1
        if self.faults and what in ERRORS and self.random.random() < 0.01:
            self.faults -= 1
            self.counts["faults"] += 1
            SEAT.machine.disk_failed = True
            raise failing(ERRORS[what], path)
        if torn is not None and self._crashes():
            torn(SEAT.machine)
            self._crash(f"in the middle of {what} {path}")

    def after(self, what: str, path: str) -> None:
        if self._crashes():
            self._crash(f"after {what} {path}")
        if self.random.random() < 0.01:
            intrude(self.counts)

    def _crashes(self) -> bool:
        return self.crashes > 0 and self.random.random() < 0.02

    def _crash(self, when: str) -> None:
        self.crashes -= 1
        world = SEAT.machine
        if self.random.random() < 0.1:
            self.counts["losses of power"] += 1
            world.reboot(power_lost=True, names_kept=self.random.random() < 0.5)
        else:
            self.counts["crashes"] += 1
            world.say(f"KILLED {when}")
        self.kept = pickle.dumps(world)
        raise Crash


def intrude(counts: Counter[str]) -> None:
    """A second daemon is started; as soon as the first has the lock it must be told so, and go."""
    if any(found.lock == "EX" and found.path.endswith("/lock") for found in SEAT.machine.descriptions.values()):
        counts["second daemons"] += 1
        if not second_daemon(SEAT.machine):
            raise Violation("a second daemon reconciles too")


def entries(random: Random) -> tuple[Entry, ...]:
    """Engines that always have a place, also when a GPU is lost and strangers came."""
    found = []
    for name in random.sample(_NAMES, random.randint(0, len(_NAMES))):
        ranks = random.choice((1, 1, 1, 2))
        found.append(
            Entry(
                name,
                revision=1000 + random.randint(0, 3),
                replicas=random.randint(0, 2),
                memory_gib=random.choice((8, 10, 12)),
                ranks=ranks,
                port=random.choice((0, 0, 8400 + 10 * _NAMES.index(name))),
                more=random.choice(((), (), ("movable: true",), ("spread: gpu",) if ranks == 1 else ())),
            )
        )
    return tuple(found)


def _happening(random: Random) -> tuple[str, tuple[object, ...]]:
    replica = f"{random.choice(_NAMES)}/{random.randint(0, 1)}"
    gpu = random.randint(0, 2)
    choices: tuple[tuple[str, tuple[object, ...]], ...] = (
        ("edit", (entries(random),)),
        ("edit", (entries(random),)),
        ("kill", (replica, random.choice(("leader", "core", "worker", "shell")))),
        ("kill", (replica, random.choice(("leader", "core", "worker", "shell")))),
        ("kill_session", (replica,)),
        ("reuse_pid", (replica, random.choice(("leader", "worker")))),
        ("reuse_pid_at_once", (replica,)),
        ("take_pid_of_shell", (replica,)),
        ("hang", (replica,)),
        ("lose_gpu", (2,)),
        ("silence_gpu", (gpu, random.uniform(0.5, 20))),
        ("take_driver", (random.uniform(0.5, 20),)),
        ("take_memory", (gpu, random.randint(1, 10) * 1024)),
        ("take_port", (8000 + random.randint(0, 3),)),
        ("strangers_leave", ()),
        ("set_clock", (random.choice((-1e6, -100.0, 100.0, 1e6)),)),
        ("fill_disk", (random.uniform(0.1, 20),)),
        ("lock_disk", (random.uniform(0.1, 20),)),
        ("write_file", ("",)),
        ("delete_file", ()),
        ("make_file_a_folder", ()),
        ("ask", ()),
        ("crash_daemon", ()),
        ("reboot", ()),
    )
    return random.choice(choices)


def story(seed: int) -> tuple[Story, Random]:
    """The story of a seed, and the chance that goes on with it."""
    random = Random(seed)
    before = entries(random)
    steps = [(random.uniform(0, _LASTS_S), *_happening(random)) for _ in range(random.randint(3, 14))]
    then: list[Step] = sorted(steps, key=lambda step: step[0])
    then += [(_LASTS_S + 1, "strangers_leave", ()), (_LASTS_S + 2, "edit", (entries(random),))]
    manners: dict[str, object] = {
        "memory_back_s": random.choice((0.05, 0.4, 3.0, 12.0)),
        "named_when_late": random.random() < 0.3,
        "ignores_term": random.random() < 0.2,
        "inodes": random.random() < 0.8,
        "marks_kept": random.random() < 0.8,
        "load_s": random.choice((0.5, 1.5, 6.0)),
        "shell_s": random.choice((0.001, 0.004, 0.5)),
        "fails_loading": random.choice((0, 0, 0, 1, 3)),
        "notices_files": random.random() < 0.9,
        "pids_used_at_once": random.random() < 0.2,
    }
    return Story(f"seed {seed}", before, tuple(then), manners, gpus=3), random


def run(seed: int) -> tuple[Machine, Counter[str], str]:
    """The world after the story of a seed, what was counted, and what went wrong (empty where nothing did)."""
    told, random = story(seed)
    chance = Chance(random)
    try:
        going = Run(told.begin(), chance, limit_s=3000.0)
    except Violation as error:
        return Machine(), chance.counts, f"before the story: {error}"
    wrong = ""
    try:
        going.to_rest()
    except Exception as error:  # noqa: BLE001 - whatever the product raises is what this looks for
        wrong = f"{type(error).__name__}: {error}"
    chance.counts["steps"] += len(told.then)
    chance.counts["lives of the daemon"] += going.lives
    chance.counts["starts"] += len(going.machine.launches)
    chance.counts["kills of engine processes"] += going.machine.kills
    chance.counts["seconds"] += int(going.machine.now)
    return going.machine, chance.counts, wrong


def runs(seeds: Iterator[int]) -> tuple[Counter[str], list[str]]:
    counts: Counter[str] = Counter()
    wrong = []
    for seed in seeds:
        _, counted, found = run(seed)
        counts += counted
        counts["seeds"] += 1
        if found:
            wrong.append(f"seed {seed}: {found}")
    return counts, wrong
