"""``diff --gpus``: would the file fit on hardware that is not here?"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from sage_reconcile.cli import asking, rendering
from sage_reconcile.core.declared import declared_gpus, declared_links
from sage_reconcile.core.gpu_models import Declared, joined, size_text
from sage_reconcile.core.observed import Observed
from sage_reconcile.core.plan_text import plan_text
from sage_reconcile.core.report import plan_document
from sage_reconcile.host import files
from sage_reconcile.host.models import ModelReader, unread
from sage_reconcile.reconcile import judged

UNPLACED = 3


def would_it_fit(path: Path, declared: Sequence[Declared], *, as_json: bool) -> int:
    """Shows the plan of the whole file for an empty machine with these GPUs; nothing of this one is looked at.

    Ends with 0 where everything fits, else with 3.

    Raises:
        FileFaults: the file cannot be used.
        UnsafePlan: the plan failed its independent check.
    """
    desired = files.load(path, os.environ).desired
    models = ModelReader(path.parent, os.environ, asking.hub_for(desired, path.parent)).read(desired)
    gpus = declared_gpus(declared, simulated=False)
    observed = Observed(
        gpus=gpus,
        links=declared_links(declared, gpus),
        models=models,
        problems=tuple(unread(desired, models)),
        gpu_note="GPUs that are only declared have no UUIDs to go by: name them by index",
    )
    plan = judged(desired, observed, 0.0).plan
    if as_json:
        print(json.dumps(plan_document(plan), indent=2))
    else:
        print(f"Would it fit on {' and '.join(map(_told, declared))}?\n")
        rendering.show_plan(plan_text(plan, 0.0))
        count = sum(engine.spec.replicas for engine in desired.engines)
        left = len(plan.unplaced)
        print(f"No: {left} of {count} have no place." if left else f"Yes: all {count} have a place.")
    return UNPLACED if plan.unplaced else 0


def _told(group: Declared) -> str:
    size = size_text(group.memory_mib)
    about = [] if group.name == size else [size]
    about += [joined(group.name).value] if group.count > 1 else []
    return f"{group.count} x {group.name}" + (f" ({', '.join(about)})" if about else "")
