"""Which engines go back to the last revision that was ready, since that of their entry failed.

Nothing is kept for this but the records of launches: of the one that failed, and of the last one that was ready
before. As long as both are there, and nobody asks for another try, the older revision is what shall run.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import replace

from pydantic import ValidationError

from sage_reconcile.core.drift import changes
from sage_reconcile.core.lifecycle import StopCause, failed, how_it_failed
from sage_reconcile.core.observed import Launch, Life, Observed
from sage_reconcile.core.plan import Rollback
from sage_reconcile.core.resolve import secret_marks
from sage_reconcile.core.spec import EFFECTS, Desired, Effect, Engine, EngineSpec


class Rollbacks:
    """Every rollback that is in force, by engine.

    ``desired`` is the file with those engines as they were. ``retained`` are the ids of launches whose records
    are needed for it, or would be if a start under way failed; ``released`` those of failures that no longer count,
    since a person asks for another try.
    """

    def __init__(self, desired: Desired, observed: Observed, tried: frozenset[str] | None) -> None:
        self._desired, self._observed, self._tried = desired, observed, tried
        self.found: dict[str, Rollback] = {}
        self.retained: frozenset[str] = frozenset()
        self.released: frozenset[str] = frozenset()
        for engine in desired.engines:
            if engine.spec.rollback == "auto":
                self._look_at(engine)

    @property
    def desired(self) -> Desired:
        """What shall run: the file, but for the engines that were rolled back."""
        older = {name: found.revision for name, found in self.found.items() if found.revision is not None}
        if not older:
            return self._desired
        return replace(self._desired, engines=tuple(older.get(x.name, x) for x in self._desired.engines))

    def _look_at(self, engine: Engine) -> None:
        of_entry: list[Launch] = []
        before: list[Launch] = []
        for launch in self._observed.launches:
            if launch.engine_name == engine.name and launch.life is not Life.UNPROVEN:
                (before if self._differs(engine, launch) else of_entry).append(launch)
        ready = [launch for launch in before if launch.ready_at is not None]
        if not ready or any(launch.ready_at is not None for launch in of_entry):
            return
        good = max(ready, key=lambda x: (x.ready_at or 0.0, x.created_at, x.id))
        self.retained |= {good.id}
        last = max(of_entry, key=lambda x: (x.created_at, x.id), default=None)
        if last is None or not never_worked(last):
            return
        if self._tried is not None and last.replica not in self._tried:
            self.released |= {launch.id for launch in of_entry if launch.life is Life.EXITED}
            return
        self.retained |= {last.id}
        revision = revision_of(engine, good)
        problem = revision if isinstance(revision, str) else ""
        older = None if isinstance(revision, str) else revision
        fix = last.failure.summary() if last.failure else ""
        why = how_it_failed(last) + (f"; {fix}" if fix else "")
        self.found[engine.name] = Rollback(engine.name, last.id, good.id, why, older, problem)

    def _differs(self, engine: Engine, launch: Launch) -> bool:
        """Whether it is of another revision; where servers listen is not a matter of one engine.

        Nor is a restart that somebody asked for: the same revision starts anew.
        """
        found = changes(self._desired, engine, launch, self._observed.gpus, self._observed.links)
        return any(change.field != "host.bind" and change.field.partition(".")[0] != "restarted" for change in found)


def never_worked(launch: Launch) -> bool:
    """Whether a start failed, be it by itself or not in time. One of which nobody knows how it ended did not."""
    if launch.ready_at is not None or not failed(launch):
        return False
    if launch.stop_cause == StopCause.STARTUP_TIMEOUT:
        return True
    return launch.life in (Life.EXITED, Life.LEFTOVER) and launch.exit is not None and launch.exit.code is not None


def revision_of(engine: Engine, launch: Launch) -> Engine | str:
    """The revision that a launch ran, so that it can be started again; or why it cannot.

    Of hidden values only marks are on record: they are those of the entry now, or they are lost. What does not
    restart an engine is taken from the entry as well.
    """
    marks = secret_marks(engine.secrets, launch.id)
    for path, mark in launch.secret_marks.items():
        if not hmac.compare_digest(marks.get(path, ""), mark):
            return f"`{path}` had another value, and hidden values are not kept"
    secrets = {path: engine.secrets[path] for path in launch.secret_marks}
    stays = {name for name, effect in EFFECTS.items() if effect is Effect.NOTHING} | {"restarted"}
    told = {name: launch.spec[name] for name in EFFECTS if name not in stays and name in launch.spec}
    try:
        said = {name: value for name, value in told.items() if value is not None}
        spec = EngineSpec.model_validate({name: _filled(value, name, secrets) for name, value in said.items()})
    except ValidationError as error:
        return f"its record cannot be read ({error.errors()[0]['msg']})"
    now = {name: getattr(engine.spec, name) for name in stays}
    spec = spec.model_copy(update={**now, "exclusive": engine.spec.exclusive or spec.memory.kind == "all"})
    hidden = {name: value for name, value in told.items() if _filled(value, name, secrets) != value}
    shown = spec.model_copy(update={name: tuple(x) if isinstance(x, list) else x for name, x in hidden.items()})
    record = {name: told.get(name, engine.record[name]) for name in engine.record}
    from_file = {path.removeprefix("env_file."): x for path, x in secrets.items() if path.startswith("env_file.")}
    return Engine(engine.name, spec, shown, record, secrets, {**from_file, **spec.env})


def _filled(value: object, path: str, secrets: Mapping[str, str]) -> object:
    """The value on record with what is hidden in it."""
    if isinstance(value, Mapping):
        return {key: _filled(item, f"{path}.{key}", secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        if path in secrets:
            return secrets[path].split("\0")
        return [_filled(item, f"{path}.{index}", secrets) for index, item in enumerate(value)]
    return secrets.get(path, value) if isinstance(value, str) else value
