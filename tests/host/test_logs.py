"""The logs of launches: their ends, how many are kept, how large they grow."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sage_reconcile.host import logs


@pytest.mark.parametrize(
    ("content", "count", "expected"),
    [
        (b"one\ntwo\nthree\n", 2, ["two", "three"]),
        (b"one\ntwo\nthree", 2, ["two", "three"]),
        (b"one\n", 5, ["one"]),
        (b"load 10%\rload 20%\rload 30%\rdone\n", 2, ["load 30%", "done"]),
        (b"one\n\n\n", 5, ["one"]),
        (b"bad \xff\xfe bytes\n", 1, ["bad \ufffd\ufffd bytes"]),
    ],
)
def test_the_last_lines_progress_bars_included(tmp_path: Path, content: bytes, count: int, expected: list[str]) -> None:
    path = tmp_path / "x.log"
    path.write_bytes(content)
    assert logs.tail(path, count) == expected


def test_where_there_is_no_log_there_are_no_lines(tmp_path: Path) -> None:
    assert logs.tail(tmp_path / "missing.log", 5) == []
    assert logs.tail(tmp_path, 5) == []
    assert [line for line in logs.tail(Path(os.devnull), 5) if line] == []


def test_the_lines_of_a_start_are_those_at_the_beginning(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_bytes(b"version 1\nload 1%\rload 2%\n" + b"x" * (9 << 20) + b"\nlast\n")
    lines = logs.start(path)
    assert lines[:3] == ["version 1", "load 1%", "load 2%"]
    assert len(lines) == 4
    assert logs.start(tmp_path / "missing.log") == []
    assert len(logs.tail(path, 5, 100)[0]) < 100


def test_of_a_huge_log_only_the_end_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    with path.open("wb") as file:
        file.seek(50 << 30)
        file.write(b"\nthe end\n")
    assert logs.tail(path, 1) == ["the end"]


def test_only_the_newest_logs_are_kept(tmp_path: Path) -> None:
    names = [f"20260101T00000{number}-ab.log" for number in range(9)]
    for name in [*names, "notes.txt"]:
        (tmp_path / name).touch()
    assert [path.name for path in logs.newest(tmp_path)] == names[::-1]
    logs.prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names[-logs.KEPT :], "notes.txt"]
    logs.prune(tmp_path)
    logs.prune(tmp_path / "missing")
    assert len(logs.newest(tmp_path)) == logs.KEPT


def test_a_log_below_its_limit_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_bytes(b"line\n")
    logs.limit(path)
    assert path.read_bytes() == b"line\n"
    logs.limit(tmp_path / "missing.log")


def test_a_log_past_its_limit_is_cut_to_its_end_at_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LIMIT_BYTES", 4096)
    monkeypatch.setattr(logs, "_KEEP_BYTES", 1000)
    path = tmp_path / "x.log"
    path.write_text("".join(f"line {number:05}\n" for number in range(1000)))
    inode = path.stat().st_ino
    logs.limit(path)
    lines = path.read_text().splitlines()
    assert lines[0] == "[the beginning of this log was cut off]"
    assert lines[1:] == [f"line {number:05}" for number in range(1000 - len(lines[1:]), 1000)]
    assert 80 <= len(lines) <= 92
    assert path.stat().st_ino == inode, "the writer has it open"


def test_a_writer_that_appends_goes_on_undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the cuts fall, lines stay whole, there is no hole of zeros, and what comes after them is all there."""
    monkeypatch.setattr(logs, "LIMIT_BYTES", 20_000)
    monkeypatch.setattr(logs, "_KEEP_BYTES", 5_000)
    path = tmp_path / "x.log"
    path.touch()
    code = (
        "import os\nfor n in range(30000): os.write(1, b'line %05d\\n' % n)\n"
        "open('all', 'w').close()\ninput()\nos.write(1, b'the last\\n')\n"
    )
    with path.open("ab") as log:
        writer = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=log, cwd=tmp_path)
    cuts = 0
    while not (tmp_path / "all").exists():
        before = path.stat().st_size
        logs.limit(path)
        cuts += before > logs.LIMIT_BYTES
    writer.communicate(b"\n", timeout=30)
    assert writer.returncode == 0
    assert cuts > 0
    lines = path.read_bytes().splitlines()
    assert lines.pop() == b"the last"
    assert [line for line in lines if not re.fullmatch(rb"line \d{5}|\[the beginning .* cut off\]", line)] == []
