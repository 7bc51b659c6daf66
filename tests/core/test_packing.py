"""Packing against a reference that tries everything, and what holds for boxes that are too large to try everything."""

from __future__ import annotations

import os
from itertools import combinations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from sage_reconcile.core.packing import pack
from sage_reconcile.core.slots import Box, Cost, Item, Option, Place, Slot, multisets

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "60"))
many = settings(max_examples=5 * EXAMPLES, deadline=None, derandomize=EXAMPLES <= 60)
NEEDS = (0, 1, 20, 26, 27, 39, 40, 41, 53, 79, 80)


@st.composite
def items(draw: st.DrawFn, slots: int) -> Item:
    count = draw(st.sampled_from([1, 1, 1, 2, 2, 3, 4]))
    options = []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        some = draw(st.sampled_from([tuple(range(slots))] * 4 + [tuple(range(0, slots, 2)), (slots - 1,)]))
        if len(some) >= count:
            options.append(Option(draw(st.sampled_from(NEEDS)), some))
    return Item(
        count, tuple(options), draw(st.sampled_from([0, 0, 0, 1, 2])), draw(st.sampled_from([False] * 5 + [True]))
    )


@st.composite
def boxes(draw: st.DrawFn, most_slots: int, most_items: int) -> tuple[list[Item], list[Slot]]:
    count = draw(st.integers(1, most_slots))
    island = draw(st.sampled_from([0, 0, 2, 4]))
    slots = []
    for slot in range(count):
        groups = () if not island else (slot // island,)
        clean = draw(st.sampled_from([True, True, False]))
        marks = 0 if clean else draw(st.sampled_from([0, 1, 3]))
        single = draw(st.sampled_from([False, False, False, True]))
        slots.append(Slot(draw(st.sampled_from([80, 80, 80, 53, 40, 24, -1])), clean, marks, groups, single))
    wanted = draw(st.lists(items(count), min_size=1, max_size=most_items))
    return [item for item in wanted for _ in range(draw(st.sampled_from([1, 1, 2])))][:most_items], slots


def fits(box: Box, item: Item, place: Place) -> bool:
    """The rules, written down a second time; that a slot takes one item only shows in what ``filled`` counts."""
    return (
        any(place.need_mib == option.need_mib and set(place.slots) <= set(option.slots) for option in item.options)
        and len(set(place.slots)) == len(place.slots) == item.count
        and all(box.free[slot] >= place.need_mib for slot in place.slots)
        and not any(box.marks[slot] & item.spread for slot in place.slots)
        and (not item.exclusive or all(box.clean[slot] for slot in place.slots))
    )


def everything(wanted: list[Item], slots: list[Slot]) -> tuple[list[int], Cost]:
    """Who gets in, and the least that it can cost: every state that can be reached, one item after another."""
    states: dict[object, tuple[Cost, Box]] = {None: ((0, 0, 0), Box(slots))}
    admitted = []
    for position, item in enumerate(wanted):
        after: dict[object, tuple[Cost, Box]] = {}
        for cost, box in states.values():
            for option in item.options:
                for chosen in combinations(option.slots, item.count):
                    place = Place(option.need_mib, chosen)
                    if not fits(box, item, place):
                        continue
                    added = box.cost(place)
                    sum_of_both = (cost[0] + added[0], cost[1] + added[1], cost[2] + added[2])
                    new = box.copy()
                    new.put(item, place)
                    key = (tuple(new.free), tuple(new.clean), tuple(new.marks))
                    if key not in after or sum_of_both < after[key][0]:
                        after[key] = (sum_of_both, new)
        if after:
            states = after
            admitted.append(position)
    return admitted, min(cost for cost, _ in states.values())


def filled(wanted: list[Item], slots: list[Slot], places: dict[int, Place]) -> Cost:
    """What an arrangement costs; every place in it keeps to the rules."""
    box, cost = Box(slots), (0, 0, 0)
    single = [slot for place in places.values() for slot in place.slots if slots[slot].single]
    assert len(set(single)) == len(single)
    for position, place in places.items():
        assert fits(box, wanted[position], place)
        added = box.cost(place)
        cost = (cost[0] + added[0], cost[1] + added[1], cost[2] + added[2])
        box.put(wanted[position], place)
    return cost


@many
@given(boxes(4, 5))
def test_what_gets_in_and_what_it_costs_is_what_trying_everything_finds(
    instance: tuple[list[Item], list[Slot]],
) -> None:
    wanted, slots = instance
    packed = pack(wanted, slots)
    admitted, least = everything(wanted, slots)
    assert sorted(packed.places) == admitted
    assert all(packed.refused.values()), "so small a box is always proven"
    cost = filled(wanted, slots, dict(packed.places))
    assert cost[2] == least[2], "slots that nothing was on"
    assert cost == least


@many
@given(boxes(16, 24))
def test_any_box_is_filled_by_the_rules_and_the_same_way_each_time(instance: tuple[list[Item], list[Slot]]) -> None:
    wanted, slots = instance
    packed = pack(wanted, slots)
    assert sorted([*packed.places, *packed.refused]) == list(range(len(wanted)))
    filled(wanted, slots, dict(packed.places))
    again = pack(list(wanted), list(slots))
    assert (list(packed.places.items()), packed.refused) == (list(again.places.items()), again.refused)
    hurried = pack(wanted, slots, budget=0)
    assert sorted([*hurried.places, *hurried.refused]) == list(range(len(wanted)))
    filled(wanted, slots, dict(hurried.places))


def line(*needs: int, count: int = 1, slots: int = 2) -> list[Item]:
    return [Item(count, (Option(need, tuple(range(slots))),)) for need in needs]


def test_three_orders_that_fail_are_not_the_end() -> None:
    """Four slots filled to the last MiB, as no greedy order does it."""
    wanted = line(31, 33, 25, 18, 34, 14, 28, 22, 35, 27, 41, 12, slots=4)
    slots = [Slot(80), Slot(80), Slot(80), Slot(80)]
    assert not pack(wanted, slots).refused
    assert list(pack(wanted, slots, budget=0).refused.values()) == [False]


def test_a_budget_ends_at_the_same_place_each_time() -> None:
    wanted = line(*range(21, 40), slots=6)
    slots = [Slot(95) for _ in range(6)]
    found = [pack(wanted, slots, budget=budget) for budget in (0, 100, 1000, 1000)]
    assert all(False in packed.refused.values() for packed in found)
    assert found[2] == found[3]


def test_what_is_too_large_for_every_slot_is_proven_without_a_search() -> None:
    packed = pack([*line(10), *line(90)], [Slot(80), Slot(80)], budget=0)
    assert packed.refused == {1: True}


def test_nobody_who_comes_first_is_left_out_for_one_who_comes_later() -> None:
    packed = pack([*line(50), *line(40, count=2), *line(40)], [Slot(80), Slot(80)])
    assert (sorted(packed.places), packed.refused) == ([0, 2], {1: True})


def test_nothing_to_place_and_nothing_to_place_it_on() -> None:
    assert pack([], []) == pack([], [Slot(80)])
    assert pack(line(1, slots=0), []).refused == {0: True}


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [
        ([2, 1, 2], 2, [(0, 0), (0, 1), (0, 2), (1, 2), (2, 2)]),
        ([1, 1, 1], 3, [(0, 1, 2)]),
        ([1, 1], 3, []),
        ([], 1, []),
        ([3], 3, [(0, 0, 0)]),
    ],
)
def test_heaps_of_alike_things(sizes: list[int], count: int, expected: list[tuple[int, ...]]) -> None:
    assert list(multisets(sizes, count)) == expected
