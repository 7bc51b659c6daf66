"""The judge of updates: each kind of wrong plan is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sage_reconcile.core.check import check_plan
from sage_reconcile.core.plan import Plan
from sage_reconcile.core.planner import make_plan
from tests.plans.world import Case, load

CASES = Path(__file__).parents[1] / "plans" / "cases"


def planned(name: str) -> tuple[Case, Plan]:
    case = load(CASES / f"{name}.yaml")
    plan = make_plan(case.desired, case.observed, case.now)
    assert check_plan(case.desired, case.observed, plan) == []
    return case, plan


def complaints(case: Case, plan: Plan) -> str:
    return "\n".join(check_plan(case.desired, case.observed, plan))


def limited(case: Case, **limits: object) -> Case:
    engines = tuple(
        replace(engine, spec=engine.spec.model_copy(update=limits)) if engine.name == "chat" else engine
        for engine in case.desired.engines
    )
    return replace(case, desired=replace(case.desired, engines=engines))


def test_more_down_at_once_than_allowed() -> None:
    case, plan = planned("rollout_of_a_full_box_stops_first")
    assert "chat/0 would be down at once" in complaints(limited(case, max_unavailable=0), plan)
    both = make_plan(limited(case, max_unavailable=2).desired, case.observed, case.now)
    assert "chat/0, chat/1 would be down at once for an update, and `max_unavailable` is 1" in complaints(case, both)


def test_more_started_first_than_allowed() -> None:
    case, plan = planned("rollout_one_after_another")
    assert "1 replicas of chat would be started first, and `max_surge` is 0" in complaints(
        limited(case, max_surge=0), plan
    )


def test_one_that_must_be_alone_is_not_started_beside_itself() -> None:
    case, plan = planned("rollout_one_after_another")
    told = complaints(limited(case, spread="gpu"), plan)
    assert "spawn chat/0 is placed beside its own old process, and must not be" in told


def test_one_whose_successor_is_not_ready_does_not_end() -> None:
    case, plan = planned("rollout_under_way")
    early = tuple(replace(action, waits_for="") for action in plan.actions)
    case = limited(case, max_unavailable=0)
    assert "would be down at once" in complaints(case, replace(plan, actions=early))
    assert complaints(case, plan) == ""


def test_one_that_waits_for_its_turn_runs() -> None:
    case, plan = planned("rollout_one_after_another")
    gone = replace(plan, kept=plan.kept[1:])
    assert "chat/1 waits for its turn, and does not run until then" in complaints(case, gone)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"good": "bad"}, "chat is rolled back to bad, which was never ready"),
        ({"failed": "good"}, "chat is rolled back for good, which has not failed to start"),
        ({"good": "nobody"}, "chat is rolled back, and there is nothing to show for it"),
        ({"engine_name": "other"}, "other is rolled back, and there is nothing to show for it"),
        ({"revision": None}, "spawn chat/0 starts another revision than the plan says"),
    ],
)
def test_what_is_rolled_back_wrongly(change: dict[str, object], told: str) -> None:
    case, plan = planned("rollback_of_what_was_stopped_first")
    wrong = replace(plan, rollbacks=(replace(plan.rollbacks[0], **change),))
    assert told in complaints(case, wrong)


def test_a_rollback_that_nobody_wants_or_that_starts_what_failed() -> None:
    case, plan = planned("rollback_of_what_was_stopped_first")
    assert "nothing to show for it" in complaints(limited(case, rollback="off"), plan)
    file = tuple(replace(action, revision=None) for action in plan.actions)
    assert "spawn chat/0 starts another revision than the plan says" in complaints(case, replace(plan, actions=file))
    (entry,) = case.desired.engines
    found = replace(plan.rollbacks[0], revision=entry)
    same = tuple(replace(action, revision=entry) for action in plan.actions)
    assert "chat is rolled back to another revision than that of good" in complaints(
        case, replace(plan, rollbacks=(found,), actions=same)
    )
