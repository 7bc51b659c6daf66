"""The text of an ``engines.yaml`` read for a test, the way the product reads it, without a file."""

from __future__ import annotations

from collections.abc import Mapping

from sage_reconcile.core.resolve import resolve
from sage_reconcile.core.source import Source
from sage_reconcile.core.spec import Desired
from sage_reconcile.errors import Fault
from sage_reconcile.host import documents


def source(text: str) -> Source:
    """The data of a text, with where each key and value stands."""
    document = documents.parse(text.encode(), "engines.yaml")
    return Source(
        data=document.data,
        places={route: (place.line, place.column) for route, place in document.places.items()},
        key_places={route: (place.line, place.column) for route, place in document.key_places.items()},
        written=document.written,
        digest=document.digest,
    )


def read(
    text: str, environ: Mapping[str, str] | None = None, env_files: Mapping[str, Mapping[str, str]] | None = None
) -> tuple[Desired, list[Fault]]:
    """What a text asks for, and its faults."""
    return resolve(source(text), environ or {}, env_files or {})


def desired(text: str, environ: Mapping[str, str] | None = None) -> Desired:
    """What a text without faults asks for."""
    wanted, faults = read(text, environ)
    assert not faults, "\n".join(fault.text("engines.yaml") for fault in faults)
    return wanted
