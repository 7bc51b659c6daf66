"""What it costs that nothing happens: memory, processor time and wake-ups of the daemon, beside supervisord."""

from __future__ import annotations

import time

from tests.benchmarks.figures import Figure, show
from tests.benchmarks.fleets import fleets
from tests.benchmarks.processes import Reading, memory_mb, reading

TARGET_MB, TARGET_PERCENT = 70.0, 1.0


def measure(seconds: float = 40.0, count: int = 20, *, beside: bool = True, quiet_s: float = 5.0) -> list[Figure]:
    """Both are read at the same two moments, some time after the last thing that happened.

    Every 10 s the daemon asks each engine whether it is well, every 30 s it looks at everything: the time holds both.
    """
    with fleets(count, beside=beside) as (ours, supervisor):
        time.sleep(quiet_s)
        pids = {"ours": ours.daemon.pid} | ({"supervisord": supervisor.daemon.pid} if supervisor else {})
        before = {who: reading(pid) for who, pid in pids.items()}
        time.sleep(seconds)
        after = {who: reading(pid) for who, pid in pids.items()}
        memory = {who: memory_mb(pid) for who, pid in pids.items()}

    values = {who: [*memory[who], *_rates(before[who], after[who])] for who in pids}
    what = f"idle {seconds:g} s, {count} engines"
    lines = (
        (f"{what}: RSS", "MB", TARGET_MB),
        (f"{what}: PSS", "MB", None),
        (f"{what}: processor", "% of a core", TARGET_PERCENT),
        (f"{what}: context switches", "/s", None),
    )
    theirs = values.get("supervisord")
    return [
        Figure(name, values["ours"][row], unit, target, f"supervisord {theirs[row]:.3g} {unit}" if theirs else "")
        for row, (name, unit, target) in enumerate(lines)
    ]


def _rates(before: Reading, after: Reading) -> tuple[float, float]:
    """Percent of a core, and context switches a second."""
    passed = after.at - before.at
    return 100 * (after.cpu_s - before.cpu_s) / passed, (after.switches - before.switches) / passed


if __name__ == "__main__":
    show(measure)
