"""Starting, proving, signalling and outliving real processes."""

from __future__ import annotations

import os
import signal
import stat as modes
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sage_reconcile.errors import SpawnError
from sage_reconcile.host import processes
from sage_reconcile.host.processes import ProcessId, Run
from tests.host.world import LAUNCH, Launched, eventually, launched, session_members, shell, stranger, zombie


def identity(pid: int) -> ProcessId:
    found = processes.identify(pid)
    assert found is not None
    return found


def spoilt(process: ProcessId) -> list[ProcessId]:
    """Identities of the same pid that are not of this process: an earlier one, a later one, another inode."""
    wrong = [
        replace(process, start_ticks=process.start_ticks - 1),
        replace(process, start_ticks=process.start_ticks + 1),
        ProcessId(process.pid, 0),
    ]
    return [*wrong, replace(process, inode=process.inode + 1)] if process.inode else wrong


def test_a_process_is_known_by_pid_start_and_inode() -> None:
    me = identity(os.getpid())
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    assert (me.pid, me.start_ticks) == (os.getpid(), int(fields[19]))
    assert processes.alive(me)
    with stranger() as other:
        assert identity(other.pid) != me
        assert not me.inode or identity(other.pid).inode != me.inode


def test_a_signal_goes_to_the_very_process_only() -> None:
    with stranger() as other:
        for wrong in spoilt(identity(other.pid)):
            assert processes.open_pidfd(wrong) is None
            assert not processes.send(wrong, signal.SIGKILL)
        processes.kill_all(spoilt(identity(other.pid)))
        assert processes.alive(identity(other.pid))


def test_a_signal_reaches_whom_it_is_for() -> None:
    child = subprocess.Popen(["sleep", "600"])
    me = identity(child.pid)
    assert processes.send(me, signal.SIGTERM)
    assert child.wait(10) == -signal.SIGTERM
    assert not processes.send(me, signal.SIGTERM), "it has ended"


def test_kill_all_kills_all_and_minds_neither_the_dead_nor_doubles() -> None:
    children = [subprocess.Popen(["sleep", "600"]) for _ in range(3)]
    ids = [identity(child.pid) for child in children]
    children[0].kill()
    children[0].wait()
    with stranger() as other:
        processes.kill_all([*ids, *ids, *spoilt(identity(other.pid))])
        assert [child.wait(10) for child in children] == [-signal.SIGKILL] * 3


def test_killing_one_that_may_not_be_signalled_does_not_spare_the_others() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a process of another user")
    code = (
        "import os, signal, subprocess, sys\nfrom sage_reconcile.host import processes\n"
        "mine = subprocess.Popen(['sleep', '600'], user=65534)\n"
        "os.setresuid(65534, 65534, 65534)\n"
        "try:\n"
        "    foreign, own = processes.identify(int(sys.argv[1])), processes.identify(mine.pid)\n"
        "    processes.kill_all([foreign, own])\n"
        "    assert mine.wait(10) == -signal.SIGKILL\n"
        "finally:\n    mine.kill()\n"
    )
    with stranger() as other:
        done = subprocess.run(
            [sys.executable, "-c", code, str(other.pid)], capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 0, done.stderr


def test_a_zombie_is_not_alive() -> None:
    child = zombie()
    stat = processes.read_stat(child.pid)
    assert stat is not None
    assert not stat.running
    assert not processes.alive(ProcessId(child.pid, stat.start_ticks))
    assert processes.identify(child.pid) is None
    assert processes.open_pidfd(ProcessId(child.pid, stat.start_ticks)) is None
    child.wait()
    assert processes.read_stat(child.pid) is None


@pytest.mark.parametrize(
    "text",
    [
        *("", "1", "12 (sh", "x (sh) S " + "1 " * 30, "1 (sh) S 1 2", "1 (sh) S x y z " + "1 " * 30),
        *("exit 0", "\0" * 100, ") 1 ( " + "1 " * 30),
    ],
)
def test_what_is_no_line_of_stat_is_nothing(text: str) -> None:
    assert processes.parse_stat(text) is None


def test_a_command_may_be_called_anything(tmp_path: Path) -> None:
    odd = tmp_path / "a) S 1 (b"
    odd.symlink_to("/bin/sleep")
    with stranger(str(odd), "600") as other:
        found = eventually(lambda: (s := processes.read_stat(other.pid)) and s.command == "a) S 1 (b" and s)
        assert (found.session, found.running) == (other.pid, True)


def test_a_launch_has_a_session_and_its_words_arrive_as_they_are(tmp_path: Path) -> None:
    words = ["a b", "c'd", '"$HOME"', "`id`", "*", "", "--flag=\\", "é\nnew line"]
    code = "import sys; print(ascii(sys.argv[1:]), flush=True)"
    with launched(tmp_path, "", argv=[sys.executable, "-c", code, *words]) as launch:
        launch.said(ascii(words))
        leader = launch.leader()
        assert launch.run().session == launch.shell.pid
        assert leader.pid != launch.shell.pid
        assert eventually(lambda: launch.run().exit_code is not None)


def test_the_shell_looks_like_no_engine_and_tells_whose_it_is(tmp_path: Path) -> None:
    with launched(tmp_path, "sleep 600 # vllm serve") as launch:
        launch.leader()
        words = Path(f"/proc/{launch.shell.pid}/cmdline").read_text().split("\0")
        assert "vllm" not in " ".join(words)
        assert "sage-reconcile chat/0" in words
        assert processes.is_marked(launch.shell.pid, LAUNCH)
        assert not processes.is_marked(launch.shell.pid, LAUNCH[:-1]), "the whole id has to match"


def test_its_files_are_for_the_owner_only_and_nothing_else_is_inherited(tmp_path: Path) -> None:
    secret = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(secret, True)
    try:
        with launched(tmp_path, "ls /proc/self/fd | tr '\\n' ' '; echo; echo done; sleep 600") as launch:
            launch.said("done")
            descriptors = launch.log.read_text().splitlines()[0].split()
            assert descriptors[:3] == ["0", "1", "2"]
            assert len(descriptors) == 4, "ls has the folder it lists open"
            for path in (launch.log, launch.run_file):
                assert modes.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.close(secret)


@pytest.mark.parametrize(
    ("code", "status"),
    [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill -15 $$", 143), ("exit 255", 255)],
)
def test_how_it_ended_is_told_by_the_shell(tmp_path: Path, code: str, status: int) -> None:
    with launched(tmp_path, code) as launch:
        assert eventually(lambda: launch.run().exit_code is not None)
        run = launch.run()
        assert run.exit_code == status
        assert run.ended_at == pytest.approx(launch.run_file.stat().st_mtime)
        assert launch.shell.wait(10) == 0


def test_a_program_that_is_not_there_ends_with_127_and_says_so_in_the_log(tmp_path: Path) -> None:
    with launched(tmp_path, "", argv=["/nowhere/python", "-m", "x"]) as launch:
        assert eventually(lambda: launch.run().exit_code is not None)
        assert launch.run().exit_code == 127
        assert launch.run().leader is not None
        assert "/nowhere/python" in launch.log.read_text()


def test_what_cannot_be_started_is_an_error_and_leaves_no_descriptor_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for broken in ("folder", "log", "run_file"):
        paths = {"folder": tmp_path, "log": tmp_path / f"{broken}.log", "run_file": tmp_path / f"{broken}.run"}
        paths[broken] = tmp_path / "missing" / "x"
        with pytest.raises(SpawnError, match=r"cannot start sleep: No such file or directory \(.*missing/x\)"):
            processes.spawn("chat/0", ["sleep", "1"], os.environ, **paths)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_exit_is_known_to_one_who_was_not_there(tmp_path: Path) -> None:
    """The parent of the shell is gone before the leader ends, as when a daemon was killed."""
    code = (
        "import os\nfrom pathlib import Path\nfrom sage_reconcile.host import processes\n"
        f"f = Path({str(tmp_path)!r})\n"
        "processes.spawn('chat/0', ['/bin/sh', '-c', '"
        "n=0; until [ -e go ] || [ $n -gt 3000 ]; do n=$((n+1)); sleep 0.01; done; exit 3'], os.environ,"
        " folder=f, log=f / 'log', run_file=f / 'run')\nos._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    run_file = tmp_path / "run"
    leader = eventually(lambda: processes.read_run(run_file).leader)
    assert processes.alive(leader)
    assert processes.under_way(run_file)
    (tmp_path / "go").touch()
    eventually(lambda: processes.read_run(run_file).exit_code == 3)
    eventually(lambda: not processes.under_way(run_file))


def test_the_lock_of_the_run_file_is_held_as_long_as_the_shell_lives(tmp_path: Path) -> None:
    assert not processes.under_way(tmp_path / "missing.run")
    (tmp_path / "empty.run").touch()
    assert not processes.under_way(tmp_path / "empty.run")
    with launched(tmp_path, "", argv=["sleep", "600"]) as launch:
        leader = launch.leader()
        assert processes.under_way(launch.run_file)
        launch.shell.kill()
        launch.shell.wait()
        eventually(lambda: Path(f"/proc/{leader.pid}/comm").read_text() == "sleep\n", "the leader is what it is to be")
        assert not processes.under_way(launch.run_file), "neither the leader nor its children have the lock"
        assert processes.alive(leader), "a shell that is killed alone takes nothing along"
        assert [stat.pid for stat in session_members(launch.shell.pid)] == [leader.pid]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_to_the_whole_group_ends_the_engine_and_not_its_shell(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # whoever runs us in the background has us ignore some
    with launched(tmp_path, "echo up; exec sleep 600") as launch:
        signal.signal(number, before)
        launch.said("up")
        eventually(lambda: Path(f"/proc/{launch.leader().pid}/comm").read_text() == "sleep\n")
        os.killpg(launch.shell.pid, number)
        assert eventually(lambda: launch.run().exit_code is not None)
        assert launch.run().exit_code == 128 + number
        assert launch.shell.wait(10) == 0


def test_the_engine_can_be_terminated_though_its_shell_cannot(tmp_path: Path) -> None:
    """The shell's traps are not inherited as "ignore"."""
    with launched(tmp_path, "", argv=["sleep", "600"]) as launch:
        leader = launch.leader()
        eventually(lambda: Path(f"/proc/{leader.pid}/comm").read_text() == "sleep\n")
        assert processes.send(leader, signal.SIGTERM)
        eventually(lambda: launch.run().exit_code == 143)


def test_members_are_the_running_ones_of_the_session_without_the_shell(tmp_path: Path) -> None:
    child = shell("import os, time; os.setsid(); print('apart', flush=True); time.sleep(600)")
    with launched(tmp_path, f"sleep 600 & {child} & apart=$!; echo $apart > pid; wait") as launch:
        launch.said("apart")
        apart = int((tmp_path / "pid").read_text())
        try:
            names = sorted(stat.command for stat in session_members(launch.shell.pid))
            assert names == ["sh", "sleep"]
            assert apart not in launch.members(), "it has a session of its own"
        finally:
            os.kill(apart, signal.SIGKILL)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", Run()),
        ("12 (sh) S", Run()),
        ("rubbish\n" * 3, Run()),
        ("\udcff\udcfe rubbish", Run()),
    ],
)
def test_a_torn_run_file_tells_nothing(tmp_path: Path, content: str, expected: Run) -> None:
    path = tmp_path / "x.run"
    path.write_bytes(content.encode(errors="surrogateescape"))
    assert processes.read_run(path) == expected


def test_an_exit_that_is_no_number_is_an_unknown_exit(tmp_path: Path) -> None:
    path = tmp_path / "x.run"
    path.write_text("7 (sh) S 1 7 7 " + "0 " * 15 + "99 0\nexit x\n")
    run = processes.read_run(path)
    assert run.leader == ProcessId(7, 99)
    assert run.exit_code is None


def test_two_launches_have_nothing_in_common(tmp_path: Path) -> None:
    with launched(tmp_path, "sleep 600") as one, launched(tmp_path, "sleep 600", "2b3c4d5e") as two:
        first, second = one.leader(), two.leader()
        assert {first.pid}.isdisjoint(two.members())
        processes.kill_all([first])
        eventually(lambda: one.run().exit_code == 137)
        assert processes.alive(second)
        assert isinstance(one, Launched)
