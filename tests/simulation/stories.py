"""What happens to a machine. Each story begins with a daemon that comes to what an earlier one left."""

from __future__ import annotations

import functools
import pickle
from dataclasses import dataclass, field, replace

from tests.simulation.entries import Entry, engines_yaml
from tests.simulation.files_seam import Undisturbed
from tests.simulation.manners import Machine
from tests.simulation.running import Run, copied
from tests.simulation.world import Gpu, folders

TOTAL_MIB = 81559
_FROM_THE_FIRST = ("marks_kept", "own_session", "inodes")
"""Manners that what already runs when a story begins has too."""
Step = tuple[float, str, tuple[object, ...]]


@dataclass(frozen=True)
class Story:
    """``before`` is what runs when it begins; ``then`` are steps, with the seconds after its begin."""

    name: str
    before: tuple[Entry, ...]
    then: tuple[Step, ...] = ()
    manners: dict[str, object] = field(default_factory=dict)
    gpus: int = 2
    limit_s: float = 1500.0
    boots: bool = True
    """Whether it ends the same where the machine is booted meanwhile."""

    def begin(self) -> Machine:
        """The world at its begin; no daemon runs."""
        world = copied(_rested(self.before, self.gpus, tuple(sorted(self.manners.items()))))
        world.trace.clear()
        world.launches = {name: launch for name, launch in world.launches.items() if world.of(name)}
        for after_s, what, arguments in self.then:
            world.story(after_s, what, *arguments)
        return world


@functools.cache
def _rested(entries: tuple[Entry, ...], gpus: int, manners: tuple[tuple[str, object], ...]) -> bytes:
    world = Machine()
    folders(world)
    world.gpus = [Gpu(f"GPU-{index}", index, TOTAL_MIB) for index in range(gpus)]
    for name, value in manners:
        assert hasattr(world.manners, name)
        if name in _FROM_THE_FIRST:
            setattr(world.manners, name, value)
    world.edit(entries)
    if entries:
        Run(world, Undisturbed(), steady_s=1.0).to_rest()
        world.end(world.daemon_pid, 137)
    for name, value in manners:
        setattr(world.manners, name, value)
    return pickle.dumps(world)


def _step(after_s: float, what: str, *arguments: object) -> Step:
    return after_s, what, arguments


CHAT = Entry("chat", memory_gib=48)
CODE = Entry("code", memory_gib=24)
WIDE = Entry("wide", memory_gib=30, ranks=2)
MOVABLE = Entry("code", memory_gib=24, more=("movable: true",))
EAGER = Entry("batch", memory_gib=40)
OTHER = Entry("other", memory_gib=60, more=("priority: 5",))

STORIES: tuple[Story, ...] = (
    Story("first start", (), (_step(0.1, "edit", (CHAT, CODE)),)),
    Story("a first start on two GPUs at once", (), (_step(0.1, "edit", (WIDE,)),)),
    Story("replace", (CHAT,), (_step(1.0, "edit", (Entry("chat", 2000, memory_gib=60),)),)),
    Story("replicas up", (CODE,), (_step(1.0, "edit", (Entry("code", replicas=2),)),)),
    Story("replicas down", (Entry("code", replicas=2),), (_step(1.0, "edit", (CODE,)),)),
    Story("an engine is removed", (CHAT, CODE), (_step(1.0, "edit", (CODE,)),)),
    Story("a crash loop", (), (_step(0.1, "edit", (CODE,)),), {"fails_loading": 3}),
    Story("a worker is killed", (CHAT,), (_step(1.0, "kill", "chat/0", "worker"),)),
    Story("an EngineCore is killed", (CHAT,), (_step(1.0, "kill", "chat/0", "core"),)),
    Story("a leader is killed", (CHAT, CODE), (_step(1.0, "kill", "chat/0", "leader"),)),
    Story("a leader of several is killed", (WIDE,), (_step(1.0, "kill", "wide/0", "leader"),)),
    Story(
        "a shell is killed", (CHAT,), (_step(1.0, "kill", "chat/0", "shell"), _step(3.0, "kill", "chat/0", "leader"))
    ),
    Story("a session is killed", (CHAT,), (_step(1.0, "kill_session", "chat/0"),)),
    Story(
        "a leader is killed while no daemon runs",
        (CHAT,),
        (_step(0.0, "kill", "chat/0", "leader"),),
        {"memory_back_s": 6.0},
    ),
    Story(
        "a GPU is lost",
        (Entry("code", replicas=2, memory_gib=60),),
        (
            _step(1.0, "lose_gpu", 1),
            _step(1.0, "edit", (Entry("code", replicas=2, memory_gib=60),), frozenset({"code/1"})),
        ),
    ),
    Story("adoption", (CHAT, CODE)),
    Story("adoption of what the kernel has no inodes for", (CHAT, CODE), (), {"inodes": False}),
    Story(
        "stopped while it loads",
        (CODE,),
        (_step(1.0, "edit", (CHAT, CODE)), _step(2.0, "edit", (CODE,))),
    ),
    Story(
        "stopped while it imports",
        (),
        (_step(0.1, "edit", (CHAT,)), _step(0.3, "edit", ())),
    ),
    Story(
        "a move, started elsewhere first",
        (replace(MOVABLE, more=(*MOVABLE.more, "gpus: [0]")), Entry("tall", memory_gib=40, more=("gpus: [1]",))),
        (_step(1.0, "edit", (MOVABLE, Entry("tall", memory_gib=40), Entry("large", memory_gib=60))),),
        {},
    ),
    Story(
        "preemption",
        (EAGER, OTHER),
        (
            _step(
                1.0,
                "edit",
                (EAGER, OTHER, Entry("vip", memory_gib=50, more=("priority: 10", "preemption: lower"))),
                frozenset({"batch/0"}),
            ),
        ),
    ),
    Story("a port is taken meanwhile", (CODE,), (_step(1.0, "edit", (CODE, CHAT)), _step(1.012, "take_port", 8001))),
    Story(
        "the port is taken when its engine has ended",
        (CHAT,),
        (_step(1.0, "kill_session", "chat/0"), _step(1.001, "take_port", 8000)),
    ),
    Story("the disk is full", (CHAT,), (_step(0.9, "fill_disk", 20.0), _step(1.0, "kill", "chat/0", "leader"))),
    Story(
        "the disk is read-only",
        (CHAT,),
        (_step(0.9, "lock_disk", 20.0), _step(1.0, "edit", (Entry("chat", 2000, memory_gib=48),))),
    ),
    Story("a reboot", (CHAT, CODE), (_step(1.0, "reboot"),)),
    Story("a reboot after which a stranger is the leader's twin", (CHAT,), (_step(1.0, "reboot_with_twin", "chat/0"),)),
    Story(
        "the number of a session is a stranger's when the daemon comes back",
        (CHAT,),
        (
            _step(0.9, "crash_daemon"),
            _step(1.0, "kill_session", "chat/0"),
            _step(1.1, "take_pid_of_shell", "chat/0"),
        ),
    ),
    Story("the file is emptied", (CHAT,), (_step(1.0, "write_file", ""), _step(2.0, "kill", "chat/0", "leader"))),
    Story(
        "the file is half written",
        (CHAT, CODE),
        (
            _step(1.0, "write_file", "version: 1\nengines:\n  chat:\n    model: org/chat\n    repl"),
            _step(2.0, "kill_session", "code/0"),
        ),
    ),
    Story(
        "the file loses all engines and the guard holds",
        (CHAT, Entry("code", replicas=2)),
        (_step(1.0, "write_file", engines_yaml((), guard="50%")), _step(2.0, "kill", "code/1", "leader")),
        boots=False,  # the guard counts what runs, and after a boot nothing does
    ),
    Story("the file is deleted", (CHAT,), (_step(1.0, "delete_file"), _step(2.0, "kill_session", "chat/0"))),
    Story(
        "the file becomes a folder", (CHAT,), (_step(1.0, "make_file_a_folder"), _step(2.0, "kill", "chat/0", "core"))
    ),
    Story(
        "the clock jumps a year ahead",
        (CHAT,),
        (_step(1.0, "edit", (Entry("chat", 2000, memory_gib=48),)), _step(1.5, "set_clock", 3.2e7)),
    ),
    Story(
        "the clock jumps back",
        (CHAT,),
        (_step(1.0, "edit", (Entry("chat", 2000, memory_gib=48),)), _step(1.5, "set_clock", -3.2e7)),
    ),
    Story(
        "SIGTERM is ignored",
        (CHAT,),
        (_step(1.0, "edit", (Entry("chat", 2000, memory_gib=48),)),),
        {"ignores_term": True},
    ),
    Story("a hung engine is removed", (CHAT, CODE), (_step(0.5, "hang", "chat/0"), _step(1.0, "edit", (CODE,)))),
    Story("a pid is used again", (CHAT,), (_step(1.0, "reuse_pid", "chat/0"),), {"memory_back_s": 3.0}),
    Story(
        "a pid is used again and the driver still names it",
        (CHAT,),
        (_step(1.0, "reuse_pid", "chat/0"),),
        {"memory_back_s": 3.0, "named_when_late": True},
    ),
    Story(
        "a pid is used again within a tick of the clock",
        (CHAT,),
        (_step(1.0, "reuse_pid_at_once", "chat/0"),),
        {"memory_back_s": 3.0},
    ),
    Story(
        "the pid of whoever is killed is a stranger's at once",
        (CHAT,),
        (_step(1.0, "kill", "chat/0", "leader"),),
        {"pids_used_at_once": True},
    ),
    Story(
        "the clock jumps back while a failed start waits",
        (),
        (_step(0.1, "edit", (CODE,)), _step(3.0, "set_clock", -1e6)),
        {"fails_loading": 3},
    ),
    Story(
        "the clock jumps back while one that ignores SIGTERM stops",
        (CHAT,),
        (_step(1.0, "edit", ()), _step(3.0, "set_clock", -1e6)),
        {"ignores_term": True},
    ),
    Story(
        "the pid of a shell is used again",
        (CHAT,),
        (_step(1.0, "kill_session", "chat/0"), _step(1.5, "take_pid_of_shell", "chat/0"), _step(2.0, "edit", ())),
    ),
    Story(
        "workers without marks are left",
        (CHAT,),
        (_step(1.0, "kill", "chat/0", "shell"), _step(1.2, "kill", "chat/0", "leader")),
        {"marks_kept": False},
    ),
    Story(
        "memory comes back late",
        (Entry("chat", memory_gib=70),),
        (_step(1.0, "edit", (Entry("chat", 2000, memory_gib=70),)),),
        {"memory_back_s": 8.0},
        gpus=1,
    ),
    Story(
        "the driver falls silent",
        (CHAT,),
        (_step(0.9, "silence_gpu", 0, 4.0), _step(1.0, "kill", "chat/0", "leader")),
        {"memory_back_s": 2.0},
    ),
    Story("the driver goes away", (CHAT,), (_step(0.9, "take_driver", 4.0), _step(1.0, "kill", "chat/0", "leader"))),
    Story(
        "a stranger takes the memory",
        (CHAT,),
        (
            _step(1.0, "kill_session", "chat/0"),
            _step(1.45, "take_memory", 0, 60000),
            _step(1.46, "take_memory", 1, 60000),
            _step(90.0, "strangers_leave"),
        ),
    ),
    Story(
        "a helper in a session of its own",
        (),
        (_step(0.1, "edit", (CHAT,)), _step(4.0, "kill", "chat/0", "leader")),
        {"own_session": True},
    ),
    Story(
        "a helper in a session of its own, without a mark",
        (CHAT,),
        (_step(1.0, "kill", "chat/0", "leader"),),
        {"own_session": True, "marks_kept": False},
    ),
    Story(
        "a pid is used again where the kernel has no inodes",
        (CHAT,),
        (_step(1.0, "reuse_pid", "chat/0"),),
        {"memory_back_s": 3.0, "inodes": False},
    ),
    Story("nobody tells of the file", (CHAT,), (_step(1.0, "edit", (CODE,)),), {"notices_files": False}),
)
BY_NAME = {story.name: story for story in STORIES}
