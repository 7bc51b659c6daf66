"""What the folders of models tell of them, without loading anything."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from sage_reconcile.core.memory import parameters_from_config
from sage_reconcile.core.observed import ModelFacts
from sage_reconcile.core.spec import Desired


class ModelReader:
    """Reads each ``config.json`` again only when it has changed. ``folder`` is that of ``engines.yaml``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, tuple[int, ModelFacts]] = {}

    def read(self, desired: Desired) -> dict[str, ModelFacts]:
        """What is known of the models whose size is asked for (``memory: auto``), by their names in the file."""
        facts: dict[str, ModelFacts] = {}
        for engine in desired.engines:
            model = engine.spec.model
            if model is None or engine.spec.memory.kind != "auto" or model in facts:
                continue
            config = self._folder / model / "config.json"
            with contextlib.suppress(OSError, ValueError):
                changed = config.stat().st_mtime_ns
                if self._known.get(model, (0, None))[0] != changed:
                    data = json.loads(config.read_text(encoding="utf-8"))
                    parameters = parameters_from_config(data) if isinstance(data, dict) else None
                    self._known[model] = (changed, ModelFacts(parameters, str(config)))
                facts[model] = self._known[model][1]
        return facts
