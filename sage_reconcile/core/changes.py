"""What a verb changes in the file: ``start``, ``stop``, ``scale``, ``set`` and ``restart`` as changes of values.

A verb looks at the file as it is at this moment and says what has to be written where; it says nothing where the file
asks for the same already. So a verb that is given twice does what it does once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sage_reconcile.core.fields import ENGINE_NAME
from sage_reconcile.core.source import Route
from sage_reconcile.core.spec import Desired, Engine, EngineSpec
from sage_reconcile.errors import EditRefused, NotFound

PRUNED = 3
"""A map deeper than ``engines.NAME.FIELD`` goes with the last thing in it."""
_INSIDE = ("args", "env")
_WAS = "was "


@dataclass(frozen=True, slots=True)
class Change:
    """A value to be written at a route; None takes away what is there. ``remark`` is a comment for its line."""

    route: Route
    value: object = None
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Present:
    """The file as it is now: its data, what that asks for, and what remark the line of a value has."""

    data: Mapping[str, Any]
    desired: Desired
    remark: Callable[[Route], str] = field(default=lambda _: "")

    def entry(self, engine_name: str) -> Mapping[str, Any]:
        """What the entry of an engine says itself; what it merges is in it, the defaults are not."""
        engines = self.data["engines"]
        return engines[engine_name] if isinstance(engines, Mapping) else {}

    def engine(self, name: str) -> Engine:
        """The engine of that name.

        Raises:
            NotFound: there is none; the message names those that there are.
        """
        engine = self.desired.engine(name)
        if engine is not None:
            return engine
        names = [engine.name for engine in self.desired.engines]
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it names {', '.join(names) or 'none'}"
        raise NotFound(f"the file names no engine {name!r}; {hint}")


@dataclass(frozen=True, slots=True)
class Wish:
    """What ``start`` was asked for. ``fields`` are values by their path (``memory``, ``args.max-model-len``)."""

    model: str
    name: str = ""
    replicas: int | None = None
    fields: Sequence[tuple[str, object]] = ()


Verb = Callable[[Present], Sequence[Change]]


def start(wish: Wish, present: Present) -> tuple[str, list[Change]]:
    """An engine for a model, or one that is in the file brought back; its name, and what has to be written.

    ``wish.model`` may be the name of an engine that is in the file. An engine that is stopped gets the replicas that
    it had before ``stop``.

    Raises:
        EditRefused: the name belongs to an engine with another model.
    """
    known = present.desired.engine(wish.model) if not wish.name else None
    name = known.name if known else wish.name or name_for(wish.model)
    engine = known or present.desired.engine(name)
    if engine is None:
        return name, [Change(("engines", name), _new_entry(wish))]
    if known is None and wish.model not in (engine.shown.model, (engine.spec.model or "").replace("$", "$$")):
        raise EditRefused(
            f"{name} is in the file, with the model {engine.shown.model}; choose another --name, or change its model "
            f"with `sage-reconcile engine set {name} model={wish.model}`"
        )
    replicas = wish.replicas
    if replicas is None and engine.spec.replicas == 0:
        replicas = before_stop(present, name)
    found = scale(present, name, replicas) if replicas is not None else []
    return name, [*found, *assign(present, name, wish.fields)]


def name_for(model: str) -> str:
    """The name of an engine for a model: the last part of the model's, in small letters.

    Raises:
        EditRefused: nothing in it can be a name.
    """
    last = re.split(r"[/\\]", model.rstrip("/\\"))[-1].lower()
    name = re.sub(r"[^a-z0-9._-]+", "-", last)[:63].strip("._-")
    if not re.fullmatch(ENGINE_NAME, name):
        raise EditRefused(f"no name can be made of the model {model[:80]!r}; give one with --name")
    return name


def _new_entry(wish: Wish) -> dict[str, object]:
    entry: dict[str, Any] = {"model": wish.model}
    if wish.replicas is not None:
        entry["replicas"] = wish.replicas
    for path, value in wish.fields:
        first, *rest = _steps(path)
        if rest:
            entry.setdefault(first, {})[rest[0]] = value
        else:
            entry[first] = value
    order = list(EngineSpec.model_fields)
    return dict(sorted(entry.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def before_stop(present: Present, engine_name: str) -> int:
    """How many replicas a stopped engine had: what ``stop`` noted beside ``replicas: 0``; else 1."""
    noted = present.remark(("engines", engine_name, "replicas")).removeprefix(_WAS)
    return int(noted) if noted.isdecimal() and 0 < int(noted) <= 10000 else 1


def stop(present: Present, engine_name: str, *, remove: bool) -> list[Change]:
    """An entry kept with ``replicas: 0``, with a note of how many there were; or taken out of the file."""
    engine = present.engine(engine_name)
    route: Route = ("engines", engine_name)
    if remove:
        return [Change(route)]
    had = engine.spec.replicas
    return [Change((*route, "replicas"), 0, f"{_WAS}{had}" if had > 1 else "")] if had else []


def scale(present: Present, engine_name: str, replicas: int) -> list[Change]:
    """Another number of replicas."""
    engine = present.engine(engine_name)
    route: Route = ("engines", engine_name, "replicas")
    return [] if engine.spec.replicas == replicas and not present.remark(route) else [Change(route, replicas)]


def assign(present: Present, engine_name: str, fields: Sequence[tuple[str, object]]) -> list[Change]:
    """Values for fields of an engine, by their path; None takes one out, so that the default counts again.

    Raises:
        EditRefused: what shall be taken out is not in the entry.
    """
    present.engine(engine_name)
    entry = present.entry(engine_name)
    found: list[Change] = []
    for path, value in fields:
        first, *rest = _steps(path)
        own = entry.get(first)
        if rest and not isinstance(own, Mapping):
            own = {}
        key = _spelled(own, rest[0]) if rest and isinstance(own, Mapping) and first == "args" else (rest or [""])[0]
        route: Route = ("engines", engine_name, first, *([key] if rest else []))
        is_there = key in own if rest and isinstance(own, Mapping) else first in entry
        if value is not None:
            now = own.get(key) if rest and isinstance(own, Mapping) else own
            if not is_there or now != value or type(now) is not type(value):
                found.append(Change(route, value))
        elif is_there:
            found.append(Change(route))
        else:
            _refuse_inherited(present, engine_name, first, key)
    return found


def _refuse_inherited(present: Present, engine_name: str, first: str, key: str) -> None:
    defaults = present.data.get("defaults")
    given = defaults.get(first) if isinstance(defaults, Mapping) else None
    if isinstance(given, Mapping) and key:
        given = given.get(_spelled(given, key) if first == "args" else key)
    if given is not None:
        path = f"{first}.{key}" if key else first
        raise EditRefused(
            f"{path} of {engine_name} comes from `defaults:`, so there is nothing to take out of its entry; give it "
            f"another value with `sage-reconcile engine set {engine_name} {path}=…`"
        )


def restart(present: Present, engine_name: str, replica: int | None, stamp: str) -> list[Change]:
    """Another value of ``restarted``, for which all replicas of an engine, or one of them, are replaced.

    ``stamp`` is what is written: the time, which tells a person when it was.

    Raises:
        EditRefused: the engine is stopped.
        NotFound: it has no such replica.
    """
    engine = present.engine(engine_name)
    if not engine.spec.replicas:
        raise EditRefused(
            f"{engine_name} is stopped (`replicas: 0`); start it with `sage-reconcile engine start {engine_name}`"
        )
    if replica is None:
        return [Change(("engines", engine_name, "restarted"), {"all": stamp})]
    if not 0 <= replica < engine.spec.replicas:
        last = engine.spec.replicas - 1
        raise NotFound(f"{engine_name} has no replica {replica}; it has " + (f"0 to {last}" if last else "only 0"))
    return [Change(("engines", engine_name, "restarted", str(replica)), stamp)]


def _steps(path: str) -> list[str]:
    """``args.max-model-len`` as two steps; what follows the first dot is one, for flags may have dots.

    Raises:
        EditRefused: a part of a field that has none.
    """
    first, dot, rest = path.partition(".")
    first = first.replace("-", "_")
    if not dot:
        return [first]
    if first not in _INSIDE or not rest:
        raise EditRefused(f"{path!r}: only `args` and `env` have parts; write args.max-model-len=8192, say")
    return [first, rest]


def _spelled(flags: Mapping[str, Any], flag: str) -> str:
    """A flag as these flags spell it already (``--max_model_len``), else as it was given."""
    return next((key for key in flags if _plain(key) == _plain(flag)), flag)


def _plain(key: str) -> str:
    return key.lstrip("-").replace("_", "-")


def changed(data: Mapping[str, Any], change: Change) -> dict[str, Any]:
    """What the data of the file is after a change."""
    return _changed(data, change.route if change.value is not None else _pruned(data, change.route), change.value)


def _changed(data: Mapping[str, Any], route: Route, value: object) -> dict[str, Any]:
    step, rest = str(route[0]), route[1:]
    if rest:
        inner = data.get(step)
        return {**data, step: _changed(inner if isinstance(inner, Mapping) else {}, rest, value)}
    if value is None:
        return {key: item for key, item in data.items() if key != step}
    return {**data, step: value}


def _pruned(data: Mapping[str, Any], route: Route) -> Route:
    """The route of the map whose last key goes, where it is inside a field."""
    while len(route) > PRUNED:
        inner: Any = data
        for step in route[:-1]:
            inner = inner.get(step, {})
        if set(inner) != {route[-1]}:
            break
        route = route[:-1]
    return route
