"""The box that packing fills: slots with room, items with needs, and what a place costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

Cost = tuple[int, int, int]
"""What an arrangement costs, what matters most first: how badly the ranks of its items are linked (the levels between
them, added up), islands broken into that nothing was on, slots taken that nothing was on."""
Undo = tuple[tuple[int, int, bool, int], ...]
Look = tuple[int, int, int, int]
View = Callable[[], list[Look]]


@dataclass(slots=True)
class Budget:
    """What a search may still spend, in looks at a slot, so that the same input ends at the same place anywhere."""

    left: int


@dataclass(frozen=True, slots=True)
class Option:
    """One way of placing an item: ``need_mib`` on each of any of these slots, of which it takes its count."""

    need_mib: int
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Item:
    """What needs a place on ``count`` distinct slots, in one of several ways.

    Items with the same bit in ``spread`` keep off each other's slots. One that is ``exclusive`` takes slots that
    nothing is on, and lets nothing else on them.
    """

    count: int
    options: tuple[Option, ...]
    spread: int = 0
    exclusive: bool = False

    @cached_property
    def least(self) -> int:
        """The least that it needs of a slot, in MiB."""
        return min((option.need_mib for option in self.options), default=0)

    @cached_property
    def _hash(self) -> int:
        return hash((self.count, self.options, self.spread, self.exclusive))

    def asks_as_much_as(self, other: Item) -> bool:
        """Whether every place for this would be one for the other: False also where that is not seen at once."""
        return (
            self.count >= other.count
            and self.exclusive >= other.exclusive
            and not other.spread & ~self.spread
            and len(self.options) == len(other.options)
            and all(
                mine.need_mib >= its.need_mib and mine.slots == its.slots
                for mine, its in zip(self.options, other.options, strict=True)
            )
        )

    def __hash__(self) -> int:
        """Worked out once: options name up to a thousand slots."""
        return self._hash


@dataclass(frozen=True, slots=True)
class Slot:
    """A GPU: what can still be promised of it (below zero where nothing may come), and whether nothing is on it.

    ``groups`` tells its group at each level of links, the best first: slots of one group are linked at least so
    well. ``marks`` are the ``spread`` bits of what is there. A ``single`` slot takes one item at the most.
    """

    free_mib: int
    clean: bool = True
    marks: int = 0
    groups: tuple[int, ...] = ()
    single: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """Where an item is: ``need_mib`` on each of these slots, in their order."""

    need_mib: int
    slots: tuple[int, ...]


def plus(one: Cost, other: Cost) -> Cost:
    """What both cost."""
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


class Box:
    """The slots while they are being filled; their positions are the fixed order by which ties are broken."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = slots
        self.free = [slot.free_mib for slot in slots]
        self.clean = [slot.clean for slot in slots]
        self.marks = [slot.marks for slot in slots]
        sizes: dict[int, int] = {}
        for slot in slots:
            if slot.groups:
                sizes[slot.groups[0]] = sizes.get(slot.groups[0], 0) + 1
        self.island = [slot.groups[0] if slot.groups and sizes[slot.groups[0]] > 1 else -1 for slot in slots]
        self.taken = dict.fromkeys(self.island, 0)
        for island, clean in zip(self.island, self.clean, strict=True):
            self.taken[island] += not clean

    def copy(self) -> Box:
        """A box in the same state, to be filled apart from this one."""
        box = Box.__new__(Box)
        box.slots, box.island, box.taken = self.slots, self.island, dict(self.taken)
        box.free, box.clean, box.marks = self.free[:], self.clean[:], self.marks[:]
        return box

    def with_places(self, items: Sequence[Item], places: Mapping[int, Place]) -> Box:
        """A copy that these items were put into."""
        box = self.copy()
        for position, place in places.items():
            box.put(items[position], place)
        return box

    def usable(self, item: Item, option: Option) -> list[int]:
        """The slots of an option that could take a rank of an item now."""
        need, spread, free = option.need_mib, item.spread, self.free
        found = [slot for slot in option.slots if free[slot] >= need]
        if spread:
            found = [slot for slot in found if not self.marks[slot] & spread]
        return [slot for slot in found if self.clean[slot]] if item.exclusive else found

    def put(self, item: Item, place: Place) -> Undo:
        """Puts an item there; the answer takes it back."""
        undo = tuple((slot, self.free[slot], self.clean[slot], self.marks[slot]) for slot in place.slots)
        for slot, free, clean, marks in undo:
            self.free[slot] = -1 if item.exclusive or self.slots[slot].single else free - place.need_mib
            self.clean[slot] = False
            self.marks[slot] = marks | item.spread
            self.taken[self.island[slot]] += clean
        return undo

    def undo(self, undo: Undo) -> None:
        """Takes back what was put last."""
        for slot, free, clean, marks in undo:
            self.free[slot], self.clean[slot], self.marks[slot] = free, clean, marks
            self.taken[self.island[slot]] -= clean

    def opens(self, slot: int) -> bool:
        """Whether this would be the first thing on an island."""
        return self.island[slot] >= 0 and not self.taken[self.island[slot]]

    def open_slots(self) -> int:
        """How many slots nothing is on that are on no island, or on one that something is on."""
        return sum(clean and not self.opens(slot) for slot, clean in enumerate(self.clean))

    def link(self, slots: Sequence[int]) -> int:
        """How far apart they are: 0 where the best links join them all, one more for each level they have to go."""
        groups = [self.slots[slot].groups for slot in slots]
        return next(
            (level for level, same in enumerate(zip(*groups, strict=True)) if len(set(same)) == 1), len(groups[0])
        )

    def cost(self, place: Place) -> Cost:
        """What putting something there costs now."""
        slots = place.slots
        islands = {self.island[slot] for slot in slots if self.opens(slot)}
        return self.link(slots) if len(slots) > 1 else 0, len(islands), sum(self.clean[slot] for slot in slots)

    def least_link(self, item: Item) -> int:
        """The least that the links of an item can cost, were the box empty."""
        if item.count < 2:
            return 0
        return min(
            (self.link(pool) for option in item.options for pool in self._pools(item.count, option.slots)), default=0
        )

    def best(self, item: Item) -> Place | None:
        """The place that costs least and leaves least free beside the item; None where there is none."""
        best: tuple[Cost, int, Place] | None = None
        for option in item.options:
            usable = self.usable(item, option)
            if len(usable) < item.count:
                continue
            for pool in self._pools(item.count, usable) if item.count > 1 else (usable,):
                ranked = self._ranked(pool)
                chosen = [min(ranked)] if item.count == 1 else sorted(ranked)[: item.count]
                place = Place(option.need_mib, tuple(sorted(rank[3] for rank in chosen)))
                left = sum(rank[2] - option.need_mib for rank in chosen)
                cost = self.cost(place)
                if best is None or (cost, left) < best[:2]:
                    best = (cost, left, place)
        return best[2] if best else None

    def _ranked(self, pool: Sequence[int]) -> list[tuple[bool, bool, int, int]]:
        """How gladly each slot is taken: no new island, nothing new touched, the tightest, the first."""
        clean, free = self.clean, self.free
        if len(self.taken) > 1:
            return [(self.opens(slot), clean[slot], free[slot], slot) for slot in pool]
        return [(False, clean[slot], free[slot], slot) for slot in pool]

    def _pools(self, count: int, slots: Sequence[int]) -> Iterator[Sequence[int]]:
        """The groups of the best level at which some hold enough of these slots; all of them where none do."""
        levels = len(self.slots[slots[0]].groups) if slots else 0
        for level in range(levels):
            pools: dict[int, list[int]] = {}
            for slot in slots:
                pools.setdefault(self.slots[slot].groups[level], []).append(slot)
            enough = [pool for pool in pools.values() if len(pool) >= count]
            if enough:
                yield from enough
                return
        if len(slots) >= count:
            yield slots

    def view(self, items: Sequence[Item], *, with_links: bool) -> View:
        """How the slots look to these items: two that look alike can be exchanged for each other."""
        options = list(dict.fromkeys(option.slots for item in items for option in item.options))
        members = [frozenset(option) for option in options]
        looks: dict[object, int] = {}
        static = []
        for slot, entry in enumerate(self.slots):
            member_of = tuple(slot in member for member in members)
            look = (entry.groups if with_links else (), entry.single, member_of)
            static.append(looks.setdefault(look, len(looks)))
        whole = with_links or any(item.exclusive for item in items)
        apart = any(item.spread for item in items)
        nothing = [0] * len(static)
        clean, marks = self.clean if whole else nothing, self.marks if apart else nothing
        return lambda: list(zip(clean, self.free, marks, static, strict=True))


def choices(box: Box, item: Item, view: View) -> Iterator[Place]:
    """Every place that an item could take now, of those that look alike one, the tightest first."""
    for option in item.options:
        looks = view()
        classes: dict[Look, list[int]] = {}
        for slot in box.usable(item, option):
            classes.setdefault(looks[slot], []).append(slot)
        alike = [classes[look] for look in sorted(classes)]
        for chosen in multisets([len(slots) for slots in alike], item.count):
            taken: dict[int, int] = {}
            slots = []
            for number in chosen:
                slots.append(alike[number][taken.get(number, 0)])
                taken[number] = taken.get(number, 0) + 1
            yield Place(option.need_mib, tuple(sorted(slots)))


def multisets(sizes: Sequence[int], count: int) -> Iterator[tuple[int, ...]]:
    """Every way to take ``count`` things out of heaps of alike ones, as the heaps' numbers in rising order."""
    behind = [sum(sizes[number:]) for number in range(len(sizes) + 1)]
    chosen: list[int] = []
    number, used = 0, 0
    while True:
        if len(chosen) == count:
            yield tuple(chosen)
        elif number < len(sizes) and behind[number] - used >= count - len(chosen):
            if used < sizes[number]:
                chosen.append(number)
                used += 1
            else:
                number, used = number + 1, 0
            continue
        if not chosen:
            return
        number = chosen.pop() + 1
        used = 0
