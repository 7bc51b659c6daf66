"""Filling slot after slot: an arrangement of all items, or the proof that there is none.

One slot is filled for good before the next is begun (bin completion, after Martello and Toth, and Korf). Where little
may stay free that is far quicker than placing item by item: of all the ways to fill a slot few waste so little, and
of those only the ones count that no other beats. The slot taken next is one that gets a rank of the largest item
left, on every kind of slot that could take it. Ranks of one item are on different slots, since a slot takes at most
one rank for each copy of the item.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd

from sage_reconcile.core.fills import LOOKS, Fill, Kind, Opening, ways
from sage_reconcile.core.slots import Box, Budget, Item, Place

WIDTHS = (3, 0)
"""How many ways to fill a slot are tried: few at first, since a search that goes wrong does so early; then all (0)."""
_PREPARED = 16
"""Of so many slots the needs of one kind are worked out in the time of one look."""
_State = tuple[tuple[int, ...], tuple[int, ...]]
"""The slots that are not filled yet, and how many ranks of each kind are left."""
_Class = tuple[int, int]
"""What makes slots exchangeable: the number of their look (what each kind needs there), and how much is free."""


def can_fill(items: Sequence[Item], positions: Sequence[int], box: Box) -> bool:
    """Whether it is told slot by slot where each of these may be: of ranks that must keep together it is not.

    Nor are slots filled that take one item each, however small.
    """
    return not any(slot.single for slot in box.slots) and all(
        items[at].count == 1 or len(items[at].options) == 1 for at in positions
    )


def filled(
    items: Sequence[Item], positions: Sequence[int], box: Box, budget: Budget, widths: Sequence[int] = WIDTHS
) -> tuple[dict[int, Place] | None, bool]:
    """A place for each, all of them such that ``can_fill``; or None, and whether it is proven that there is none.

    ``widths`` tells how many ways to fill a slot are tried in one pass after another.
    """
    budget.left -= len({items[at] for at in positions}) * len(box.free) // _PREPARED
    return (None, False) if budget.left < 0 else _Filling(items, positions, box).search(budget, widths)


class _Filling:
    """All of some items to be put into a box. Sizes inside are in the largest unit that divides all needs."""

    def __init__(self, items: Sequence[Item], positions: Sequence[int], box: Box) -> None:
        self.groups = [entry.groups for entry in box.slots]
        alike: dict[Item, list[int]] = {}
        for at in sorted(positions):
            alike.setdefault(items[at], []).append(at)
        order = sorted(alike, key=lambda item: (-item.least, alike[item]))
        self.unit = gcd(*(option.need_mib for item in order for option in item.options)) or 1
        self.free = [free // self.unit for free in box.free]
        table = [_needs(item, box, self.unit) for item in order]
        self.kinds = [_kind(item, alike[item], needs, self.unit) for item, needs in zip(order, table, strict=True)]
        looks: dict[tuple[int, ...], int] = {}
        self.look = [looks.setdefault(look, len(looks)) for look in zip(*table, strict=True)] if table else []
        self.needs = list(looks)
        self.mask = (1 << (max([0, *self.free]) + 1)) - 1
        self.slots = tuple(
            sorted(
                (slot for slot, free in enumerate(self.free) if free >= 0),
                key=lambda slot: (self.free[slot], self.look[slot], slot),
            )
        )
        self._sums: dict[tuple[int, tuple[int, ...]], int] = {}

    def search(self, budget: Budget, widths: Sequence[int]) -> tuple[dict[int, Place] | None, bool]:
        """One pass after another, until one finds an arrangement or has left nothing out."""
        state = self.slots, tuple(len(kind.positions) * kind.item.count for kind in self.kinds)
        for width in widths:
            fills, complete = self._pass(state, budget, width)
            if fills is not None:
                return self._places(fills), False
            if complete or budget.left < 0:
                return None, complete
        return None, False

    def _pass(self, state: _State, budget: Budget, width: int) -> tuple[list[tuple[int, Fill]] | None, bool]:
        """One search with so many ways for each slot (0: all): the fills, or None and whether all were looked at."""
        seen = {state}
        path: list[tuple[int, Fill]] = []
        states, stack, tried = [state], [self._fills(state, budget)], [0]
        complete = True
        while stack:
            cut = tried[-1] == width > 0
            complete = complete and not cut
            found = None if cut else next(stack[-1], None)
            if budget.left < 0:
                return None, False
            if found is None:
                stack.pop(), states.pop(), tried.pop()
                del path[-1:]
                continue
            tried[-1] += 1
            left = list(states[-1][1])
            for number, ranks in found[1]:
                left[number] -= ranks
            if not any(left):
                return [*path, found], False
            state = tuple(slot for slot in states[-1][0] if slot != found[0]), tuple(left)
            if state not in seen:
                seen.add(state)
                path.append(found)
                states.append(state)
                stack.append(self._fills(state, budget))
                tried.append(0)
        return None, complete

    def _fills(self, state: _State, budget: Budget) -> Iterator[tuple[int, Fill]]:
        """Every way to fill a slot with the largest of what is left, the fullest first; of each class one in turn."""
        asked = [ways(opening, self.kinds, budget) for opening in self._openings(*state, budget)]
        while asked:
            for way in list(asked):
                found = next(way, None)
                if found is None:
                    asked.remove(way)
                else:
                    yield found

    def _openings(self, slots: tuple[int, ...], ranks: tuple[int, ...], budget: Budget) -> Iterator[Opening]:
        """One slot of each class that can take the largest; none if it is certain that the rest does not fit."""
        kinds = self.kinds
        left = [number for number, count in enumerate(ranks) if count]
        volume = sum([kinds[number].least * ranks[number] for number in left])
        budget.left -= LOOKS * (len(left) + len(slots))
        if sum([self.free[slot] for slot in slots]) < volume:
            return
        classes: dict[_Class, list[int]] = {}
        for slot in slots:
            classes.setdefault((self.look[slot], self.free[slot]), []).append(slot)
        fits = [
            sum([len(found) for (look, free), found in classes.items() if 0 <= self.needs[look][number] <= free])
            for number in left
        ]
        caps = [kinds[number].most(ranks[number]) for number in left]
        if any(ranks[number] > cap * count for number, cap, count in zip(left, caps, fits, strict=True)):
            return
        sums: dict[int, list[int]] = {}
        wasted: dict[_Class, int] = {}
        spare = -volume
        for (look, free), found in classes.items():
            if look not in sums:
                sums[look] = self._reached(look, left, caps, ranks)
                budget.left -= LOOKS * len(left)
            filled = (sums[look][0] & ((1 << (free + 1)) - 1)).bit_length() - 1
            wasted[look, free] = free - filled
            spare += filled * len(found)
        if spare < 0:
            return
        for (look, free), found in classes.items():
            needs = [self.needs[look][number] for number in left]
            if not 0 <= needs[0] <= free:
                continue
            here = [0 <= need <= free for need in needs]
            most = [cap if fit else 0 for cap, fit in zip(caps, here, strict=True)]
            least = [
                max(0, ranks[number] - (count - fit) * cap)
                for number, cap, count, fit in zip(left, caps, fits, here, strict=True)
            ]
            least[0] = max(least[0], 1)
            budget.left -= LOOKS * len(left)
            if all(low <= high for low, high in zip(least, most, strict=True)):
                yield Opening(found[0], free, spare + wasted[look, free], left, needs, most, least, sums[look])

    def _reached(self, look: int, left: list[int], caps: list[int], ranks: tuple[int, ...]) -> list[int]:
        """The sums that what is left can come to on such a slot: of all kinds, of all but the first, and so on."""
        needs, bits = self.needs[look], 1
        found = [bits]
        for number, cap in zip(reversed(left), reversed(caps), strict=True):
            key = (look, ranks[number:])
            known = self._sums.get(key)
            if known is None:
                need = needs[number]
                if need > 0:
                    for _ in range(cap):
                        bits |= (bits << need) & self.mask
                self._sums[key] = bits
            else:
                bits = known
            found.append(bits)
        found.reverse()
        return found

    def _places(self, fills: Sequence[tuple[int, Fill]]) -> dict[int, Place]:
        """Which copy of an item is where: those that have no choice first, the others side by side."""
        on: dict[int, dict[int, int]] = {}
        for slot, fill in fills:
            for number, count in fill:
                on.setdefault(number, {})[slot] = count
        places = {}
        for number, counts in on.items():
            kind = self.kinds[number]
            for copies, position in zip(range(len(kind.positions), 0, -1), kind.positions, strict=True):
                ordered = sorted(counts, key=lambda slot: (counts[slot] < copies, self.groups[slot][::-1], slot))
                chosen = tuple(sorted(ordered[: kind.item.count]))
                for slot in chosen:
                    counts[slot] -= 1
                    if not counts[slot]:
                        del counts[slot]
                places[position] = Place(self.needs[self.look[chosen[0]]][number] * self.unit, chosen)
        return places


def _needs(item: Item, box: Box, unit: int) -> list[int]:
    """What a rank takes of each slot; below zero where it may not be."""
    needs = [-1] * len(box.free)
    for option in sorted(item.options, key=lambda option: -option.need_mib):
        for slot in box.usable(item, option):
            needs[slot] = option.need_mib // unit
    return needs


def _kind(item: Item, positions: Sequence[int], needs: Sequence[int], unit: int) -> Kind:
    allowed = sum(1 << slot for slot, need in enumerate(needs) if need >= 0)
    movable = not item.spread and not item.exclusive
    alone = movable and item.count == 1 and len(item.options) == 1 and item.least > 0
    return Kind(item, tuple(positions), item.least // unit, allowed, movable, alone)
