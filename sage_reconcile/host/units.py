"""Units of systemd on disk, and systemctl."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from sage_reconcile.errors import SageReconcileError

SYSTEM_FOLDER = Path("/etc/systemd/system")


def unit_folder(environ: Mapping[str, str], *, of_user: bool) -> Path:
    """Where an administrator's units are, or a user's own."""
    if not of_user:
        return SYSTEM_FOLDER
    base = environ.get("XDG_CONFIG_HOME") or str(Path(environ.get("HOME") or Path.home()) / ".config")
    return Path(base) / "systemd/user"


def read_unit(path: Path) -> str | None:
    """A unit as it is now; None where there is none.

    Raises:
        SageReconcileError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SageReconcileError(f"{path}: cannot be read: {error.strerror}") from error


def write_unit(path: Path, text: str) -> None:
    """Writes a unit, readable to all as units are.

    Raises:
        SageReconcileError: it cannot be written; says what to do.
    """
    draft = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        draft.chmod(0o644)
        draft.replace(path)
    except OSError as error:
        raise SageReconcileError(
            f"{path} cannot be written: {error.strerror}; install it as root, or with --user for yourself alone"
        ) from error


def systemctl(words: Sequence[str], *, of_user: bool) -> None:
    """Runs systemctl; what it prints goes where ours goes.

    Raises:
        SageReconcileError: it is not there, or it failed.
    """
    program = shutil.which("systemctl")
    command = ["systemctl", *(["--user"] if of_user else []), *words]
    if program is None:
        raise SageReconcileError(f"there is no systemctl on this machine; not run: {' '.join(command)}")
    done = subprocess.run([program, *command[1:]], check=False)
    if done.returncode:
        raise SageReconcileError(f"{' '.join(command)} failed (exit {done.returncode}); see above")


def unit_of(pid: int) -> str:
    """The service that a process is in, by its cgroup; empty where it is in none."""
    try:
        text = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8")
    except OSError:
        return ""
    names = [part for line in text.splitlines() for part in Path(line.split(":", 2)[-1]).parts]
    return next((name for name in reversed(names) if name.endswith(".service")), "")
