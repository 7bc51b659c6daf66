"""``apply`` and ``down``: a plan is shown, agreed to, and carried out if it still is the plan then."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sage_reconcile.cli import asking, following, rendering
from sage_reconcile.cli.commands import file_option, file_path, held_note, other_file, show_plan, state_folder
from sage_reconcile.cli.following import Shown
from sage_reconcile.core.host_spec import HostSpec
from sage_reconcile.core.spec import Desired
from sage_reconcile.errors import FileFaults, LockHeld, SageReconcileError, StalePlan
from sage_reconcile.host import files, units
from sage_reconcile.host.local import LocalHost
from sage_reconcile.host.state import Holder, StateFolder
from sage_reconcile.reconcile import look

_SHOWINGS = 5


def apply(given: Path | None, state_dir: Path | None, *, yes: bool, allow_moves: bool) -> int:
    """``apply``: by itself, or by the daemon where one follows the same file."""
    path, state = file_path(given), state_folder(state_dir)

    def show() -> tuple[Shown, bool]:
        loaded = files.load(path, os.environ)
        _daemon_of(path, state)
        host = LocalHost(state, path.parent, os.environ, hub=asking.hub_for(loaded.desired, path.parent))
        seen = look(host, loaded.desired, tried=frozenset(), allow_moves=allow_moves)
        other_file(path, state)
        show_plan(seen)
        held = held_note(path, state, loaded.desired)
        shown = Shown(path, loaded.desired, loaded.text, seen.plan.mark(), allow_moves)
        return shown, held or not all(action.blocked for action in seen.plan.actions)

    def carry_out(shown: Shown) -> dict[str, Any]:
        daemon = _daemon_of(path, state)
        return following.follow_daemon(state, daemon, shown) if daemon else following.settle_here(state, shown)

    document = _agreed(show, carry_out, "Do this?", yes=yes)
    return 1 if document is None else following.conclude(document, _program(given, state_dir))


def down(given: Path | None, state_dir: Path | None, *, yes: bool) -> int:
    """``down``."""
    path, state = file_path(given), state_folder(state_dir)
    holding = state.holder()
    if holding is not None:
        unit = units.unit_of(holding.pid) if holding.role == "daemon" else ""
        end = f"systemctl stop {unit}" if unit.startswith("sage-reconcile") else f"kill {holding.pid}"
        raise LockHeld(f"{holding.text()} would start them again; end it first ({end})")
    desired = Desired(_host_spec(path), (), unwanted="all engines were asked to stop")

    def show() -> tuple[Shown, bool]:
        seen = look(LocalHost(state, path.parent, os.environ), desired)
        if seen.plan.in_sync:
            print("No engine runs.")
        else:
            show_plan(seen)
        return Shown(path, desired, None, seen.plan.mark()), not seen.plan.in_sync

    document = _agreed(show, lambda shown: following.settle_here(state, shown, role="down"), "Stop them?", yes=yes)
    if document is None:
        return 1
    left = [replica["name"] for engine in document["engines"] for replica in engine["replicas"]]
    if left:
        rendering.error(f"still there: {', '.join(left)}")
        return 1
    print("All engines are stopped.")
    return 0


def _agreed(
    show: Callable[[], tuple[Shown, bool]],
    carry_out: Callable[[Shown], dict[str, Any]],
    question: str,
    *,
    yes: bool,
) -> dict[str, Any] | None:
    """Shows a plan, asks where there is something to ask, and has it carried out; None where nobody agrees.

    A plan that is another one by then is not carried out, but shown as it is now.

    Raises:
        SageReconcileError: it was another one each time.
    """
    for _ in range(_SHOWINGS):
        shown, asks = show()
        if asks and not yes and not _confirmed(question):
            return None
        try:
            return carry_out(shown)
        except StalePlan as stale:
            print(f"{str(stale).capitalize()}; this is the plan now:\n", flush=True)
    raise SageReconcileError(
        f"the plan was another one each of {_SHOWINGS} times, and nothing that was shown was done; try again when file "
        "and machine are quiet (a daemon with another environment, HF_HOME say, may see other models than this command)"
    )


def _daemon_of(path: Path, state: StateFolder) -> Holder | None:
    """The daemon that follows this very file, or None where nobody reconciles.

    Raises:
        LockHeld: somebody else does.
    """
    holding = state.holder()
    if holding is None:
        return None
    if holding.role == "daemon" and holding.file == str(path):
        return holding
    raise LockHeld(f"{state.path} is in use by {holding.text()}; wait for it or end it, or use another --state-dir")


def _host_spec(path: Path) -> HostSpec:
    try:
        return files.load(path, os.environ).desired.host
    except FileFaults:
        return HostSpec()


def _confirmed(question: str) -> bool:
    if not sys.stdin.isatty():
        rendering.error("there is no terminal to ask on; say --yes to go ahead without being asked")
        return False
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def _program(given: Path | None, state_dir: Path | None) -> str:
    """How to call us again from here with the same file and state folder."""
    name = sys.argv[0] if os.sep in sys.argv[0] else "sage-reconcile"
    if name.endswith("__main__.py"):
        name = f"{sys.executable} -m sage_reconcile"
    return f"{name} {{}}{file_option(given)}{f' --state-dir {state_dir}' if state_dir else ''}"
