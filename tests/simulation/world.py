"""The machine of a simulation. Plain data and a queue of what will happen: it is copied by pickling it.

It keeps its own books: which launch a process really belongs to, who really holds which memory. The product
never sees these; the invariants are about them.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from tests.simulation.disk import BOOT_ID, Disk, Node
from tests.simulation.entries import Entry, engines_yaml, expected, parse_arguments

FILE, STATE = "/etc/box/engines.yaml", "/var/box"
GIB = 1024


class Violation(Exception):
    """Something that must never be."""


@dataclass
class Process:
    """``launch`` is the launch it really belongs to, empty for strangers and for the daemon itself."""

    pid: int
    parent: int
    session: int
    command: str
    start_ticks: int
    inode: int
    role: str
    launch: str = ""
    environ: bytes = b""
    zombie: bool = False
    signals: list[int] = field(default_factory=list)


@dataclass
class Gpu:
    uuid: str
    index: int
    total_mib: int
    holds: dict[int, int] = field(default_factory=dict)
    """MiB by the pid of who holds it."""
    late: dict[int, tuple[int, int]] = field(default_factory=dict)
    """What the dead held and the driver has not given back: pid and MiB, by a number."""
    lost: bool = False
    silent: bool = False
    """Its memory and processes cannot be read just now."""

    @property
    def used_mib(self) -> int:
        return sum(self.holds.values()) + sum(mib for _, mib in self.late.values())


@dataclass
class Launch:
    """One spawn, as it really was."""

    id: str
    replica: str
    shell: int
    argv: list[str]
    gpus: list[str]
    started_at: float
    run_node: int
    log_node: int
    leader: int = 0
    phase: str = "shell"
    """shell, importing, loading, ready, ending, or over."""
    failed_at: float | None = None
    hung: bool = False

    @property
    def revision(self) -> str:
        return parse_arguments(self.argv).get("--max-model-len", "")

    @property
    def port(self) -> int:
        return int(parse_arguments(self.argv)["--port"])


@dataclass
class Description:
    """An open file: shared by all who inherited it, and with it the lock on it."""

    node: int
    path: str
    append: bool = False
    owners: set[int] = field(default_factory=set)
    lock: str = ""


@dataclass
class Manners:
    """How this machine behaves; each may be another one in each story."""

    shell_s: float = 0.004
    import_s: float = 0.3
    load_s: float = 1.5
    memory_back_s: float = 0.4
    named_when_late: bool = False
    """Whether the driver lists the dead by their pid until their memory is back."""
    ignores_term: bool = False
    own_session: bool = False
    """Whether an engine has a helper that leads a session of its own, and holds memory."""
    marks_kept: bool = True
    """Whether workers keep the environment that they were started with (``SPT_NOENV``)."""
    inodes: bool = True
    """Whether pidfds have inodes of their own (kernel 6.9)."""
    fails_loading: int = 0
    """So many starts to come fail while they load."""
    notices_files: bool = True
    pids_used_at_once: bool = False
    """Whether the pid of whoever ends is a stranger's in the next moment."""
    probe_s: float = 0.003


@dataclass
class World:
    now: float = 1000.0
    """Seconds since boot: never goes back."""
    wall_offset: float = 1.7e9
    boot: int = 1
    disk: Disk = field(default_factory=Disk)
    manners: Manners = field(default_factory=Manners)
    processes: dict[int, Process] = field(default_factory=dict)
    gpus: list[Gpu] = field(default_factory=list)
    ports: dict[int, int] = field(default_factory=dict)
    """Who has a port, by pid."""
    launches: dict[str, Launch] = field(default_factory=dict)
    descriptions: dict[int, Description] = field(default_factory=dict)
    queue: list[tuple[float, int, str, tuple[object, ...]]] = field(default_factory=list)
    wanted: tuple[Entry, ...] = ()
    unplaced: frozenset[str] = frozenset()
    driver_gone: bool = False
    daemon_pid: int = 0
    asked: int = 0
    counter: int = 0
    next_pid: int = 300
    forced_pid: int = 0
    forced_ticks: int = 0
    trace: list[str] = field(default_factory=list)
    stirred: bool = False
    """Whether something happened near the file since that was last asked."""
    stranger_came: dict[str, float] = field(default_factory=dict)
    """When memory was last taken by a stranger, by GPU."""
    kills: int = 0
    disk_failed: bool = False
    """Whether an effect on the disk has ever failed."""
    stories_left: int = 0

    # -- time -----------------------------------------------------------------------------------------------------

    @property
    def wall(self) -> float:
        return self.now + self.wall_offset

    @property
    def boot_id(self) -> str:
        return f"boot-{self.boot}"

    def number(self) -> int:
        self.counter += 1
        return self.counter

    def later(self, delay_s: float, what: str, *arguments: object) -> None:
        """Something will happen."""
        heapq.heappush(self.queue, (self.now + delay_s, self.number(), what, arguments))

    def story(self, delay_s: float, what: str, *arguments: object) -> None:
        """Something of the story will happen: nothing has settled before it has."""
        self.stories_left += 1
        self.later(delay_s, "tell", what, *arguments)

    def tell(self, what: str, *arguments: Any) -> None:
        self.stories_left -= 1
        self.say(f"STORY {what} {' '.join(str(x)[:60] for x in arguments)}".replace("\n", " "))
        getattr(self, what)(*arguments)

    def advance(self, seconds: float, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Lets time pass, and what was to happen meanwhile; stops early where that interrupts."""
        until = self.now + seconds
        while not interrupted():
            if not self.queue or self.queue[0][0] > until:
                self.now = until
                return
            at, _, what, arguments = heapq.heappop(self.queue)
            self.now = max(self.now, at)
            getattr(self, what)(*arguments)

    def say(self, text: str) -> None:
        self.trace.append(f"{self.now:10.3f}  {text}")

    # -- processes ------------------------------------------------------------------------------------------------

    def start(self, role: str, parent: int, session: int | None, **rest: object) -> Process:
        """A new process; without a session it leads one of its own."""
        pid, ticks = self.forced_pid, self.forced_ticks or int(self.now * 100)
        self.forced_pid = self.forced_ticks = 0
        while not pid or pid in self.processes or any(p.session == pid for p in self.processes.values()):
            pid, self.next_pid = self.next_pid, self.next_pid + 1
        process = Process(
            pid,
            parent,
            pid if session is None else session,
            str(rest.pop("command", role)),
            ticks,
            50_000 + self.number(),
            role,
            **rest,  # type: ignore[arg-type]
        )
        self.processes[pid] = process
        self.say(f"process {pid} begins: {role} {process.launch}")
        return process

    def of(self, launch: str, *roles: str) -> list[Process]:
        """The processes that really are of a launch, zombies left out."""
        return [
            p for p in self.processes.values() if p.launch == launch and not p.zombie and (not roles or p.role in roles)
        ]

    def members(self, launch: str) -> list[Process]:
        """The same without the shell: what serves, or holds memory."""
        return [process for process in self.of(launch) if process.role != "shell"]

    def close_all(self, pid: int) -> None:
        for number in [n for n, d in self.descriptions.items() if pid in d.owners]:
            self.close(number, pid)

    def close(self, number: int, pid: int) -> None:
        found = self.descriptions[number]
        found.owners.discard(pid)
        if not found.owners:
            del self.descriptions[number]

    def end(self, pid: int, code: int) -> None:
        """A process ends; its parent reaps it, or init, or nobody yet."""
        process = self.processes.get(pid)
        if process is None or process.zombie:
            return
        self.say(f"process {pid} ends with {code}: {process.role} {process.launch}")
        process.zombie = True
        process.environ = b""
        self.close_all(pid)
        self.ports = {port: owner for port, owner in self.ports.items() if owner != pid}
        for child in [p for p in self.processes.values() if p.parent == pid]:
            child.parent = 1
            if child.zombie:
                del self.processes[child.pid]
        for gpu in self.gpus:
            if pid in gpu.holds:
                number = self.number()
                gpu.late[number] = (pid, gpu.holds.pop(pid))
                self.later(self.manners.memory_back_s, "give_back", gpu.index, number)
        parent = self.processes.get(process.parent)
        if parent is None or parent.zombie or parent.role in ("shell", "init"):
            del self.processes[pid]
            if process.launch and self.manners.pids_used_at_once:
                self.later(0.0001, "take_freed_pid", pid)
        self.ended(process, code)

    def give_back(self, index: int, number: int) -> None:
        self.gpus[index].late.pop(number, None)

    def reap(self, pid: int, inode: int) -> bool:
        """Whether a child has ended; then nothing of it is left."""
        process = self.processes.get(pid)
        if process is not None and process.inode == inode and not process.zombie:
            return False
        if process is not None and process.inode == inode:
            del self.processes[pid]
        return True

    def ended(self, process: Process, code: int) -> None:
        raise AssertionError("manners are missing")

    # -- the books ------------------------------------------------------------------------------------------------

    def live(self) -> dict[str, list[str]]:
        """The revisions that really serve, by replica."""
        found: dict[str, list[str]] = {}
        for launch in self.launches.values():
            if launch.phase == "ready" and launch.failed_at is None and self.of(launch.id, "leader"):
                found.setdefault(launch.replica, []).append(launch.revision)
        return found

    def expected(self) -> dict[str, list[str]]:
        return expected(self.wanted, self.unplaced)

    def status(self) -> dict[str, object]:
        """What the daemon reported last."""
        path = f"{STATE}/status.json"
        return json.loads(self.disk.node(path).content) if self.disk.exists(path) else {}

    # -- what a story may do --------------------------------------------------------------------------------------

    def edit(self, entries: tuple[Entry, ...], unplaced: frozenset[str] = frozenset()) -> None:
        """The user writes another file, as editors do: whole, beside it, renamed."""
        self.wanted, self.unplaced = entries, unplaced
        self.write_file(engines_yaml(entries))

    def write_file(self, text: str) -> None:
        """Whatever is in the file now."""
        self.delete_file()
        node = self.disk.make(FILE, 0o644, self.wall)
        node.content = node.flushed = text.encode()
        self.disk.flush("/etc/box", self.disk.node("/etc/box"))
        self.stirred = True

    def delete_file(self) -> None:
        if self.disk.exists(FILE):
            del self.disk.names[FILE]
        self.stirred = True

    def make_file_a_folder(self) -> None:
        self.delete_file()
        self.disk.make(FILE, 0o755, self.wall, folder=True)

    def ask(self) -> None:
        """SIGHUP to the daemon."""
        self.asked += 1

    def newest(self, replica: str) -> Launch | None:
        found = [launch for launch in self.launches.values() if launch.replica == replica]
        return found[-1] if found else None

    def kill(self, replica: str, role: str) -> None:
        """SIGKILL from outside to a process of the newest launch of a replica."""
        launch = self.newest(replica)
        for process in self.of(launch.id, role)[:1] if launch else ():
            self.kills += 1
            self.end(process.pid, 137)

    def kill_session(self, replica: str) -> None:
        """SIGKILL to all of it at once, as the kernel does when a cgroup is out of memory."""
        launch = self.newest(replica)
        for process in self.of(launch.id) if launch else ():
            self.kills += 1
            self.end(process.pid, 137)

    def hang(self, replica: str) -> None:
        """Its EngineCore is stopped: /health still answers 200."""
        launch = self.newest(replica)
        if launch is not None:
            launch.hung = True

    def lose_gpu(self, index: int) -> None:
        gpu = self.gpus[index]
        gpu.lost = True
        for pid in list(gpu.holds):
            self.later(0.2, "end", pid, 134)

    def bring_gpu_back(self, index: int) -> None:
        self.gpus[index].lost = False

    def silence_gpu(self, index: int, seconds: float) -> None:
        self.gpus[index].silent = True
        self.later(seconds, "let_gpu_speak", index)

    def let_gpu_speak(self, index: int) -> None:
        self.gpus[index].silent = False

    def take_driver(self, seconds: float) -> None:
        self.driver_gone = True
        self.later(seconds, "give_driver")

    def give_driver(self) -> None:
        self.driver_gone = False

    def stranger(self, command: str = "VLLM::EngineCor") -> int:
        """A process that looks like one of ours and is not."""
        return self.start("stranger", 1, None, command=command).pid

    def take_memory(self, index: int, mib: int) -> None:
        gpu = self.gpus[index]
        gpu.holds[self.stranger()] = min(mib, gpu.total_mib - gpu.used_mib)
        self.stranger_came[gpu.uuid] = self.now

    def take_port(self, port: int) -> None:
        if port not in self.ports:
            self.ports[port] = self.stranger("python3")

    def strangers_leave(self) -> None:
        for process in [p for p in self.processes.values() if p.role == "stranger"]:
            self.end(process.pid, 0)
            self.processes.pop(process.pid, None)

    def reuse_pid(self, replica: str, role: str = "leader", *, same_tick: bool = False) -> None:
        """Kills a process of ours, and a stranger gets its pid; within one tick of the clock its start time too."""
        launch = self.newest(replica)
        for process in self.of(launch.id, role)[:1] if launch else ():
            self.kills += 1
            self.end(process.pid, 137)
            told_apart = self.manners.inodes  # older kernels have nothing by which the two could be told apart
            ticks = process.start_ticks if same_tick and told_apart else 0
            self.later(0.02, "take_freed_pid", process.pid, ticks)

    def reuse_pid_at_once(self, replica: str) -> None:
        self.reuse_pid(replica, same_tick=True)

    def take_pid_of_shell(self, replica: str) -> None:
        """A stranger gets the number of a session that has ended, and leads one of its own under it."""
        launch = self.newest(replica)
        if launch is not None and self.take_freed_pid(launch.shell):
            self.start("stranger", launch.shell, launch.shell)

    def take_freed_pid(self, pid: int, ticks: int = 0) -> bool:
        """A stranger gets this pid, unless somebody has it, or it names a session."""
        if pid in self.processes or any(process.session == pid for process in self.processes.values()):
            return False
        self.forced_pid, self.forced_ticks = pid, ticks
        self.stranger()
        return True

    def set_clock(self, seconds: float) -> None:
        """The wall clock jumps; what was measured since boot does not."""
        self.wall_offset += seconds

    def fill_disk(self, seconds: float) -> None:
        self.disk.full = self.disk_failed = True
        self.later(seconds, "free_disk")

    def free_disk(self) -> None:
        self.disk.full = False

    def lock_disk(self, seconds: float) -> None:
        self.disk.read_only = self.disk_failed = True
        self.later(seconds, "unlock_disk")

    def unlock_disk(self) -> None:
        self.disk.read_only = False

    def crash_daemon(self) -> None:
        """kill -9, from outside, while it waits."""
        self.end(self.daemon_pid, 137)

    # -- boots ----------------------------------------------------------------------------------------------------

    def reboot(self, *, power_lost: bool = False, names_kept: bool = True) -> None:
        """Every process is gone, and so is the memory that they held; the disk is what it was, or nearly."""
        self.say("REBOOT" + (" after a loss of power" if power_lost else ""))
        if power_lost:
            self.disk.lose_power(names_kept=names_kept)
        self.boot += 1
        self.processes, self.ports, self.descriptions = {}, {}, {}
        self.next_pid = 300
        self.now += 30
        for gpu in self.gpus:
            gpu.holds, gpu.late, gpu.silent = {}, {}, False
        self.driver_gone = False
        for launch in self.launches.values():
            launch.phase = "over"
        stories = [entry for entry in self.queue if entry[2] in ("tell", "free_disk", "unlock_disk")]
        self.queue = []
        for at, _, what, arguments in sorted(stories):
            self.later(max(0.0, at - self.now), what, *arguments)
        self.prepare()

    def reboot_with_twin(self, replica: str) -> None:
        """After the boot a stranger has all by which the kernel told a leader of ours from others."""
        launch = self.newest(replica)
        twin = self.processes.get(launch.leader) if launch else None
        self.reboot()
        if twin is not None:
            self.processes[twin.pid] = replace(twin, parent=1, session=twin.pid, role="stranger", launch="", signals=[])

    def prepare(self) -> None:
        self.disk.nodes[self.disk.names[BOOT_ID]].content = self.boot_id.encode() + b"\n"
        self.disk.nodes[self.disk.names[BOOT_ID]].flushed = self.boot_id.encode() + b"\n"
        self.processes[1] = Process(1, 0, 1, "init", 1, 40_000 + self.boot, "init")


def folders(world: World) -> None:
    """The folders that are there before anything else, and the file that names the boot."""
    disk = world.disk
    disk.nodes[1] = Node(1, folder=True, mode=0o755, changed_at=0.0)
    disk.names["/"] = disk.flushed_names["/"] = 1
    deep = [str(path) for path in PurePosixPath(BOOT_ID).parents][-2::-1]
    for path in ("/etc", "/etc/box", "/var", "/var/box", *deep):
        disk.make(path, 0o700, world.wall, folder=True)
    disk.make(BOOT_ID, 0o444, world.wall)
    disk.flushed_names[BOOT_ID] = disk.names[BOOT_ID]
    world.prepare()
