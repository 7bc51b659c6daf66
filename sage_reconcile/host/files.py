"""``engines.yaml`` on disk: found, read, and turned into what it asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sage_reconcile.core.resolve import env_file_names, resolve
from sage_reconcile.core.source import Route, Source
from sage_reconcile.core.spec import Desired
from sage_reconcile.errors import Fault, FileFaults
from sage_reconcile.host import documents

SYSTEM_FILE = Path("/etc/sage-reconcile/engines.yaml")


def default_file() -> Path:
    """``./engines.yaml`` where there is one, else the system's where there is one, else ``./engines.yaml``."""
    here = Path("engines.yaml")
    return SYSTEM_FILE if not here.exists() and SYSTEM_FILE.exists() else here


def signature(path: Path) -> tuple[int, ...]:
    """Differs where the file may have another content; cheap to ask. Empty where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino, found.st_dev


@dataclass(frozen=True, slots=True)
class Loaded:
    """A valid file: what it asks for, its text, and the files that its ``env_file`` fields name."""

    desired: Desired
    text: str
    env_files: tuple[Path, ...] = ()


def load(path: Path, environ: Mapping[str, str]) -> Loaded:
    """Reads and resolves a file.

    Raises:
        FileFaults: with everything that is wrong with it.
    """
    return _resolved(lambda: documents.read(path), path, environ)


def load_text(text: str, path: Path, environ: Mapping[str, str]) -> Loaded:
    """The same for content that was read before; ``path`` is the file it came from.

    Raises:
        FileFaults: with everything that is wrong with it.
    """
    return load_content(text.encode(), path, environ)


def load_content(content: bytes, path: Path, environ: Mapping[str, str]) -> Loaded:
    """The same for the bytes of a file.

    Raises:
        FileFaults: with everything that is wrong with it.
    """
    return _resolved(lambda: documents.parse(content, str(path)), path, environ)


def _resolved(read: Callable[[], documents.Document], path: Path, environ: Mapping[str, str]) -> Loaded:
    unreadable: tuple[Fault, ...] = ()
    try:
        document = read()
    except FileFaults as error:
        if not isinstance(error.partial, documents.Document):
            raise
        document, unreadable = error.partial, error.faults
    source = Source(
        data=document.data,
        places={route: (place.line, place.column) for route, place in document.places.items()},
        key_places={route: (place.line, place.column) for route, place in document.key_places.items()},
        written=document.written,
        digest=document.digest,
    )
    env_files, faults = _env_files(source, path.parent, environ)
    desired, found = resolve(source, environ, env_files)
    if unreadable or faults or found:
        told = {fault.where for fault in unreadable}  # what could not be read needs no second complaint
        raise FileFaults(str(path), [*unreadable, *(fault for fault in (*faults, *found) if fault.where not in told)])
    return Loaded(desired, document.text, tuple(path.parent / name for name in env_files))


def _env_files(
    source: Source, folder: Path, environ: Mapping[str, str]
) -> tuple[dict[str, Mapping[str, str]], list[Fault]]:
    contents: dict[str, Mapping[str, str]] = {}
    faults: list[Fault] = []
    for name, route in env_file_names(source, environ).items():
        try:
            contents[name] = documents.read_env_file(folder / name)
        except FileFaults as error:
            faults += (_told_here(source, route, name, fault) for fault in error.faults)
    return contents, faults


def _told_here(source: Source, route: Route, name: str, fault: Fault) -> Fault:
    """A fault of an ``env_file``, told where the file is named."""
    place = f"{name}, line {fault.line}" if fault.line else name
    return source.fault(route, f"{place}: {fault.message}", fault.fix)
