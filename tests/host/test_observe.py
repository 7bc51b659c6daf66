"""What became of a launch, by its record and the kernel: with real processes, and records that lie."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sage_reconcile.core.observed import Life
from sage_reconcile.host import observe, processes
from sage_reconcile.host.processes import LAUNCH_VARIABLE, ProcessId
from tests.host.world import LAUNCH, Launched, eventually, launched, record, session_members, stranger

NOTHING: frozenset[int] = frozenset()
TREE = "sleep 600 & sleep 600 & echo up; wait"


def look(launch: Launched, holding: frozenset[int] = NOTHING) -> observe.Found:
    return observe.examine(launch.record, launch.run_file, holding)


def run_file(folder: Path, leader: int, session: int, ticks: int) -> Path:
    """A run file as the shell writes it."""
    path = folder / f"{LAUNCH}.run"
    path.write_text(f"{leader} (sh) S {session} {session} {session} " + "0 " * 15 + f"{ticks} 0 0\n")
    return path


def test_while_the_leader_lives_it_is_alive(tmp_path: Path) -> None:
    with launched(tmp_path, "sleep 600") as launch:
        leader = launch.leader()
        found = look(launch)
        assert (found.life, found.leader, found.session) == (Life.ALIVE, leader, launch.shell.pid)
        assert not found.never_started


def test_recorded_and_never_started(tmp_path: Path) -> None:
    found = observe.examine(record(), tmp_path / "missing.run", NOTHING)
    assert (found.life, found.never_started) == (Life.EXITED, True)
    (tmp_path / "empty.run").touch()
    found = observe.examine(record(), tmp_path / "empty.run", NOTHING)
    assert (found.life, found.never_started) == (Life.EXITED, True), "its starter was killed before there was a shell"


def test_a_start_under_way_is_neither_there_nor_not(tmp_path: Path) -> None:
    """The shell holds the lock and has not written yet who leads."""
    path = tmp_path / f"{LAUNCH}.run"
    code = (
        "import fcntl, os, sys, time\n"
        "fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\nfcntl.flock(fd, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\ntime.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as shell:
        try:
            assert shell.stdout
            assert shell.stdout.readline() == b"locked\n"
            assert observe.examine(record(), path, NOTHING).life is Life.INTENT
        finally:
            shell.kill()
    assert observe.examine(record(), path, NOTHING).never_started


@pytest.mark.parametrize(("code", "status"), [("exit 0", 0), ("exit 4", 4), ("kill -9 $$", 137)])
def test_an_end_is_known_with_its_status_and_time(tmp_path: Path, code: str, status: int) -> None:
    with launched(tmp_path, code) as launch:
        leader = launch.leader()
        eventually(lambda: not processes.alive(leader))
        found = look(launch)
        assert (found.life, found.exit_code) == (Life.EXITED, status), "the shell is waited for, for a moment"
        assert found.ended_at == pytest.approx(launch.run_file.stat().st_mtime)
        assert not found.never_started


def test_the_shell_is_given_a_moment_to_write_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with launched(tmp_path, "", argv=["sleep", "600"]) as launch:
        leader = launch.leader()
        launch.shell.send_signal(signal.SIGSTOP)
        processes.kill_all([leader])
        eventually(lambda: not processes.alive(leader))
        assert look(launch).exit_code is None, "it is not waited for long"
        monkeypatch.setattr(observe, "_EXIT_WAIT_S", 20.0)
        late = threading.Timer(0.05, launch.shell.send_signal, (signal.SIGCONT,))
        late.start()
        found = look(launch)
        late.join()
        assert (found.life, found.exit_code) == (Life.EXITED, 137)


def test_a_program_that_is_not_there_has_started_and_failed(tmp_path: Path) -> None:
    with launched(tmp_path, "", argv=["/nowhere/python"]) as launch:
        eventually(lambda: launch.run().exit_code is not None)
        found = look(launch)
        assert (found.life, found.exit_code, found.never_started) == (Life.EXITED, 127, False)


def test_what_outlives_a_killed_leader_is_a_leftover_until_all_is_gone(tmp_path: Path) -> None:
    with launched(tmp_path, TREE) as launch:
        launch.said("up")
        leader = launch.leader()
        os.kill(leader.pid, signal.SIGKILL)
        eventually(lambda: launch.run().exit_code is not None)
        found = look(launch)
        assert (found.life, found.exit_code) == (Life.LEFTOVER, 137)
        assert {stat.pid for stat in found.members} == set(launch.members())
        assert len(found.members) == 2
        processes.kill_all(observe.identities(found.members[:1]))
        eventually(lambda: len(launch.members()) == 1)
        assert look(launch).life is Life.LEFTOVER
        processes.kill_all(observe.identities(found.members))
        eventually(lambda: not launch.members())
        assert look(launch).life is Life.EXITED


def test_leftovers_are_proven_by_their_mark_also_when_the_shell_is_gone(tmp_path: Path) -> None:
    with launched(tmp_path, TREE) as launch:
        launch.said("up")
        launch.shell.kill()
        launch.shell.wait()
        assert look(launch).life is Life.ALIVE, "a shell killed alone changes nothing"
        os.kill(launch.leader().pid, signal.SIGKILL)
        eventually(lambda: not processes.alive(launch.leader()))
        found = look(launch)
        assert (found.life, found.exit_code, len(found.members)) == (Life.LEFTOVER, None, 2)
        assert observe.proven_members(launch.record, launch.shell.pid, launch.leader())[1] == []


def test_without_shell_and_mark_they_are_proven_by_having_been_seen_before(tmp_path: Path) -> None:
    unmarked = f"env -u {LAUNCH_VARIABLE} sleep 600 & env -u {LAUNCH_VARIABLE} sleep 600 & echo up; wait"
    with launched(tmp_path, unmarked) as launch:
        launch.said("up")
        eventually(lambda: [s.command for s in session_members(launch.shell.pid)].count("sleep") == 2)
        leader, (first, second) = (
            launch.leader(),
            [stat for stat in session_members(launch.shell.pid) if stat.command == "sleep"],
        )
        launch.shell.kill()
        launch.shell.wait()
        os.kill(leader.pid, signal.SIGKILL)
        eventually(lambda: not processes.alive(leader))
        assert look(launch).life is Life.UNPROVEN, "nothing proves them: they are left alone"
        launch.record.members = [[first.pid, first.start_ticks + 1, 0]]
        assert look(launch).life is Life.UNPROVEN, "that was another process of this pid"
        launch.record.members = [[first.pid, first.start_ticks, 0]]
        found = look(launch)
        assert [stat.pid for stat in found.members] == [first.pid], "the other one is still not proven"
        assert found.life is Life.LEFTOVER
        launch.record.members.append([second.pid, second.start_ticks, 0])
        assert len(look(launch).members) == 2


def test_a_leader_whose_pid_was_given_to_a_stranger_has_ended(tmp_path: Path) -> None:
    with stranger() as other:
        now = processes.identify(other.pid)
        assert now
        wrong = [ProcessId(now.pid, now.start_ticks - 5, 0), ProcessId(now.pid, now.start_ticks + 5, 0)]
        for identity in wrong:
            lying = record(leader=[identity.pid, identity.start_ticks, identity.inode])
            found = observe.examine(lying, tmp_path / "missing.run", NOTHING)
            assert found.life is Life.EXITED
        found = observe.examine(record(), run_file(tmp_path, now.pid, 4194000, now.start_ticks - 5), NOTHING)
        assert found.life is Life.EXITED, "what the run file says is held against the kernel as well"


def test_a_session_whose_number_was_given_to_a_stranger_is_left_alone(tmp_path: Path) -> None:
    """The shell and all of the launch are gone; a stranger's session now has the shell's pid."""
    with stranger("sh", "-c", "sleep 600 & sleep 600 & wait") as other:
        eventually(lambda: len(session_members(other.pid)) == 2)
        head = processes.identify(other.pid)
        assert head
        found = observe.examine(record(), run_file(tmp_path, 4194001, other.pid, head.start_ticks - 50), NOTHING)
        assert (found.life, found.members) == (Life.EXITED, [])
        later = ProcessId(4194001, head.start_ticks + 50)
        assert observe.proven_members(record(), other.pid, later) == ([], []), "older than the leader, but not marked"


def test_a_strangers_session_is_left_alone_though_its_head_is_a_zombie(tmp_path: Path) -> None:
    """A zombie has no environment in which to look for a mark; it is younger than the leader was."""
    code = (
        "import os, time\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        time.sleep(600)\n"
        "    os._exit(0)\n"
        "print(pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        head = int(parent.stdout.readline())
        try:
            stat = eventually(lambda: (s := processes.read_stat(head)) and s.state == "Z" and s)
            members = session_members(head)
            assert len(members) == 1
            path = run_file(tmp_path, 4194001, head, stat.start_ticks - 50)
            found = observe.examine(record(), path, NOTHING)
            assert (found.life, found.members) == (Life.EXITED, [])
        finally:
            for member in session_members(head):
                os.kill(member.pid, signal.SIGKILL)
            parent.kill()


def test_the_record_of_another_boot_is_history(tmp_path: Path) -> None:
    with stranger() as other:
        now = processes.identify(other.pid)
        assert now
        old = record(boot_id="another-boot", leader=[now.pid, now.start_ticks, now.inode])
        found = observe.examine(old, run_file(tmp_path, now.pid, now.pid, now.start_ticks), NOTHING)
        assert found.life is Life.EXITED
        assert found.members == []
        assert not found.never_started


def test_what_has_ended_stays_ended(tmp_path: Path) -> None:
    with launched(tmp_path, "sleep 600") as launch:
        launch.leader()
        launch.record.ended, launch.record.exit_code, launch.record.ended_at = True, 5, 77.0
        found = look(launch)
        assert (found.life, found.exit_code, found.ended_at) == (Life.EXITED, 5, 77.0)


def test_it_lives_on_as_a_leftover_while_the_driver_shows_its_memory(tmp_path: Path) -> None:
    with launched(tmp_path, "exit 0") as launch:
        leader = launch.leader()
        launch.shell.wait()
        launch.record.leader = [leader.pid, leader.start_ticks, 0]
        launch.record.members = [[4194002, 7, 0]]
        for pid in (leader.pid, 4194002):
            found = look(launch, frozenset({pid}))
            assert (found.life, found.members) == (Life.LEFTOVER, [])
        assert look(launch, frozenset({4194003})).life is Life.EXITED


def test_memory_of_a_stranger_with_a_members_old_pid_keeps_nothing_alive(tmp_path: Path) -> None:
    with launched(tmp_path, "exit 0") as launch, stranger() as other:
        leader = launch.leader()
        launch.shell.wait()
        launch.record.leader = [leader.pid, leader.start_ticks, 0]
        launch.record.members = [[other.pid, 7, 0]]
        assert look(launch, frozenset({other.pid})).life is Life.EXITED


def test_identities_are_of_those_that_still_run_and_are_the_same(tmp_path: Path) -> None:
    with launched(tmp_path, TREE) as launch, stranger() as other:
        launch.said("up")
        stats = session_members(launch.shell.pid)
        assert {process.pid for process in observe.identities(stats)} == {stat.pid for stat in stats}
        stat = processes.read_stat(other.pid)
        assert stat
        earlier = processes.Stat(stat.pid, stat.command, "S", stat.parent, stat.session, stat.start_ticks - 1)
        assert observe.identities([earlier]) == []
