"""The host's memory as the kernel tells it, and as a cgroup limits it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sage_reconcile.core.observed import Life
from sage_reconcile.host import memory, observe
from tests.host.world import launched, shell

MIB = 1 << 20
HOLDS = """
import mmap, sys
mine = bytearray(64 << 20)
for at in range(0, len(mine), 4096):
    mine[at] = 1
file = open(sys.argv[1], "r+b")
shared = mmap.mmap(file.fileno(), 0)
for at in range(0, len(shared), 4096):
    shared[at]
print("holds", flush=True)
sys.stdin.read()
"""


def limited(root: Path, path: str, **files: str) -> None:
    """A cgroup below a root of its own: ``max``, ``current`` and ``stat``."""
    folder = root / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/old\n0::/slice/service\n")
    return tmp_path


def test_it_is_what_the_kernel_says(root: Path) -> None:
    found = memory.read(root)
    assert found is not None
    told = psutil.virtual_memory()
    assert found.total_mib == told.total // MIB
    assert 0 < found.available_mib < found.total_mib
    assert abs(found.available_mib - told.available // MIB) < 2048
    assert memory.read() is not None


def test_a_cgroup_with_less_decides_and_what_it_only_caches_is_not_used(root: Path) -> None:
    stat = f"anon 5\nfile {900 * MIB}\ninactive_file {100 * MIB}\nactive_file {800 * MIB}\n"
    limited(root, "slice/service", max=f"{1024 * MIB}\n", current=f"{400 * MIB}\n", stat=stat)
    found = memory.read(root)
    assert found is not None
    assert (found.total_mib, found.available_mib) == (1024, 724)


def test_the_tightest_of_those_above_it_decides(root: Path) -> None:
    limited(root, "slice/service", max="max\n", current=f"{1 * MIB}\n")
    limited(root, "slice", max=f"{2048 * MIB}\n", current=f"{2000 * MIB}\n")
    limited(root, "", max=f"{4096 * MIB}\n", current=f"{2001 * MIB}\n")
    found = memory.read(root)
    assert found is not None
    assert (found.total_mib, found.available_mib) == (2048, 48)


def test_a_container_sees_its_own_as_the_top(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("0::/\n")
    limited(root, "", max=f"{512 * MIB}\n", current=f"{600 * MIB}\n")
    found = memory.read(root)
    assert found is not None
    assert (found.total_mib, found.available_mib) == (512, 0)


@pytest.mark.parametrize("files", [{"max": "max\n", "current": "5\n"}, {"max": f"{2**60}\n", "current": "5\n"}, {}])
def test_a_cgroup_without_a_limit_of_its_own_changes_nothing(root: Path, files: dict[str, str]) -> None:
    limited(root, "slice/service", **files)
    found = memory.read(root)
    assert found is not None
    assert found.total_mib == psutil.virtual_memory().total // MIB


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process with 64 MiB of its own, and a file of 96 MiB mapped."""
    file = tmp_path / "large"
    file.write_bytes(b"x" * (96 * MIB))
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "holds\n"
        yield process
        process.kill()


def test_what_a_process_has_for_itself_is_counted_and_what_it_maps_is_not(holder: subprocess.Popen[str]) -> None:
    held = memory.held_mib([holder.pid])
    assert 64 <= held < 64 + 32
    assert psutil.Process(holder.pid).memory_info().rss >= (64 + 96) * MIB
    assert memory.held_mib([holder.pid, holder.pid]) in range(2 * held - 2, 2 * held + 1)


def test_what_has_ended_holds_nothing() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    assert memory.held_mib([child.pid]) == 0
    assert memory.held_mib([]) == 0


def test_what_all_processes_of_a_launch_hold_counts_as_its_own(tmp_path: Path) -> None:
    """The leader, and a child that holds 64 MiB; only of what was promised some, or is vLLM on the CPU."""
    code = shell("mine = bytearray(64 << 20); print('there', flush=True); input()")
    with launched(tmp_path, f"(sleep 600 | {code} >&2) & wait") as made:
        made.said("there")
        found = {made.record.id: observe.examine(made.record, made.run_file, frozenset())}
        assert observe.host_held([made.record], found) == {}
        made.record.spec = {"device": "cpu", "runtime": "vllm"}
        assert 64 <= observe.host_held([made.record], found)[made.record.id] < 64 + 64
        made.record.spec, made.record.host_memory_mib = {}, 1
        assert 64 <= observe.host_held([made.record], found)[made.record.id] < 64 + 64
        found[made.record.id].life = Life.UNPROVEN
        assert observe.host_held([made.record], found) == {}
