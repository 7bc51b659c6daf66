"""What became of our launches: each record held against what the kernel says now."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sage_reconcile.core.observed import Life
from sage_reconcile.host import processes
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
    if processes.alive(leader):
        return Found(Life.ALIVE, leader, run.session)
    return _after_the_leader(record, run, run_file, leader, holding)


def _leader(record: Record, run: Run) -> ProcessId | None:
    if record.leader:
        return ProcessId(*record.leader[:3])
    return run.leader


def _after_the_leader(record: Record, run: Run, run_file: Path, leader: ProcessId, holding: frozenset[int]) -> Found:
    run = _with_exit(run, run_file)
    members, unproven = proven_members(record, run.session, leader)
    found = Found(Life.EXITED, leader, run.session, members, run.exit_code, run.ended_at)
    if members:
        found.life = Life.LEFTOVER
    elif unproven:
        found.life = Life.UNPROVEN
    elif any(_holds_on(ProcessId(*member), holding) for member in [record.leader, *record.members] if member):
        found.life = Life.LEFTOVER  # ended, but the driver has not given its memory back yet
    return found


def _holds_on(process: ProcessId, holding: frozenset[int]) -> bool:
    """Whether the driver shows memory of this process, and not of a later one of the same pid."""
    stat = processes.read_stat(process.pid) if process.pid in holding else None
    return process.pid in holding and (stat is None or stat.start_ticks == process.start_ticks)


def _with_exit(run: Run, run_file: Path) -> Run:
    """The shell writes the exit status a moment after the leader has ended: waits for it, but not long."""
    deadline = time.monotonic() + _EXIT_WAIT_S
    while run.exit_code is None and time.monotonic() < deadline and processes.under_way(run_file):
        time.sleep(0.001)
        run = processes.read_run(run_file)
    return run if run.exit_code is not None else processes.read_run(run_file)


def proven_members(record: Record, session: int, leader: ProcessId) -> tuple[list[Stat], list[Stat]]:
    """The running processes of a launch besides its shell: those proven to be its, and those that are not.

    A session's number is not given to another process while any process is in the session; so if a process
    of that pid leads it and is not our shell, the session is a stranger's. Our shell is older than the leader,
    its child; a later process of its pid is younger. Without the shell a process is ours if it was seen while
    the leader lived, or carries the launch's mark.
    """
    if not session:
        return [], []
    stats = list(processes.scan())
    head = next((stat for stat in stats if stat.pid == session), None)
    if head is not None and not _is_our_shell(head, record, leader):
        return [], []
    known = {(member[0], member[1]) for member in record.members}
    ours: list[Stat] = []
    others: list[Stat] = []
    for stat in stats:
        if stat.session != session or stat.pid == session or not stat.running:
            continue
        proven = head is not None or (stat.pid, stat.start_ticks) in known or processes.is_marked(stat.pid, record.id)
        (ours if proven else others).append(stat)
    return ours, others


def _is_our_shell(stat: Stat, record: Record, leader: ProcessId) -> bool:
    marked = not stat.running or processes.is_marked(stat.pid, record.id)  # a zombie has no environment to look at
    return marked and stat.start_ticks <= leader.start_ticks


def identities(stats: Sequence[Stat]) -> list[ProcessId]:
    """The full identities of those that still run."""
    found = (processes.identify(stat.pid) for stat in stats)
    ticks = {stat.pid: stat.start_ticks for stat in stats}
    return [process for process in found if process is not None and process.start_ticks == ticks[process.pid]]
