"""``python -m tests.simulation``: long random runs, or every pair of crash points, and what was counted.

--seeds N      N random stories, from seed 0 (or --seed) on
--seed S       one random story, with its trace
--pairs        every single crash, fault and pair of crashes of every story
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.simulation import chance, exploring
from tests.simulation.seam import installed
from tests.simulation.stories import STORIES


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description="The product in a simulated world.")
    parser.add_argument("--seeds", type=int, default=0, help="so many random stories")
    parser.add_argument("--seed", type=int, help="the first, or the only one")
    parser.add_argument("--pairs", action="store_true", help="every crash, fault and pair of crashes of every story")
    given = parser.parse_args()
    started = time.monotonic()
    with installed():
        if given.pairs:
            wrong = _explored()
        elif given.seeds or given.seed is None:
            first = given.seed or 0
            counts, wrong = chance.runs(iter(range(first, first + (given.seeds or 100))))
            for name, number in sorted(counts.items()):
                print(f"{number:10,}  {name}")
        else:
            world, _, found = chance.run(given.seed)
            wrong = [f"seed {given.seed}: {found}"] if found else []
            print("\n".join(world.trace))
    for text in wrong:
        print(f"WRONG  {text}")
    print(f"{len(wrong)} wrong, {time.monotonic() - started:.0f} s")
    return 1 if wrong else 0


def _explored() -> list[str]:
    whole = exploring.Tally()
    for story in STORIES:
        tally = exploring.explored(iter([story]))
        whole.add(tally)
        print(f"{story.name}: {tally.points:,} points, {len(tally.wrong)} wrong", flush=True)
    print(f"{whole.points:,} crash points and faults, {whole.runs:,} runs")
    return whole.wrong


sys.exit(main())
