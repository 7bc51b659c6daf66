"""``engines.yaml`` changed in place, by many at once, and nobody's words lost.

::

    lock --> read --> splice --> read what came out --> does it mean just that? --> exchange --> was it still that?

The lock keeps our own writers apart. An editor does not know it: so the new file is not put over the old one but
*exchanged* with it, in one step, and what comes out is compared with what was read. Where somebody saved in between,
the two change places again, and the edit begins anew from what was saved.
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import errno
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sage_reconcile.core.changes import Change, Present, changed
from sage_reconcile.core.resolve import HIDDEN
from sage_reconcile.core.spec import Desired
from sage_reconcile.errors import EditRefused, FileFaults, LockHeld
from sage_reconcile.host import documents, files, splice

_LOCK_S = 30.0
_GONE_S = 0.5
"""Some editors move the old file away before the new one is there."""
_POLL_S = 0.01
_TRIES = 1000
_DRAFT = ".sage-edit"
_BOM = b"\xef\xbb\xbf"
_REFERENCE = re.compile(r"\$\{[A-Za-z_][A-Za-z0-9_]*(:-)?\}")
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_AT_CWD = -100


@dataclass(frozen=True, slots=True)
class Edited:
    """What an edit came to. ``before`` and ``after`` are the file's text and meaning; equal where nothing changed."""

    path: Path
    before: files.Loaded
    after: files.Loaded
    changes: tuple[Change, ...]

    @property
    def is_change(self) -> bool:
        """Whether the file was changed, or would be."""
        return self.before.desired.digest != self.after.desired.digest

    def difference(self) -> str:
        """The change as a unified diff. Values of ``env`` that are written out in the file are hidden in it."""
        name = self.path.name
        before, after = _without_secrets(self.before.text, self.after.text)
        lines = difflib.unified_diff(
            before.splitlines(keepends=True), after.splitlines(keepends=True), f"{name} (now)", name
        )
        return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def edit(
    path: Path,
    environ: Mapping[str, str],
    decide: Callable[[Present], Sequence[Change]],
    *,
    write: bool = True,
) -> Edited:
    """Changes the file as ``decide`` says of what is in it; with ``write=False`` only says what would come out.

    ``decide`` is asked again where somebody else saved meanwhile.

    Raises:
        EditRefused: it cannot be written, or would not mean exactly the change; it is as it was.
        FileFaults: the file is missing or wrong already.
        LockHeld: somebody else holds the lock for too long.
    """
    if not write:
        return _tried(path, environ, decide)[0]
    target = Path(os.path.realpath(path))
    _content(target)  # what is no file needs no lock
    with _alone(target.parent):
        for _ in range(_TRIES):
            result, before, after = _tried(path, environ, decide)
            if before == after or _swapped(target, before, after):
                return result
            target = Path(os.path.realpath(path))
    raise EditRefused(f"{path} is saved by somebody else all the time; try again later")


def _without_secrets(before: str, after: str) -> tuple[str, str]:
    """Both texts with literal values of ``env`` hidden; that one is another now is told."""
    old, new = (_literals(documents.parse(text.encode(), "").data) for text in (before, after))
    differing = [route for route in new if route in old and old[route] != new[route]]
    same = [route for route in new if route not in differing]
    after = splice.without(after, differing, f"{HIDDEN[:-1]}, another value)")
    return splice.without(before, list(old), HIDDEN), splice.without(after, same, HIDDEN)


def _literals(data: Mapping[str, Any]) -> dict[tuple[str, ...], object]:
    """Every value of an ``env`` that is no reference, by its route."""
    found: dict[tuple[str, ...], object] = {}
    holders: dict[tuple[str, ...], Any] = {("engines", name): entry for name, entry in data["engines"].items()}
    for route, holder in {**holders, ("defaults",): data.get("defaults")}.items():
        env = holder.get("env") if isinstance(holder, Mapping) else None
        for name, value in env.items() if isinstance(env, Mapping) else ():
            if not (isinstance(value, str) and _REFERENCE.fullmatch(value)):
                found[(*route, "env", name)] = value
    return found


def _tried(
    path: Path, environ: Mapping[str, str], decide: Callable[[Present], Sequence[Change]]
) -> tuple[Edited, bytes, bytes]:
    content = _content(path)
    before = files.load_content(content, path, environ)
    data = documents.parse(content, str(path)).data
    text = before.text
    changes = tuple(decide(Present(data, before.desired, lambda route: splice.remark(before.text, route))))
    wanted: dict[str, Any] = dict(data)
    for change in changes:
        wanted = changed(wanted, change)
        if change.value is None:
            text = splice.take(text, change.route)
        else:
            text = splice.put(text, change.route, change.value, change.remark)
    if text == before.text:
        return Edited(path, before, before, changes), content, content
    try:
        written = (_BOM if content.startswith(_BOM) else b"") + text.encode()
    except UnicodeEncodeError:
        raise EditRefused("the value holds half a character; nothing was written") from None
    after = _meant(written, path, environ)
    _check(data, wanted, documents.parse(written, str(path)).data)
    _check_others(changes, before.desired, after.desired)
    return Edited(path, before, after, changes), content, written


def _meant(written: bytes, path: Path, environ: Mapping[str, str]) -> files.Loaded:
    try:
        return files.load_content(written, path, environ)
    except FileFaults as error:
        faults = "\n  ".join(
            f"{fault.where or 'the file'}: {fault.message}" + (f"; {fault.fix}" if fault.fix else "")
            for fault in error.faults
        )
        raise EditRefused(f"{path.name} would not be valid any more, so nothing was written:\n  {faults}") from None


def _check(before: Mapping[str, Any], wanted: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """That the text means what was wanted, and nothing else."""
    if _exact(after) == _exact(wanted) and list(after["engines"]) == list(wanted["engines"]):
        return
    differing = list(_differing(wanted, after))
    others = [".".join(route) for route in differing if _at(before, route) != _at(after, route)] or [
        ".".join(route) for route in differing
    ]
    raise EditRefused(
        f"nothing was written, for it would not be this change alone: {', '.join(others[:5])} would change too, or not "
        "as asked. Where an anchor (`&`), an alias (`*`) or a merge (`<<`) is shared, edit the file by hand"
    )


def _check_others(changes: Sequence[Change], before: Desired, after: Desired) -> None:
    """That what is resolved, defaults applied, is the same for all that the change does not name."""
    named = {change.route[1] for change in changes if change.route[0] == "engines" and len(change.route) > 1}
    left = {engine.name: engine for engine in before.engines if engine.name not in named}
    now = {engine.name: engine for engine in after.engines if engine.name not in named}
    host_is_named = any(change.route[0] in ("host", "defaults") for change in changes)
    if not host_is_named and (left != now or before.host != after.host):
        differing = sorted(name for name in left.keys() | now.keys() if left.get(name) != now.get(name))
        raise EditRefused(f"nothing was written, for {', '.join(differing) or 'the host'} would change too")


def _exact(data: object) -> str:
    """Data as text that tells ``1``, ``1.0`` and ``true`` apart."""
    return json.dumps(data, sort_keys=True)


def _differing(wanted: object, found: object, route: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        for key in dict.fromkeys((*wanted, *found)):
            yield from _differing(wanted.get(key), found.get(key), (*route, str(key)))
    elif _exact(wanted) != _exact(found):
        yield route


def _at(data: object, route: tuple[str, ...]) -> object:
    for step in route:
        data = data.get(step) if isinstance(data, Mapping) else None
    return data


def _content(path: Path) -> bytes:
    """The bytes of the file; waits a moment where an editor has just moved it away."""
    deadline = time.monotonic() + _GONE_S
    while not path.exists() and path.parent.is_dir() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return documents.content(path, "`sage-reconcile init` writes one")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The lock of a folder: no file of its own is needed, and it ends with the process."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise EditRefused(f"{folder} cannot be opened: {error.strerror}; nothing was written") from error
    try:
        deadline = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise LockHeld(f"somebody else edits in {folder} for {_LOCK_S:g}s already; try again") from None
                time.sleep(_POLL_S)
            except OSError as error:
                raise EditRefused(f"{folder} cannot be locked: {error.strerror}; edit the file by hand") from error
        yield
    finally:
        os.close(descriptor)


def _swapped(target: Path, before: bytes, after: bytes) -> bool:
    """Puts the new content in place of the old; False, and nothing changed, where that was not the old any more.

    Raises:
        EditRefused: it cannot be written.
    """
    draft = target.with_name(f".{target.name}.{os.getpid()}{_DRAFT}")
    try:
        _check_writable(target)
        for dead in target.parent.glob(f".{target.name}.*{_DRAFT}"):
            dead.unlink(missing_ok=True)  # we hold the lock: whoever wrote it was killed
        _write_like(target, draft, after)
        try:
            return _exchanged(target, draft, before, after)
        finally:
            draft.unlink(missing_ok=True)
            _flush_folder(target.parent)
    except FileNotFoundError:
        return False  # moved away by an editor: read again, which tells where it is not there for good
    except OSError as error:
        hint = {
            errno.EBUSY: "it is mounted by itself: mount its folder in place of the file",
            errno.EROFS: "the file system is read-only",
            errno.ENOSPC: "free some space",
            errno.EACCES: f"user {os.geteuid()} must be allowed to write in {target.parent}",
        }.get(error.errno or 0, "edit it by hand")
        raise EditRefused(f"{target} cannot be written: {error.strerror}; {hint}. It is as it was") from error


def _check_writable(target: Path) -> None:
    found = target.stat()
    if not stat.S_IMODE(found.st_mode) & 0o222:
        raise EditRefused(f"{target} is read-only; allow it with `chmod u+w {target}`")
    if not os.access(target, os.W_OK, effective_ids=True):
        raise EditRefused(f"user {os.geteuid()} may not write {target}; run as the user who owns it")


def _write_like(target: Path, draft: Path, content: bytes) -> None:
    """A file beside the target with its owner, mode and attributes, on disk when this returns."""
    like = target.stat()
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            mine = os.fstat(descriptor)
            if (mine.st_uid, mine.st_gid) != (like.st_uid, like.st_gid):
                try:
                    os.fchown(descriptor, like.st_uid, like.st_gid)
                except PermissionError:
                    raise EditRefused(
                        f"{target} belongs to user {like.st_uid}, group {like.st_gid}, and would not after the edit; "
                        "run as that user"
                    ) from None
            for name in os.listxattr(target):
                with contextlib.suppress(OSError):  # those of the system are the system's to set
                    os.setxattr(descriptor, name, os.getxattr(target, name))
            os.fchmod(descriptor, stat.S_IMODE(like.st_mode))
            file.write(content)
            file.flush()
            os.fsync(descriptor)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _exchanged(target: Path, draft: Path, before: bytes, after: bytes) -> bool:
    if target.read_bytes() != before:
        return False
    if not _exchange(draft, target):
        if target.read_bytes() != before:  # a file system that cannot exchange: as near as it gets
            return False
        draft.replace(target)
        return True
    put, held = after, draft.read_bytes()
    if held == before:
        return True
    while True:  # what was saved goes back; and if something newer was saved meanwhile, that one
        _exchange(draft, target)
        found = draft.read_bytes()
        if found == put:
            return False
        put, held = held, found


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two files in one step; False where the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_CWD, os.fsencode(one), _AT_CWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
