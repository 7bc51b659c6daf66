"""The records of launches on disk: whole or not at all, readable across versions, never trusted blindly."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from sage_reconcile.errors import StateError
from sage_reconcile.host.records import Record, Records, write_atomically
from tests.host.world import LAUNCH, ROOT, record

FULL = record(
    leader=[10, 20, 30],
    members=[[11, 21, 0], [12, 22, 0]],
    ready_at=2000.5,
    stopping_since=2001,
    stop_cause="its entry changed",
    ended=True,
    exit_code=137,
    ended_at=2002.0,
    restarts=3,
    failures=2,
    log_path="/x/y.log",
    predecessor="0badcafe",
    destination=["GPU-3", "GPU-4"],
    inner_port=20000,
    inner_count=8,
    host_memory_mib=6000,
    gpus=["GPU-1", "GPU-2"],
    spec={"model": "a/b", "args": {"x": [1, None]}},
    secret_marks={"env.A": "mark"},
)


def put(folder: Path, **changed: Any) -> None:
    data = {**asdict(record()), **changed}
    (folder / f"{LAUNCH}.json").write_text(json.dumps({key: value for key, value in data.items() if value != "gone"}))


def test_what_is_saved_is_read_again(tmp_path: Path) -> None:
    records = Records(tmp_path)
    assert records.load() == ([], [])
    for one in (record(), FULL):
        records.save(one)
        assert records.load() == ([one], [])
    path = tmp_path / f"{LAUNCH}.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    records.run_file(LAUNCH).touch()
    assert len(records.load()[0]) == 1
    records.drop(LAUNCH)
    records.drop(LAUNCH)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_holds_no_record(tmp_path: Path) -> None:
    assert Records(tmp_path / "missing").load() == ([], [])


def test_a_folder_that_cannot_be_read_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match=r"file: cannot be read: Not a directory; run as the user who owns it"):
        Records(tmp_path / "file").load()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"\0" * 40, b"\xff\xfe", b"null", b"[]", b'"text"', b"{}", b"[" * 100_000),
        json.dumps(asdict(record())).encode()[:-20],
    ],
)
def test_torn_and_foreign_records_are_reported_and_skipped(tmp_path: Path, content: bytes) -> None:
    records = Records(tmp_path)
    good = record("00000001")
    records.save(good)
    (tmp_path / f"{LAUNCH}.json").write_bytes(content)
    (tmp_path / "folder.json").mkdir()
    found, problems = records.load()
    assert found == [good]
    assert len(problems) == 2
    assert all("not a readable record" in problem and "is left alone" in problem for problem in problems)
    assert f"{tmp_path}/{LAUNCH}.json" in problems[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("id", 3), ("engine_name", None), ("index", "0"), ("index", True), ("spec", []), ("gpus", "GPU-1")),
        *(("gpus", [1]), ("memory_mib", "1"), ("port", 8000.5), ("port", None), ("created_at", "now")),
        *(("leader", [1]), ("leader", ["a", 1, 2]), ("leader", {}), ("leader", [1, 2, 3, 4]), ("leader", None)),
        *(("members", [1]), ("members", [[1, 2]]), ("members", [[]]), ("ready_at", "x"), ("stopping_since", [])),
        *(("ended", 1), ("ended", "no"), ("exit_code", "0"), ("ended_at", True), ("restarts", None)),
        *(("failures", "many"), ("log_path", 1), ("secret_marks", []), ("boot_id", 1), ("bind", 1), ("version", "1")),
        *(("id", "gone"), ("engine_name", "gone"), ("index", "gone"), ("spec", "gone"), ("gpus", "gone")),
        *(("memory_mib", "gone"), ("port", "gone"), ("inner_port", "20000"), ("inner_port", None)),
        *(("predecessor", 1), ("predecessor", None), ("destination", "GPU-1"), ("destination", [1])),
        *(("inner_port", -1), ("inner_count", 65536), ("inner_count", True), ("inner_count", -8)),
        *(("host_memory_mib", -1), ("host_memory_mib", "6"), ("host_memory_mib", None)),
    ],
)
def test_a_field_that_is_wrong_or_missing_makes_it_unreadable(tmp_path: Path, name: str, value: object) -> None:
    put(tmp_path, **{name: value})
    found, problems = Records(tmp_path).load()
    assert found == []
    assert f"`{name}`" in problems[0]


def test_records_of_other_versions_stay_readable(tmp_path: Path) -> None:
    """Fields unknown here are passed over, fields not there yet have a default."""
    later = ("bind", "created_at", "version", "leader", "members", "ready_at", "stopping_since", "stop_cause", "ended")
    later += ("exit_code", "ended_at", "restarts", "failures", "log_path", "secret_marks", "boot_id")
    later += ("inner_port", "inner_count", "predecessor", "destination")
    put(tmp_path, invented_later={"a": 1}, **dict.fromkeys(later, "gone"))
    found, problems = Records(tmp_path).load()
    assert problems == []
    expected = Record(
        **{key: value for key, value in asdict(record()).items() if key not in later},
        bind="127.0.0.1",
        created_at=0.0,
        boot_id="",
        secret_marks={},
    )
    assert found == [expected]


def test_a_record_under_another_name_is_not_taken_for_a_second_launch(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.save(record())
    (tmp_path / "copy.json").write_bytes((tmp_path / f"{LAUNCH}.json").read_bytes())
    found, problems = records.load()
    assert [one.id for one in found] == [LAUNCH]
    assert "under another name" in problems[0]


def test_a_record_that_names_a_file_elsewhere_leads_nowhere(tmp_path: Path) -> None:
    folder = tmp_path / "launches"
    folder.mkdir()
    (tmp_path / "victim.json").write_text("{}")
    (folder / f"{LAUNCH}.json").write_text(json.dumps({**asdict(record()), "id": "../victim"}))
    assert Records(folder).load()[0] == []
    assert (tmp_path / "victim.json").exists()


def test_drafts_are_no_records(tmp_path: Path) -> None:
    (tmp_path / f".{LAUNCH}.json.1.tmp").write_text("{")
    (tmp_path / f".{LAUNCH}.json").write_text("{")
    assert Records(tmp_path).load() == ([], [])


def test_a_write_that_fails_leaves_the_old_content_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    write_atomically(path, "old")
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\n"
        "from sage_reconcile.host.records import write_atomically\nfrom sage_reconcile.errors import StateError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    write_atomically(Path(sys.argv[1]), 'new' * 1000)\nexcept StateError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    assert f"{path}: cannot be written: File too large; free space there or choose another folder" in done.stdout
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_a_folder_that_takes_no_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match=r"file/x\.json: cannot be written: Not a directory"):
        write_atomically(tmp_path / "file" / "x.json", "{}")
    with pytest.raises(StateError, match="No such file"):
        write_atomically(tmp_path / "missing" / "x.json", "{}")


def test_a_folder_without_permission_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        if os.geteuid() == 0:
            code = (
                "import os, sys\nfrom pathlib import Path\nfrom sage_reconcile.errors import StateError\n"
                "from sage_reconcile.host.records import write_atomically\nos.setresuid(65534, 65534, 65534)\n"
                "try:\n    write_atomically(Path(sys.argv[1]), '{}')\nexcept StateError as error:\n    print(error)\n"
            )
            done = subprocess.run(
                [sys.executable, "-c", code, str(tmp_path / "x.json")],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=30,
                check=True,
            )
            assert "x.json: cannot be written: Permission denied; free space there or choose another" in done.stdout
        else:
            with pytest.raises(StateError, match=r"x\.json: cannot be written: Permission denied"):
                write_atomically(tmp_path / "x.json", "{}")
        assert list(tmp_path.iterdir()) == []
    finally:
        tmp_path.chmod(0o700)


def test_readers_see_the_old_or_the_new_and_never_a_part(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_atomically(path, "0" * 50_000)
    code = (
        "import sys\nfrom pathlib import Path\nfrom sage_reconcile.host.records import write_atomically\n"
        "for number in range(150):\n    write_atomically(Path(sys.argv[1]), str(number % 10) * 50_000)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT)
    seen = set()
    while writer.poll() is None:
        text = path.read_text()
        assert len(text) == 50_000
        assert len(set(text)) == 1
        seen.add(text[0])
    assert writer.returncode == 0
    assert len(seen) > 1
