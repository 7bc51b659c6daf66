"""Making a plan: sort what runs into kept, drifted and ending, place what is missing, put it all in order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from sage_reconcile.core.drift import Change, changes
from sage_reconcile.core.lifecycle import StopCause, failed, failures, fault_note, next_try, stop_deadline
from sage_reconcile.core.memory import Occupancy, launches_by_gpu, occupancy
from sage_reconcile.core.observed import Launch, Life, Observed
from sage_reconcile.core.placement import Placement, Refusal, Request, launch_gpus, place
from sage_reconcile.core.plan import Action, GpuMap, Kept, Kind, Plan, Unplaced
from sage_reconcile.core.ports import Ports
from sage_reconcile.core.reasons import problem
from sage_reconcile.core.spec import Desired, Engine

_KINDS: tuple[Kind, ...] = ("reap", "kill", "stop", "spawn")


def make_plan(desired: Desired, observed: Observed, now: float, *, tried: frozenset[str] | None = None) -> Plan:
    """The plan that leads from what is observed to what is desired. ``now`` is in seconds since the epoch.

    Without ``tried`` a replica that failed is started again after its back-off, as a daemon does. With it
    there is no back-off, since a person asked; but replicas in ``tried`` are not started a second time.
    """
    return _Planner(desired, observed, now, tried).plan()


class _Planner:
    """One plan in the making."""

    def __init__(self, desired: Desired, observed: Observed, now: float, tried: frozenset[str] | None) -> None:
        self.desired, self.observed, self.now, self.tried = desired, observed, now, tried
        self.kept: dict[str, Launch] = {}
        self.drifted: dict[str, tuple[Launch, tuple[Change, ...]]] = {}
        self.ending: dict[str, Launch] = {}
        self.history: dict[str, Launch] = {}
        self.actions: list[Action] = []
        self.waiting: list[str] = []
        self.forget: list[str] = []
        self.notes: list[str] = list(observed.problems)
        self.launches = {launch.id: launch for launch in observed.launches}

    def plan(self) -> Plan:
        engines = {engine.name: engine for engine in self.desired.engines}
        for launch in sorted(self.launches.values(), key=lambda x: (x.engine_name, x.index, x.created_at, x.id)):
            self._sort(launch, engines.get(launch.engine_name))
        requests, results, refused = self._place()
        for launch, differences in self.drifted.values():
            self.actions.append(_stop(launch, StopCause.CHANGED, differences))
        self.actions.sort(key=lambda action: (_KINDS.index(action.kind), action.replica, action.launch))
        spawns, unplaced = self._spawns(requests, results)
        unplaced += [Unplaced(replica, reason, runs_on=True) for replica, reason in refused.items()]
        names = (replica for engine in self.desired.engines for replica in engine.replicas())
        order = {replica: position for position, replica in enumerate(names)}
        kept = sorted(self.kept.items(), key=lambda item: order.get(item[0], 0))
        return Plan(
            actions=(*self.actions, *spawns),
            kept=tuple(Kept(launch, launch_gpus(launch, self.observed.gpus)) for _, launch in kept),
            unplaced=tuple(sorted(unplaced, key=lambda item: order.get(item.replica, 0))),
            waiting=tuple(sorted(self.waiting)),
            gpus=tuple(self._maps(spawns)),
            forget=tuple(sorted(self.forget)),
            notes=tuple(sorted(self.notes)),
        )

    @property
    def leaving(self) -> frozenset[str]:
        """Ids of launches that will have gone before anything is started in their place."""
        return frozenset(self.ending) | {launch.id for launch, _ in self.drifted.values()}

    def _changes(self, engine: Engine, launch: Launch) -> tuple[Change, ...]:
        return changes(self.desired, engine, launch, self.observed.gpus, self.observed.links)

    def _sort(self, launch: Launch, engine: Engine | None) -> None:
        wanted = engine if engine is not None and launch.index < engine.spec.replicas else None
        match launch.life:
            case Life.UNPROVEN:
                self.notes.append(
                    f"{launch.replica}: something runs in its place that cannot be proven ours (pid {launch.pid}); "
                    "it is left alone, and its memory and port count as taken"
                )
            case Life.EXITED:
                self._sort_ended(launch, wanted)
            case Life.LEFTOVER:
                asked = f"its leader was stopped ({launch.stop_cause}); " if launch.stop_cause else "its leader ended; "
                self._end("reap", launch, asked + "other processes of it still run")
            case Life.INTENT:
                self.waiting.append(f"{launch.replica}: its process is about to start")
                if wanted is not None:
                    self.kept.setdefault(launch.replica, launch)
            case Life.ALIVE:
                self._sort_alive(launch, engine, wanted)
        if note := fault_note(launch, self.observed):
            self.notes.append(note)

    def _sort_ended(self, launch: Launch, wanted: Engine | None) -> None:
        """Of a replica that is wanted the last ended launch stays known: its port, failures and log."""
        if wanted is None:
            self.forget.append(launch.id)
            return
        earlier = self.history.get(launch.replica)
        if earlier is not None and earlier.life is Life.EXITED:
            self.forget.append(earlier.id)
        self.history[launch.replica] = launch

    def _sort_alive(self, launch: Launch, engine: Engine | None, wanted: Engine | None) -> None:
        if launch.stopping_since is not None:
            self._sort_stopping(launch, engine)
        elif wanted is None or launch.replica in self.kept or launch.replica in self.drifted:
            self._end("stop", launch, _why_unwanted(self.desired, launch, engine), StopCause.REMOVED)
        elif differences := self._changes(wanted, launch):
            self.drifted[launch.replica] = (launch, differences)
        elif not (launch.ready or launch.ready_at) and self.now >= launch.created_at + wanted.spec.startup_timeout:
            cause = f"not ready after {wanted.spec.startup_timeout:g}s (`startup_timeout`)"
            self._end("stop", launch, cause, StopCause.STARTUP_TIMEOUT)
        else:
            self.kept[launch.replica] = launch

    def _sort_stopping(self, launch: Launch, engine: Engine | None) -> None:
        timeout = engine.spec.stop_timeout if engine else _recorded_seconds(launch, "stop_timeout", 30.0)
        deadline = stop_deadline(launch, timeout)
        if self.now < deadline and launch.stopping_since is not None and self.now >= launch.stopping_since:
            self.ending[launch.id] = self.history[launch.replica] = launch
            self.waiting.append(f"{launch.replica}: stopping ({launch.stop_cause})")
        else:
            self._end("kill", launch, f"still there {deadline - (launch.stopping_since or 0):g}s after SIGTERM")

    def _end(self, kind: Kind, launch: Launch, cause: str, why: StopCause | None = None) -> None:
        self.ending[launch.id] = self.history[launch.replica] = launch
        self.actions.append(_action(kind, launch, cause, why))

    def _place(self) -> tuple[list[Request], dict[str, tuple[Placement, int] | Refusal], dict[str, str]]:
        """A place and a port for all that is missing.

        A replica whose new revision has no place keeps its old one, and so its memory; then the others
        are placed anew, until nothing changes.
        """
        refused: dict[str, str] = {}
        while True:
            requests = [
                Request(engine, index, position, returning=replica in self.drifted)
                for position, engine in enumerate(self.desired.engines)
                for index, replica in enumerate(engine.replicas())
                if replica not in self.kept
            ]
            places = place(self.desired, self.observed, requests, self.leaving)
            ports = Ports(self.desired, self.observed, self.leaving)
            results = {
                request.replica: self._with_port(request, places[request.replica], ports) for request in requests
            }
            stuck = [
                (replica, result.reason)
                for replica, result in results.items()
                if isinstance(result, Refusal) and replica in self.drifted
            ]
            if not stuck:
                return requests, results, refused
            for replica, reason in stuck:
                refused[replica] = reason
                self.kept[replica] = self.drifted.pop(replica)[0]

    def _with_port(
        self, request: Request, result: Placement | Refusal, ports: Ports
    ) -> tuple[Placement, int] | Refusal:
        if isinstance(result, Refusal):
            return result
        drifted = self.drifted.get(request.replica)
        before = drifted[0] if drifted else self.history.get(request.replica)
        port = ports.lease(request.engine, request.index, before.port if before else None)
        return port if isinstance(port, Refusal) else (result, port)

    def _spawns(
        self, requests: list[Request], results: dict[str, tuple[Placement, int] | Refusal]
    ) -> tuple[list[Action], list[Unplaced]]:
        spawns: list[Action] = []
        unplaced: list[Unplaced] = []
        waits = _Waits(self)
        for request in sorted(requests, key=lambda r: (-r.engine.spec.priority, r.position, r.index)):
            result = results[request.replica]
            if isinstance(result, Refusal):
                unplaced.append(Unplaced(request.replica, result.reason))
            else:
                spawns.append(self._spawn(request, result[0], result[1], waits))
        return spawns, unplaced

    def _spawn(self, request: Request, placement: Placement, port: int, waits: _Waits) -> Action:
        replica = request.replica
        keys = (replica, port, *(gpu.uuid for gpu in placement.gpus))
        cause, not_before, restarts, failed_before = self._history(request)
        waiting = waits.texts(keys)
        if not_before is not None:
            waiting = (*waiting, f"its back-off ({failed_before} failed in a row)")
        held_back = not_before is not None or (self.tried is not None and replica in self.tried)
        if held_back and not waiting:
            waiting = ("the next `apply`, since it was tried just now",)
        action = Action(
            id=f"spawn {replica}",
            kind="spawn",
            replica=replica,
            cause=cause,
            after=waits.ids(keys),
            waits_for=", ".join(waiting),
            not_before=not_before,
            gpus=placement.gpus,
            memory_mib=placement.memory_mib,
            port=port,
            restarts=restarts,
            failures=failed_before,
        )
        if not held_back:
            waits.starts(action)
        return action

    def _history(self, request: Request) -> tuple[str, float | None, int, int]:
        """Cause, earliest time, restarts and failures of a start, from what became of the one before it."""
        if request.replica in self.drifted:
            return "its entry changed", None, 0, 0
        last = self.history.get(request.replica)
        cause = "wanted, and its last process is ending" if last and last.holds else "wanted, and not running"
        if last is None or self._changes(request.engine, last):
            return cause, None, 0, 0
        if not failed(last):
            return cause, None, last.restarts, 0
        when = next_try(last, self.now) if self.tried is None else self.now
        unasked = StopCause.STARTUP_TIMEOUT if last.life is Life.ALIVE else StopCause.ENDED
        how = last.stop_cause or (last.exit.text() if last.exit else unasked)
        return f"it failed ({how})", when if when > self.now else None, last.restarts + 1, failures(last)

    def _maps(self, spawns: list[Action]) -> Iterator[GpuMap]:
        on = launches_by_gpu(self.observed)
        headroom, leaving = self.desired.host.headroom, self.leaving
        added: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for action in spawns:
            for gpu in action.gpus:
                added[gpu.uuid].append((action.replica, action.memory_mib))
        for gpu in sorted(self.observed.gpus, key=lambda item: item.index):
            before = occupancy(gpu, on[gpu.uuid], headroom)
            after = occupancy(gpu, on[gpu.uuid], headroom, leaving=leaving)
            ours = (*after.ours, *added[gpu.uuid])
            stays = [launch for launch in on[gpu.uuid] if launch.id not in leaving]
            whole = Occupancy(after.total_mib, after.kept_back_mib, ours, after.unmanaged_mib)
            yield GpuMap(gpu, before, whole, problem(gpu, stays))


class _Waits:
    """What a start has to wait for, found by the replica, the port and the GPUs it shares with others.

    vLLM measures the free memory while it loads (a neighbour that allocates meanwhile is charged to it),
    so starts on one GPU go one after another.
    """

    def __init__(self, planner: _Planner) -> None:
        self._ids: dict[object, list[str]] = defaultdict(list)
        self._texts: dict[object, list[str]] = defaultdict(list)
        self._last: dict[str, str] = {}
        acted_on = {action.launch for action in planner.actions}
        for action in planner.actions:
            for key in self._keys(planner.launches[action.launch]):
                self._ids[key].append(action.id)
        for launch in planner.ending.values():
            if launch.id not in acted_on:
                for key in self._keys(launch):
                    self._texts[key].append(f"{launch.replica} to end")
        for launch in planner.kept.values():
            if not launch.ready and launch.ready_at is None:
                for uuid in launch.gpus:
                    self._texts[uuid].append(f"{launch.replica} to be ready")

    @staticmethod
    def _keys(launch: Launch) -> tuple[object, ...]:
        return (launch.replica, launch.port, *launch.gpus)

    def ids(self, keys: tuple[object, ...]) -> tuple[str, ...]:
        found = dict.fromkeys(action for key in keys for action in self._ids[key])
        found |= dict.fromkeys(self._last[str(key)] for key in keys if str(key) in self._last)
        return tuple(found)

    def texts(self, keys: tuple[object, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(text for key in keys for text in self._texts[key]))

    def starts(self, action: Action) -> None:
        self._last |= {gpu.uuid: action.id for gpu in action.gpus}


def _action(
    kind: Kind, launch: Launch, cause: str, why: StopCause | None, differences: tuple[Change, ...] = ()
) -> Action:
    return Action(
        id=f"{kind} {launch.replica} {launch.id}",
        kind=kind,
        replica=launch.replica,
        cause=cause,
        launch=launch.id,
        stop_cause=why,
        changes=differences,
        memory_mib=launch.memory_mib,
        port=launch.port,
    )


def _stop(launch: Launch, why: StopCause, differences: tuple[Change, ...]) -> Action:
    return _action("stop", launch, "changed: " + ", ".join(change.field for change in differences), why, differences)


def _why_unwanted(desired: Desired, launch: Launch, engine: Engine | None) -> str:
    if engine is None:
        return desired.unwanted
    if launch.index >= engine.spec.replicas:
        return f"`replicas` is {engine.spec.replicas}"
    return "a second process of the same replica"


def _recorded_seconds(launch: Launch, name: str, default: float) -> float:
    try:
        return float(str(launch.spec.get(name, default)).removesuffix("s"))
    except ValueError:
        return default
