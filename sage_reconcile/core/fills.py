"""The ways to fill one slot, without those that another way beats."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from sage_reconcile.core.slots import Budget, Item

LOOKS = 2
"""What looking at one kind or slot takes, in looks of the budget."""

_LARGEST_SWAP = 3
"""So many items at the most are looked at together for one that could take their room."""

Fill = tuple[tuple[int, int], ...]
"""What a slot is given: the numbers of kinds, and how many ranks of each."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Items that are alike: what a rank needs at the least, and the slots that it may be on, as bits."""

    item: Item
    positions: tuple[int, ...]
    least: int
    allowed: int
    movable: bool
    """Nothing but room keeps a rank off a slot that it may be on."""
    alone: bool
    """It is movable, needs the same everywhere, and has no other ranks: it can change places with what is larger."""

    def most(self, ranks: int) -> int:
        """How many of so many ranks one slot can take."""
        return min(len(self.positions) if self.movable else 1, ranks)


@dataclass(frozen=True, slots=True)
class Opening:
    """A slot to be filled, and what of each kind (by its place in ``left``) it can take and must take."""

    slot: int
    free: int
    waste: int
    left: list[int]
    needs: list[int]
    most: list[int]
    least: list[int]
    sums: list[int]


def ways(slot: Opening, kinds: Sequence[Kind], budget: Budget) -> Iterator[tuple[int, Fill]]:
    """Every way to fill this slot that no other beats, the fullest first."""
    for at, number in enumerate(slot.left):
        if kinds[number].item.exclusive and slot.most[at]:
            if not any(least for other, least in enumerate(slot.least) if other != at):
                yield slot.slot, ((number, 1),)
            if slot.least[at]:
                return
            slot.most[at] = 0
    spots = [at for at, most in enumerate(slot.most) if most]
    after = [*(slot.sums[at] for at in spots[1:]), 1]
    low = max(0, slot.free - slot.waste)
    reached = 0
    for count in range(slot.least[0], slot.most[0] + 1):
        reached |= after[0] << (count * slot.needs[0])
    reached = (reached & ((1 << (slot.free + 1)) - 1)) >> low
    while reached:
        top = reached.bit_length() - 1
        reached ^= 1 << top
        budget.left -= LOOKS
        for fill in _exact(slot, spots, after, low + top):
            budget.left -= 2 * LOOKS
            if not _clashes(fill, kinds) and not _beaten(slot, fill, kinds, slot.free - low - top):
                yield slot.slot, fill


def _exact(slot: Opening, spots: Sequence[int], after: Sequence[int], total: int) -> Iterator[Fill]:
    """Every fill of exactly this size, those with the largest ranks first.

    ``spots`` are the kinds that it can have, ``after`` the sums that those behind each can come to.
    """
    stack: list[tuple[int, int, Fill]] = [(0, total, ())]
    while stack:
        step, rest, fill = stack.pop()
        while step < len(spots):
            at = spots[step]
            need, reached = slot.needs[at], after[step]
            step += 1
            counts = [
                count
                for count in range(slot.least[at], slot.most[at] + 1)
                if count * need <= rest and reached >> (rest - count * need) & 1
            ]
            if not counts:
                break
            *fewer, count = counts
            stack += [(step, rest - some * need, _with(fill, slot.left[at], some)) for some in fewer]
            rest, fill = rest - count * need, _with(fill, slot.left[at], count)
        else:
            if not rest:
                yield fill


def _with(fill: Fill, number: int, count: int) -> Fill:
    return (*fill, (number, count)) if count else fill


def _clashes(fill: Fill, kinds: Sequence[Kind]) -> bool:
    """Whether two kinds in it keep off each other's slots."""
    marks = 0
    for number, _ in fill:
        spread = kinds[number].item.spread
        if marks & spread:
            return True
        marks |= spread
    return False


def _beaten(slot: Opening, fill: Fill, kinds: Sequence[Kind], rest: int) -> bool:
    """Whether another fill does as well whatever becomes of the other slots.

    It does where one more rank fits beside, and where a rank fits that is larger than one that is there, or as large
    as some that are there together: in any arrangement they can change places.
    """
    here = dict(fill)
    more = sorted(
        (need, number)
        for need, number, most in zip(slot.needs, slot.left, slot.most, strict=True)
        if here.get(number, 0) < most and kinds[number].movable
    )
    if not more:
        return False
    if more[0][0] <= rest:
        return True
    parts = [number for number, count in fill if kinds[number].alone for _ in range(min(count, _LARGEST_SWAP))]
    for size in range(1, min(_LARGEST_SWAP, len(parts)) + 1):
        for some in combinations(parts, size):
            total = sum([kinds[number].least for number in some])
            for need, number in more[bisect_left(more, (total + (size == 1), -1)) :]:
                if need > total + rest:
                    break
                allowed = kinds[number].allowed
                if len(kinds[number].item.options) == 1 and not any(allowed & ~kinds[part].allowed for part in some):
                    return True
    return False
