"""How a running replica differs from its entry, field by field, and which differences replace it."""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from sage_reconcile.core.observed import Gpu, Launch, Links, link_groups
from sage_reconcile.core.reasons import WORST_LINK
from sage_reconcile.core.resolve import HIDDEN, secret_marks
from sage_reconcile.core.spec import EFFECTS, Desired, Effect, Engine, EngineSpec
from sage_reconcile.core.units import mib_text

_DEFAULTS = EngineSpec.model_construct().model_dump(mode="json")


@dataclass(frozen=True, slots=True)
class Change:
    """A field that differs: what the replica runs with, and what its entry says now."""

    field: str
    old: str
    new: str

    def text(self) -> str:
        """``memory: 48GiB -> 60GiB``."""
        return f"{self.field}: {self.old or '(not set)'} -> {self.new or '(not set)'}"


def changes(desired: Desired, engine: Engine, launch: Launch, gpus: Sequence[Gpu], links: Links) -> tuple[Change, ...]:
    """The differences for which this replica must be replaced; none where it may run on."""
    found: list[Change] = []
    if engine.record != launch.spec:
        for name, effect in EFFECTS.items():
            if name == "restarted":
                found += _restart_asked(engine, launch)
            elif effect is Effect.RESTART:
                found += _field_changes(name, engine.record[name], launch.spec.get(name, _DEFAULTS[name]))
    found += _secret_changes(engine, launch, {change.field for change in found})
    found += _placement_changes(engine, launch, gpus)
    found += _link_changes(engine, launch, links)
    if desired.host.bind != launch.bind:
        found.append(Change("host.bind", launch.bind, desired.host.bind))
    return tuple(found)


def differences(before: Engine | None, after: Engine) -> tuple[Change, ...]:
    """How two readings of an entry differ, field by field; hidden values are not shown."""
    old = before.record if before else _DEFAULTS
    found = [change for name in EFFECTS for change in _field_changes(name, after.record[name], old.get(name))]
    if before is not None:
        known, now = before.secrets, after.secrets
        told = {change.field for change in found}
        others = (path for path in now if path in known and now[path] != known[path] and path not in told)
        found += (Change(path, HIDDEN, f"{HIDDEN}, another value") for path in others)
    return tuple(found)


def _field_changes(name: str, new: object, old: object) -> Iterator[Change]:
    if new == old:
        return
    if isinstance(new, Mapping) and isinstance(old, Mapping):
        for key in (*new, *(key for key in old if key not in new)):
            if new.get(key) != old.get(key) or (key in new) != (key in old):
                yield Change(
                    f"{name}.{key}",
                    _text(old.get(key)) if key in old else "",
                    _text(new.get(key)) if key in new else "",
                )
    else:
        yield Change(name, _text(old), _text(new))


def _restart_asked(engine: Engine, launch: Launch) -> Iterator[Change]:
    """Only a value that is there asks for anything; that one was taken away does not."""
    known = launch.spec.get("restarted")
    before = known if isinstance(known, Mapping) else {}
    for key in ("all", str(launch.index)):
        moment = engine.spec.restarted.get(key)
        if moment is not None and moment != before.get(key):
            yield Change(f"restarted.{key}", str(before.get(key) or ""), moment)


def _secret_changes(engine: Engine, launch: Launch, known: set[str]) -> Iterator[Change]:
    if not engine.secrets and not launch.secret_marks:
        return
    marks = secret_marks(engine.secrets, launch.id)
    for path in (*marks, *(path for path in launch.secret_marks if path not in marks)):
        new, old = marks.get(path), launch.secret_marks.get(path)
        if path in known or (new and old and hmac.compare_digest(new, old)):
            continue
        if path.startswith("env_file.") or (new and old):
            yield Change(
                path,
                HIDDEN if old else "",
                f"{HIDDEN}, another value" if new and old else HIDDEN if new else "",
            )


def _placement_changes(engine: Engine, launch: Launch, gpus: Sequence[Gpu]) -> Iterator[Change]:
    if engine.spec.gpus != "auto":
        indexes = {gpu.uuid: gpu.index for gpu in gpus}
        pins = set(engine.spec.gpus)
        # a GPU that is not shown may be any of them: a look that failed must not restart anything
        if any(uuid not in pins and uuid in indexes and indexes[uuid] not in pins for uuid in launch.gpus):
            runs_on = [indexes.get(uuid, uuid) for uuid in launch.gpus]
            yield Change("gpus", _text(runs_on), _text(list(engine.spec.gpus)))
    if engine.spec.port != "auto" and engine.spec.port + launch.index != launch.port:
        yield Change("port", str(launch.port), str(engine.spec.port + launch.index))


def _link_changes(engine: Engine, launch: Launch, links: Links) -> Iterator[Change]:
    """Only a change of the entry counts, and only known links: a look that failed must not restart anything."""
    wanted, before = engine.spec.link, str(launch.spec.get("link", "any"))
    if wanted in (before, "any") or any(frozenset(pair) not in links for pair in combinations(launch.gpus, 2)):
        return
    if len(set(link_groups(launch.gpus, links, WORST_LINK[wanted]).values())) > 1:
        yield Change("link", before, wanted)


def _text(value: object) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case list() | tuple():
            return "[" + ", ".join(_text(item) for item in value) + "]"
        case Mapping():
            return "{" + ", ".join(f"{key}: {_text(item)}" for key, item in value.items()) + "}"
        case str() if value.endswith("MiB") and value[:-3].isdecimal():
            return mib_text(int(value[:-3]))
    return str(value)
