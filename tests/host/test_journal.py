"""Events on disk: kept bounded, whole, and never a reason to fail."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from pathlib import Path

import pytest

from sage_reconcile.host import journal as room
from sage_reconcile.host.journal import Journal


def event(number: int, **more: object) -> dict[str, object]:
    return {"type": "ready", "at": float(number), **more}


def numbers(found: list[dict[str, object]]) -> list[object]:
    return [item["at"] for item in found]


def test_what_is_added_is_read_in_order_and_is_for_its_owner_only(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "events.jsonl")
    assert journal.read() == []
    old = os.umask(0)
    try:
        assert journal.append([event(1), event(2, message="ü\n")]) == ""
    finally:
        os.umask(old)
    assert Journal(journal.path).append([event(3)]) == ""
    assert numbers(journal.read()) == [1, 2, 3]
    assert journal.read()[1]["message"] == "ü\n"
    assert stat.S_IMODE(journal.path.stat().st_mode) == 0o600


@pytest.mark.parametrize("torn", [b'{"type": "re', b'{"type"', b"\xff\xfe", b"7\n[]\n{}\nnull"])
def test_what_a_crash_left_half_written_costs_no_event_but_itself(tmp_path: Path, torn: bytes) -> None:
    journal = Journal(tmp_path / "events.jsonl")
    journal.append([event(1)])
    with journal.path.open("ab") as file:
        file.write(torn)
    assert numbers(journal.read()) == [1]
    journal.append([event(2)])
    journal.append([event(3)])
    assert numbers(journal.read()) == [1, 2, 3]


def test_it_never_grows_beyond_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LIMIT_BYTES", 1000)
    journal = Journal(tmp_path / "events.jsonl")
    for number in range(200):
        journal.append([event(number)])
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2100
    kept = numbers(journal.read())
    assert len(kept) > 20
    assert kept == [float(number) for number in range(200 - len(kept), 200)]
    assert sorted(path.name for path in tmp_path.iterdir()) <= ["events.1.jsonl", "events.jsonl"]
    assert journal.older.stat().st_mode & 0o777 == 0o600


def test_a_disk_that_takes_nothing_is_told_and_raises_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "events.jsonl"
    folder.mkdir()
    assert "Is a directory" in Journal(folder).append([event(1)])
    assert "No such file" in Journal(tmp_path / "gone/events.jsonl").append([event(1)])
    full = Journal(Path("/dev/full"))
    if full.path.exists():
        assert "No space left" in full.append([event(1)])
    assert Journal(folder).read() == []


@pytest.mark.parametrize("every", [1, 4, 13])
def test_followers_see_everything_once_also_over_the_change_of_files(
    every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "LIMIT_BYTES", 300)
    journal = Journal(tmp_path / "events.jsonl")
    with contextlib.closing(journal.follow()) as steps:
        seen = numbers(next(steps))
        assert seen == []
        for number in range(100):
            journal.append([event(number)])
            if number % every == 0:
                seen += numbers(next(steps))
        seen += numbers(next(steps))
    assert seen == [float(number) for number in range(100)]
    with contextlib.closing(Journal(journal.path).follow()) as late:
        assert numbers(next(late)) == numbers(journal.read())
        assert next(late) == []


def test_a_follower_waits_for_the_rest_of_a_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "events.jsonl")
    line = json.dumps(event(1)).encode()
    journal.path.write_bytes(line[:10])
    with contextlib.closing(journal.follow()) as steps:
        assert next(steps) == []
        with journal.path.open("ab") as file:
            file.write(line[10:] + b"\n")
        assert numbers(next(steps)) == [1]
