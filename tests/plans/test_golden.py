"""Desired + observed -> the plan's exact text. ``GOLDEN_UPDATE=1`` rewrites the expected texts; read them then."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from sage_reconcile.core.check import check_plan
from sage_reconcile.core.observed import Observed
from sage_reconcile.core.plan_text import plan_text
from sage_reconcile.core.planner import make_plan
from tests.plans.world import Case, load

CASES = sorted((Path(__file__).parent / "cases").glob("*.yaml"))
UPDATE = os.environ.get("GOLDEN_UPDATE") == "1"


def text_of(case: Case, observed: Observed) -> str:
    return plan_text(
        make_plan(case.desired, observed, case.now, tried=case.tried, allow_moves=case.allow_moves), case.now
    )


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_the_plan_is_safe_deterministic_and_as_expected(path: Path) -> None:
    case = load(path)
    plan = make_plan(case.desired, case.observed, case.now, tried=case.tried, allow_moves=case.allow_moves)
    assert check_plan(case.desired, case.observed, plan) == []
    text = plan_text(plan, case.now)
    assert text_of(case, case.observed) == text
    for seed in range(4):
        assert text_of(case, shuffled(case.observed, seed)) == text
    if UPDATE:
        rewrite(path, text)
    else:
        assert text == case.plan, case.about


def shuffled(observed: Observed, seed: int) -> Observed:
    """The same machine, told in another order."""
    rng = random.Random(seed)
    gpus = [replace(gpu, processes=tuple(rng.sample(gpu.processes, len(gpu.processes)))) for gpu in observed.gpus]
    rng.shuffle(gpus)
    launches = rng.sample(observed.launches, len(observed.launches))
    ports = rng.sample(observed.ports, len(observed.ports))
    return replace(observed, gpus=tuple(gpus), launches=tuple(launches), ports=tuple(ports))


def rewrite(path: Path, text: str) -> None:
    """Puts the text after ``plan: |``, which every case ends with."""
    head, _, _ = path.read_text().partition("\nplan: |")
    block = "".join(f"  {line}".rstrip() + "\n" for line in text.splitlines())
    path.write_text(f"{head.rstrip()}\nplan: |\n{block}")


def test_there_are_as_many_cases_as_there_are_questions() -> None:
    assert len(CASES) >= 80
