"""What a shell is told to complete: engines of the file, and fields. It must be quick, and never fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sage_reconcile.errors import FileFaults
from sage_reconcile.host import documents, files

_INSIDE = ("args", "env")


def engine_names(file: Path | None, incomplete: str) -> list[str]:
    """The engines whose names begin so."""
    return [name for name in _engines(file) if name.startswith(incomplete)]


def assignments(file: Path | None, engine_name: str | None, incomplete: str) -> list[str]:
    """``field=`` for every field that begins so; for ``args`` and ``env`` also with what the entry has in them."""
    from sage_reconcile.core.spec import EFFECTS

    entry = _engines(file).get(engine_name or "")
    entry = entry if isinstance(entry, dict) else {}
    found = [name for name in EFFECTS if name not in _INSIDE]
    for name in _INSIDE:
        inner = entry.get(name)
        found += [f"{name}.{key}" for key in (inner if isinstance(inner, dict) else {})]
    return [f"{path}=" for path in found if path.startswith(incomplete)] + [
        f"{name}." for name in _INSIDE if name.startswith(incomplete)
    ]


def _engines(file: Path | None) -> dict[str, Any]:
    try:
        data = documents.read(Path(file or files.default_file())).data
    except FileFaults as error:
        data = error.partial.data if isinstance(error.partial, documents.Document) else {}
    engines = data.get("engines")
    return engines if isinstance(engines, dict) else {}
