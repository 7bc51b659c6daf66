"""What became of our launches: each record held against what the kernel says now."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sage_reconcile.core.host_needs import asks_host
from sage_reconcile.core.observed import HostMemory, Life
from sage_reconcile.core.spec import Desired
from sage_reconcile.host import memory, processes
from sage_reconcile.host.processes import ProcessId, Run, Stat
from sage_reconcile.host.records import Record

_EXIT_WAIT_S = 0.1


@dataclass(slots=True)
class Found:
    """A launch as it is. ``session`` is 0 where it is not known, ``members`` are its proven processes."""

    life: Life
    leader: ProcessId | None = None
    session: int = 0
    members: list[Stat] = field(default_factory=list)
    exit_code: int | None = None
    ended_at: float | None = None
    never_started: bool = False


def examine(record: Record, run_file: Path, holding: frozenset[int]) -> Found:
    """What the kernel says of a launch. ``holding`` are the pids that hold memory on any GPU.

    The records of another boot are history. While its leader lives a launch is alive; after that it lives
    on as a leftover until its session is empty and the driver shows none of its processes.
    """
    run = processes.read_run(run_file)
    if record.ended or record.boot_id != processes.boot_id():
        code = record.exit_code if record.exit_code is not None else run.exit_code
        return Found(Life.EXITED, exit_code=code, ended_at=record.ended_at or run.ended_at)
    leader = _leader(record, run)
    if leader is None:
        if processes.under_way(run_file):
            return Found(Life.INTENT)
        run = processes.read_run(run_file)
        if run.leader is None:
            return Found(
                Life.EXITED, never_started=run.exit_code is None, exit_code=run.exit_code, ended_at=run.ended_at
            )
        leader = _leader(record, run)
        assert leader is not None
    if _leads(leader, record, run.session):
        return Found(Life.ALIVE, leader, run.session)
    return _after_the_leader(record, run, run_file, leader, holding)


def _leader(record: Record, run: Run) -> ProcessId | None:
    if record.leader:
        return ProcessId(*record.leader[:3])
    return run.leader


def _leads(leader: ProcessId, record: Record, session: int) -> bool:
    """Whether the leader lives. Its start time alone is not unique where pids are used again within one tick.

    So until its inode is on record it must be where the shell started it, or carry the launch's mark.
    """
    if not processes.alive(leader):
        return False
    stat = None if leader.inode or not session else processes.read_stat(leader.pid)
    return stat is None or session in (stat.session, stat.parent) or processes.is_marked(leader.pid, record.id)


def _after_the_leader(record: Record, run: Run, run_file: Path, leader: ProcessId, holding: frozenset[int]) -> Found:
    run = _with_exit(run, run_file)
    members, unproven = proven_members(record, run.session, leader)
    found = Found(Life.EXITED, leader, run.session, members, run.exit_code, run.ended_at)
    if members:
        found.life = Life.LEFTOVER
    elif unproven:
        found.life = Life.UNPROVEN
    elif any(
        _holds_on(ProcessId(*member), run.session, holding) for member in [record.leader, *record.members] if member
    ):
        found.life = Life.LEFTOVER  # ended, but the driver has not given its memory back yet
    return found


def _holds_on(process: ProcessId, session: int, holding: frozenset[int]) -> bool:
    """Whether the driver shows memory of this process, and not of a later one of the same pid."""
    if process.pid not in holding:
        return False
    stat = processes.read_stat(process.pid)
    if stat is None or not stat.running:
        return stat is None or stat.start_ticks == process.start_ticks
    return processes.alive(process) and bool(process.inode or session in (0, stat.session))


def _with_exit(run: Run, run_file: Path) -> Run:
    """The shell writes the exit status a moment after the leader has ended: waits for it, but not long."""
    deadline = time.monotonic() + _EXIT_WAIT_S
    while run.exit_code is None and time.monotonic() < deadline and processes.under_way(run_file):
        time.sleep(0.001)
        run = processes.read_run(run_file)
    return run if run.exit_code is not None else processes.read_run(run_file)


def proven_members(
    record: Record, session: int, leader: ProcessId, stats: Sequence[Stat] = ()
) -> tuple[list[Stat], list[Stat]]:
    """The running processes of a launch besides its shell: those proven to be its, and those that are not.

    A session's number is not given to another process while any process is in the session; so if a process
    of that pid leads it and is not our shell, the session is a stranger's. Our shell is older than the leader,
    its child; a later process of its pid is younger. Without the shell a process is ours if it was seen while
    the leader lived, or carries the launch's mark. The same holds of a session that the leader made for itself.

    Outside of these sessions what was seen to descend from ours while the leader lived is ours, and whatever
    descends from ours now; a mark alone, which anything may carry, is no proof there.
    """
    stats = stats or list(processes.scan())
    heads = {stat.pid: stat for stat in stats}
    known = {(member[0], member[1]): member[2] for member in record.members}
    own = {session} if session and _may_be_ours(heads.get(session), record, leader) else set()
    headed = own & heads.keys()
    if _leads(leader, record, session):
        own.add(leader.pid)
        headed.add(leader.pid)
    elif (head := heads.get(leader.pid)) is None or not head.running:
        own.add(leader.pid)
    ours: dict[int, Stat] = {}
    others: list[Stat] = []
    for stat in stats:
        if stat.pid == session or not stat.running:
            continue
        seen = (stat.pid, stat.start_ticks) in known
        if stat.session in own:
            if stat.session in headed or seen or processes.is_marked(stat.pid, record.id):
                ours[stat.pid] = stat
            elif stat.session == session:
                others.append(stat)
        elif seen and _is_very(stat, known[stat.pid, stat.start_ticks]):
            ours[stat.pid] = stat
    _add_descendants(ours, stats)
    return list(ours.values()), [stat for stat in others if stat.pid not in ours]


def _may_be_ours(head: Stat | None, record: Record, leader: ProcessId) -> bool:
    return head is None or _is_our_shell(head, record, leader)


def _is_very(stat: Stat, inode: int) -> bool:
    """Whether it is the process that was seen; without an inode on record that is not sure enough out of session."""
    found = processes.identify(stat.pid)
    return found is not None and found.start_ticks == stat.start_ticks and found.inode == inode


def _add_descendants(ours: dict[int, Stat], stats: Sequence[Stat]) -> None:
    children = defaultdict(list)
    for stat in stats:
        children[stat.parent].append(stat)
    ways = list(ours.values())
    while ways:
        parent = ways.pop()
        for stat in children[parent.pid]:
            if stat.pid not in ours and stat.running and stat.start_ticks >= parent.start_ticks:
                ours[stat.pid] = stat
                ways.append(stat)


def members(record: Record, session: int, leader: ProcessId, stats: Sequence[Stat] = ()) -> list[list[int]]:
    """The proven processes of a launch as its record keeps them: with the inode where they left its session."""
    found, _ = proven_members(record, session, leader, stats)
    inside = [[stat.pid, stat.start_ticks, 0] for stat in found if stat.session == session]
    outside = identities([stat for stat in found if stat.session != session])
    return [*inside, *([process.pid, process.start_ticks, process.inode] for process in outside)]


def with_escaped(record: Record, session: int, leader: ProcessId, stats: Sequence[Stat]) -> list[list[int]]:
    """The members on record, with those that are outside of the session now in place of those that were."""
    sessions = {stat.pid: stat.session for stat in stats}
    outside = [member for member in members(record, session, leader, stats) if sessions[member[0]] != session]
    told = {(member[0], member[1]) for member in outside}
    return [member for member in record.members if not member[2] and (member[0], member[1]) not in told] + outside


def _is_our_shell(stat: Stat, record: Record, leader: ProcessId) -> bool:
    marked = not stat.running or processes.is_marked(stat.pid, record.id)  # a zombie has no environment to look at
    return marked and stat.start_ticks <= leader.start_ticks


def host_held(records: Iterable[Record], found: Mapping[str, Found]) -> dict[str, int]:
    """MiB of the host that each launch holds that was promised some, or is vLLM on the CPU; of others nothing.

    All its processes together, from one look at the machine's, without what they share.
    """
    asked = [
        (record, seen.session, seen.leader)
        for record in records
        if (seen := found[record.id]).life in (Life.ALIVE, Life.LEFTOVER) and seen.leader is not None
        if record.host_memory_mib or (record.spec.get("device"), record.spec.get("runtime")) == ("cpu", "vllm")
    ]
    stats = list(processes.scan()) if asked else []
    held = {}
    for record, session, leader in asked:
        ours, _ = proven_members(record, session, leader, stats)
        held[record.id] = memory.held_mib([stat.pid for stat in ours])
    return held


def host_memory(desired: Desired, records: Iterable[Record], problems: list[str]) -> HostMemory | None:
    """The host's memory, where anybody has or asks for some; to be read after ``host_held``, which may be growing."""
    asked = any(asks_host(engine.spec) for engine in desired.engines)
    if not (asked or any(record.host_memory_mib for record in records if not record.ended)):
        return None
    found = memory.read()
    if found is None:
        problems.append("the host's memory could not be read: what engines need of it is not counted")
    return found


def identities(stats: Sequence[Stat]) -> list[ProcessId]:
    """The full identities of those that still run."""
    found = (processes.identify(stat.pid) for stat in stats)
    ticks = {stat.pid: stat.start_ticks for stat in stats}
    return [process for process in found if process is not None and process.start_ticks == ticks[process.pid]]
