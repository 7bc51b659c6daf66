"""Asking a hub of models before a command plans, for a bounded time: what a pass itself never does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from sage_reconcile.cli import rendering
from sage_reconcile.core.spec import Desired
from sage_reconcile.host.hub import Hub
from sage_reconcile.host.models import ModelReader

if TYPE_CHECKING:
    from sage_reconcile.core.observed import ModelFacts

PLAN_S = 5.0
"""A plan waits no longer than this, for all models together."""
ESTIMATE_S = 20.0
"""``estimate`` is about nothing else, so it waits longer."""


def hub_for(desired: Desired, folder: Path) -> Hub:
    """A hub that was asked for the models of ``memory: auto`` that are not here; it asks for nothing more.

    Notes for whom it has not told all in time; it goes on by itself, and the next command knows.
    """
    hub = Hub(os.environ, asks=not desired.host.offline)
    away = ModelReader(folder, os.environ, hub).away(desired)
    left = hub.wait([one for one, _ in away], PLAN_S)
    names = [engine.name for one, engine in away if one in left]
    if names:
        rendering.note(
            f"{', '.join(names)}: the hub has not described the model within {PLAN_S:.0f} s, so the memory goes by "
            "its name; it may be known the next time"
        )
    hub.asks = False
    return hub


def facts_of(model: str, *, offline: bool) -> ModelFacts | None:
    """What is known of a model here, else what a hub tells of it."""
    from sage_reconcile.core.observed import ModelFacts

    hub = Hub(os.environ, asks=not offline)
    reader = ModelReader(Path.cwd(), os.environ, hub)
    facts = reader.facts(model)
    wanted = None if facts else reader.sought(model)
    if wanted is None:
        return facts
    if hub.wait([wanted], ESTIMATE_S):
        return ModelFacts("", problem=f"the hub has not described the model within {ESTIMATE_S:.0f} s")
    return reader.told(wanted)
