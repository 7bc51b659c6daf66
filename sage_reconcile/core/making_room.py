"""Whom to move, or to displace, so that a replica without a place gets one.

Nothing here acts: the planner carries out what the file or the user allowed, and the plan proposes the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, islice

from sage_reconcile.core.host_memory import taken_mib
from sage_reconcile.core.host_needs import asks_host
from sage_reconcile.core.observed import Launch, Observed
from sage_reconcile.core.placement import Placement, Request, books, launch_gpus, needs, place
from sage_reconcile.core.plan import Move, Proposal
from sage_reconcile.core.reasons import Book, pinned
from sage_reconcile.core.spec import Desired

MOST_MOVES = 3
"""Moves that a proposal may ask for: on a loaded box of 8 GPUs one lets in half of what is refused for
fragmentation, three 74 to 87 %."""
_TRIALS = 64
"""Arrangements tried for one refused replica; each is a packing with a small budget of its own."""
_TRIAL_BUDGET = 1500
_SETS = 4000
"""Ways to free enough GPUs that are looked at for one refused replica."""
_CHOICES = 8
"""Ways that work and are compared by their cost."""
_MOST_ENGINES = 4
"""Refused engines of one plan for which moves are looked for."""


@dataclass(frozen=True, slots=True)
class Room:
    """Who leaves so that ``replica`` gets in: moved to these places, or displaced, which is told with ``cause``."""

    replica: str
    moves: Mapping[str, Placement]
    displaced: tuple[str, ...] = ()
    cause: str = ""


class MakingRoom:
    """One plan so far, with those who have a place and those who have none.

    ``kept`` are the running replicas that may be asked to leave at all. ``leaving`` are launches that will be gone.
    """

    def __init__(
        self,
        desired: Desired,
        observed: Observed,
        *,
        leaving: frozenset[str],
        placed: Sequence[Request],
        refused: Sequence[Request],
        kept: Mapping[str, Launch],
        allow_moves: bool,
    ) -> None:
        self.desired, self.observed, self.leaving = desired, observed, leaving
        self.placed, self.kept, self.allow_moves = placed, kept, allow_moves
        firsts: dict[str, Request] = {}
        for request in sorted(refused, key=Request.rank):
            if request.engine.spec.gpu_count or asks_host(request.engine.spec):
                firsts.setdefault(request.engine.name, request)
        self.refused = list(firsts.values())
        self._positions = {engine.name: position for position, engine in enumerate(desired.engines)}
        self._trials = 0

    def allowed(self, but_for: frozenset[str]) -> Room | None:
        """What may be done for the first of the refused for whom something may, those in ``but_for`` left out."""
        for request in self.refused[:_MOST_ENGINES]:
            if request.replica in but_for:
                continue
            free = [launch for launch in self._movable() if self.allow_moves or self._consents(launch)]
            room = (self._moves(request, free) if free else None) or self._displacement(request)
            if room is not None:
                return room
        return None

    def proposals(self) -> tuple[Proposal, ...]:
        """The moves that would let in those who are refused, each as if it were the only one."""
        found = []
        for request in self.refused[:_MOST_ENGINES]:
            room = self._moves(request, self._movable())
            if room is not None:
                found.append(Proposal(request.replica, tuple(self._ordered(room.moves))))
        return tuple(found)

    def _movable(self) -> list[Launch]:
        """Only what has been ready is moved: the rest has not shown yet that it can run at all."""
        return [
            launch
            for launch in self.kept.values()
            if launch.ready_at is not None and launch.gpus and len(launch_gpus(launch, self.observed.gpus)) > 0
        ]

    def _consents(self, launch: Launch) -> bool:
        engine = self.desired.engine(launch.engine_name)
        return engine is not None and engine.spec.movable

    def _request(self, launch: Launch) -> Request:
        engine = self.desired.engine(launch.engine_name)
        assert engine is not None, "what is kept is in the file"
        return Request(engine, launch.index, self._positions[engine.name], returning=True)

    def _moves(self, request: Request, candidates: Sequence[Launch]) -> Room | None:
        """The cheapest of the smallest sets of moves that let it in; None where none of those tried does.

        First as if whatever starts now stood where the plan puts it, then with that free to be arranged anew.
        """
        if not candidates or not request.engine.spec.gpu_count:
            return None
        self._trials = 0
        stay = [other for other in self.placed if other.rank() < request.rank() or not request.returning]
        standing = place(self.desired, self.observed, stay, self.leaving)
        taken = {name: found for name, found in standing.items() if isinstance(found, Placement)}
        for others in (taken, {}) if any(found.gpus for found in taken.values()) else ({},):
            pages = books(self.desired, self.observed, self.leaving)
            box = _Box(pages, self.observed, others, request, candidates)
            for size in range(1, MOST_MOVES + 1):
                rooms = []
                for chosen in box.sets(size):
                    moves = self._trial(request, stay, chosen)
                    if moves is not None:
                        rooms.append(Room(request.replica, moves))
                    if len(rooms) == _CHOICES or self._trials >= _TRIALS:
                        break
                if rooms:
                    return min(rooms, key=lambda room: self._cost(room.moves))
        return None

    def _trial(
        self, request: Request, stay: Sequence[Request], chosen: Sequence[Launch]
    ) -> dict[str, Placement] | None:
        """Where those who move go if all of them, the new one and all who have a place fit together."""
        self._trials += 1
        places = self._fits([*stay, request, *map(self._request, chosen)], chosen)
        if places is None:
            return None
        moves = {launch.replica: places[launch.replica] for launch in chosen}
        stays = any(launch.gpus == tuple(gpu.uuid for gpu in moves[launch.replica].gpus) for launch in chosen)
        return None if stays else moves

    def _fits(self, requests: Sequence[Request], gone: Sequence[Launch]) -> dict[str, Placement] | None:
        leaving = self.leaving | {launch.id for launch in gone}
        found = place(self.desired, self.observed, requests, leaving, budget=_TRIAL_BUDGET)
        places = {name: item for name, item in found.items() if isinstance(item, Placement) and not item.blocked}
        return places if len(places) == len(found) else None

    def _cost(self, moves: Mapping[str, Placement]) -> tuple[float, float, int, tuple[str, ...]]:
        """Seconds without service, then seconds of starting, then memory, then the names."""
        told = self._ordered(moves)
        down = sum(move.restart_s or 0.0 for move in told if not move.start_first)
        return (
            down,
            sum(move.restart_s or 0.0 for move in told),
            sum(move.memory_mib * len(move.to_gpus) for move in told),
            tuple(sorted(moves)),
        )

    def _ordered(self, moves: Mapping[str, Placement]) -> list[Move]:
        told = [as_move(self.kept[name], found, self.observed) for name, found in moves.items()]
        return in_order(told, self.desired)

    def _displacement(self, request: Request) -> Room | None:
        """Who gives way to a higher priority: nobody in vain, the lowest first, and of equals those further down."""
        spec = request.engine.spec
        if spec.preemption != "lower":
            return None
        lower = []
        for launch in self.kept.values():
            engine = self.desired.engine(launch.engine_name)
            has = (launch.gpus and spec.gpu_count) or (taken_mib(launch) and asks_host(spec))
            if engine is not None and has and engine.spec.priority < spec.priority:
                lower.append((engine.spec.priority, -self._positions[engine.name], -launch.index, launch))
        victims = [launch for *_, launch in sorted(lower, key=lambda item: item[:3])]
        before = [other for other in self.placed if other.rank() < request.rank()]
        if not victims or self._fits([*before, request], victims) is None:
            return None
        for launch in reversed(victims):
            fewer = [victim for victim in victims if victim is not launch]
            if self._fits([*before, request], fewer) is not None:
                victims = fewer
        cause = f"gives way to {request.replica} (priority {spec.priority}, `preemption: lower`)"
        return Room(request.replica, {}, tuple(launch.replica for launch in victims), cause)


class _Box:
    """Which sets of replicas, if they left, would leave enough GPUs with enough room: a necessary condition."""

    def __init__(
        self,
        pages: Sequence[Book],
        observed: Observed,
        places: Mapping[str, Placement],
        request: Request,
        candidates: Sequence[Launch],
    ) -> None:
        self.request = request
        self.candidates = {launch.replica: launch for launch in candidates}
        self.count = request.engine.spec.gpu_count
        self._gpus: list[tuple[int, frozenset[str], dict[str, int]]] = []
        there = self.candidates
        for book in pages:
            need = needs(request.engine, book, observed)
            if need is None or book.barred or not pinned(request.engine, book.gpu):
                continue
            must = self._must_leave(book)
            if must - there.keys():
                continue
            new = sum(found.memory_mib for found in places.values() if book.gpu in found.gpus)
            ours = {name: mib for name, mib in book.taken.ours if name in there}
            self._gpus.append((need + new - book.taken.free_mib, must, ours))

    def _must_leave(self, book: Book) -> frozenset[str]:
        """Who has to leave this GPU whatever memory they take; an unknown name where it cannot be had."""
        here = [name for name, _ in book.taken.ours]
        spec = self.request.engine.spec
        if spec.exclusive:
            return frozenset(["others"] if book.has_strangers else here)
        own = [name for name in here if name.rpartition("/")[0] == self.request.engine.name]
        return frozenset(([book.alone] if book.alone else []) + (own if spec.spread == "gpu" else []))

    def sets(self, size: int) -> Iterator[tuple[Launch, ...]]:
        """The sets of so many replicas that would do: first those of which each is in the way, then with others.

        Whoever moves may need a place from which another one has to move.
        """
        names = sorted(self.candidates, key=lambda name: (self.candidates[name].memory_mib, name))
        for cover in self._covers:
            if len(cover) <= size:
                others = [name for name in names if name not in cover]
                for more in combinations(others, size - len(cover)):
                    yield tuple(self.candidates[name] for name in (*sorted(cover), *more))

    @cached_property
    def _covers(self) -> list[frozenset[str]]:
        """Who may leave so that enough GPUs have room, nobody in vain: the most in the way first, of a few thousand."""
        ready = sum(lack <= 0 and not must for lack, must, _ in self._gpus)
        blocked = [list(_least(*gpu)) for gpu in self._gpus if gpu[0] > 0 or gpu[1]]
        found = dict.fromkeys(islice(_joined(blocked, self.count - ready), _SETS))

        def size(cover: frozenset[str]) -> tuple[int, int, list[str]]:
            return -len(cover), sum(self.candidates[name].memory_mib for name in cover), sorted(cover)

        return sorted(found, key=size)


def _least(lack: int, must: frozenset[str], ours: Mapping[str, int]) -> Iterator[frozenset[str]]:
    """Who could leave one GPU so that this much comes free, at the most as many as may move, and none too many."""
    found: list[frozenset[str]] = []
    for size in range(1, MOST_MOVES + 1):
        for chosen in map(frozenset, combinations(sorted(ours), size)):
            if must <= chosen and sum(ours[name] for name in chosen) >= lack and not any(x <= chosen for x in found):
                found.append(chosen)
    yield from found


def _joined(
    blocked: Sequence[Sequence[frozenset[str]]], missing: int, union: frozenset[str] = frozenset()
) -> Iterator[frozenset[str]]:
    """The ways to free so many of these GPUs with no more moves than are allowed."""
    if missing <= 0:
        yield union
        return
    for at, ways in enumerate(blocked[: len(blocked) - missing + 1]):
        for way in ways:
            if len(union | way) <= MOST_MOVES:
                yield from _joined(blocked[at + 1 :], missing - 1, union | way)


def as_move(launch: Launch, found: Placement, observed: Observed) -> Move:
    """The move of a launch to a place, before it is known what can be started first."""
    seen = launch.ready_at - launch.created_at if launch.ready_at is not None else None
    from_gpus = launch_gpus(launch, observed.gpus)
    return Move(launch, from_gpus, found.gpus, found.memory_mib, False, seen, found.host.mib)


def in_order(moves: Sequence[Move], desired: Desired) -> list[Move]:
    """The moves in the order in which they can be made, those that need no downtime first.

    A replica is started at its new place first where it may have another port, none of its GPUs is the same, and it
    keeps nothing in the host's memory. If
    another one that is moved has to leave that place, it is moved before; of those that wait for each other
    the one that starts fastest is stopped first.
    """
    left = {move.launch.replica: move for move in sorted(moves, key=lambda move: move.launch.replica)}
    stopped = {name: move for name, move in left.items() if not _can_start_first(move, desired)}
    for name in stopped:
        del left[name]
    ordered: list[Move] = []
    while left:
        ready = next((move for move in left.values() if not _in_its_way(move, tuple(left.values()))), None)
        if ready is None:
            ready = min(left.values(), key=lambda move: (move.restart_s or 0.0, move.launch.replica))
            stopped[ready.launch.replica] = ready
        else:
            ordered.append(replace(ready, start_first=True))
        del left[ready.launch.replica]
    return [*ordered, *stopped.values()]


def _can_start_first(move: Move, desired: Desired) -> bool:
    engine = desired.engine(move.launch.engine_name)
    new = {gpu.uuid for gpu in move.to_gpus}
    if taken_mib(move.launch) or move.host_memory_mib:
        return False  # for a while both would have theirs of the host's memory
    return engine is not None and engine.spec.port == "auto" and not new & set(move.launch.gpus)


def _in_its_way(move: Move, others: Sequence[Move]) -> bool:
    new = {gpu.uuid for gpu in move.to_gpus}
    return any(other is not move and new & set(other.launch.gpus) for other in others)
