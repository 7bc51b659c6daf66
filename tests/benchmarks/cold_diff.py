"""Commands from their start to their end, each in a new process, beside a bare Python and ``supervisorctl status``.

The processor time is told too: unlike the time that passes it hardly depends on what else the machine does.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.benchmarks.figures import Figure, median, p99, show
from tests.benchmarks.fleets import fleets

TARGET_MS = 400.0


def measure(rounds: int = 30, count: int = 20, *, beside: bool = True) -> list[Figure]:
    """``count`` engines run; the commands take turns, and the first turn, which fills the caches, does not count."""
    with fleets(count, beside=beside) as (ours, supervisor):
        program, environ = [sys.executable, "-m", "sage_reconcile"], ours.box.environ
        empty = environ | {"SAGE_RECONCILE_STATE_DIR": str(ours.folder / "none")}
        commands: dict[str, tuple[Sequence[str], Mapping[str, str], int]] = {
            f"diff, {count} engines run": ([*program, "diff"], environ, 0),
            f"diff, {count} engines to start": ([*program, "diff"], empty, 2),
            f"status, {count} engines run": ([*program, "status"], environ, 0),
            "--help": ([*program, "--help"], environ, 0),
            "python -c pass": ([sys.executable, "-c", "pass"], environ, 0),
        }
        if supervisor:
            commands["supervisorctl status"] = (supervisor.ctl_command("status"), supervisor.environ, 0)
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for number in range(rounds + 1):
            for name, (command, variables, code) in commands.items():
                times = _times_ms(command, variables, ours.folder, code)
                if number:
                    taken[name].append(times)
    passed = {name: [wall for wall, _ in times] for name, times in taken.items()}
    used = {name: median([processor for _, processor in times]) for name, times in taken.items()}
    others = [name for name in ("python -c pass", "supervisorctl status") if name in taken]
    figures = []
    for name in (name for name in taken if name not in others):
        target = TARGET_MS if name.startswith("diff") else None
        for what, value in (("median", median), ("p99", p99)):
            beside_us = ", ".join(f"{other} {value(passed[other]):.0f} ms" for other in others)
            limit = target if what == "median" else None
            figures.append(Figure(f"cold {name}: {what}", value(passed[name]), "ms", limit, beside_us))
        beside_us = ", ".join(f"{other} {used[other]:.0f} ms" for other in others)
        figures.append(Figure(f"cold {name}: processor", used[name], "ms", None, beside_us))
    return figures


def _times_ms(command: Sequence[str], environ: Mapping[str, str], folder: Path, code: int) -> tuple[float, float]:
    """The time that passed, and the processor time that was used."""
    before, begun = _used_s(), time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    passed, used = time.perf_counter() - begun, _used_s() - before
    assert done.returncode == code, f"{command}: exit {done.returncode}, not {code}\n{done.stdout}{done.stderr}"
    return passed * 1000, used * 1000


def _used_s() -> float:
    """Processor time of all our children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    show(measure)
