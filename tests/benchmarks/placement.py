"""How full boxes get and how long a plan takes, beside simpler ways of placing on the same boxes.

Two kinds of boxes. A *full* one is cut into engines that fill it to the last MiB, so that the best packing is known;
its engines stand in the file in random order. A *crowded* one gets 20 % more engines than it has memory, some GPUs
being in use by others. Each way of placing takes the engines in file order and never moves one that it has placed;
ours arranges them together. With the extra ``bench`` installed (``pip install -e '.[bench]'``) the CP-SAT solver of
``ortools`` checks every refusal on part of the boxes: the reference is what admission one after another comes to with
that solver and a second for each.
"""

from __future__ import annotations

import importlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sage_reconcile.core.check import check_plan
from sage_reconcile.core.observed import Gpu, Observed
from sage_reconcile.core.packing import Packed, pack
from sage_reconcile.core.planner import make_plan
from sage_reconcile.core.slots import Box, Item, Option, Place, Slot
from tests.benchmarks.figures import Figure, median, p99, show
from tests.reading import desired

GPU_MIB = 80 * 1024
SOLVER_S = 1.0
Chooser = Callable[[Box, Item], Place | None]


@dataclass(frozen=True)
class Instance:
    items: list[Item]
    slots: list[Slot]

    @property
    def room_mib(self) -> int:
        return sum(slot.free_mib for slot in self.slots)

    def share(self, admitted: Sequence[int]) -> float:
        """Per cent of the free memory that these engines take."""
        return 100 * sum(self.items[at].count * self.items[at].least for at in admitted) / self.room_mib


def engine(count: int, need_mib: int, slots: int) -> Item:
    return Item(count, (Option(need_mib, tuple(range(slots))),))


def full(seed: int, gpus: int) -> Instance:
    """A box that is cut into engines: ranks of several GPUs first, then what is left of each GPU."""
    rng = random.Random(seed)
    left = [GPU_MIB] * gpus
    items = []
    for _ in range(rng.randint(gpus // 8, gpus // 2)):
        count = rng.choice([2, 2, 4])
        chosen = rng.sample(range(gpus), count)
        most = min(left[slot] for slot in chosen)
        if most > 12 * 1024:
            need = rng.randint(8 * 1024, most)
            items.append(engine(count, need, gpus))
            for slot in chosen:
                left[slot] -= need
    for room in left:
        rest = room
        while rest:
            need = rest if rest < 16 * 1024 else rng.randint(8 * 1024, rest - 8 * 1024 if rest < 70 * 1024 else rest)
            items.append(engine(1, need, gpus))
            rest -= need
    rng.shuffle(items)
    return Instance(items, [Slot(GPU_MIB)] * gpus)


def crowded(seed: int, gpus: int) -> Instance:
    """Engines of one to eight GPUs, some of them in several replicas, until they ask for 120 % of what is free."""
    rng = random.Random(seed)
    slots = [Slot(GPU_MIB if rng.random() < 0.8 else rng.randrange(20, 70) * 1024) for _ in range(gpus)]
    items: list[Item] = []
    room = 1.2 * sum(slot.free_mib for slot in slots)
    while room > 0:
        count = rng.choices([1, 2, 4, 8], [60, 25, 12, 3 if gpus > 8 else 1])[0]
        gib = rng.choice([rng.randrange(4, 30), rng.randrange(10, 79), rng.randrange(30, 79)])
        replicas = rng.choice([1, 1, 1, 2, 3])
        items += [engine(count, gib * 1024 + rng.randrange(1024), gpus)] * replicas
        room -= items[-1].count * items[-1].least * replicas
    return Instance(items, slots)


def fitting(box: Box, item: Item) -> list[int]:
    found = box.usable(item, item.options[0])
    return found if len(found) >= item.count else []


def best_fit(box: Box, item: Item) -> Place | None:
    """The GPUs on which it leaves least."""
    chosen = sorted(fitting(box, item), key=lambda slot: (box.free[slot], slot))[: item.count]
    return Place(item.least, tuple(chosen)) if chosen else None


def worst_fit(box: Box, item: Item) -> Place | None:
    """The GPUs that have most free."""
    chosen = sorted(fitting(box, item), key=lambda slot: (-box.free[slot], slot))[: item.count]
    return Place(item.least, tuple(chosen)) if chosen else None


def gpustack_like(box: Box, item: Item) -> Place | None:
    """As GPUStack chooses: for one GPU the fullest that holds it, for several those that have most free."""
    return best_fit(box, item) if item.count == 1 else worst_fit(box, item)


def one_by_one(instance: Instance, choose: Chooser) -> list[int]:
    box, admitted = Box(instance.slots), []
    for at, item in enumerate(instance.items):
        place = choose(box, item)
        if place is not None:
            box.put(item, place)
            admitted.append(at)
    return admitted


class Reference:
    """Admission one after another with CP-SAT as the judge; what our search placed needs no judge."""

    def __init__(self) -> None:
        self.cp: Any = importlib.import_module("ortools.sat.python.cp_model")
        self.unknown = 0

    def admitted(self, instance: Instance, packed: Packed) -> list[int]:
        found: list[int] = []
        same = True
        hopeless: set[Item] = set()
        for at, item in enumerate(instance.items):
            ours = at in packed.places
            if item in hopeless:
                continue
            if same and ours:
                found.append(at)
            elif self._fit(instance, [*found, at]):
                found.append(at)
                same = False
            else:
                hopeless.add(item)
        return found

    def _fit(self, instance: Instance, positions: list[int]) -> bool:
        model, slots = self.cp.CpModel(), range(len(instance.slots))
        on = {(at, slot): model.new_bool_var("") for at in positions for slot in slots}
        for at in positions:
            model.add(sum(on[at, slot] for slot in slots) == instance.items[at].count)
        for slot, entry in enumerate(instance.slots):
            model.add(sum(on[at, slot] * instance.items[at].least for at in positions) <= entry.free_mib)
        solver = self.cp.CpSolver()
        solver.parameters.max_time_in_seconds = SOLVER_S
        solver.parameters.num_workers = 1
        status = solver.solve(model)
        self.unknown += status == self.cp.UNKNOWN
        return status in (self.cp.FEASIBLE, self.cp.OPTIMAL)


@dataclass
class Sums:
    """What was measured on boxes of one kind."""

    ours: list[float] = field(default_factory=list)
    others: dict[str, list[float]] = field(default_factory=dict)
    times_ms: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    unproven: int = 0


def measured(make: Callable[[int, int], Instance], gpus: int, boxes: int, reference: Reference | None) -> Sums:
    sums = Sums()
    for seed in range(boxes):
        instance = make(1000 * gpus + seed, gpus)
        begun = time.process_time()
        packed = pack(instance.items, instance.slots)
        sums.times_ms.append(1000 * (time.process_time() - begun))
        share = instance.share(list(packed.places))
        sums.ours.append(share)
        sums.unproven += not all(packed.refused.values())
        for name, choose in (("best fit", best_fit), ("worst fit", worst_fit), ("GPUStack-like", gpustack_like)):
            sums.others.setdefault(name, []).append(instance.share(one_by_one(instance, choose)))
        if make is full:
            sums.gaps.append(100 - share)
        elif reference is not None:
            sums.gaps.append(instance.share(reference.admitted(instance, packed)) - share)
    return sums


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def solver() -> Reference | None:
    try:
        return Reference()
    except ModuleNotFoundError:
        return None


def box_figures(boxes: int, checked: int) -> list[Figure]:
    figures = []
    for gpus in (8, 16):
        reference = solver()
        for name, make in (("full", full), ("crowded", crowded)):
            sums = measured(make, gpus, boxes, None)
            gaps = sums.gaps or measured(make, gpus, checked, reference).gaps
            beside = ", ".join(f"{other} {mean(shares):.2f}" for other, shares in sums.others.items())
            what = f"{name} box, {gpus} GPUs"
            figures.append(Figure(f"{what}: packed", mean(sums.ours), "%", beside=beside))
            if gaps:
                unknown = f"CP-SAT not done {reference.unknown}" if reference and make is crowded else "known: 100 %"
                figures.append(Figure(f"{what}: gap to the best known", max(mean(gaps), 1e-9), "%", 0.6, unknown))
            target = (5.0, 60.0) if gpus == 8 else (None, 60.0)
            unproven = f"budget ended on {sums.unproven} of {boxes}"
            figures.append(Figure(f"{what}: plan, median", median(sums.times_ms), "ms", target[0]))
            figures.append(Figure(f"{what}: plan, p99", p99(sums.times_ms), "ms", target[1], unproven))
    return figures


def thousand(count: int) -> list[Figure]:
    """As many engines as GPUs; then more than there is room for."""
    figures = []
    for name, gpus, sizes in (("all fit", count, (20, 70)), ("crowded", 7 * count // 10, (30, 79))):
        rng = random.Random(count)
        lines = ["version: 1", f"host: {{ports: 8000-{8000 + 2 * count}}}", "engines:"]
        for number in range(count):
            mib = rng.randint(*sizes) * 1024 + rng.randrange(1024)
            lines.append(f"  engine-{number}: {{model: m, memory: {mib}MiB}}")
        wanted = desired("\n".join(lines))
        box = Observed(tuple(Gpu(f"GPU-{at}", at, "H100", f"{at:08x}", GPU_MIB) for at in range(gpus)))
        begun = time.process_time()
        plan = make_plan(wanted, box, 0.0)
        took = time.process_time() - begun
        wrong = check_plan(wanted, box, plan)
        assert not wrong, wrong[:3]
        told = f"{len(plan.actions)} placed, {len(plan.unplaced)} refused"
        figures.append(Figure(f"{count} replicas on {gpus} GPUs, {name}", max(took, 1e-9), "s", 2.0, told))
    return figures


def measure(boxes: int = 200, checked: int = 8, count: int = 1000) -> list[Figure]:
    """``checked`` of the crowded boxes are also given to the solver. Times are those of one core."""
    return [*box_figures(boxes, checked), *thousand(count)]


if __name__ == "__main__":
    show(measure)
