"""From saving the file to the new process's exec, beside supervisor with the same programs and the same edits."""

from __future__ import annotations

import random
import time

from tests.benchmarks.figures import Figure, median, p99, show
from tests.benchmarks.fleets import Edited, fleets, until

TARGET_MS = 100.0


def measure(edits: int = 25, count: int = 20, *, beside: bool = True) -> list[Figure]:
    """``edits`` engines added, and as many changed, one at a time; ours and supervisor's in turns."""
    chance = random.Random(2)
    taken: dict[tuple[str, str], list[float]] = {}
    with fleets(count, beside=beside) as (ours, supervisor):
        under = {"ours": ours, "supervisor": supervisor} if supervisor else {"ours": ours}
        for number in range(edits):
            for who, fleet in under.items():
                added, changed = f"added-{number}", f"engine-{number % count}"
                times = taken.setdefault((who, "adds"), [])
                times.append(_edit(fleet, added, f"token-{number}", chance))
                del fleet.tokens[added]
                fleet.edit()
                _settle(fleet, chance)
                times = taken.setdefault((who, "changes"), [])
                times.append(_edit(fleet, changed, f"token-{number}", chance))
    figures = []
    for kind in ("adds", "changes", "all"):
        kinds = ("adds", "changes") if kind == "all" else (kind,)
        mine, theirs = ([t for k in kinds for t in taken.get((who, k), [])] for who in ("ours", "supervisor"))
        what = {"adds": "an engine is added", "changes": "one is changed", "all": "both"}[kind]
        for name, value in (("median", median), ("p99", p99)):
            figures.append(
                Figure(
                    f"edit to exec, {count} engines run, {what} ({len(mine)} edits): {name}",
                    value(mine),
                    "ms",
                    TARGET_MS if name == "median" else None,
                    f"supervisor {value(theirs):.0f} ms" if theirs else "",
                )
            )
    return figures


def _edit(fleet: Edited, name: str, token: str, chance: random.Random) -> float:
    """Milliseconds from saving the file to the exec."""
    fleet.tokens[name] = token
    saved = fleet.edit()
    until(f"{name} {token} begins", lambda: fleet.began(name, token) is not None)
    began = fleet.began(name, token)
    assert began is not None
    _settle(fleet, chance)
    return (began - saved) * 1000


def _settle(fleet: Edited, chance: random.Random) -> None:
    """Until all is as the file says; then a pause of any length, so that edits fall into no step with anything."""
    until("the fleet is settled", fleet.settled)
    time.sleep(chance.uniform(0.1, 0.3))


if __name__ == "__main__":
    show(measure)
