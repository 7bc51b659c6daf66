"""Packing, without a word about engines: which items go onto which slots, exactly where the budget allows it.

Items are admitted in the order in which they are given: an item gets in if and only if it and all that got in
before it can be placed together. Three greedy orders come first, then an exact depth-first search where they
leave something out; a last search looks for an arrangement of what got in that costs less.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, compress

from sage_reconcile.core.slots import Box, Cost, Item, Place, Slot, Undo, choices

BUDGET = 18_000
"""Looks at a slot that one plan may spend on searching, over all its checks.

A set of slots that a search tries costs one look for each slot of the box; a greedy pass, whose looks are lighter,
one for every two. So the same input ends at the same place on any machine. Calibrated on 100 full and 100 crowded boxes
each of 8 and 16 GPUs: the dearest plan took 60 ms of one core of a busy 2-core machine, and the 99th of 100 58 ms
(``tests/benchmarks/placement.py`` measures it).
"""
_TIDY = 2_000
"""Looks for making a plan cheaper once it is known who gets in: some 250 arrangements on 8 GPUs."""
_GREEDY_LOOKS = 2
"""Looks of a greedy pass that take the time of one of the search."""
_BOUND_LOOKS = 24
"""What working out the bounds of a check takes for each item, in looks of a greedy pass."""
_MOST_NEEDS = 24
"""Of so many different needs at the most it is counted whether there is room for all that are as large."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Who is where, by position among the items; for who got in nowhere whether that is proven."""

    places: Mapping[int, Place]
    refused: Mapping[int, bool]


@dataclass(slots=True)
class _Budget:
    left: int


def _plus(one: Cost, other: Cost) -> Cost:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def pack(items: Sequence[Item], slots: Sequence[Slot], budget: int = BUDGET) -> Packed:
    """A place for every item that gets in; the same input gives the same answer, always."""
    box = Box(slots)
    everything = list(range(len(items)))
    placed = _greedy(items, everything, box)
    if placed is not None:
        return Packed(_tidied(items, placed, box), {})
    admission = _Admission(items, box, _Budget(budget))
    for position in everything:
        admission.admit(position)
    again = _greedy(items, list(admission.placed), box)
    places = _tidied(items, again or admission.placed, box)
    refused = dict(admission.refused)
    full = box.with_places(items, places)
    for position in [position for position, proven in refused.items() if not proven]:
        place = full.best(items[position])
        if place is not None:
            full.put(items[position], place)
            places[position] = place
            del refused[position]
    return Packed(places, refused)


@dataclass(slots=True)
class _Admission:
    """Who got in so far, with a witness: one arrangement of them all."""

    items: Sequence[Item]
    box: Box
    budget: _Budget
    placed: dict[int, Place] = field(default_factory=dict)
    refused: dict[int, bool] = field(default_factory=dict)
    _hopeless: set[Item] = field(default_factory=set)
    _witness: Box | None = None

    def admit(self, position: int) -> None:
        """Lets one more in, or says that it cannot be, and whether that is proven."""
        item = self.items[position]
        if item in self._hopeless or self.box.best(item) is None:
            self.refused[position] = True
            return
        if self._witness is None:
            self._witness = self.box.with_places(self.items, self.placed)
        place = self._witness.best(item)
        if place is not None:
            self._witness.put(item, place)
            self.placed[position] = place
            return
        placed, proven = self._rearranged([*self.placed, position])
        if placed is not None:
            self.placed, self._witness = placed, None
            return
        self.refused[position] = proven
        if proven:
            self._hopeless.add(item)

    def _rearranged(self, positions: list[int]) -> tuple[dict[int, Place] | None, bool]:
        """All of them placed, or None and whether it is proven that they cannot be.

        One check may spend half of what is left, so that those who come later get their part.
        """
        self.budget.left -= len(positions) * (len(self.box.free) + _BOUND_LOOKS) // _GREEDY_LOOKS
        if self.budget.left <= 0:
            return None, False
        bounds = Bounds(self.items, _hardest_first(self.items, positions), self.box)
        if not bounds.allow(self.box, 0):
            return None, True
        share = _Budget(self.budget.left // 2)
        placed = _greedy(self.items, positions, self.box)
        if placed is not None:
            return placed, False
        before = share.left
        placed, complete = _search(bounds, self.box, share, None)
        self.budget.left -= before - share.left
        return placed, complete


def _orders(items: Sequence[Item], positions: Iterable[int]) -> Iterator[list[int]]:
    """Slots × need with the largest first, need with the largest first, as given."""
    given = sorted(positions)
    yield sorted(given, key=lambda p: (not items[p].exclusive, -items[p].count * items[p].least))
    yield sorted(given, key=lambda p: (not items[p].exclusive, -items[p].least, -items[p].count))
    yield given


def _hardest_first(items: Sequence[Item], positions: Iterable[int]) -> list[int]:
    """The order of the exact search: what can go to the fewest arrangements first, equals side by side."""
    numbers: dict[Item, int] = {}
    for position in sorted(positions):
        numbers.setdefault(items[position], len(numbers))
    return sorted(
        sorted(positions),
        key=lambda p: (not items[p].exclusive, -items[p].count * items[p].least, numbers[items[p]]),
    )


def _greedy(items: Sequence[Item], positions: Sequence[int], box: Box) -> dict[int, Place] | None:
    """All of them one by one, each where it costs least: the cheapest of three orders that places them all."""
    best: tuple[Cost, dict[int, Place]] | None = None
    for order in _orders(items, positions):
        trial = box.copy()
        placed: dict[int, Place] = {}
        cost: Cost = (0, 0, 0)
        for position in order:
            place = trial.best(items[position])
            if place is None:
                break
            cost = _plus(cost, trial.cost(place))
            trial.put(items[position], place)
            placed[position] = place
        else:
            if best is None or cost < best[0]:
                best = (cost, placed)
    return best[1] if best else None


def _tidied(items: Sequence[Item], placed: dict[int, Place], box: Box) -> dict[int, Place]:
    """The same items in the cheapest arrangement that a short search finds; as they were where there is none."""
    if not placed:
        return {}
    bounds = Bounds(items, _hardest_first(items, placed), box)
    trial, cost = box.copy(), (0, 0, 0)
    for position in bounds.order:
        cost = _plus(cost, trial.cost(placed[position]))
        trial.put(items[position], placed[position])
    if cost <= _plus((bounds.least_links(box), 0, 0), bounds.least_cost(box, 0)):
        return dict(placed)
    better, _ = _search(bounds, box, _Budget(_TIDY), cost)
    return better or dict(placed)


class _Fill(dict[int, int]):
    """How much of so much room some of the needs can fill at most: the largest of their sums that is not above it."""

    def __init__(self, sums: int) -> None:
        super().__init__()
        self.sums = sums

    def __missing__(self, room: int) -> int:
        fill = (self.sums & ((1 << (room + 1)) - 1)).bit_length() - 1 if room > 0 else 0
        self[room] = fill
        return fill


class Bounds:
    """What must hold for the rest of an order to have a place at all, and what it costs at the least."""

    def __init__(self, items: Sequence[Item], order: Sequence[int], box: Box) -> None:
        self.items = [items[position] for position in order]
        self.order = list(order)
        self.volume = [0] * (len(order) + 1)
        sums = [1] * (len(order) + 1)
        mask = (1 << (max([0, *box.free]) + 1)) - 1
        for depth in range(len(order) - 1, -1, -1):
            item = self.items[depth]
            self.volume[depth] = self.volume[depth + 1] + item.count * item.least
            for need in {0, *(option.need_mib for option in item.options)}:
                sums[depth] |= (sums[depth + 1] << need) & mask
        self._fills = [_Fill(reachable) for reachable in sums]
        self._found_ranks: dict[int, list[tuple[int, int]]] = {}

    def _ranks(self, depth: int) -> list[tuple[int, int]]:
        """For needs in the rest, the largest first: how many ranks need as much or more. Of many needs a few."""
        if depth not in self._found_ranks:
            counts: dict[int, int] = {}
            for item in self.items[depth:]:
                counts[item.least] = counts.get(item.least, 0) + item.count
            needs = sorted(counts, reverse=True)
            row = [
                (need, ranks) for need, ranks in zip(needs, accumulate(counts[n] for n in needs), strict=True) if need
            ]
            self._found_ranks[depth] = row[:: 1 + len(row) // _MOST_NEEDS]
        return self._found_ranks[depth]

    def allow(self, box: Box, depth: int) -> bool:
        """Whether the rest may still have a place: False is proof that it has none."""
        if sum(map(self._fills[depth].__getitem__, box.free)) < self.volume[depth]:
            return False
        left = len(self.items) - depth
        free = sorted(box.free)
        for need, total in self._ranks(depth):
            if total > sum([min(room // need, left) for room in free[bisect_left(free, need) :]]):
                return False
        return True

    def least_links(self, box: Box) -> int:
        """The least that the links of all items can cost."""
        return sum(box.least_link(item) for item in self.items)

    def least_cost(self, box: Box, depth: int) -> Cost:
        """Whole slots and islands that the rest must take at the least, since what is taken already is too small."""
        whole = list(compress(box.free, box.clean))
        inside = sum(map(self._fills[depth].__getitem__, box.free))
        inside -= sum(map(self._fills[depth].__getitem__, whole))
        largest = max(whole, default=0)
        missing = self.volume[depth] - inside
        count = -(-missing // largest) if missing > 0 and largest > 0 else 0
        return 0, int(count > box.open_slots()), count


def _search(bounds: Bounds, box: Box, budget: _Budget, below: Cost | None) -> tuple[dict[int, Place] | None, bool]:
    """Depth first through all arrangements: the first one, or with ``below`` the cheapest that costs less.

    The second value tells whether all were looked at. Slots that look alike are tried once, and so is a state
    that was reached before at no more cost.
    """
    if not bounds.items:
        return ({}, True) if below is None else (None, True)
    box, found, best = box.copy(), None, below
    view = box.view(bounds.items, with_links=below is not None)
    seen: dict[tuple[object, ...], Cost] = {}
    path: list[tuple[Place, Undo]] = []
    costs: list[Cost] = [(0, 0, 0)]
    stack = [choices(box, bounds.items[0], view)]
    width = len(box.free)
    while stack:
        place = next(stack[-1], None)
        budget.left -= width
        if place is None or budget.left < 0:
            stack.pop()
            if path:
                box.undo(path.pop()[1])
                costs.pop()
            if budget.left < 0:
                return found, False
            continue
        depth = len(path) + 1
        cost = (0, 0, 0) if below is None else _plus(costs[-1], box.cost(place))
        undo = box.put(bounds.items[depth - 1], place)
        if depth == len(bounds.items):
            if best is None or cost < best:
                found = dict(zip(bounds.order, [*(step for step, _ in path), place], strict=True))
                best = cost
                if below is None:
                    return found, False
            box.undo(undo)
            continue
        key = (depth, *sorted(view()))
        known = seen.get(key)
        hopeless = (known is not None and known <= cost) or not bounds.allow(box, depth)
        if hopeless or (best is not None and _plus(cost, bounds.least_cost(box, depth)) >= best):
            box.undo(undo)
            continue
        seen[key] = cost
        path.append((place, undo))
        costs.append(cost)
        stack.append(choices(box, bounds.items[depth], view))
    return found, True
