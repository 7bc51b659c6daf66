"""The openb replay: a real cluster's tasks arrive one by one on 6,212 GPUs, and what cannot be used is measured.

``python -m tests.benchmarks.openb FOLDER [TRACE [SEEDS]]`` takes the data of the FGD paper (USENIX ATC '23) and follows
its protocol: nodes in random order, tasks drawn until they ask for 130 % of the GPUs, no departures, no second try.

Ours scores a node by how much the placement adds to its expected fragmentation (the paper's idea: what a task drawn
from the trace could not use of it), plus a slight pull to the node of which least is left; ties go to the first node,
never a coin. The pull matters: without it near equals are scattered over the cluster, and 5.6 % of ``default`` stay
unallocated. The authors get that pull from rounding the score to a whole number of 0 to 100 and taking the first node;
where the steps of that rounding fall then decides, trace by trace. The pull was chosen with seeds 52 to 54 of
``default`` and ``gpushare40``. Mean of the authors' seeds, 42 to 51, ours and their FGD: ``default`` 4.73 and 4.77 %,
``gpushare40`` 6.02 and 6.04 %, ``multigpu50`` 2.91 and 2.91 %.
"""

from __future__ import annotations

import csv
import math
import random
import sys
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

WHOLE = 1000
"""Thousandths of one GPU."""
OVERLOAD = 1.3
PULL = 0.01
"""GPUs of added waste that outweigh one large node's whole CPU (or memory, or GPUs) being left over."""
POLICIES = ("ours", "best fit", "random")


@dataclass(frozen=True, slots=True)
class Task:
    """What a task asks for; ``milli`` is of each of its GPUs."""

    cpu: int
    memory: int
    gpus: int
    milli: int
    models: frozenset[str]

    @property
    def asked(self) -> int:
        return self.gpus * self.milli


@dataclass(slots=True)
class Node:
    """A machine: what of its CPU, its memory and each GPU is free."""

    model: str
    cpu: int
    memory: int
    free: list[int]


Scorer = Callable[[Node, Task], tuple[float, tuple[int, ...]] | None]
"""The score of a node, the lowest being the best, and the GPUs there; None where the task does not fit."""


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def read_nodes(folder: Path) -> list[Node]:
    return [
        Node(row["model"], int(row["cpu_milli"]), int(row["memory_mib"]), [WHOLE] * int(row["gpu"]))
        for row in rows(folder / "openb_node_list_gpu_node.csv")
    ]


def read_tasks(folder: Path, trace: str) -> list[Task]:
    found = sorted(rows(folder / f"openb_pod_list_{trace}.csv"), key=lambda row: row["name"])
    return [
        Task(
            int(row["cpu_milli"]),
            int(row["memory_mib"]),
            int(row["num_gpu"]),
            int(row["gpu_milli"]) if int(row["num_gpu"]) == 1 else WHOLE,
            frozenset(filter(None, (row.get("gpu_spec") or "").split("|"))),
        )
        for row in found
    ]


def arriving(tasks: Sequence[Task], capacity: int, seed: int) -> list[Task]:
    """All tasks shuffled, then more of them drawn until they ask for 130 % of the capacity."""
    rng = random.Random(seed)
    found = rng.sample(tasks, len(tasks))
    asked = sum(task.asked for task in found)
    while True:
        task = rng.choice(tasks)
        if asked + task.asked > OVERLOAD * capacity:
            return found
        found.append(task)
        asked += task.asked


def chosen_gpus(node: Node, task: Task) -> tuple[int, ...] | None:
    """The tightest GPUs of a node that hold a task; None where it does not fit."""
    if task.cpu > node.cpu or task.memory > node.memory or (task.models and node.model not in task.models):
        return None
    if not task.gpus:
        return ()
    fitting = sorted((free, at) for at, free in enumerate(node.free) if free >= task.milli)
    return tuple(at for _, at in fitting[: task.gpus]) if len(fitting) >= task.gpus else None


class Waste:
    """What the free GPUs of a node are not good for: the mean over the trace's GPU tasks of what each cannot use.

    What a task cannot use: all of a node that lacks its GPUs, its CPU or its model, else the GPUs too full for it.
    Tasks without a GPU are left out: the authors count all free room as wasted for them, on every node alike. Counted
    in whole numbers, so that equals are equal.
    """

    def __init__(self, tasks: Iterable[Task]) -> None:
        shapes = Counter((task.cpu, task.gpus, task.milli, task.models) for task in tasks if task.gpus)
        self.total = sum(shapes.values())
        self.shapes = sorted(((*shape, count) for shape, count in shapes.items()), key=lambda shape: shape[0])
        self._found: dict[tuple[str, tuple[int, ...]], tuple[list[int], list[int]]] = {}

    def of(self, model: str, cpu: int, free: Sequence[int]) -> int:
        """Thousandths of a GPU, times ``total``."""
        key = (model, tuple(sorted(free)))
        if key not in self._found:
            self._found[key] = self._by_cpu(*key)
        wants, waste = self._found[key]
        return waste[bisect_right(wants, cpu)]

    def _by_cpu(self, model: str, free: tuple[int, ...]) -> tuple[list[int], list[int]]:
        """The steps of the free CPU at which one more shape fits, and the waste below the first and from each on."""
        steps, waste = [], [self.total * sum(free)]
        usable: dict[tuple[int, int], int] = {}
        for wants, gpus, milli, models, count in self.shapes:
            if (gpus, milli) not in usable:
                rooms = [room for room in free if room >= milli]
                usable[gpus, milli] = sum(rooms) if len(rooms) >= gpus else 0
            if usable[gpus, milli] and (not models or model in models):
                steps.append(wants)
                waste.append(waste[-1] - count * usable[gpus, milli])
        return steps, waste


def by_waste(waste: Waste) -> Scorer:
    def score(node: Node, task: Task) -> tuple[float, tuple[int, ...]] | None:
        first = chosen_gpus(node, task)
        if first is None:
            return None
        cpu = node.cpu - task.cpu
        before = waste.of(node.model, node.cpu, node.free)
        options = [first] if task.gpus != 1 or task.milli == WHOLE else _each_room(node, task)
        best = (math.inf, first)
        for gpus in options:
            free = list(node.free)
            for at in gpus:
                free[at] -= task.milli
            added = waste.of(node.model, cpu, free) - before
            if added < best[0]:
                best = (added, gpus)
        return best[0] / waste.total / WHOLE + PULL * left_over(node, task), best[1]

    return score


def _each_room(node: Node, task: Task) -> list[tuple[int, ...]]:
    """One GPU for each different amount of free room that holds the task, the tightest first."""
    rooms = {free: at for at, free in reversed(list(enumerate(node.free))) if free >= task.milli}
    return [(rooms[free],) for free in sorted(rooms)]


def left_over(node: Node, task: Task) -> float:
    """What a task leaves of a node: CPU, memory and GPUs, each as a share of a large node."""
    left = (node.cpu - task.cpu) / 128_000 + (node.memory - task.memory) / 786_432
    return left + (sum(node.free) - task.asked) / (8 * WHOLE)


def by_fit(node: Node, task: Task) -> tuple[float, tuple[int, ...]] | None:
    """Best fit: the node of which least is left."""
    gpus = chosen_gpus(node, task)
    return None if gpus is None else (left_over(node, task), gpus)


def by_chance(rng: random.Random) -> Scorer:
    def score(node: Node, task: Task) -> tuple[float, tuple[int, ...]] | None:
        gpus = chosen_gpus(node, task)
        return None if gpus is None else (rng.random(), gpus)

    return score


class Scores:
    """The score of every node for every kind of task, worked out again only for nodes that changed since."""

    def __init__(self, nodes: Sequence[Node], scorer: Scorer, *, fixed: bool) -> None:
        self.nodes, self.scorer, self.fixed = nodes, scorer, fixed
        self._changed: list[int] = []
        self._known: dict[int, tuple[list[float], int]] = {}

    def best(self, kind: int, task: Task) -> int | None:
        """The first of the nodes with the best score."""
        scores, seen = self._known.get(kind, ([], 0))
        stale: Iterable[int] = set(self._changed[seen:])
        if not scores or not self.fixed:
            scores, stale = [math.inf] * len(self.nodes), range(len(self.nodes))
        for at in stale:
            found = self.scorer(self.nodes[at], task)
            scores[at] = math.inf if found is None else found[0]
        self._known[kind] = (scores, len(self._changed))
        lowest = min(scores)
        return None if lowest == math.inf else scores.index(lowest)

    def place(self, at: int, task: Task) -> None:
        """Puts a task on a node."""
        node, found = self.nodes[at], self.scorer(self.nodes[at], task)
        assert found is not None
        node.cpu, node.memory = node.cpu - task.cpu, node.memory - task.memory
        for gpu in found[1]:
            node.free[gpu] -= task.milli
            assert node.free[gpu] >= 0
        self._changed.append(at)


def replay(nodes: list[Node], tasks: Sequence[Task], scorer: Scorer, *, fixed: bool) -> tuple[float, float]:
    """Unallocated per cent when 100 % have arrived, and decisions a second of one core.

    ``fixed`` tells that a score holds until its node changes.
    """
    capacity = WHOLE * sum(len(node.free) for node in nodes)
    kinds = {task: number for number, task in enumerate(dict.fromkeys(tasks))}
    scores = Scores(nodes, scorer, fixed=fixed)
    arrived = used = 0
    at_full: list[float] = []
    begun = time.process_time()
    for task in tasks:
        at = scores.best(kinds[task], task)
        arrived += task.asked
        if at is not None:
            scores.place(at, task)
            used += task.asked
        if round(100 * arrived / capacity) == 100:
            at_full.append(100 - 100 * used / capacity)
    return sum(at_full) / len(at_full), len(tasks) / (time.process_time() - begun)


def run(folder: Path, trace: str, seeds: Sequence[int]) -> None:
    tasks = read_tasks(folder, trace)
    print(f"{trace}: unallocated % at 100 % arrived, seeds {', '.join(map(str, seeds))}")
    for policy in POLICIES:
        results = []
        for seed in seeds:
            nodes = read_nodes(folder)
            random.Random(seed).shuffle(nodes)
            capacity = WHOLE * sum(len(node.free) for node in nodes)
            scorer = {"ours": by_waste(Waste(tasks)), "best fit": by_fit, "random": by_chance(random.Random(seed))}[
                policy
            ]
            stream = arriving(tasks, capacity, seed)
            results.append(replay(nodes, stream, scorer, fixed=policy != "random"))
        shares, speeds = zip(*results, strict=True)
        told = " ".join(f"{share:.2f}" for share in shares)
        mean = sum(shares) / len(shares)
        print(f"  {policy:<28} {mean:6.2f}   ({told})   {min(speeds):,.0f} decisions/s", flush=True)
    for row in rows(folder / "expected_unallocated_percent.csv"):
        if row["trace"] == trace:
            print(f"  authors' {row['policy']:<19} {float(row['at100']):6.2f}")


if __name__ == "__main__":
    folder, trace, seeds = (*sys.argv[1:], *("default", "3")[len(sys.argv) - 2 :])
    run(Path(folder), trace, range(42, 42 + int(seeds)))
