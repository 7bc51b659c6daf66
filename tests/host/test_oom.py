"""What the kernel tells of processes that it killed for want of memory."""

from __future__ import annotations

import os
from pathlib import Path

from sage_reconcile.host import oom

LINE = "Out of memory: Killed process 4242 (VLLM::EngineCor) total-vm:91234kB, anon-rss:81234kB, oom_score_adj:0"


def test_the_kernels_line_about_one_of_ours_is_found(tmp_path: Path) -> None:
    log = tmp_path / "kmsg"
    log.write_text(
        "6,1,1000000,-;booted\n"
        "3,2,2000000,-;Out of memory: Killed process 42 (other) total-vm:1kB\n"
        f"3,3,3000000,-;{LINE}\n"
        "3,4,4000000,-;Memory cgroup out of memory: Killed process 77 (python3) total-vm:1kB\n"
    )
    assert oom.killed({1, 4242}, 0, log) == LINE
    assert oom.killed({77}, 0, log).startswith("Memory cgroup out of memory: Killed process 77 (python3)")
    assert oom.killed({4}, 0, log) == ""
    assert oom.killed({4242}, 3, log) == LINE
    assert oom.killed({4242}, 3.1, log) == "", "that was another process of this pid"
    assert oom.killed({4242}, 0, tmp_path / "none") == ""


def test_a_log_that_ends_without_a_line_is_read_to_its_end(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    descriptor = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(descriptor, f"3,3,3,-;{LINE}\n".encode())
        assert oom.killed({4242}, 0, pipe) == LINE  # reading on would block: that is the end
    finally:
        os.close(descriptor)


def test_the_kills_of_a_cgroup_are_counted(tmp_path: Path) -> None:
    proc = tmp_path / "cgroup"
    proc.write_text("0::/system.slice/x.service\n")
    assert oom.kills(proc, tmp_path) == 0
    folder = tmp_path / "system.slice" / "x.service"
    folder.mkdir(parents=True)
    (folder / "memory.events").write_text("low 0\nhigh 0\nmax 9\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert oom.kills(proc, tmp_path) == 2
    proc.write_text("1:memory:/old\n")
    assert oom.kills(proc, tmp_path) == 0


def test_here_it_can_be_asked() -> None:
    assert oom.kills() >= 0
    assert oom.killed({os.getpid()}) == ""
