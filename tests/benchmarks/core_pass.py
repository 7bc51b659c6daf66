"""One pass of the deciding code, plan and check, over engines that are all as the file says: no I/O at all."""

from __future__ import annotations

import gc
import time

from sage_reconcile.core.check import check_plan
from sage_reconcile.core.planner import make_plan
from tests.benchmarks.figures import Figure, median, p99, show
from tests.plans.world import NOW, world
from tests.reading import desired

TARGET_MS = 50.0
_GPUS = 8


def measure(counts: tuple[int, ...] = (20, 1000), rounds: int = 100) -> list[Figure]:
    """Engines of 1 GiB on eight large GPUs."""
    figures = []
    for count in counts:
        times = _times(count, rounds)
        target = TARGET_MS if count == 1000 else None
        what = f"core pass, {count} engines in sync"
        figures += [Figure(f"{what}: median", median(times), "ms", target), Figure(f"{what}: p99", p99(times), "ms")]
    return figures


def _times(count: int, rounds: int) -> list[float]:
    lines = ["version: 1", "host:", f"  ports: 8000-{8000 + count}", "engines:"]
    for number in range(count):
        lines += [f"  engine-{number}:", f"    model: org/model-{number}", "    memory: 1GiB"]
        lines += ["    args: {max-model-len: 8192}", "    env: {HF_HOME: /data/hf}"]
    wanted = desired("\n".join(lines))
    launches = [
        {
            "run": f"engine-{number}/0",
            "gpu": number % _GPUS,
            "port": 8000 + number,
            "inner": f"{20000 + 8 * number}-{20007 + 8 * number}",
        }
        for number in range(count)
    ]
    seen = world({"gpus": [f"H200-141GB {141}GiB"] * _GPUS, "launches": launches}, wanted, NOW)
    times = []
    gc.collect()
    for _ in range(rounds):
        begun = time.perf_counter()
        plan = make_plan(wanted, seen, NOW)
        wrong = check_plan(wanted, seen, plan)
        times.append((time.perf_counter() - begun) * 1000)
        assert plan.in_sync, "not what is measured here"
        assert not wrong, wrong
    return times


if __name__ == "__main__":
    show(measure)
