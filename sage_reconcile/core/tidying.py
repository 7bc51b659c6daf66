"""Making an arrangement cheaper once it is known who gets in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from sage_reconcile.core.search import Bounds, hardest_first, search
from sage_reconcile.core.slots import Box, Budget, Cost, Item, Place, plus

_LOOKS = 2_000
"""What the search for a cheaper arrangement may spend: some 250 arrangements on 8 slots."""
_PAIRS = 4_000
"""So many pairs of slots at the most are looked at, to see whether an exchange of what is on them pays."""
_WEIGHED = 20
"""Working out what an exchange comes to takes the time of looking at so many pairs."""


def tidied(items: Sequence[Item], placed: Mapping[int, Place], box: Box) -> dict[int, Place]:
    """The same items in the cheapest arrangement that a short search finds; as they were where there is none."""
    if not placed:
        return {}
    bounds = Bounds(items, hardest_first(items, placed), box)
    least = plus((bounds.least_links(box), 0, 0), bounds.least_cost(box, 0))
    exchanges = _Exchanges(items, dict(placed), box)
    if exchanges.cost() > least:
        exchanges.make(least)
    if exchanges.cost() <= least:
        return exchanges.placed
    better, _ = search(bounds, box, Budget(_LOOKS), exchanges.cost())
    return better or exchanges.placed


class _Exchanges:
    """An arrangement in which two slots exchange all that was put on them, as long as that makes it cheaper.

    So ranks that a search put onto slots that looked alike to it come together where they are linked.
    """

    def __init__(self, items: Sequence[Item], placed: dict[int, Place], box: Box) -> None:
        self.items, self.placed, self.box = items, placed, box
        self.on: list[set[int]] = [set() for _ in box.free]
        for position, place in placed.items():
            for slot in place.slots:
                self.on[slot].add(position)
        self.linked = [position for position in placed if items[position].count > 1]

    def cost(self) -> Cost:
        """What all of it costs."""
        box = self.box
        taken = [slot for slot, positions in enumerate(self.on) if positions]
        links = sum([box.link(self.placed[position].slots) for position in self.linked])
        islands = len({box.island[slot] for slot in taken if box.opens(slot)})
        return links, islands, sum([box.clean[slot] for slot in taken])

    def make(self, least: Cost) -> None:
        """Makes every exchange that pays, until none does, or so little is left to gain, or enough were weighed."""
        alike = [(entry.groups, clean) for entry, clean in zip(self.box.slots, self.box.clean, strict=True)]
        usable = [slot for slot, free in enumerate(self.box.free) if free >= 0]
        if len(set(alike)) < 2:
            return
        cost, left, gained = self.cost(), _PAIRS, True
        while gained:
            gained = False
            for one, other in combinations(usable, 2):
                left -= 1
                if left < 0 or cost <= least:
                    return
                if alike[one] == alike[other] or not (self.on[one] or self.on[other]):
                    continue
                if not (self._may(one, other) and self._may(other, one)):
                    continue
                left -= _WEIGHED
                self._exchange(one, other)
                after = self.cost()
                if after < cost:
                    cost, gained = after, True
                else:
                    self._exchange(one, other)

    def _may(self, one: int, other: int) -> bool:
        """Whether what is on one slot may be on the other in place of what is there."""
        box, needed = self.box, 0
        if box.slots[other].single and len(self.on[one]) > 1:
            return False
        for position in self.on[one]:
            item, place = self.items[position], self.placed[position]
            needed += place.need_mib
            if position in self.on[other]:
                continue
            slots = {other, *place.slots} - {one}
            if (
                needed > box.free[other]
                or box.marks[other] & item.spread
                or (item.exclusive and not box.clean[other])
                or not any(place.need_mib == option.need_mib and slots <= set(option.slots) for option in item.options)
            ):
                return False
        return needed <= box.free[other]

    def _exchange(self, one: int, other: int) -> None:
        to = {one: other, other: one}
        for position in self.on[one] ^ self.on[other]:
            place = self.placed[position]
            self.placed[position] = Place(place.need_mib, tuple(sorted(to.get(slot, slot) for slot in place.slots)))
        self.on[one], self.on[other] = self.on[other], self.on[one]
