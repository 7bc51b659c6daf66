"""Filling slot by slot against a reference that tries everything, and on boxes that leave no room at all."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sage_reconcile.core.filling import WIDTHS, can_fill, filled
from sage_reconcile.core.fills import Kind, Opening, ways
from sage_reconcile.core.packing import pack
from sage_reconcile.core.slots import Box, Budget, Item, Option, Place, Slot
from sage_reconcile.core.tidying import tidied
from tests.core.test_packing import boxes, everything, fits, many

PLENTY = 1_000_000


def arranged(
    wanted: list[Item], slots: list[Slot], budget: int = PLENTY, widths: tuple[int, ...] = WIDTHS
) -> tuple[dict[int, Place] | None, bool]:
    """What filling finds; an arrangement that it finds holds everything, by the rules."""
    found, proven = filled(wanted, range(len(wanted)), Box(slots), Budget(budget), widths)
    if found is not None:
        box = Box(slots)
        assert sorted(found) == list(range(len(wanted)))
        for position, place in found.items():
            assert fits(box, wanted[position], place)
            box.put(wanted[position], place)
    return found, proven


def line(*needs: int, count: int = 1, slots: int = 2, spread: int = 0, exclusive: bool = False) -> list[Item]:
    return [Item(count, (Option(need, tuple(range(slots))),), spread, exclusive) for need in needs]


def cut(seed: int, gpus: int, unit: int) -> tuple[list[Item], list[Slot]]:
    """A box cut into items that fill it to the last unit, some of them with ranks on several slots."""
    rng = random.Random(seed)
    left = [80 * unit] * gpus
    wanted = []
    for _ in range(gpus // 3):
        chosen = rng.sample(range(gpus), 2)
        need = rng.randint(8 * unit, 30 * unit)
        if all(left[slot] >= need for slot in chosen):
            wanted += line(need, count=2, slots=gpus)
            for slot in chosen:
                left[slot] -= need
    for room in left:
        while room > 0:
            need = min(room, rng.randint(10 * unit, 50 * unit))
            wanted += line(need, slots=gpus)
            room -= need  # noqa: PLW2901
    rng.shuffle(wanted)
    return wanted, [Slot(80 * unit)] * gpus


@many
@given(boxes(4, 6))
def test_an_arrangement_is_found_if_and_only_if_there_is_one(instance: tuple[list[Item], list[Slot]]) -> None:
    wanted, slots = instance
    if not can_fill(wanted, range(len(wanted)), Box(slots)):
        return
    found, proven = arranged(wanted, slots)
    admitted, _ = everything(wanted, slots)
    assert (found is not None) == (len(admitted) == len(wanted))
    assert proven == (found is None)


@many
@given(st.data())
def test_the_same_of_boxes_that_are_nearly_full(data: st.DataObject) -> None:
    """Where little may stay free is where ways to fill a slot are left out because others beat them."""
    count = data.draw(st.integers(2, 3))
    slots = [
        Slot(data.draw(st.sampled_from([10, 10, 10, 7])), marks=data.draw(st.sampled_from([0, 0, 1])))
        for _ in range(count)
    ]
    room, wanted = sum(slot.free_mib for slot in slots) - data.draw(st.integers(0, 3)), []
    while room > 0 and len(wanted) < 9:
        ranks = data.draw(st.sampled_from([1, 1, 1, 2]))
        need = data.draw(st.integers(1, 7))
        some = data.draw(st.sampled_from([tuple(range(count))] * 3 + [(0, 1)]))
        wanted.append(Item(ranks, (Option(need, some),), data.draw(st.sampled_from([0, 0, 0, 1]))))
        room -= ranks * need
    found, proven = arranged(wanted, slots)
    admitted, _ = everything(wanted, slots)
    assert (found is not None) == (len(admitted) == len(wanted))
    assert proven == (found is None)


@pytest.mark.parametrize("unit", [1, 1024, 1021])
@pytest.mark.parametrize("seed", range(5))
def test_a_box_of_sixteen_is_filled_to_the_last_mib(seed: int, unit: int) -> None:
    wanted, slots = cut(seed, 16, unit)
    assert sum(item.count * item.least for item in wanted) == sum(slot.free_mib for slot in slots)
    found, _ = arranged(wanted, slots)
    assert found is not None


def test_all_of_a_full_box_gets_in_within_the_budget_of_a_plan() -> None:
    for seed in range(5):
        wanted, slots = cut(seed, 12, 1021)
        assert not pack(wanted, slots).refused


def test_copies_share_slots_and_the_ranks_of_one_do_not() -> None:
    found, _ = arranged(line(40, 40, count=2, slots=2), [Slot(80), Slot(80)])
    assert found == {0: Place(40, (0, 1)), 1: Place(40, (0, 1))}
    three = line(40, 40, 40, count=2, slots=3)
    assert arranged(three, [Slot(120), Slot(80), Slot(40)])[0] is not None
    assert arranged(three, [Slot(160), Slot(40), Slot(40)]) == (None, True), "one slot takes one rank of each"


def test_what_keeps_apart_or_alone_is_kept_apart_and_alone() -> None:
    slots = [Slot(80), Slot(80), Slot(80)]
    assert arranged(line(20, 20, 20, slots=3, spread=1), slots)[0] is not None
    assert arranged(line(20, 20, 20, 20, slots=3, spread=1), slots) == (None, True)
    found, _ = arranged([*line(10, slots=3, exclusive=True), *line(50, 50, slots=3)], slots)
    assert found is not None
    assert len({place.slots for place in found.values()}) == 3
    assert arranged([*line(10, 10, slots=3, exclusive=True), *line(50, 50, slots=3)], slots) == (None, True)


def test_a_budget_that_ends_proves_nothing() -> None:
    wanted, slots = cut(1, 16, 1021)
    assert arranged(wanted, slots, budget=0) == (None, False)
    assert arranged(wanted, slots, budget=100) == (None, False)


@pytest.mark.parametrize(
    ("needs", "allowed", "left"),
    [
        ((6, 4, 3, 1), 0b11, [(6, 4)]),  # 4 can take the room of 3 and 1; 6 with 3, or alone, leaves room for more
        ((6, 5, 2), 0b11, [(6, 2)]),
        ((6, 4, 3, 1), 0b01, [(6, 4), (6, 3, 1)]),  # where the 4 is instead the 3 and the 1 may not be
        ((5, 5, 5), 0b11, [(5, 5)] * 2),
    ],
)
def test_only_ways_that_no_other_beats_are_tried(needs: tuple[int, ...], allowed: int, left: list[object]) -> None:
    """Into a slot of 10 that must take the first of these."""
    kinds = [
        Kind(item, (at,), item.least, allowed if item.least in (3, 1) else 0b11, movable=True, alone=True)
        for at, item in enumerate(line(*needs))
    ]
    sums = [0b1]
    for need in reversed(needs):
        sums.insert(0, sums[0] | sums[0] << need)
    numbers = list(range(len(needs)))
    opening = Opening(0, 10, 10, numbers, list(needs), [1] * len(needs), [1] + [0] * (len(needs) - 1), sums)
    found = [tuple(needs[number] for number, _ in fill) for _, fill in ways(opening, kinds, Budget(PLENTY))]
    assert found == left


def test_a_search_that_leaves_ways_out_proves_nothing() -> None:
    """The fullest way for each slot alone does not fill these three; trying all ways does."""
    wanted, slots = line(4, 7, 14, 8, 9, 18, 18, 14, 15, 13, slots=3), [Slot(40)] * 3
    assert arranged(wanted, slots, widths=(1,)) == (None, False)
    assert arranged(wanted, slots, widths=(1, 0))[0] is not None


def test_ranks_come_together_where_they_are_linked() -> None:
    """Two arrangements of the same items on the same slots; what is on slots of equal room changes places."""
    wanted = [*line(40, count=2, slots=4), *line(70, count=2, slots=4)]
    slots = [Slot(80, groups=(slot // 2,)) for slot in range(4)]
    apart = {0: Place(40, (0, 2)), 1: Place(70, (1, 3))}
    assert tidied(wanted, apart, Box(slots)) == {0: Place(40, (2, 3)), 1: Place(70, (0, 1))}


@many
@given(boxes(8, 12))
def test_tidying_keeps_to_the_rules_and_never_costs_more(instance: tuple[list[Item], list[Slot]]) -> None:
    wanted, slots = instance
    box, placed, before = Box(slots), {}, (0, 0, 0)
    for position, item in enumerate(wanted):
        for option in item.options:
            usable = box.usable(item, option)
            if position not in placed and len(usable) >= item.count:
                placed[position] = Place(option.need_mib, tuple(usable[-item.count :]))
        if position in placed:
            before = added(before, box.cost(placed[position]))
            box.put(item, placed[position])
    after, trial = (0, 0, 0), Box(slots)
    for position, place in sorted(tidied(wanted, placed, Box(slots)).items()):
        assert fits(trial, wanted[position], place)
        after = added(after, trial.cost(place))
        trial.put(wanted[position], place)
    assert after <= before


def added(one: tuple[int, int, int], other: tuple[int, int, int]) -> tuple[int, int, int]:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def test_what_asks_for_as_much_as_what_failed() -> None:
    small, large = line(40)[0], line(50)[0]
    assert large.asks_as_much_as(small)
    assert small.asks_as_much_as(small)
    assert not small.asks_as_much_as(large)
    assert line(40, count=2)[0].asks_as_much_as(small)
    assert not small.asks_as_much_as(line(40, count=2)[0])
    assert line(40, spread=1)[0].asks_as_much_as(small)
    assert not small.asks_as_much_as(line(40, spread=1)[0])
    assert line(40, exclusive=True)[0].asks_as_much_as(small)
    assert not small.asks_as_much_as(line(40, exclusive=True)[0])
    assert not line(50, slots=1)[0].asks_as_much_as(small), "told apart at once only where the slots are the same"
