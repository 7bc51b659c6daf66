"""engines.yaml changed in place: what is asked and nothing else, by many at once, and what cannot be done is not."""

from __future__ import annotations

import difflib
import fcntl
import os
import re
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sage_reconcile.core import changes
from sage_reconcile.core.changes import Change, Present
from sage_reconcile.errors import EditRefused, FileFaults, LockHeld
from sage_reconcile.host import edits, files

FILE = """\
# head
version: 1
engines:
  chat:
    model: a/b-7B  # the model
    memory: 24GiB
  code: {model: q/c-7B}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "engines.yaml"
    path.write_text(FILE)
    return path


def assign(name: str, **fields: object) -> Callable[[Present], list[Change]]:
    return lambda present: changes.assign(present, name, list(fields.items()))


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_an_edit_changes_the_file_and_tells_what_it_was_and_is(path: Path) -> None:
    done = edits.edit(path, {}, assign("chat", memory="30GiB"))
    assert path.read_text() == FILE.replace("24GiB", "30GiB")
    assert (done.before.text, done.after.text, done.is_change) == (FILE, path.read_text(), True)
    assert done.after.desired == files.load(path, {}).desired
    assert names(path.parent) == ["engines.yaml"], "nothing is left beside it"


def test_what_is_so_already_is_not_written(path: Path) -> None:
    before = path.stat()
    done = edits.edit(path, {}, assign("chat", memory="24GiB"))
    assert not done.is_change
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_what_is_only_tried_is_not_written(path: Path) -> None:
    done = edits.edit(path, {}, assign("chat", memory="30GiB"), write=False)
    assert done.after.text == FILE.replace("24GiB", "30GiB")
    assert path.read_text() == FILE


def test_owner_mode_attributes_and_the_target_of_a_link_are_kept(path: Path, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    real = path.rename(tmp_path / "etc/real.yaml")
    (tmp_path / "etc/current").symlink_to("real.yaml")
    path.symlink_to("etc/current")
    real.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(real, 1234, 4321)
    try:
        os.setxattr(real, "user.note", b"kept")
        noted = True
    except OSError:
        noted = False
    edits.edit(path, {}, assign("chat", memory="30GiB"))
    assert str(path.readlink()) == "etc/current"
    assert str((tmp_path / "etc/current").readlink()) == "real.yaml"
    assert real.read_text() == FILE.replace("24GiB", "30GiB")
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    if os.geteuid() == 0:
        assert (real.stat().st_uid, real.stat().st_gid) == (1234, 4321)
    assert not noted or os.getxattr(real, "user.note") == b"kept"


def test_a_byte_order_mark_and_line_ends_are_kept(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + FILE.replace("\n", "\r\n").encode())
    edits.edit(path, {}, assign("chat", port=8000))
    assert (
        path.read_bytes()
        == b"\xef\xbb\xbf" + FILE.replace("  code:", "    port: 8000\n  code:").replace("\n", "\r\n").encode()
    )


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"memory": "plenty"}, "engines.chat.memory: expected a size, got the text 'plenty'"),
        ({"memmory": "1GiB"}, "unknown field `memmory`; did you mean `memory`?"),
        ({"args.port": 1}, "use the field `port`"),
        ({"args.api-key": "x"}, "use `env:` with VLLM_API_KEY"),
        ({"args": [1]}, "expected a map, got a list"),
        ({"replicas": -1}, "-1 is impossible"),
        ({"model": "${NOT_SET_ANYWHERE}"}, "environment variable NOT_SET_ANYWHERE is not set"),
        ({"model": "\udcff"}, "half a character"),
    ],
)
def test_what_would_not_be_valid_is_not_written(path: Path, fields: dict[str, object], told: str) -> None:
    with pytest.raises(EditRefused, match=re.escape(told)):
        edits.edit(path, {}, assign("chat", **fields))
    assert path.read_text() == FILE
    assert names(path.parent) == ["engines.yaml"]


@pytest.mark.parametrize(
    ("text", "name", "told"),
    [
        ("engines:\n  a: &a\n    model: m\n  b: *a\n", "a", r"engines\.b\.memory would change too"),
        ("engines:\n  a: &a {model: m}\n  b: {<<: *a, port: 1}\n", "a", r"engines\.b\.memory would change too"),
        ("engines:\n  a: {model: m, memory: &m 1GiB}\n  b: {model: m, memory: *m}\n", "a", r"engines\.b\.memory"),
    ],
)
def test_what_others_share_is_not_changed_with_one(path: Path, text: str, name: str, told: str) -> None:
    path.write_text(f"version: 1\n{text}")
    with pytest.raises(EditRefused, match=told):
        edits.edit(path, {}, assign(name, memory="9GiB"))
    assert path.read_text() == f"version: 1\n{text}"


def test_one_that_shares_can_be_changed_alone(path: Path) -> None:
    path.write_text("version: 1\nengines:\n  a: &a {model: m}\n  b: *a\n  c: {<<: *a}\n")
    edits.edit(path, {}, assign("b", memory="1GiB"))
    edits.edit(path, {}, assign("c", memory="2GiB"))
    assert path.read_text() == (
        "version: 1\nengines:\n  a: &a {model: m}\n  b: {<<: *a, memory: 1GiB}\n  c: {<<: *a, memory: 2GiB}\n"
    )


def test_an_anchor_that_is_used_is_not_removed(path: Path) -> None:
    text = "version: 1\nengines:\n  a: &a {model: m}\n  b: *a\n"
    path.write_text(text)
    with pytest.raises(EditRefused, match=r"the alias `\*a` names nothing above it"):
        edits.edit(path, {}, lambda present: changes.stop(present, "a", remove=True))
    assert path.read_text() == text


def refusal(path: Path) -> str:
    with pytest.raises((EditRefused, FileFaults)) as raised:
        edits.edit(path, {}, assign("chat", memory="30GiB"))
    return str(raised.value)


def test_what_cannot_be_edited_says_why_and_is_as_it_was(path: Path, tmp_path: Path) -> None:
    assert "this is a folder; name a file in it" in refusal(tmp_path)
    assert "does not exist" in refusal(tmp_path / "other.yaml")
    assert "does not exist" in refusal(tmp_path / "no/such/folder/engines.yaml")
    path.chmod(0o444)
    assert f"is read-only; allow it with `chmod u+w {path}`" in refusal(path)
    path.chmod(0o644)
    path.write_text(FILE.replace("memory", "memmory"))
    assert "did you mean `memory`?" in refusal(path)
    path.write_text(FILE + "  chat: {}\n")
    assert "the key `chat` is given twice" in refusal(path)
    assert path.read_text() == FILE + "  chat: {}\n"


STRANGER = """
import os, sys
from pathlib import Path
from sage_reconcile.core import changes
from sage_reconcile.host import edits

os.setegid(4321)
os.seteuid(1234)
edits.edit(Path(sys.argv[1]), {}, lambda now: changes.assign(now, "chat", [("memory", "30GiB")]))
"""


def test_who_may_not_keep_the_owner_does_not_write() -> None:
    """In a folder where everyone may write, a file that everyone may write, of somebody else."""
    if os.geteuid() != 0:
        return  # only root can become somebody else
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "engines.yaml"
        path.write_text(FILE)
        folder.chmod(0o777)
        for mode, told in (
            (0o666, "belongs to user 0, group 0, and would not after the edit"),
            (0o644, "may not write"),
        ):
            path.chmod(mode)
            done = subprocess.run([sys.executable, "-c", STRANGER, path], check=False, capture_output=True, text=True)
            assert told in done.stderr
            assert path.read_text() == FILE
            assert names(folder) == ["engines.yaml"]


def test_writers_of_ours_wait_for_each_other(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_SH)
    monkeypatch.setattr(edits, "_LOCK_S", 0.05)
    with pytest.raises(LockHeld, match="somebody else edits in"):
        edits.edit(path, {}, assign("chat", memory="30GiB"))
    assert path.read_text() == FILE
    edits.edit(path, {}, assign("chat", memory="30GiB"), write=False)
    os.close(other)
    edits.edit(path, {}, assign("chat", memory="30GiB"))
    edits.edit(path, {}, assign("chat", memory="31GiB"))
    assert "31GiB" in path.read_text()


def test_what_a_killed_writer_left_is_cleared_away(path: Path) -> None:
    (path.parent / ".engines.yaml.1.sage-edit").write_text("half")
    (path.parent / ".other.yaml.1.sage-edit").write_text("not ours")
    edits.edit(path, {}, assign("chat", memory="30GiB"))
    assert names(path.parent) == [".other.yaml.1.sage-edit", "engines.yaml"]


def test_an_edit_begins_anew_where_somebody_saved_meanwhile(path: Path) -> None:
    """An editor that knows no lock saves between our look and our write, more than once."""
    saves = [FILE + "# one\n", FILE + "# one\n# two\n"]
    seen = []

    def decide(present: Present) -> list[Change]:
        seen.append(path.read_text())
        if saves:
            draft = path.with_suffix(".new")
            draft.write_text(saves.pop(0))
            draft.replace(path)
        return changes.assign(present, "chat", [("memory", "30GiB")])

    edits.edit(path, {}, decide)
    assert seen == [FILE, FILE + "# one\n", FILE + "# one\n# two\n"]
    assert path.read_text() == (FILE + "# one\n# two\n").replace("24GiB", "30GiB")


@pytest.mark.parametrize("exchange", [True, False])
def test_a_save_in_the_very_last_moment_is_put_back(
    path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """It comes when the new file is written and about to take its place; a second one while the first goes back."""
    saves = [FILE + "# one\n", FILE + "# two\n"] if exchange else [FILE + "# one\n"]
    real = edits._exchange

    def late(one: Path, other: Path) -> bool:
        if saves:
            draft = path.with_suffix(".new")
            draft.write_text(saves.pop(0))
            draft.replace(path)
        return exchange and real(one, other)

    monkeypatch.setattr(edits, "_exchange", late)
    edits.edit(path, {}, assign("chat", memory="30GiB"))
    last = "# two\n" if exchange else "# one\n"
    assert path.read_text() == FILE.replace("24GiB", "30GiB") + last
    assert names(path.parent) == ["engines.yaml"]


def test_a_file_that_an_editor_has_just_moved_away_is_waited_for(path: Path) -> None:
    backup = path.rename(path.with_suffix(".bak"))
    timer = threading.Timer(0.05, lambda: backup.rename(path))
    timer.start()
    edits.edit(path, {}, assign("chat", memory="30GiB"))
    timer.join()
    assert "30GiB" in path.read_text()


WRITER = """
import sys
from pathlib import Path
from sage_reconcile.core import changes
from sage_reconcile.host import edits

path, who, times = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for number in range(times):
    wish = changes.Wish(f"org/{who}-{number}", fields=[("port", 1000 + int(who[1:]) * 100 + number)])
    edits.edit(path, {}, lambda now: changes.start(wish, now)[1])
    edits.edit(path, {}, lambda now: changes.assign(now, "shared", [(f"args.{who}-{number}", number)]))
"""

EDITOR = """
# A person's editor: it knows no lock, and saves by rename what it had opened a while ago. It does so blindly; so that
# what it overwrites itself can be told from what others lose, it exchanges, and notes the lines that it put an end to.
import ctypes, os, sys, time
from pathlib import Path

path, times = Path(sys.argv[1]), int(sys.argv[2])
libc = ctypes.CDLL(None, use_errno=True)
for number in range(times):
    opened = path.read_bytes()
    time.sleep(0.02)
    draft = path.with_name(f"editor.{number}")
    draft.write_bytes(opened + f"# a person was here {number}\\n".encode())
    assert libc.renameat2(-100, os.fsencode(draft), -100, os.fsencode(path), 2) == 0
    for line in set(draft.read_text().splitlines()) - set(opened.decode().splitlines()):
        print(line)
    draft.unlink()
    time.sleep(0.03)
"""


def test_twenty_writers_at_once_lose_nothing(path: Path) -> None:
    """Ours, in processes of their own, and a person's editor between them."""
    path.write_text(FILE + "  shared:\n    model: m\n    args:\n      first: 1\n")
    times, ours, saves = 4, 19, 60
    running = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), f"w{number}", str(times)]) for number in range(ours)
    ]
    editor = subprocess.run(
        [sys.executable, "-c", EDITOR, str(path), str(saves)], check=True, capture_output=True, text=True, timeout=120
    )
    assert [process.wait(120) for process in running] == [0] * ours
    text, desired = path.read_text(), files.load(path, {}).desired
    overwritten = editor.stdout
    made = {f"w{who}-{number}" for who in range(ours) for number in range(times)}
    shared = desired.engine("shared")
    assert shared is not None
    lost = {f"  {name}:" for name in made - {engine.name for engine in desired.engines}}
    lost |= {f"      {name}: " for name in made - set(shared.spec.args)}
    assert [line for line in lost if line not in overwritten] == []
    assert len(lost) < len(made), "most of them did not meet the editor at all"
    assert re.findall(r"# a person was here (\d+)", text) == [str(number) for number in range(saves)]
    gone = [line for line in difflib.ndiff(FILE.splitlines(), text.splitlines()) if line.startswith("- ")]
    assert gone == [], "every line that was there is there"
    assert names(path.parent) == ["engines.yaml"]
