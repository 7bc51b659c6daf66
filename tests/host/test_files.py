"""``engines.yaml`` found and read with the files it names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sage_reconcile.errors import FileFaults
from sage_reconcile.host import files

ENGINE = "runtime: simulator, model: a/b-7B"


def write(folder: Path, *lines: str) -> Path:
    path = folder / "engines.yaml"
    path.write_text("\n".join(["version: 1", "engines:", *(f"  {line}" for line in lines)]) + "\n")
    return path


def faults(path: Path, **environ: str) -> list[str]:
    with pytest.raises(FileFaults) as raised:
        files.load(path, environ)
    return str(raised.value).replace(str(path), "engines.yaml").splitlines()


def test_a_file_with_its_env_files_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "chat.env").write_text("A=from-file\nB=from-file\n")
    (tmp_path / "x").mkdir()
    (tmp_path / "x/code.env").write_text("C=c\n")
    path = write(
        tmp_path,
        f"chat: {{{ENGINE}, env_file: chat.env, env: {{B: from-entry}}}}",
        f"code: {{{ENGINE}, env_file: '${{WHERE}}/code.env'}}",
        f"plain: {{{ENGINE}}}",
    )
    loaded = files.load(path, {"WHERE": "x"})
    assert [dict(engine.env) for engine in loaded.desired.engines] == [
        {"A": "from-file", "B": "from-entry"},
        {"C": "c"},
        {},
    ]
    assert loaded.env_files == (tmp_path / "chat.env", tmp_path / "x/code.env")
    assert loaded.text == path.read_text()
    assert files.load_text(loaded.text, path, {"WHERE": "x"}).desired.digest == loaded.desired.digest


def test_faults_of_an_env_file_are_told_where_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.env").write_text("GOOD=1\nnot a line\n")
    path = write(
        tmp_path,
        f"chat: {{{ENGINE}, env_file: bad.env}}",
        "code:",
        "  model: a/b-7B",
        "  env_file: missing.env",
        f"third: {{{ENGINE}, tensor_paralell_size: 2}}",
    )
    found = faults(path)
    column = len("  chat: {" + ENGINE + ", env_file: ") + 1
    assert found[0].startswith(f"engines.yaml:3:{column}: engines.chat.env_file: bad.env, line 2: ")
    assert found[1].startswith("engines.yaml:6:15: engines.code.env_file: missing.env: ")
    assert "unknown field" in found[2]
    assert len(found) == 3, "all of them at once"


def test_a_folder_is_no_env_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    found = faults(write(tmp_path, f"chat: {{{ENGINE}, env_file: folder}}"))
    assert len(found) == 1
    assert "engines.chat.env_file: folder: " in found[0]


def test_one_env_file_for_two_engines_is_told_at_its_first_place(tmp_path: Path) -> None:
    path = write(tmp_path, *(f"{name}: {{{ENGINE}, env_file: missing.env}}" for name in ("one", "two")))
    found = faults(path)
    assert found
    assert "engines.one.env_file: missing.env" in found[0]


def test_a_missing_file_is_told_as_such(tmp_path: Path) -> None:
    assert "engines.yaml" in faults(tmp_path / "engines.yaml")[0]


def test_a_signature_changes_with_the_content_however_it_is_saved(tmp_path: Path) -> None:
    path = tmp_path / "engines.yaml"
    assert files.signature(path) == ()
    path.write_text("one")
    seen = [files.signature(path)]
    assert files.signature(path) == seen[0]
    times = path.stat()
    path.write_text("two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    seen.append(files.signature(path))  # same size, same time of change: another time of status change
    other = tmp_path / "other"
    other.write_text("six")
    other.replace(path)
    seen.append(files.signature(path))
    link = tmp_path / "link"
    link.symlink_to(path)
    assert files.signature(link) == seen[-1], "a link is what it points to"
    path.write_text("longer")
    seen.append(files.signature(path))
    assert len(set(seen)) == 4
    path.unlink()
    assert files.signature(link) == ()


def test_which_file_is_meant_where_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "SYSTEM_FILE", tmp_path / "system.yaml")
    assert files.default_file() == Path("engines.yaml")
    (tmp_path / "system.yaml").touch()
    assert files.default_file() == tmp_path / "system.yaml"
    (tmp_path / "engines.yaml").touch()
    assert files.default_file() == Path("engines.yaml")
