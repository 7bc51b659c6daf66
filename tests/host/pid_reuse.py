"""Run as the first process of a pid namespace of its own: every pid of a launch is given to strangers.

``/proc/sys/kernel/ns_last_pid`` says which pid comes next, there and nowhere else on the machine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from sage_reconcile.core.observed import Life
from sage_reconcile.host import observe, processes
from sage_reconcile.host.processes import LAUNCH_VARIABLE, ProcessId
from tests.host.world import LAUNCH, Launched, eventually, session_members

NEXT_PID = Path("/proc/sys/kernel/ns_last_pid")


def stranger(pid: int, *, marked: bool) -> subprocess.Popen[bytes]:
    """A process of that very pid, with a session of its own and a child in it."""
    NEXT_PID.write_text(str(pid - 1), encoding="ascii")
    environ = {**os.environ, **({LAUNCH_VARIABLE: LAUNCH} if marked else {})}
    words = ["/bin/sh", "-c", "sleep 600 & echo up; wait"]
    made = subprocess.Popen(words, stdout=subprocess.PIPE, env=environ, start_new_session=True)
    assert made.pid == pid, f"{made.pid} in place of {pid}"
    assert made.stdout
    assert made.stdout.readline() == b"up\n"
    return made


def reap() -> None:
    """Orphans are ours here, as the first process."""
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return


def once(folder: Path, *, marked: bool) -> int:
    """One launch, dead and gone, and strangers under all its pids; how many signals were tried on them."""
    launch = Launched(folder, "sleep 600 & echo up; wait")
    launch.said("up")
    leader = processes.identify(launch.leader().pid)
    head = processes.identify(launch.shell.pid)
    child = next(s for s in session_members(launch.shell.pid) if s.pid != launch.leader().pid)
    assert leader
    assert head
    launch.record.leader = [leader.pid, leader.start_ticks, leader.inode]
    launch.record.members = observe.members(launch.record, head.pid, leader)
    of_old = [leader, head, *observe.identities([child])]
    processes.kill_all([head, leader, of_old[2]])
    launch.shell.wait()
    eventually(lambda: reap() or not any(processes.read_stat(old.pid) for old in of_old), "all are gone")
    # the shell's pid stays unmarked: a marked leader of its session that is as old as ours was would be our shell
    # the highest first, so that the child of one does not take the pid of the next
    new = [stranger(old.pid, marked=marked and old is not head) for old in sorted(of_old, key=lambda x: -x.pid)]
    ticks = {other.pid: stat.start_ticks for other in new if (stat := processes.read_stat(other.pid))}
    found = observe.examine(launch.record, launch.run_file, frozenset(ticks))
    assert found.life is Life.EXITED, found
    tried = 0
    same_tick = [replace(old, start_ticks=ticks[old.pid]) for old in of_old]
    for identity in (*of_old, *same_tick):
        assert not processes.alive(identity)
        assert not processes.send(identity, signal.SIGKILL)
        tried += 1
    launch.record.leader = [leader.pid, ticks[leader.pid], leader.inode]
    assert observe.examine(launch.record, launch.run_file, frozenset()).life is Life.EXITED
    bare = ProcessId(leader.pid, ticks[leader.pid])
    launch.record.leader = [bare.pid, bare.start_ticks, 0]  # it died before its inode was on record
    if not marked:
        assert observe.examine(launch.record, launch.run_file, frozenset()).life is Life.EXITED
    ours, _ = observe.proven_members(launch.record, head.pid, leader)
    processes.kill_all([*of_old, *same_tick, *observe.identities(ours)])
    time.sleep(0.01)  # a signal that was sent would have come by now
    assert [other.poll() for other in new] == [None] * len(new), "a stranger was harmed"
    for other in new:
        assert len(session_members(other.pid)) == 1, "and so was its child"
        os.killpg(other.pid, signal.SIGKILL)
        other.wait()
        assert other.stdout
        other.stdout.close()
    reap()
    return tried


def main() -> None:
    total = 0
    for number in range(int(sys.argv[1])):
        with tempfile.TemporaryDirectory() as folder:
            total += once(Path(folder), marked=bool(number % 2))
    print(f"{total} identities, all of strangers by then, and none signalled")


if __name__ == "__main__":
    main()
