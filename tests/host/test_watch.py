"""Saves of every kind are noticed, and ends of processes without looking."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sage_reconcile.host import processes
from sage_reconcile.host.processes import ProcessId
from sage_reconcile.host.watch import DEBOUNCE_MS, SETTLED_MS, ExitWatcher, FileWatcher
from tests.host.world import eventually


class Watched:
    """A file with a watcher on it, and how often it called."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.calls = 0
        self.watcher = FileWatcher(file, self._changed)
        self.watcher.refresh()
        eventually(lambda: self.calls, "the first look, when the watch is in place")

    def _changed(self) -> None:
        self.calls += 1

    def notices(self, change: Callable[[], object]) -> None:
        """Makes a change when all is quiet, and waits until it was told of."""
        self.quiet()
        before = self.calls
        change()
        eventually(lambda: self.calls > before, "a call", within_s=15)

    def quiet(self) -> None:
        """Waits until no call comes for twice the time that a burst may take."""
        while True:
            before = self.calls
            time.sleep(2 * DEBOUNCE_MS / 1000)
            if self.calls == before:
                return


@pytest.fixture(name="watched")
def _watched(tmp_path: Path) -> Iterator[Watched]:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/engines.yaml").write_text("one")
    watched = Watched(tmp_path / "d/engines.yaml")
    yield watched
    watched.watcher.close()
    eventually(lambda: not [t for t in threading.enumerate() if t.name == "watch"], "the watching thread ends")


def rename_over(file: Path, text: str) -> None:
    draft = file.with_name(".draft")
    draft.write_text(text)
    draft.replace(file)


def test_in_place_by_rename_and_away(watched: Watched) -> None:
    watched.notices(lambda: watched.file.write_text("two"))
    watched.notices(lambda: rename_over(watched.file, "three"))
    watched.notices(lambda: rename_over(watched.file, "four"))
    watched.notices(watched.file.unlink)
    watched.notices(lambda: watched.file.write_text("five"))
    watched.quiet()
    before = watched.calls
    watched.file.read_text()
    watched.watcher.refresh()
    watched.quiet()
    assert watched.calls == before, "reading is no change, and watching the same folders is no new watch"


def test_a_burst_of_saves_is_few_calls(watched: Watched) -> None:
    watched.quiet()
    before = watched.calls
    for number in range(100):
        watched.file.write_text(str(number))
    eventually(lambda: watched.calls > before)
    watched.quiet()
    assert watched.calls - before <= 10


def test_a_swapped_link_and_an_edit_of_what_it_points_to(tmp_path: Path) -> None:
    """As a ConfigMap is mounted: the file is a link to ``..data/engines.yaml``, and ``..data`` is a link too."""
    for name in ("v1", "v2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "engines.yaml").write_text(name)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/..data").symlink_to(tmp_path / "v1")
    (tmp_path / "etc/engines.yaml").symlink_to("..data/engines.yaml")
    watched = Watched(tmp_path / "etc/engines.yaml")

    def swap() -> None:
        (tmp_path / "etc/..new").symlink_to(tmp_path / "v2")
        (tmp_path / "etc/..new").rename(tmp_path / "etc/..data")

    try:
        watched.notices(lambda: (tmp_path / "v1/engines.yaml").write_text("edited where it is"))
        watched.notices(swap)
        before = watched.calls
        watched.watcher.refresh()
        eventually(lambda: watched.calls > before, "the first look at where it points now")
        watched.notices(lambda: (tmp_path / "v2/engines.yaml").write_text("edited where it is now"))
    finally:
        watched.watcher.close()


def test_a_folder_that_goes_away_and_comes_back(watched: Watched) -> None:
    folder = watched.file.parent

    def away() -> None:
        watched.file.unlink()
        folder.rmdir()

    watched.notices(away)
    watched.watcher.refresh()
    folder.mkdir()
    (folder / "other").mkdir()  # so that the folder's number is another one also where numbers are used again
    watched.file.write_text("new")
    before = watched.calls
    watched.watcher.refresh()
    eventually(lambda: watched.calls > before, "the first look at the new folder")
    watched.notices(lambda: watched.file.write_text("newer"))


def test_a_folder_that_is_replaced_by_another(watched: Watched) -> None:
    folder = watched.file.parent
    folder.rename(folder.with_name("old"))
    folder.mkdir()
    before = watched.calls
    watched.watcher.refresh()
    eventually(lambda: watched.calls > before)
    watched.notices(lambda: watched.file.write_text("in the new one"))


def test_what_is_saved_while_the_watch_is_being_set_up_is_looked_for(tmp_path: Path) -> None:
    """Between the reading of the file and the watch there is a moment in which a save makes no event."""
    called = threading.Event()
    watcher = FileWatcher(tmp_path / "engines.yaml", called.set)
    try:
        begun = time.monotonic()
        watcher.refresh()
        assert called.wait(15), "called though nothing has changed"
        assert time.monotonic() - begun >= SETTLED_MS / 1000 * 0.9
    finally:
        watcher.close()


def test_after_the_end_nothing_is_told(watched: Watched) -> None:
    watched.watcher.close()
    watched.watcher.close()
    eventually(lambda: not [t for t in threading.enumerate() if t.name == "watch"])
    before = watched.calls
    watched.file.write_text("two")
    time.sleep(2 * DEBOUNCE_MS / 1000)
    assert watched.calls == before


def test_a_file_in_no_folder_is_no_fault(tmp_path: Path) -> None:
    watcher = FileWatcher(tmp_path / "missing" / "engines.yaml", lambda: None)
    watcher.refresh()
    watcher.refresh()
    watcher.close()


class Ends:
    """An event loop with an exit watcher, and how often it was woken."""

    def __init__(self) -> None:
        self.woken = 0
        self.event = asyncio.Event()
        self.watcher = ExitWatcher(asyncio.get_running_loop(), self._ended)

    def _ended(self) -> None:
        self.woken += 1
        self.event.set()

    async def wait(self, seconds: float = 20) -> None:
        await asyncio.wait_for(self.event.wait(), seconds)
        self.event.clear()


def sleeping() -> tuple[subprocess.Popen[bytes], ProcessId]:
    process = subprocess.Popen(["sleep", "600"])
    found = processes.identify(process.pid)
    assert found
    return process, found


def test_the_end_of_a_process_wakes_the_loop_once() -> None:
    async def story() -> None:
        ends = Ends()
        (first, one), (second, two) = sleeping(), sleeping()
        try:
            wanted = {("a", one.pid): one, ("b", two.pid): two}
            ends.watcher.follow(wanted)
            ends.watcher.follow(wanted)
            await asyncio.sleep(0.05)
            assert ends.woken == 0
            first.kill()
            await ends.wait()
            first.wait()
            ends.watcher.follow({("b", two.pid): two})
            ends.watcher.follow({})
            second.kill()
            second.wait()
            await asyncio.sleep(0.05)
            assert ends.woken == 1, "who is no longer followed wakes nobody"
        finally:
            ends.watcher.close()
            for process in (first, second):
                process.kill()
                process.wait()

    before = len(list(Path("/proc/self/fd").iterdir()))
    asyncio.run(story())
    assert len(list(Path("/proc/self/fd").iterdir())) == before, "no descriptor stays open"


def test_one_that_ended_before_it_was_followed_or_is_another_by_now_wakes_the_loop() -> None:
    async def story() -> None:
        ends = Ends()
        process, identity = sleeping()
        try:
            later = ProcessId(identity.pid, identity.start_ticks + 1)
            ends.watcher.follow({("a", later.pid): later})
            await ends.wait()
            process.send_signal(signal.SIGKILL)
            process.wait()
            ends.watcher.follow({("a", identity.pid): identity})
            await ends.wait()
        finally:
            ends.watcher.close()
            process.kill()
            process.wait()

    asyncio.run(story())


def test_the_end_of_what_is_not_our_child_is_seen_too() -> None:
    parent = subprocess.Popen(
        ["/bin/sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, start_new_session=True
    )

    async def story() -> None:
        ends = Ends()
        try:
            assert parent.stdout
            pid = int(parent.stdout.readline())
            identity = processes.identify(pid)
            assert identity
            ends.watcher.follow({("a", pid): identity})
            os.kill(pid, signal.SIGKILL)
            await ends.wait()
        finally:
            ends.watcher.close()
            os.killpg(parent.pid, signal.SIGKILL)
            parent.communicate()

    asyncio.run(story())
