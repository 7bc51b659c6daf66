"""Packing, without a word about engines: which items go onto which slots, exactly where the budget allows it.

Items are admitted in the order in which they are given: an item gets in if and only if it and all that got in
before it can be placed together. Three greedy orders come first. Where they leave something out an exact search says
whether all of them fit (``filling``, or ``search`` for what that cannot tell), and if not, who does, one after
another. Then what got in is arranged so that it costs less (``tidying``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sage_reconcile.core.filling import can_fill, filled
from sage_reconcile.core.search import Bounds, hardest_first, search
from sage_reconcile.core.slots import Box, Budget, Cost, Item, Place, Slot, plus
from sage_reconcile.core.tidying import tidied

BUDGET = 11_000
"""Looks at a slot that one plan may spend on searching, over all its checks.

A set of slots that a search tries costs one look for each slot of the box; a greedy pass, whose looks are lighter,
one for every two. So the same input ends at the same place on any machine. Calibrated on 200 full and 200 crowded
boxes each of 8 and 16 GPUs, on a 2-core machine with twice as much to do as it can: the 99th of 100 plans took 18 ms of
one core for 8 GPUs and 57 ms for 16 (``tests/benchmarks/placement.py`` measures it).
"""
_SHARE = 2
"""One search may spend this part of what is left, so that those who come later get theirs."""
_FIRST = 1_000
"""Looks that may be spent on going item by item before going slot by slot: that ends soon where few decide it."""
_GREEDY_LOOKS = 2
"""Looks of a greedy pass that take the time of one of the search."""
_BOUND_LOOKS = 24
"""What working out the bounds of a check takes for each item, in looks of a greedy pass."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Who is where, by position among the items; for who got in nowhere whether that is proven."""

    places: Mapping[int, Place]
    refused: Mapping[int, bool]


def pack(items: Sequence[Item], slots: Sequence[Slot], budget: int = BUDGET) -> Packed:
    """A place for every item that gets in; the same input gives the same answer, always."""
    box = Box(slots)
    everything = list(range(len(items)))
    placed = _greedy(items, everything, box)
    if placed is not None:
        return Packed(tidied(items, placed, box), {})
    admission = _Admission(items, box, Budget(budget))
    placed = admission.searched(everything, 0)[0]
    if placed is not None:
        return Packed(tidied(items, placed, box), {})
    for position in everything:
        admission.admit(position)
    again = _greedy(items, list(admission.placed), box)
    places = tidied(items, again or admission.placed, box)
    refused = dict(admission.refused)
    full = box.with_places(items, places)
    for position in [position for position, proven in refused.items() if not proven]:
        place = full.best(items[position])
        if place is not None:
            full.put(items[position], place)
            places[position] = place
            del refused[position]
    return Packed(places, refused)


Answer = tuple[dict[int, Place] | None, bool]
"""A place for each; or None, and whether it is proven that there is none."""


@dataclass(slots=True)
class _Admission:
    """Who got in so far, with a witness: one arrangement of them all."""

    items: Sequence[Item]
    box: Box
    budget: Budget
    placed: dict[int, Place] = field(default_factory=dict)
    refused: dict[int, bool] = field(default_factory=dict)
    _failed: list[tuple[Item, bool]] = field(default_factory=list)
    """What did not get in, and whether that is proven: what asks for as much is then refused, or not searched for."""
    _witness: Box | None = None

    def admit(self, position: int) -> None:
        """Lets one more in, or says that it cannot be, and whether that is proven."""
        item = self.items[position]
        easier = [proven for failed, proven in self._failed if item.asks_as_much_as(failed)]
        if any(easier) or self.box.best(item) is None:
            self.refused[position] = True
            return
        if self._witness is None:
            self._witness = self.box.with_places(self.items, self.placed)
        place = self._witness.best(item)
        if place is not None:
            self._witness.put(item, place)
            self.placed[position] = place
            return
        placed, proven = self._rearranged([*self.placed, position], thorough=not easier)
        if placed is not None:
            self.placed, self._witness = placed, None
            return
        self.refused[position] = proven
        if proven or not easier:
            self._failed.append((item, proven))

    def _rearranged(self, positions: list[int], *, thorough: bool) -> Answer:
        """All of them placed, or None and whether it is proven that they cannot be."""
        self.budget.left -= len(positions) * len(self.box.free) // _GREEDY_LOOKS
        placed = _greedy(self.items, positions, self.box) if self.budget.left > 0 else None
        return (placed, False) if placed is not None else self.searched(positions, _FIRST, thorough=thorough)

    def searched(self, positions: list[int], first: int, *, thorough: bool = True) -> Answer:
        """The same where no greedy order places them; ``first`` may be spent on going item by item."""
        self.budget.left -= len(positions) * _BOUND_LOOKS // _GREEDY_LOOKS
        if self.budget.left <= 0:
            return None, False
        bounds = Bounds(self.items, hardest_first(self.items, positions), self.box)
        if not bounds.allow(self.box, 0):
            return None, True
        if not thorough:
            return None, False
        if not can_fill(self.items, positions, self.box):
            return self._spent(self.budget.left, lambda share: search(bounds, self.box, share, None))
        placed, proven = self._spent(first, lambda share: search(bounds, self.box, share, None))
        if placed is not None or proven:
            return placed, proven
        return self._spent(self.budget.left, lambda share: filled(self.items, positions, self.box, share))

    def _spent(self, most: int, look: Callable[[Budget], Answer]) -> Answer:
        """What a search finds that may spend so much, and no more than its share of what is left."""
        share = Budget(min(most, self.budget.left // _SHARE))
        self.budget.left -= share.left
        found = look(share)
        self.budget.left += share.left
        return found


def _orders(items: Sequence[Item], positions: Iterable[int]) -> Iterator[list[int]]:
    """Slots × need with the largest first, need with the largest first, as given."""
    given = sorted(positions)
    yield sorted(given, key=lambda p: (not items[p].exclusive, -items[p].count * items[p].least))
    yield sorted(given, key=lambda p: (not items[p].exclusive, -items[p].least, -items[p].count))
    yield given


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
            cost = plus(cost, trial.cost(place))
            trial.put(items[position], place)
            placed[position] = place
        else:
            if best is None or cost < best[0]:
                best = (cost, placed)
    return best[1] if best else None
