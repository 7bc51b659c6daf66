"""Depth first through all arrangements, item after item: the first that there is, or the cheapest."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate, compress

from sage_reconcile.core.slots import Box, Budget, Cost, Item, Place, Undo, choices, plus

_MOST_NEEDS = 24
"""Of so many different needs at the most it is counted whether there is room for all that are as large."""


def hardest_first(items: Sequence[Item], positions: Iterable[int]) -> list[int]:
    """The order of the exact search: what can go to the fewest arrangements first, equals side by side."""
    numbers: dict[Item, int] = {}
    for position in sorted(positions):
        numbers.setdefault(items[position], len(numbers))
    return sorted(
        sorted(positions),
        key=lambda p: (not items[p].exclusive, -items[p].count * items[p].least, numbers[items[p]]),
    )


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


def search(bounds: Bounds, box: Box, budget: Budget, below: Cost | None) -> tuple[dict[int, Place] | None, bool]:
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
        cost = (0, 0, 0) if below is None else plus(costs[-1], box.cost(place))
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
        if hopeless or (best is not None and plus(cost, bounds.least_cost(box, depth)) >= best):
            box.undo(undo)
            continue
        seen[key] = cost
        path.append((place, undo))
        costs.append(cost)
        stack.append(choices(box, bounds.items[depth], view))
    return found, True
