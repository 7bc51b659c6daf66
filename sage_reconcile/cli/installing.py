"""``systemd show`` and ``systemd install``: the unit of the daemon for this machine."""

from __future__ import annotations

import difflib
import os
import pwd
import sys
from pathlib import Path

from sage_reconcile.cli import rendering
from sage_reconcile.cli.commands import file_path
from sage_reconcile.core.service_unit import UNIT, Service, unit_text
from sage_reconcile.errors import SageReconcileError
from sage_reconcile.host import units
from sage_reconcile.host.state import StateFolder, default_folder

_MADE_BY_SYSTEMD = Path("/var/lib/sage-reconcile")


def show(given: Path | None, state_dir: Path | None, *, of_user: bool, run_as: str | None) -> int:
    """``systemd show``."""
    print(unit_text(_service(given, state_dir, of_user=of_user, run_as=run_as)), end="")
    return 0


def install(
    given: Path | None, state_dir: Path | None, *, of_user: bool, run_as: str | None, now: bool, force: bool
) -> int:
    """``systemd install``."""
    service = _service(given, state_dir, of_user=of_user, run_as=run_as)
    text, path = unit_text(service), units.unit_folder(os.environ, of_user=of_user) / UNIT
    there = units.read_unit(path)
    if there == text:
        print(f"{path} says this already.")
    elif there is not None and not force:
        sys.stdout.writelines(_difference(path, there, text))
        rendering.error(
            f"{path} is there and says something else (- there, + here); nothing was written. Replace it with --force; "
            "changes of your own belong into a drop-in (systemctl edit), which stays"
        )
        return 1
    else:
        units.write_unit(path, text)
        print(text)
        print(f"Wrote {path}.")
    _notes(service)
    if now:
        for words in (["daemon-reload"], ["enable", UNIT], ["restart", UNIT]):
            units.systemctl(words, of_user=of_user)
        print(f"{UNIT} is enabled and runs.")
    _next(service, now=now)
    return 0


def _service(given: Path | None, state_dir: Path | None, *, of_user: bool, run_as: str | None) -> Service:
    """What the unit says on this machine.

    Raises:
        SageReconcileError: there is no such user.
    """
    if of_user and run_as is not None:
        raise SageReconcileError("a service of --user runs as that user; leave out --run-as")
    user = run_as or pwd.getpwuid(os.geteuid()).pw_name
    try:
        pwd.getpwnam(user)
    except KeyError as error:
        raise SageReconcileError(
            f"there is no user {user}; make one (useradd --system --create-home {user}), or name another with --run-as"
        ) from error
    folder = Path.cwd() / state_dir if state_dir else None
    if of_user:
        folder = folder or default_folder({key: os.environ[key] for key in os.environ if key != "STATE_DIRECTORY"})
    elif folder == _MADE_BY_SYSTEMD:
        folder = None
    variables = Path("/etc/sage-reconcile/environment")
    if of_user:
        variables = units.unit_folder(os.environ, of_user=True).parents[1] / "sage-reconcile/environment"
    program = _program()
    return Service(
        program=program,
        file=os.path.normpath(file_path(given)),
        user=user,
        state_folder=os.path.normpath(folder) if folder else "",
        bin_folder=str(Path(program[0]).parent),
        environment_file=str(variables),
        of_user=of_user,
    )


def _program() -> tuple[str, ...]:
    """How this program is started, whatever the working directory and PATH are."""
    called = Path.cwd() / sys.argv[0]
    beside = Path(sys.executable).parent / "sage-reconcile"
    if called.name == beside.name and beside.exists():
        return (str(beside),)
    return (sys.executable, "-m", "sage_reconcile")


def _difference(path: Path, there: str, text: str) -> list[str]:
    lines = there.splitlines(keepends=True), text.splitlines(keepends=True)
    return [
        line if line.endswith("\n") else f"{line}\n" for line in difflib.unified_diff(*lines, str(path), "here", n=1)
    ]


def _notes(service: Service) -> None:
    if not Path(service.file).exists():
        rendering.note(f"{service.file} is not there yet: sage-reconcile init -f {service.file}")
    holding = StateFolder(Path(service.state_folder or _MADE_BY_SYSTEMD)).holder()
    if holding is not None and holding.role == "daemon" and units.unit_of(holding.pid) != UNIT:
        rendering.note(
            f"{holding.text()} runs outside of systemd; the service takes over, with all engines, once it is ended "
            f"(kill {holding.pid})"
        )


def _next(service: Service, *, now: bool) -> None:
    control, journal = ("systemctl --user", "journalctl --user") if service.of_user else ("systemctl", "journalctl")
    begin = [] if now else [(f"{control} daemon-reload && {control} enable --now {UNIT}", "start it, now and at boot")]
    linger = [(f"loginctl enable-linger {service.user}", "or all ends when you log out")] if service.of_user else []
    rows = [
        *begin,
        *linger,
        (f"{control} status {UNIT}", "how many replicas are ready"),
        (f"{control} reload {UNIT}", "read the file again; fails where it is refused"),
        (f"{journal} -u {UNIT} -f -o cat", "what happens"),
        (f"{control} restart {UNIT}", "after an upgrade: adopts all engines, stops none"),
        (f"{control} stop {UNIT}", "end the daemon; `sage-reconcile down` then ends the engines"),
    ]
    print("\nNext:")
    for command, meaning in rows:
        print(f"  {command:<60}  # {meaning}")
    if not service.of_user and not service.state_folder and os.geteuid() != 0:
        print(f"Your own commands find it with SAGE_RECONCILE_STATE_DIR={_MADE_BY_SYSTEMD}.")
