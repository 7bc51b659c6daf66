"""Processes that leave the session of their launch: found while their parent lives, and ended with it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sage_reconcile.core.observed import Life
from sage_reconcile.host import observe, processes
from sage_reconcile.host.processes import LAUNCH_VARIABLE, ProcessId, Stat
from tests.host.world import LAUNCH, Launched, eventually, launched, shell, stranger

NOTHING: frozenset[int] = frozenset()
AWAY = shell("import os, time; os.setsid(); print('away', flush=True); time.sleep(600)")
AWAY_WITH_CHILD = shell(
    "import os, subprocess, time; os.setsid()\n"
    "subprocess.Popen(['/bin/sleep', '600'], env={}); print('away', flush=True); time.sleep(600)"
)
AWAY_WITH_LATE_CHILD = shell(
    "import os, signal, subprocess, time; os.setsid()\n"
    "signal.signal(10, lambda *_: subprocess.Popen(['/bin/sleep', '600'], env={})); print('away', flush=True)\n"
    "while True: time.sleep(600)"
)
AWAY_WHEN_TOLD = shell(
    "import os, signal, time; signal.signal(10, lambda *_: os.setsid()); print('away', flush=True)\n"
    "while True: time.sleep(600)"
)


@contextmanager
def escaping(folder: Path, code: str) -> Iterator[Launched]:
    """A launch of which something leaves the session; whatever is left of it is ended."""
    with launched(folder, code) as launch:
        launch.said("away")
        before = everything(launch)
        try:
            yield launch
        finally:
            for stat in before:
                identity = processes.identify(stat.pid)
                if identity and identity.start_ticks == stat.start_ticks:
                    with suppress(ProcessLookupError):
                        os.kill(stat.pid, signal.SIGKILL)


def identity(launch: Launched) -> ProcessId:
    found = processes.identify(launch.leader().pid)
    assert found
    return found


def everything(launch: Launched) -> list[Stat]:
    ours, others = observe.proven_members(launch.record, launch.shell.pid, identity(launch))
    assert others == []
    return ours


def seen(launch: Launched) -> None:
    """A pass looks while the leader lives."""
    leader = identity(launch)
    launch.record.leader = [leader.pid, leader.start_ticks, leader.inode]
    launch.record.members = observe.with_escaped(launch.record, launch.shell.pid, leader, list(processes.scan()))


def killed(launch: Launched) -> observe.Found:
    leader = launch.leader()
    os.kill(leader.pid, signal.SIGKILL)
    eventually(lambda: not processes.alive(leader))
    return observe.examine(launch.record, launch.run_file, NOTHING)


def ended(launch: Launched, found: observe.Found) -> None:
    """What is proven to be left is killed, and nothing is."""
    processes.kill_all(observe.identities(found.members))
    eventually(lambda: observe.examine(launch.record, launch.run_file, NOTHING).life is Life.EXITED)


def test_a_child_in_a_session_of_its_own_is_found_through_its_parent(tmp_path: Path) -> None:
    with escaping(tmp_path, f"{AWAY} & wait") as launch:
        apart = [stat for stat in everything(launch) if stat.session != launch.shell.pid]
        assert len(apart) == 1
        assert apart[0].session == apart[0].pid


def test_it_is_ours_when_its_parent_is_gone_if_it_was_seen_before(tmp_path: Path) -> None:
    with escaping(tmp_path, f"{AWAY_WITH_CHILD} & wait") as launch:
        seen(launch)
        assert len(launch.record.members) == 2, "one that left, and its child"
        found = killed(launch)
        assert found.life is Life.LEFTOVER
        assert len(found.members) == 2
        ended(launch, found)


def test_what_descends_from_it_later_is_ours_too(tmp_path: Path) -> None:
    with escaping(tmp_path, f"{AWAY_WITH_LATE_CHILD} & wait") as launch:
        seen(launch)
        away = launch.record.members[-1][0]
        assert killed(launch).life is Life.LEFTOVER
        os.kill(away, signal.SIGUSR1)
        found = eventually(
            lambda: len((f := observe.examine(launch.record, launch.run_file, NOTHING)).members) == 2 and f
        )
        ended(launch, found)


def test_one_that_nobody_saw_is_not_proven_by_its_mark(tmp_path: Path) -> None:
    """The mark may be anybody's: it is inherited, and copied."""
    with escaping(tmp_path, f"{AWAY} & wait") as launch:
        assert launch.record.members == []
        found = killed(launch)
        assert (found.life, found.members) == (Life.EXITED, [])


def test_a_stranger_with_the_mark_of_a_launch_in_a_session_of_its_own_is_a_stranger(tmp_path: Path) -> None:
    with launched(tmp_path, "sleep 600 & echo away; wait") as launch, stranger(**{LAUNCH_VARIABLE: LAUNCH}) as other:
        launch.said("away")
        seen(launch)
        assert other.pid not in {stat.pid for stat in everything(launch)}
        found = killed(launch)
        assert other.pid not in {stat.pid for stat in found.members}
        ended(launch, found)


def test_another_process_under_the_pid_of_one_that_was_seen_is_a_stranger(tmp_path: Path) -> None:
    """Of the same start tick even; only its inode is another."""
    with escaping(tmp_path, f"{AWAY} & wait") as launch, stranger() as other:
        seen(launch)
        them = processes.identify(other.pid)
        assert them
        assert them.inode, "this kernel tells processes apart by inode"
        launch.record.members.append([them.pid, them.start_ticks, them.inode + 1])
        launch.record.members.append([them.pid, them.start_ticks, 0])
        assert other.pid not in {stat.pid for stat in everything(launch)}


def test_a_leader_that_makes_a_session_of_its_own_is_ended_with_all_it_started(tmp_path: Path) -> None:
    with escaping(tmp_path, f"exec {AWAY_WITH_CHILD}") as launch:
        leader = identity(launch)
        stat = processes.read_stat(leader.pid)
        assert stat
        assert stat.session == leader.pid != launch.shell.pid
        found = observe.examine(launch.record, launch.run_file, NOTHING)
        assert (found.life, found.session) == (Life.ALIVE, launch.shell.pid)
        assert len(everything(launch)) == 2
        seen(launch)
        found = killed(launch)
        assert found.life is Life.LEFTOVER
        assert len(found.members) == 1
        ended(launch, found)


def test_those_that_left_and_ended_are_not_kept_on_record(tmp_path: Path) -> None:
    with escaping(tmp_path, f"{AWAY} & exec sleep 600") as launch:
        seen(launch)
        ((away, ticks, inode),) = [member for member in launch.record.members if member[2]]
        processes.kill_all([ProcessId(away, ticks, inode)])
        eventually(lambda: not processes.alive(ProcessId(away, ticks)))
        seen(launch)
        assert not any(member[2] for member in launch.record.members)


def test_a_member_that_leaves_its_session_later_is_put_on_record_with_its_inode(tmp_path: Path) -> None:
    with escaping(tmp_path, f"{AWAY_WHEN_TOLD} & wait") as launch:
        leader = identity(launch)
        launch.record.members = observe.members(launch.record, launch.shell.pid, leader)
        assert not any(member[2] for member in launch.record.members)
        (child,) = [stat.pid for stat in everything(launch) if stat.pid != leader.pid]
        os.kill(child, signal.SIGUSR1)
        eventually(lambda: (stat := processes.read_stat(child)) and stat.session == child)
        seen(launch)
        assert [member[0] for member in launch.record.members if member[2]] == [child]
        found = killed(launch)
        assert [stat.pid for stat in found.members] == [child]
        ended(launch, found)
