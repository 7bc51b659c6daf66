"""One pass: look, plan, have the plan judged, do what can be done now. Start reading here.

A pass never waits. What cannot be done yet (a start that must come after a stop) is left to the next pass,
which begins again with what is there then. So a crash at any point, a missed event or a second look
all end in the same place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from sage_reconcile.core.check import check_plan
from sage_reconcile.core.observed import Observed
from sage_reconcile.core.plan import Action, Plan
from sage_reconcile.core.planner import make_plan
from sage_reconcile.core.spec import Desired
from sage_reconcile.errors import PortTaken, SpawnError, StateError, UnsafePlan


class Host(Protocol):
    """What a pass needs of the machine."""

    def now(self) -> float:
        """Seconds since the epoch."""

    def observe(self, desired: Desired) -> Observed:
        """What is there now."""

    def carry_out(self, action: Action, desired: Desired) -> str:
        """Does one action; the id of the launch that it did it to. ``SpawnError`` or ``StateError`` where it cannot."""

    def forget(self, launch_id: str) -> None:
        """Drops the record of a launch that has ended; raises ``StateError`` where it cannot."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass saw, decided and did. ``failed`` are actions that could not be carried out, and why.

    ``untried`` are replicas among these for which the next pass decides anew, since their port is taken by now.
    ``withheld`` tells that nothing of the plan was to be done.
    ``not_forgotten`` says why records that are no longer needed could not be dropped: the next pass tries again.
    """

    desired: Desired
    observed: Observed
    plan: Plan
    now: float
    done: tuple[Action, ...] = ()
    failed: tuple[tuple[Action, str], ...] = ()
    untried: frozenset[str] = frozenset()
    withheld: bool = False
    not_forgotten: tuple[str, ...] = ()


def look(host: Host, desired: Desired, *, tried: frozenset[str] | None = None, allow_moves: bool = False) -> Pass:
    """A pass that stops before doing anything: what ``diff`` shows. See ``make_plan`` for the options.

    Raises:
        UnsafePlan: the plan failed its independent check.
    """
    observed = host.observe(desired)
    return judged(desired, observed, host.now(), tried=tried, allow_moves=allow_moves)


def judged(
    desired: Desired,
    observed: Observed,
    now: float,
    *,
    tried: frozenset[str] | None = None,
    allow_moves: bool = False,
) -> Pass:
    """The plan for a machine, wherever what is known of it comes from. See ``make_plan`` for the options.

    Raises:
        UnsafePlan: the plan failed its independent check.
    """
    plan = make_plan(desired, observed, now, tried=tried, allow_moves=allow_moves)
    wrong = check_plan(desired, observed, plan)
    if wrong:
        raise UnsafePlan(
            "a plan failed its check, and nothing of it was carried out; please report this:\n  " + "\n  ".join(wrong)
        )
    return Pass(desired, observed, plan, now)


def run_pass(
    host: Host,
    desired: Desired,
    *,
    tried: frozenset[str] | None = None,
    allow_moves: bool = False,
    may: Callable[[Pass], bool] | None = None,
) -> Pass:
    """One whole pass. ``may`` is asked about the plan before anything of it is done; on a no nothing is.

    Raises:
        UnsafePlan: the plan failed its independent check; nothing was done.
    """
    seen = look(host, desired, tried=tried, allow_moves=allow_moves)
    if may is not None and not may(seen):
        return replace(seen, withheld=True)
    done: list[Action] = []
    failed: list[tuple[Action, str]] = []
    untried: set[str] = set()
    for action in seen.plan.actions:
        if not action.now:
            continue
        try:
            launch_id = host.carry_out(action, desired)
        except (SpawnError, StateError) as error:
            failed.append((action, str(error)))
            untried |= {action.replica} if isinstance(error, PortTaken) else set()
        else:
            done.append(replace(action, launch=launch_id))
    not_forgotten: list[str] = []
    for launch_id in seen.plan.forget:
        try:
            host.forget(launch_id)
        except StateError as error:
            not_forgotten.append(str(error))
    return replace(
        seen,
        done=tuple(done),
        failed=tuple(failed),
        untried=frozenset(untried),
        not_forgotten=tuple(not_forgotten),
    )
