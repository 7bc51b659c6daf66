"""Updates under way as data for JSON: who waits for a turn, and what was rolled back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sage_reconcile.core.drift import Change
from sage_reconcile.core.plan import Plan


def updates_document(plan: Plan) -> dict[str, Any]:
    """What a plan tells of them."""
    return {
        "queued": [
            {
                "replica": item.launch.replica,
                "waits_for": item.waits_for,
                "changes": changes_document(item.changes),
            }
            for item in plan.queued
        ],
        "rollbacks": [
            {
                "engine": found.engine_name,
                "cause": found.cause,
                "done": found.revision is not None,
                "problem": found.problem,
            }
            for found in plan.rollbacks
        ],
    }


def changes_document(found: Sequence[Change]) -> list[dict[str, str]]:
    """Why a replica is replaced, field by field."""
    return [{"field": change.field, "old": change.old, "new": change.new} for change in found]
