"""How many of those that are refused only because of fragmentation moves would let in, and what looking takes.

A box of 8 GPUs is filled by engines that come and go, each placed by best fit, until it is loaded. Then one more
comes. It is refused for *fragmentation* where it has no place, and some arrangement of all, found by packing them
from nothing, has one: what moves could at best do.
"""

from __future__ import annotations

import random
import time

from sage_reconcile.core.observed import Gpu, GpuProcess, Launch, Life, Observed
from sage_reconcile.core.packing import pack
from sage_reconcile.core.planner import make_plan
from sage_reconcile.core.slots import Item, Option, Slot
from sage_reconcile.core.spec import Desired
from tests.benchmarks.figures import Figure, median, p99, show
from tests.reading import desired

GPUS, GPU_GIB, NOW = 8, 80, 1_000_000.0
LOADED = 0.8
Running = dict[str, tuple[int, list[int]]]
"""GiB on each of these GPUs, by engine."""


def size(rng: random.Random) -> tuple[int, int]:
    """GPUs of an engine, and GiB on each of them."""
    return rng.choices([1, 2, 4], [70, 20, 10])[0], rng.choice([rng.randrange(4, 30), rng.randrange(10, 70)])


def loaded(rng: random.Random) -> tuple[Running, list[int]]:
    """A box after some coming and going."""
    free, running = [GPU_GIB] * GPUS, Running()
    for number in range(120):
        count, gib = size(rng)
        fits = sorted((room, gpu) for gpu, room in enumerate(free) if room >= gib)
        if len(fits) >= count:
            on = [gpu for _, gpu in fits[:count]]
            running[f"e{number}"] = (gib, on)
            for gpu in on:
                free[gpu] -= gib
        while running and 1 - sum(free) / (GPUS * GPU_GIB) > LOADED:
            gib, on = running.pop(rng.choice(sorted(running)))
            for gpu in on:
                free[gpu] += gib
    return running, free


def fits_somehow(running: Running, count: int, gib: int) -> bool:
    everywhere = tuple(range(GPUS))
    sizes = [(len(on), of) for of, on in running.values()]
    items = [Item(one, (Option(of, everywhere),)) for one, of in (*sizes, (count, gib))]
    return not pack(items, [Slot(GPU_GIB)] * GPUS).refused


def machine(running: Running, count: int, gib: int) -> tuple[Desired, Observed]:
    """The same as a file and what is observed."""
    lines = [  # an entry each
        f"  {name}: {{model: m, memory: {of}GiB, tensor_parallel_size: {len(on)}}}"
        for name, (of, on) in running.items()
    ]
    new = f"  new: {{model: m, memory: {gib}GiB, tensor_parallel_size: {count}}}"
    wanted = desired("\n".join(["version: 1", "engines:", *lines, new]))
    launches, held = [], {gpu: [] for gpu in range(GPUS)}
    for port, (name, (of, on)) in enumerate(running.items(), 8000):
        engine = wanted.engine(name)
        assert engine is not None
        uuids = tuple(f"GPU-{gpu}" for gpu in on)
        launches.append(
            Launch(
                id=name,
                engine_name=name,
                index=0,
                spec=engine.record,
                secret_marks={},
                gpus=uuids,
                memory_mib=of * 1024,
                port=port,
                bind="127.0.0.1",
                life=Life.ALIVE,
                created_at=NOW - 600,
                ready=True,
                ready_at=NOW - 500,
            )
        )
        for gpu in on:
            held[gpu].append(GpuProcess(port, of * 1024, launch=name))
    gpus = tuple(
        Gpu(
            f"GPU-{gpu}",
            gpu,
            "H100",
            f"{gpu:02x}",
            GPU_GIB * 1024,
            memory_used_mib=sum(process.memory_mib or 0 for process in processes),
            processes=tuple(processes),
        )
        for gpu, processes in held.items()
    )
    return wanted, Observed(gpus, tuple(launches))


def measure(boxes: int = 300) -> list[Figure]:
    refused = fragmented = 0
    moves: list[int] = []
    no_downtime = 0
    times_ms = []
    for seed in range(boxes):
        rng = random.Random(seed)
        running, free = loaded(rng)
        count, gib = size(rng)
        if sum(room >= gib for room in free) >= count:
            continue
        refused += 1
        if not fits_somehow(running, count, gib):
            continue
        fragmented += 1
        wanted, observed = machine(running, count, gib)
        begun = time.process_time()
        plan = make_plan(wanted, observed, NOW)
        times_ms.append(1000 * (time.process_time() - begun))
        moves += [len(proposal.moves) for proposal in plan.proposals]
        no_downtime += sum(all(move.start_first for move in proposal.moves) for proposal in plan.proposals)
    told = f"{fragmented} of {refused} refused, of {boxes} that came"
    shares = [100 * sum(number <= most for number in moves) / max(1, fragmented) for most in (1, 2, 3)]
    return [
        Figure("refused for fragmentation only", 100 * fragmented / boxes, "%", beside=told),
        *(
            Figure(f"of these let in by {most} move{'s' * (most > 1)}", max(share, 1e-9), "%")
            for most, share in zip((1, 2, 3), shares, strict=True)
        ),
        Figure("of the proposals without any downtime", 100 * no_downtime / max(1, len(moves)), "%"),
        Figure("plan with its proposal, median", median(times_ms or [0.0]), "ms"),
        Figure("plan with its proposal, p99", p99(times_ms or [0.0]), "ms"),
    ]


if __name__ == "__main__":
    show(measure)
