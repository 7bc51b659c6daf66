"""Whether what somebody waits for has come, still may, or cannot: read from a status document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sage_reconcile.core.lifecycle import Phase


class Goal(StrEnum):
    """What is waited for."""

    READY = "ready"
    """Every replica that is wanted is ready, and runs what the file says."""
    STOPPED = "stopped"
    """Nothing of it runs; its entry may be there still, with ``replicas: 0``."""
    DELETED = "deleted"
    """Nothing of it runs, and it has no entry."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How it stands: ``come``, or it never will (``hopeless``); else ``why`` tells what it waits for.

    ``by_itself`` tells that it may come though nobody reconciles.
    """

    come: bool = False
    hopeless: bool = False
    why: str = ""
    by_itself: bool = False


def verdict(document: Mapping[str, Any], name: str, goal: Goal, *, reconciled: bool) -> Verdict:
    """How the engine or replica of this name stands; all engines where it is empty.

    ``reconciled`` tells whether anybody reconciles: where nobody does, only what already loads can become ready.
    """
    engines = [engine for engine in document["engines"] if name.partition("/")[0] in ("", engine["name"])]
    if goal is Goal.READY:
        found = [told for engine in engines for told in _readiness(engine, name)]
        if name and not found:
            why = "`replicas` is 0" if engines and "/" not in name else "there is none of that name"
            return Verdict(hopeless=True, why=f"{name} cannot become ready: {why}")
    else:
        found = [told for engine in engines for told in _absence(engine, name, goal)]
    hopeless = [told.why for told in found if told.hopeless]
    if hopeless:
        return Verdict(hopeless=True, why="; ".join(hopeless))
    late = [told for told in found if not told.come]
    why = "; ".join(told.why for told in late)
    if late and not reconciled and not all(told.by_itself for told in late):
        nobody = "nobody reconciles, so it stays as it is: `sage-reconcile apply` or `run` does"
        return Verdict(hopeless=True, why=f"{why}; {nobody}")
    return Verdict(come=not late, why=why)


def _readiness(engine: Mapping[str, Any], name: str) -> Iterator[Verdict]:
    wanted = [f"{engine['name']}/{index}" for index in range(engine["desired"])]
    rows = {row["name"]: row for row in engine["replicas"]}
    for replica in wanted:
        if name in ("", engine["name"], replica):
            yield _of_one(replica, rows.get(replica))


def _of_one(replica: str, row: Mapping[str, Any] | None) -> Verdict:
    if row is None:
        return Verdict(why=f"{replica} is not looked at yet")
    phase = row["phase"]
    told = {condition["type"]: condition for condition in row.get("conditions", ())}
    current = told.get("Current", {"status": "True"})["status"] == "True"
    reason = row["reason"] or told.get("Ready", {}).get("message", "")
    if phase == Phase.READY and current and not row["unplaced"]:
        return Verdict(come=True)
    what = "runs what its entry said before" if phase == Phase.READY else f"is {phase}"
    why = f"{replica} {what}: {reason}" if reason else f"{replica} {what}"
    never = row["unplaced"] or phase in (Phase.STALLED, Phase.UNKNOWN)
    return Verdict(hopeless=never, why=why, by_itself=phase == Phase.STARTING)


def _absence(engine: Mapping[str, Any], name: str, goal: Goal) -> Iterator[Verdict]:
    if name in ("", engine["name"]) and engine["desired"]:
        yield Verdict(
            hopeless=True, why=f"{engine['name']} is not stopped: its entry says `replicas: {engine['desired']}`"
        )
        return
    rows = [row for row in engine["replicas"] if name in ("", engine["name"], row["name"])]
    for row in rows:
        if "/" in name and int(name.rpartition("/")[2]) < engine["desired"]:
            yield Verdict(hopeless=True, why=f"{name} is not stopped: its entry says `replicas: {engine['desired']}`")
        else:
            never = row["phase"] == Phase.UNKNOWN
            yield Verdict(
                hopeless=never, why=f"{row['name']} is {row['phase']}", by_itself=row["phase"] == Phase.STOPPING
            )
    if goal is Goal.DELETED and not rows and "/" not in name:
        yield Verdict(hopeless=True, why=f"{engine['name']} is not deleted: it has an entry, with `replicas: 0`")
