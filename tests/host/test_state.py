"""The state folder: its lock and who holds it, generations, what was last good."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sage_reconcile.errors import LockHeld, StateError
from sage_reconcile.host import state as state_module
from sage_reconcile.host.state import Held, Holder, StateFolder, Word, default_folder
from tests.host.world import ROOT, eventually

ME = Holder(os.getpid(), 1, "apply", "/x/engines.yaml", 1.0)
HOLD = """
import sys, time
from pathlib import Path
from sage_reconcile.host.state import Holder, StateFolder
StateFolder(Path(sys.argv[1])).take_lock(Holder(4711, 5, "daemon", "/x/engines.yaml", 7.0))
print("held", flush=True)
time.sleep(600)
"""


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The folder with its lock held by another process."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE) as other:
        assert other.stdout
        assert other.stdout.readline() == b"held\n"
        try:
            yield other
        finally:
            other.kill()


def test_everything_in_it_is_for_its_owner_only(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "a" / "s")
    state.take_lock(ME)
    state.accept(tmp_path / "engines.yaml", "d1", "text")
    state.write_json("status.json", {})
    for path in [state.path, *state.path.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    state.create()
    state.release_lock()


def test_a_second_holder_is_told_who_the_first_is(tmp_path: Path) -> None:
    state = StateFolder(tmp_path)
    assert state.holder() is None
    with held(tmp_path):
        assert state.holder() == Holder(4711, 5, "daemon", "/x/engines.yaml", 7.0)
        with pytest.raises(LockHeld, match=r"is in use by daemon \(pid 4711, following /x/engines.yaml\); stop it"):
            state.take_lock(ME)
        assert state.holder() is not None, "one who was refused leaves the holder's words alone"


def test_the_lock_of_a_killed_holder_is_free_at_once(tmp_path: Path) -> None:
    state = StateFolder(tmp_path)
    with held(tmp_path) as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert "4711" in (tmp_path / "lock").read_text(), "what it wrote is still there"
        assert state.holder() is None
        state.take_lock(ME)
    assert StateFolder(tmp_path).holder() == ME
    state.release_lock()
    assert state.holder() is None
    state.take_lock(ME)
    state.release_lock()
    state.release_lock()


def test_those_who_only_look_never_keep_anyone_from_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks whether the lock is held shares it for a moment."""
    monkeypatch.setattr(state_module, "_LOOKED_AT_S", 20.0)
    state = StateFolder(tmp_path)
    state.create()
    descriptor = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    over = threading.Timer(0.1, fcntl.flock, (descriptor, fcntl.LOCK_UN))
    over.start()
    try:
        state.take_lock(ME)
        assert StateFolder(tmp_path).holder() == ME
        state.release_lock()
    finally:
        over.join()
        os.close(descriptor)


def test_a_holder_that_has_not_said_who_it_is_yet_is_waited_for(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    words = json.dumps({name: getattr(ME, name) for name in Holder.__slots__}).encode()
    late = threading.Timer(0.05, os.write, (descriptor, words))
    late.start()
    try:
        assert StateFolder(tmp_path).holder() == ME
        late.join()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"{", 0)
        with pytest.raises(LockHeld, match="in use by another process"):
            StateFolder(tmp_path).take_lock(ME)
    finally:
        late.join()
        os.close(descriptor)


def test_what_a_killed_holder_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    state = StateFolder(tmp_path)
    state.create()
    drafts = [tmp_path / ".status.json.77.tmp", state.launches / ".1a2b3c4d.json.77.tmp"]
    kept = [tmp_path / "status.json", state.launches / "1a2b3c4d.json", state.path / "logs" / ".x.tmp"]
    for path in (*drafts, *kept):
        path.write_text("{")
    with held(tmp_path):
        with pytest.raises(LockHeld):
            state.take_lock(ME)
        assert not any(path.exists() for path in drafts), "the holder has done it already"
        drafts[0].write_text("{")
        with pytest.raises(LockHeld):
            state.take_lock(ME)
        assert drafts[0].exists(), "who does not have the lock clears nothing away"
    state.take_lock(ME)
    assert not any(path.exists() for path in drafts)
    assert all(path.exists() for path in kept)
    state.release_lock()


def test_generations_count_contents_not_saves(tmp_path: Path) -> None:
    state, file = StateFolder(tmp_path), tmp_path / "engines.yaml"
    state.create()
    assert state.generation("d1") == (1, False)
    assert state.accept(file, "d1", "one") == 1
    assert state.generation("d1") == (1, True)
    assert state.accept(file, "d1", "one") == 1
    assert state.generation("d2") == (2, False)
    assert state.accept(file, "d2", "two") == 2
    assert state.accept(file, "d1", "one") == 3, "going back is a change too"
    assert StateFolder(tmp_path).generation("d1") == (3, True)
    assert (tmp_path / "last-good.yaml").read_text() == "one"
    assert state.read_json("generation.json") == {"generation": 3, "digest": "d1", "file": str(file)}


def test_the_same_content_at_another_place_is_the_same_generation_of_that_file(tmp_path: Path) -> None:
    state = StateFolder(tmp_path)
    state.create()
    state.accept(tmp_path / "a.yaml", "d1", "one")
    assert state.accept(tmp_path / "b.yaml", "d1", "one") == 1
    assert state.read_json("generation.json")["file"] == str(tmp_path / "b.yaml")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"generation": "many"}', "\0\0"])
def test_a_generation_that_cannot_be_read_starts_anew(tmp_path: Path, content: str) -> None:
    state = StateFolder(tmp_path)
    state.create()
    (tmp_path / "generation.json").write_text(content)
    assert state.generation("d1") == (1, False)
    assert state.accept(tmp_path / "engines.yaml", "d1", "one") == 1


def test_small_files_are_written_whole_and_read_or_empty(tmp_path: Path) -> None:
    state = StateFolder(tmp_path)
    assert state.read_json("status.json") == {}
    state.write_json("status.json", {"a": [1, None]})
    assert state.read_json("status.json") == {"a": [1, None]}
    (tmp_path / "status.json").write_bytes(b"\xff")
    assert state.read_json("status.json") == {}


def test_a_folder_that_cannot_be_made_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match=r"file/s: cannot be made: Not a directory; choose another with --state-dir"):
        StateFolder(tmp_path / "file" / "s").take_lock(ME)
    state = StateFolder(tmp_path / "s")
    state.create()
    (state.path / "lock").mkdir()
    with pytest.raises(StateError, match=r"lock: Is a directory; choose another with --state-dir"):
        state.take_lock(ME)


def test_a_folder_in_which_everyone_may_write_is_refused_with_a_remedy(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(StateError, match=rf"everyone may write there.*chmod o-w {folder}"):
        StateFolder(folder).take_lock(ME)
    folder.chmod(0o775)
    StateFolder(folder).take_lock(ME)


def test_a_lock_that_cannot_be_written_is_an_error_and_not_held(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\n"
        "from sage_reconcile.host.state import Holder, StateFolder\nfrom sage_reconcile.errors import StateError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nstate = StateFolder(Path(sys.argv[1]))\nstate.create()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "try:\n    state.take_lock(Holder(1, 1, 'apply', 'f', 1.0))\nexcept StateError as error:\n"
        "    print(error, state.holder())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == f"{tmp_path}/lock: File too large None\n"


def test_logs_sort_by_time_and_name_their_launch(tmp_path: Path) -> None:
    state = StateFolder(tmp_path)
    paths = [state.log("chat", 1, at, launch) for at, launch in ((1.0, "ff"), (61.0, "00"), (1e9, "aa"))]
    assert sorted(paths) == paths
    assert paths[0] == tmp_path / "logs" / "chat.1" / "19700101T000001-ff.log"


def test_where_the_state_is_kept_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_folder({"STATE_DIRECTORY": "/var/lib/a:/var/lib/b", "HOME": "/h"}) == Path("/var/lib/a")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_folder({"HOME": "/h"}) == Path("/var/lib/sage-reconcile")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert default_folder({"HOME": "/h"}) == Path("/h/.local/state/sage-reconcile")
    assert default_folder({"HOME": "/h", "XDG_STATE_HOME": "/x"}) == Path("/x/sage-reconcile")
    assert default_folder({"XDG_STATE_HOME": "", "HOME": "/h"}) == Path("/h/.local/state/sage-reconcile")


def test_being_refused_the_lock_takes_no_long_time(tmp_path: Path) -> None:
    with held(tmp_path):
        begun = time.monotonic()
        with pytest.raises(LockHeld):
            StateFolder(tmp_path).take_lock(ME)
        assert time.monotonic() - begun < 5
        assert eventually(StateFolder(tmp_path).holder)


def test_what_was_agreed_is_told_once_and_the_last_word_counts(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "s")
    state.create()
    assert state.take_word() is None
    state.leave_word(Word("one", "v", "p"))
    state.leave_word(Word("two", "v", "p", allow_moves=True))
    assert StateFolder(tmp_path / "s").take_word() == Word("two", "v", "p", allow_moves=True)
    assert state.take_word() is None
    assert not list((tmp_path / "s").glob("agreed*"))
    for torn in ("torn", "[]", '{"digest": "two"}', '{"digest": "a", "values": "", "plan": "", "later": 1}'):
        (tmp_path / "s" / "agreed.json").write_text(torn)
        assert state.take_word() is None


def test_what_is_held_back_is_so_until_something_is_accepted(tmp_path: Path) -> None:
    state, file = StateFolder(tmp_path), tmp_path / "engines.yaml"
    state.create()
    held = Held("d2", str(file), ("chat/0",), 1, "0", 7.0)
    assert state.held(file, "d2") is None
    state.accept(file, "d1", "one")
    state.hold(held)
    assert StateFolder(tmp_path).held(file, "d2") == held
    assert state.held(file, "d1") is None
    assert state.held(tmp_path / "other.yaml", "d2") is None
    state.accept(file, "d1", "one")
    assert state.held(file, "d2") is None
    state.hold(held)
    text = (tmp_path / "held.json").read_text()
    state.accept(file, "d2", "two")
    assert not (tmp_path / "held.json").exists()
    (tmp_path / "held.json").write_text(text)
    assert state.held(file, "d2") is None, "a crash came between its acceptance and this"


@pytest.mark.parametrize("gone", ["replicas", "running", "guard", "since"])
def test_what_another_version_holds_back_is_held_back(tmp_path: Path, gone: str) -> None:
    state, file = StateFolder(tmp_path), tmp_path / "engines.yaml"
    state.create()
    told = {"digest": "d", "file": str(file), "replicas": ["a/0"], "running": 1, "guard": "0", "since": 1.0}
    (tmp_path / "held.json").write_text(json.dumps({key: value for key, value in told.items() if key != gone}))
    assert state.held(file, "d") is not None
    (tmp_path / "held.json").write_text(json.dumps({**told, "invented_later": 1}))
    assert state.held(file, "d") is not None
