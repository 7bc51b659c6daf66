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
        taken: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(rounds + 1):
            for name, (command, variables, code) in commands.items():
                time_ms = _time_ms(command, variables, ours.folder, code)
                if number:
                    taken[name].append(time_ms)
    python = median(taken.pop("python -c pass"))
    theirs = taken.pop("supervisorctl status", None)
    beside_us = f"python -c pass {python:.0f} ms" + (
        f", supervisorctl status {median(theirs):.0f} ms" if theirs else ""
    )
    figures = []
    for name, times in taken.items():
        target = TARGET_MS if name.startswith("diff") else None
        figures.append(Figure(f"cold {name}: median", median(times), "ms", target, beside_us))
        figures.append(Figure(f"cold {name}: p99", p99(times), "ms"))
    return figures


def _time_ms(command: Sequence[str], environ: Mapping[str, str], folder: Path, code: int) -> float:
    begun = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    taken = (time.perf_counter() - begun) * 1000
    assert done.returncode == code, f"{command}: exit {done.returncode}, not {code}\n{done.stdout}{done.stderr}"
    return taken


if __name__ == "__main__":
    show(measure)
