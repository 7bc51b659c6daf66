"""The rules of the house, so that they are kept and not only written down."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sage_reconcile"
CORE = PACKAGE / "core"
TOP_LEVEL = {"sage_reconcile", "examples", "schemas", "tests", "pyproject.toml", "README.md"}
SKIPPED = {"__pycache__", "node_modules", "build", "dist"}
"""What a build leaves, for where git is not there to say."""

MODULES = sorted(PACKAGE.rglob("*.py"))
FILE_LINES, CORE_FILE_LINES, FUNCTION_LINES = 400, 320, 60
LONGER = {
    "core/resolve.py": 400,  # one reading of one file, whose faults are all told at once
}
"""Rooms that may be larger, and why."""
BROAD_EXCEPTS = 3
TOUCHING = {
    *("asyncio", "datetime", "os", "pathlib", "psutil", "pynvml", "random", "socket", "structlog", "subprocess"),
    *("threading", "time"),
}
ABSOLUTE = re.compile(r"(?<![\w.$}~-])/(?:work|root|home|Users)/")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def files() -> list[Path]:
    """Every file that git knows or would add; without git every file that is no build output."""
    git = shutil.which("git")
    if git and (ROOT / ".git").exists():
        command = [git, "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode == 0:
            return [path for entry in done.stdout.split("\0") if entry and (path := ROOT / entry).is_file()]
    found = (path for path in ROOT.rglob("*") if path.is_file())
    return [path for path in found if not any(_not_ours(part) for part in path.relative_to(ROOT).parts[:-1])]


def _not_ours(part: str) -> bool:
    return part in SKIPPED or part.endswith(".egg-info") or (part.startswith(".") and part not in (".ci", ".github"))


def functions(module: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def imported(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def test_the_top_level_holds_what_it_should_and_nothing_else() -> None:
    found = {path.relative_to(ROOT).parts[0] for path in files()}
    assert {entry for entry in found if not entry.startswith(".")} <= TOP_LEVEL
    assert {"sage_reconcile", "tests", "pyproject.toml"} <= found


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_no_room_is_too_large(path: Path) -> None:
    room = path.relative_to(PACKAGE).as_posix()
    limit = LONGER.get(room, CORE_FILE_LINES if CORE in path.parents else FILE_LINES)
    assert len(path.read_text().splitlines()) <= limit


def test_no_exception_for_a_room_is_kept_longer_than_needed() -> None:
    for room in LONGER:
        limit = CORE_FILE_LINES if room.startswith("core/") else FILE_LINES
        assert len((PACKAGE / room).read_text().splitlines()) > limit, f"{room} fits the general rule by now"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_no_function_is_too_long(path: Path) -> None:
    for function in functions(tree(path)):
        assert (function.end_lineno or 0) - function.lineno < FUNCTION_LINES, function.name


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(tree(path))


def test_no_room_is_named_after_nothing() -> None:
    said_nothing = re.compile(r"(^|_)(utils?|helpers?|common|misc|manager)(_|$)")
    assert not [name(path) for path in (*MODULES, *ROOT.glob("tests/**/*.py")) if said_nothing.search(path.stem)]


def test_nothing_is_left_open() -> None:
    opened = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error")) + r")\b")
    for path in (*MODULES, *ROOT.glob("tests/**/*.py")):
        assert not opened.findall(path.read_text()), name(path)


def test_broad_excepts_are_few() -> None:
    broad = [
        f"{name(path)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")))
    ]
    assert len(broad) <= BROAD_EXCEPTS, broad


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=name)
def test_what_decides_touches_nothing(path: Path) -> None:
    module = tree(path)
    assert not {entry.partition(".")[0] for entry in imported(module)} & TOUCHING
    called = {
        node.func.id for node in ast.walk(module) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"open", "print", "input", "exec", "eval", "__import__"}


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_click_is_not_there_to_be_imported(path: Path) -> None:
    assert "click" not in {entry.partition(".")[0] for entry in imported(tree(path))}


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    for path in files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found = [match[0] for match in ABSOLUTE.finditer(text)]
        assert not found, f"{name(path)}: {found}"


def test_the_deciding_code_is_tested_without_a_mock() -> None:
    mocks = ("mock", "pytest_" + "mock", "unittest")
    for path in (*ROOT.glob("tests/core/**/*.py"), *ROOT.glob("tests/plans/**/*.py")):
        module = tree(path)
        assert not {entry.partition(".")[0] for entry in imported(module)} & set(mocks), name(path)
        assert not [
            argument.arg for node in functions(module) for argument in node.args.args if argument.arg == "monkeypatch"
        ]
