"""A daemon's report in one line, as for ``systemctl status``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from sage_reconcile.core.lifecycle import Phase


def in_a_line(told: Mapping[str, Any], trouble: str = "") -> str:
    """A daemon's report with the counts in one line; ``trouble`` is why a pass failed."""
    rows = [row for engine in told.get("engines", ()) for row in engine["replicas"]]
    wanted = sum(engine["desired"] for engine in told.get("engines", ()))
    ready = sum(engine["ready"] for engine in told.get("engines", ()))
    counts = Counter(row["phase"] for row in rows if row["phase"] != Phase.READY)
    parts = [f"{ready} of {wanted} replicas ready"] if "engines" in told else ["no valid file yet"]
    parts += [f"{count} {phase}" for phase, count in sorted(counts.items())]
    parts += [f"{unplaced} without a place"] if (unplaced := sum(row["unplaced"] for row in rows)) else []
    parts += [f"generation {told['generation']}"] if told.get("generation") else []
    parts += [f"file refused: {told['file_error'].splitlines()[0]}"] if told.get("file_error") else []
    parts += ["an edit is held back"] if told.get("held_back") else []
    parts += [f"pass failed: {trouble.splitlines()[0]}"] if trouble else []
    return "; ".join(parts)
