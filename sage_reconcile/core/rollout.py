"""How changed replicas are replaced: whose turn it is, and who waits until those before are ready again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from sage_reconcile.core.drift import Change
from sage_reconcile.core.failure import LASTING
from sage_reconcile.core.gpu_maps import once_back
from sage_reconcile.core.lifecycle import StopCause, failed, failures, next_try
from sage_reconcile.core.observed import Launch, Observed
from sage_reconcile.core.placement import Placement, Refusal, Request, place
from sage_reconcile.core.plan import Action, Unplaced
from sage_reconcile.core.ports import Lease
from sage_reconcile.core.promise import known_of
from sage_reconcile.core.rollback import Rollbacks
from sage_reconcile.core.spec import Desired, Engine
from sage_reconcile.core.standing import Standing, end

Results = dict[str, tuple[Placement, Lease] | Refusal]
"""What becomes of each replica that needs a place."""
Changed = Mapping[str, tuple[Launch, tuple[Change, ...]]]
"""Running replicas whose entry says something else by now, with what differs."""


@dataclass(frozen=True, slots=True)
class Turns:
    """Whose turn it is, by replica, and why each of the others waits.

    ``may_surge`` and ``may_stop`` are how many of each engine may be started first, or stopped first, now.
    """

    now: frozenset[str]
    waits: Mapping[str, str]
    may_surge: Mapping[str, int]
    may_stop: Mapping[str, int]


def turns(
    desired: Desired, standing: Standing, changed: Changed, refused: Collection[str], hopeless: Collection[str]
) -> Turns:
    """Decides by what is ready now: never more of an engine at once than its entry allows.

    ``refused`` have no place with their new revision, and stay; ``hopeless`` run nothing and have no place at all, so
    that nobody waits for them.
    """
    now: set[str] = set()
    waits: dict[str, str] = {}
    surge: dict[str, int] = {}
    stop: dict[str, int] = {}
    for engine in desired.engines:
        mine = [name for name in engine.replicas() if name in changed]
        if not mine:
            continue
        ending = {launch.replica for launch in standing.ending.values()}
        idle = [x for x in mine if not changed[x][0].ready and x not in ending and x not in refused]
        missing = [name for name in _missing(engine, standing, changed) if name not in hopeless]
        coming = [name for name in engine.replicas() if name in standing.superseded]
        busy = [*missing, *(name for name in coming if name not in missing)]
        surge[engine.name] = max(0, engine.spec.max_surge - len(busy))
        stop[engine.name] = max(0, engine.spec.max_unavailable - len(busy))
        room = max(surge[engine.name], stop[engine.name])
        free = [name for name in mine if name not in refused and name not in ending and name not in idle]
        now |= {*idle, *free[:room]}
        before = [*busy, *free[:room]]
        for name in mine:
            if name in ending:
                waits[name] = "its other process to end"
            elif name not in now and name not in refused:
                waits[name] = f"{', '.join(before)} to be ready ({_limit(engine)})"
    return Turns(frozenset(now), waits, surge, stop)


def _limit(engine: Engine) -> str:
    return f"`max_unavailable: {engine.spec.max_unavailable}`, `max_surge: {engine.spec.max_surge}`"


def _missing(engine: Engine, standing: Standing, changed: Changed) -> Iterator[str]:
    """The replicas of an engine that do not serve."""
    for name in engine.replicas():
        found = (standing.kept.get(name), changed[name][0] if name in changed else None, standing.superseded.get(name))
        if not any(launch is not None and launch.ready for launch in found):
            yield name


class Updating(ABC):
    """The part of a plan in the making that replaces what has changed; the planner has the rest of it.

    ``changed`` are all that are to be replaced, ``queued`` those whose turn has not come, ``first`` those that are
    started before their old process ends, with the GPUs (by UUID) for it.
    """

    def __init__(self, desired: Desired, observed: Observed, now: float, tried: frozenset[str] | None) -> None:
        self.rollbacks = Rollbacks(desired, observed, tried)
        self.desired, self.observed, self.now, self.tried = self.rollbacks.desired, observed, now, tried
        self.standing = Standing(self.desired, observed, now, self.rollbacks.retained)
        self.changed = dict(self.standing.drifted)
        self.hopeless: set[str] = set()
        self.first: dict[str, tuple[str, ...]] = {}
        self.turns = turns(self.desired, self.standing, self.changed, (), ())
        self.queued: dict[str, str] = {}
        self.refused: dict[str, Refusal] = {}
        self.room_for = ""
        self.expected = once_back(observed, self.standing)

    @property
    @abstractmethod
    def _leaving(self) -> frozenset[str]:
        """Ids of launches that will have gone once all is done."""

    @abstractmethod
    def _placed(self, requests: list[Request]) -> Results:
        """A place and ports for each, or why it has none."""

    def _take_turns(self) -> bool:
        """Lets those be replaced now whose turn it is, and the others run on; whether that changes anything."""
        standing = self.standing
        before = set(standing.drifted)
        self.turns = turns(self.desired, standing, self.changed, self.refused, self.hopeless)
        for name, found in self.changed.items():
            if name in self.turns.now:
                standing.kept.pop(name, None)
                standing.drifted[name] = found
            else:
                standing.drifted.pop(name, None)
                standing.kept[name] = found[0]
        self.queued = dict(self.turns.waits)
        return before != set(standing.drifted)

    def _without_hope(self, results: Results) -> bool:
        """Whether some who run nothing turn out to have no place: no turn waits for them."""
        held = {launch.replica for launch in self.observed.launches if launch.holds}
        lost = {name for name, found in results.items() if isinstance(found, Refusal) or found[0].blocked} - held
        if not self.changed or lost <= self.hopeless:
            return False
        self.hopeless |= lost
        return self._take_turns()

    def _start_first(self, requests: list[Request], results: Results) -> tuple[list[Request], Results]:
        """Of those to be replaced, who is started beside its old process, since there is room for both.

        Nobody loses a place by it. Who finds room only when one of these has left waits for that; who may not be
        stopped first, and finds none at all, stays as it is.
        """
        standing = self.standing
        for name in sorted(standing.drifted) if not self.room_for else ():
            launch, _ = standing.drifted[name]
            engine = self.desired.engine(launch.engine_name)
            mine = sum(other.rpartition("/")[0] == launch.engine_name for other in self.first)
            if (
                not engine
                or engine.spec.port != "auto"
                or not launch.ready
                or mine >= self.turns.may_surge[engine.name]
            ):
                continue
            tried = self._beside(name, requests, results)
            if tried is not None:
                requests, results = tried
        return self._stop_first(requests, results)

    def _beside(self, name: str, requests: list[Request], results: Results) -> tuple[list[Request], Results] | None:
        """The same plan with this one started first; None where that cannot be, or costs somebody a place."""
        standing = self.standing
        staying = {launch.id for other, (launch, _) in standing.drifted.items() if other not in self.first}
        request = next(x for x in requests if x.replica == name)
        chosen = [replace(x, destination=self.first[x.replica]) for x in requests if x.replica in self.first]
        found = place(self.desired, self.expected, [*chosen, request], self._leaving - staying)[name]
        if isinstance(found, Refusal) or found.blocked:
            return None
        self.first[name] = tuple(gpu.uuid for gpu in found.gpus)
        pinned = [replace(x, destination=self.first.get(x.replica, x.destination)) for x in requests]
        anew = self._placed(pinned)
        if any(refused(anew[other]) and not refused(results[other]) for other in results):
            del self.first[name]
            return None
        return pinned, anew

    def _stop_first(self, requests: list[Request], results: Results) -> tuple[list[Request], Results]:
        """Lets all others that are to be replaced stop first, as far as their entry and their place allow it."""
        standing = self.standing
        left = {name: launch for name, (launch, _) in standing.drifted.items() if name not in self.first}
        stays = {standing.drifted[name][0].id for name in self.first}
        now = [x for x in requests if x.replica in self.first or x.replica in left]
        places = place(self.desired, self.expected, now, self._leaving - stays) if self.first else results
        for name, launch in left.items():
            engine_name = launch.engine_name
            engine = self.desired.engine(engine_name)
            assert engine is not None, "what is to be replaced is in the file"
            mine = sum(other.rpartition("/")[0] == engine_name for other in self.first)
            mine += sum(x.engine_name == engine_name and x.ready for other, x in left.items() if other < name)
            if launch.ready and mine >= self.turns.may_stop[engine_name]:
                why = "another to be ready" if engine.spec.max_unavailable else "room to be started first"
                self.queued[name] = f"{why} (`max_unavailable: {engine.spec.max_unavailable}`)"
            elif refused(places[name]):
                self.queued[name] = f"room until {', '.join(sorted(self.first))} can leave"
            else:
                continue
            standing.kept[name] = standing.drifted.pop(name)[0]
        requests = [x for x in requests if x.replica not in self.queued]
        return requests, self._placed(requests)

    def _stop_changed(self, replica: str, after: tuple[str, ...] = ()) -> Action:
        launch, differences = self.standing.drifted[replica]
        cause = "changed: " + ", ".join(change.field for change in differences)
        waits = [self._untold(launch.engine_name)]
        if launch.ready and not after:
            waits.append(self._held_back(replica))
        return end(
            "stop",
            launch,
            cause,
            StopCause.CHANGED,
            differences=differences,
            after=after,
            waits_for=", ".join(part for part in waits if part),
        )

    def _held_back(self, replica: str) -> str:
        """Why what runs does not end yet for a revision that has failed already."""
        last = self.standing.history.get(replica)
        engine = self.desired.engine(replica.rpartition("/")[0])
        if last is None or engine is None or self.standing.changes(engine, last) or not failed(last):
            return ""
        if self.tried is not None:
            return "the next `apply`, since it was tried just now" if replica in self.tried else ""
        if last.failure is not None and last.failure.kind in LASTING:
            return "an edit of its entry, or `apply`, since it cannot get better by itself"
        return f"its back-off ({failures(last)} failed in a row)" if next_try(last, self.now) > self.now else ""

    @property
    def rolled_back(self) -> frozenset[str]:
        """The engines that run an older revision than that of their entry."""
        return frozenset(name for name, found in self.rollbacks.found.items() if found.revision is not None)

    def _untold(self, engine_name: str) -> str:
        """What a start, and the end that comes before it, waits for where the memory it needs is about to be known."""
        engine = self.desired.engine(engine_name)
        asks = engine if engine is not None and engine.spec.memory.kind == "auto" else None
        facts = self.observed.models.get(asks.spec.model_at) if asks else None
        return "what the hub tells of its model" if facts and facts.pending else ""

    def _tried_already(self, replica: str) -> bool:
        """Whether a person asked, and this was done already; to go back to what worked is not a second try."""
        last, engine = self.standing.history.get(replica), self.desired.engine(replica.rpartition("/")[0])
        back = engine is not None and engine.name in self.rolled_back
        if back and last is not None and engine is not None and self.standing.changes(engine, last):
            return False
        return self.tried is not None and replica in self.tried

    def _restart_s(self, request: Request, placement: Placement, last: Launch | None) -> float | None:
        """How long a start takes, as far as is known: as the last one like it, else as that of what it replaces."""
        measured = known_of(request.engine, placement.gpus[0], self.observed).measured if placement.gpus else None
        if measured is not None and measured.startup_s is not None:
            return measured.startup_s
        return last.ready_at - last.created_at if last is not None and last.ready_at is not None else None

    def _stay_unplaced(self) -> list[Unplaced]:
        """Those that run on since their new revision has no place, or none before others have been replaced."""
        turning = {name.rpartition("/")[0] for name in self.standing.drifted}
        early = {name: why.reason for name, why in self.refused.items() if name.rpartition("/")[0] in turning}
        self.queued |= early
        left = [(name, why) for name, why in self.refused.items() if name not in early]
        return [Unplaced(name, why.reason, runs_on=True, ways=why.ways) for name, why in left]


def refused(result: Placement | Refusal | tuple[Placement, Lease]) -> bool:
    """Whether it is why something has no place, or no ports."""
    return isinstance(result, Refusal)
