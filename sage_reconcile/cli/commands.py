"""What the commands do. Each returns its exit code; errors of our own tree are raised."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sage_reconcile.cli import asking, rendering
from sage_reconcile.core.conditions import keep_since
from sage_reconcile.core.guard import held_text
from sage_reconcile.core.host_spec import HostSpec
from sage_reconcile.core.plan_text import plan_text
from sage_reconcile.core.report import plan_document, status_document
from sage_reconcile.core.spec import Desired
from sage_reconcile.core.status_line import in_a_line
from sage_reconcile.errors import FileFaults, NotFound, SageReconcileError, StateError
from sage_reconcile.host import files
from sage_reconcile.host import logs as log_files
from sage_reconcile.host.local import LocalHost
from sage_reconcile.host.state import Holder, StateFolder, default_folder, held_document, this_process
from sage_reconcile.reconcile import Pass, look

CHANGES, UNPLACED = 2, 3


def file_path(given: Path | None) -> Path:
    """The file that is meant, as an absolute path with its links as they are."""
    return Path.cwd() / (given or files.default_file())


def state_folder(given: Path | None) -> StateFolder:
    """The state folder that is meant.

    Raises:
        StateError: something else than a folder is in its place.
    """
    path = Path.cwd() / (given or default_folder(os.environ))
    if path.exists() and not path.is_dir():
        raise StateError(f"{path} is not a folder; choose another with --state-dir")
    return StateFolder(path)


def init(given: Path | None, *, force: bool) -> int:
    """``init``."""
    from sage_reconcile.core.starter import starter
    from sage_reconcile.host.gpus import NvmlInventory

    path = file_path(given or Path("engines.yaml"))
    if path.exists() and not force:
        raise SageReconcileError(f"{path} is there already; edit it, or replace it with --force")
    inventory = NvmlInventory()
    gpus, why = inventory.read()
    inventory.close()
    try:
        path.write_text(starter(gpus, why), encoding="utf-8")
    except OSError as error:
        raise SageReconcileError(f"{path} cannot be written: {error.strerror}") from error
    print(f"Wrote {path}. Look at it, then: sage-reconcile diff{file_option(given)}")
    return 0


def validate(given: Path | None, as_json: bool) -> int:
    """``validate``."""
    path = file_path(given)
    faults: tuple[Any, ...] = ()
    engines = 0
    try:
        engines = len(files.load(path, os.environ).desired.engines)
    except FileFaults as error:
        faults = error.faults
    if as_json:
        names = ("line", "column", "where", "message", "fix")
        rows = [{name: getattr(fault, name) for name in names} for fault in faults]
        print(json.dumps({"version": 1, "file": str(path), "valid": not faults, "faults": rows}, indent=2))
    elif faults:
        for fault in faults:
            print(fault.text(short(path)), file=sys.stderr)
        print(f"{len(faults)} {'fault' if len(faults) == 1 else 'faults'}.", file=sys.stderr)
    else:
        print(f"{short(path)} is valid: {engines} {'engine' if engines == 1 else 'engines'}.")
    return 1 if faults else 0


def diff(given: Path | None, state_dir: Path | None, as_json: bool, *, allow_moves: bool) -> int:
    """``diff``."""
    path, state = file_path(given), state_folder(state_dir)
    desired = files.load(path, os.environ).desired
    host = LocalHost(state, path.parent, os.environ, hub=asking.hub_for(desired, path.parent))
    seen = look(host, desired, tried=tried(state), allow_moves=allow_moves)
    if as_json:
        print(json.dumps(plan_document(seen.plan), indent=2))
    else:
        other_file(path, state)
        show_plan(seen)
        held_note(path, state, desired)
    if seen.plan.unplaced:
        return UNPLACED
    return 0 if seen.plan.in_sync else CHANGES


def tried(state: StateFolder) -> frozenset[str] | None:
    """See ``make_plan``: a daemon waits for its back-off; apply, which a person asks for, does not."""
    holding = state.holder()
    return None if holding and holding.role == "daemon" else frozenset()


def run(given: Path | None, state_dir: Path | None) -> int:
    """``run``."""
    import asyncio
    import faulthandler

    from sage_reconcile.daemon import Daemon
    from sage_reconcile.log import configure

    faulthandler.enable()  # a watchdog ends what hangs with SIGABRT: the log then shows where it hung
    path, state = file_path(given), state_folder(state_dir)
    state.take_lock(this_process("daemon", path))
    try:
        asyncio.run(Daemon(path, state, os.environ, configure()).run())
    finally:
        state.release_lock()
    return 0


def reload(state_dir: Path | None, *, wait: bool) -> int:
    """``reload``."""
    from sage_reconcile.cli import following

    told = following.reload_daemon(state_folder(state_dir), wait=wait)
    if told is None:
        print("The daemon was told to read the file again.")
        return 0
    stays = "what was in force before stays" if told["generation"] else "nothing is in force"
    if told["file_error"]:
        rendering.error(f"{told['file_error']}\n{stays.capitalize()}.")
    elif told["held_back"]:
        rendering.error(
            f"the file is held back: {_why_held(told['held_back'])}; {stays}; confirm it with `sage-reconcile apply`"
        )
    elif told.get("trouble"):  # a daemon of an earlier version tells none
        rendering.error(f"the pass failed: {told['trouble']}")
    else:
        print(in_a_line(told))
        return 0
    return 1


def status(given: Path | None, state_dir: Path | None, as_json: bool, *, watch: bool) -> int:
    """``status``."""
    path, state = file_path(given), state_folder(state_dir)
    while True:
        document = read_status(path, state)
        if watch and not as_json:
            print("\033[H\033[2J" if sys.stdout.isatty() else "", end="")
        _show_status(document, as_json)
        if not watch:
            return 0
        sys.stdout.flush()
        time.sleep(1)


def read_status(path: Path, state: StateFolder) -> dict[str, Any]:
    """Engines and GPUs as they are now, the file, its generation, and who follows it."""
    told = state.read_json("status.json")
    holding = state.holder()
    follows = holding is not None and holding.role == "daemon" and told.get("pid") == holding.pid
    known = state.read_json("generation.json")
    file_error, generation = "", int(known.get("generation") or 0)
    observed_generation = generation
    held_back = None
    try:
        desired = files.load(path, os.environ).desired
        generation, _ = state.generation(desired.digest)
        if held_back := held_document(state.held(path, desired.digest)):
            desired = last_good(path, state) or Desired(HostSpec(), ())
    except FileFaults as error:
        file_error = str(error)
        if follows and "engines" in told and not told["file_error"]:
            return _told_by_daemon(path, told, holding)  # it has variables of the file that we do not have
        desired = last_good(path, state) or Desired(HostSpec(), ())
    seen = look(LocalHost(state, path.parent, os.environ), desired)
    document = {
        "file": str(path),
        "file_error": file_error,
        "held_back": held_back,
        "generation": generation,
        "observed_generation": observed_generation,
        "daemon": {"pid": holding.pid, "since": holding.since} if holding and holding.role == "daemon" else None,
        **status_document(desired, seen.observed, seen.plan, seen.now),
    }
    keep_since(document, told, None)
    if holding is None and seen.plan.actions:
        document["notes"].append(
            "nobody reconciles now; what is left to do is done by `sage-reconcile apply`, or `run`"
        )
    if follows:
        document["observed_generation"] = told.get("generation", observed_generation)
    if file_error or held_back:
        document["converged"] = False
    return document


def _told_by_daemon(path: Path, told: dict[str, Any], daemon: Holder | None) -> dict[str, Any]:
    """The status as the daemon last wrote it."""
    own = ("pid", "asked", "refused", "trouble", "busy", "digest", "values")
    return {
        "file": str(path),
        "observed_generation": told["generation"],
        "daemon": {"pid": daemon.pid, "since": daemon.since} if daemon else None,
        **{key: value for key, value in told.items() if key not in own},
    }


def last_good(path: Path, state: StateFolder) -> Desired | None:
    """What the file last said that was valid, where that is known."""
    if state.read_json("generation.json").get("file") != str(path):
        return None
    try:
        text = (state.path / "last-good.yaml").read_text(encoding="utf-8")
        return files.load_text(text, path, os.environ).desired
    except (OSError, FileFaults):
        return None


def _show_status(document: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(document, indent=2))
        return
    if document["file_error"]:
        stays = "\nWhat was valid last stays in force." if document["generation"] else ""
        rendering.error(f"{document['file_error']}{stays}")
    if held := document["held_back"]:
        rendering.error(
            f"{short(Path(document['file']))} is held back: {_why_held(held)}\n"
            "What was in force before stays. If it is meant, confirm it with `sage-reconcile apply`; where it is "
            "normal here, say so with `guard` under `host:`; else mend the file."
        )
    rendering.show_status(document, time.time())
    daemon = document["daemon"]
    follows = f"the daemon (pid {daemon['pid']}) follows it" if daemon else "no daemon follows it"
    late = "" if document["generation"] == document["observed_generation"] else ", not applied yet"
    print(f"\n{short(Path(document['file']))}, generation {document['generation']}{late}; {follows}.")


def logs(name: str, given: Path | None, state_dir: Path | None, *, lines: int, follow: bool) -> int:
    """``logs``."""
    state = state_folder(state_dir)
    engine, _, index = name.partition("/")
    folders = sorted((state.path / "logs").glob(f"{engine}.*" if not index else f"{engine}.{index}"))
    newest = [found[0] for folder in folders if _is_of(folder, engine) and (found := log_files.newest(folder))]
    if not newest:
        raise NotFound(f"{name} has no log in {state.path / 'logs'}; {engines_hint(given)}")
    try:
        for path in newest:
            if len(newest) > 1:
                print(f"==> {path} <==")
            print("\n".join(log_files.tail(path, lines)) if lines else "", end="\n" if lines else "")
        while follow:
            newest = [_follow(path) for path in newest]
    except KeyboardInterrupt:
        return 130
    return 0


def _is_of(folder: Path, engine: str) -> bool:
    name, _, index = folder.name.rpartition(".")
    return name == engine and index.isdecimal()


def engines_hint(given: Path | None) -> str:
    """Which engines there are."""
    try:
        names = [engine.name for engine in files.load(file_path(given), os.environ).desired.engines]
    except FileFaults:
        return "see `sage-reconcile status` for what runs"
    return f"the file names {', '.join(names)}" if names else "the file names no engine"


def _follow(path: Path) -> Path:
    """Prints what is added to a log until a newer one takes its place."""
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        while True:
            if os.fstat(file.fileno()).st_size < file.tell():
                file.seek(0)  # it was cut at its size limit
            sys.stdout.buffer.write(file.read())
            sys.stdout.flush()
            newer = log_files.newest(path.parent)[0]
            if newer != path:
                print(f"==> {newer} <==")
                return newer
            time.sleep(0.2)


def schema() -> int:
    """``schema``."""
    from sage_reconcile.core.schema import file_schema

    print(json.dumps(file_schema(), indent=2))
    return 0


def show_plan(seen: Pass) -> None:
    """Prints the plan."""
    rendering.show_plan(plan_text(seen.plan, seen.now))


def held_note(path: Path, state: StateFolder, desired: Desired) -> bool:
    """Tells where the daemon holds this content back; whether it does."""
    held = state.held(path, desired.digest)
    if held is not None:
        rendering.note(f"the daemon holds this back until it is confirmed: {_why_held(held_document(held))}")
    return held is not None


def _why_held(held: Mapping[str, Any] | None) -> str:
    return held_text(held["replicas"], held["running"], held["guard"]) if held else ""


def other_file(path: Path, state: StateFolder) -> None:
    """Tells where the engines of this state folder were started from another file."""
    before = state.read_json("generation.json").get("file")
    if before and before != str(path):
        rendering.note(f"the engines of {state.path} were started from {before}; what {path} does not name is stopped")


def short(path: Path) -> str:
    """The path as a person would write it from here."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)


def file_option(given: Path | None) -> str:
    """How the file that was given is given again."""
    return f" -f {given}" if given else ""
