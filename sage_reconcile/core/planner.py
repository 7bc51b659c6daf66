"""Making a plan: sort what runs, place what is missing, make room where that is allowed, put it all in order."""

from __future__ import annotations

from collections.abc import Mapping

from sage_reconcile.core.gpu_maps import gpu_maps, host_map, not_back
from sage_reconcile.core.lanes import Lanes
from sage_reconcile.core.lifecycle import Retry, StopCause, after
from sage_reconcile.core.making_room import MakingRoom, Room, as_move, in_order
from sage_reconcile.core.observed import Launch, Life, Observed
from sage_reconcile.core.placement import Placement, Refusal, Request, launch_gpus, place, promise_of
from sage_reconcile.core.plan import Action, Kept, Kind, Move, Plan, Proposal, Queued, Unplaced
from sage_reconcile.core.ports import Lease, Ports
from sage_reconcile.core.rollout import Results, Updating, refused
from sage_reconcile.core.spec import Desired
from sage_reconcile.core.standing import end

_KINDS: tuple[Kind, ...] = ("reap", "kill", "stop", "spawn")
_RETURNING = (StopCause.CHANGED, StopCause.MOVED)
"""Stops after which a replica comes back before any newcomer gets its memory."""


def make_plan(
    desired: Desired, observed: Observed, now: float, *, tried: frozenset[str] | None = None, allow_moves: bool = False
) -> Plan:
    """The plan that leads from what is observed to what is desired. ``now`` is in seconds since the epoch.

    Without ``tried`` a replica that failed is started again after its back-off, as a daemon does. With it
    there is no back-off, since a person asked; but replicas in ``tried`` are not started a second time.
    With ``allow_moves`` every running replica may be moved to let in one that has no place, not only those whose
    entry says so.
    """
    return _Planner(desired, observed, now, tried, allow_moves=allow_moves).plan()


class _Planner(Updating):
    """One plan in the making."""

    def __init__(
        self, desired: Desired, observed: Observed, now: float, tried: frozenset[str] | None, *, allow_moves: bool
    ) -> None:
        super().__init__(desired, observed, now, tried)
        self.allow_moves = allow_moves
        self.moving: dict[str, Launch] = {}
        self.displaced: dict[str, tuple[Launch, str]] = {}
        self.in_vain_for: frozenset[str] = frozenset()
        self.on_their_way = True
        self.stranded: list[str] = []

    def plan(self) -> Plan:
        standing = self.standing
        requests, results, proposals = self._settle()
        requests, results = self._start_first(requests, results)
        moves = in_order(self._moves(results), self.desired)
        standing.actions += [self._stop_changed(name) for name in standing.drifted if name not in self.first]
        for launch, cause in self.displaced.values():
            standing.actions.append(end("stop", launch, cause, StopCause.DISPLACED))
        for move in moves:
            if not move.start_first:
                standing.actions.append(self._stop_moved(move))
        standing.actions.sort(key=lambda action: (_KINDS.index(action.kind), action.replica, action.launch))
        actions, unplaced = self._actions(requests, results, [move for move in moves if move.start_first])
        unplaced += self._stay_unplaced()
        if unplaced:
            standing.notes += [*not_back(self.observed, standing), *standing.failed_moves()]
        order = {replica: position for position, replica in enumerate(self.desired.replicas())}
        kept = sorted(standing.kept.items(), key=lambda item: order.get(item[0], 0))
        return Plan(
            actions=tuple(actions),
            kept=tuple(Kept(launch, launch_gpus(launch, self.observed.gpus)) for _, launch in kept),
            unplaced=tuple(sorted(unplaced, key=lambda item: order.get(item.replica, 0))),
            proposals=proposals,
            waiting=tuple(sorted(standing.waiting)),
            gpus=tuple(gpu_maps(self.desired, self.observed, self.expected, self._leaving, actions)),
            host=host_map(self.observed, self._leaving, actions),
            forget=tuple(sorted({*standing.forget, *self.rollbacks.released})),
            notes=tuple(sorted(standing.notes)),
            queued=tuple(
                Queued(*self.changed[name], self.queued[name]) for name in sorted(self.queued, key=lambda x: order[x])
            ),
            rollbacks=tuple(found for _, found in sorted(self.rollbacks.found.items())),
        )

    @property
    def _leaving(self) -> frozenset[str]:
        """Ids of launches that will have gone once all is done."""
        gone = [*self.moving.values(), *(launch for launch, _ in self.displaced.values())]
        return self.standing.leaving | {launch.id for launch in gone}

    def _settle(self) -> tuple[list[Request], Results, tuple[Proposal, ...]]:
        """A place and ports for all that is missing.

        A replica whose new revision has no place keeps its old one, and so its memory; for one that has none
        at all others are moved or displaced where that is allowed, for one after another, each when all is done
        for the one before. After each such step all are placed anew, until nothing changes.
        """
        self._take_turns()
        while True:
            requests = self._requests()
            results = self._placed(requests)
            if self._taken_back(results) or self._in_vain(results) or self._without_hope(results):
                continue
            if self.standing.under_way:
                self.stranded = [x.replica for x in requests if x.destination and refused(results[x.replica])]
                return requests, results, ()
            room = self._making_room(requests, results)
            found = None if self.room_for else room.allowed(self.in_vain_for)
            if found is not None:
                self._make(found)
            elif self.on_their_way and any(x.destination and refused(results[x.replica]) for x in requests):
                self.on_their_way = False  # their places have been taken meanwhile: any other will do
            else:
                proposals = () if self.room_for else room.proposals()
                in_vain = self.in_vain_for  # to propose what was just tried and led to nothing would be a lie
                return requests, results, tuple(item for item in proposals if item.replica not in in_vain)

    def _taken_back(self, results: Results) -> bool:
        """Whether some that should have been replaced have nowhere to go, or be moved need not, and so stay."""
        standing = self.standing
        stuck = {name: result for name, result in results.items() if isinstance(result, Refusal)}
        drifted = [name for name in stuck if name in standing.drifted]
        for name in drifted:
            self.refused[name] = stuck[name]
        self._take_turns()
        same = [move.launch.replica for move in self._moves(results) if move.from_gpus == move.to_gpus]
        for name in same:
            standing.kept[name] = self.moving.pop(name)
        return bool(drifted or same)

    def _in_vain(self, results: Results) -> bool:
        """Whether room was made, and all together do not fit after all: then all of it is taken back."""
        if not self.room_for or not any(refused(results[name]) for name in (self.room_for, *self.moving)):
            return False
        gone = self.moving | {replica: launch for replica, (launch, _) in self.displaced.items()}
        self.standing.kept |= gone
        self.moving, self.displaced = {}, {}
        self.in_vain_for |= {self.room_for}
        self.room_for = ""
        return True

    def _make(self, room: Room) -> None:
        kept = self.standing.kept
        for replica in room.moves:
            self.moving[replica] = kept.pop(replica)
        for replica in room.displaced:
            self.displaced[replica] = (kept.pop(replica), room.cause)
        self.room_for = room.replica

    def _making_room(self, requests: list[Request], results: Results) -> MakingRoom:
        return MakingRoom(
            self.desired,
            self.expected,
            leaving=self._leaving,
            placed=[x for x in requests if not refused(results[x.replica])],
            refused=[x for x in requests if refused(results[x.replica])],
            kept={name: launch for name, launch in self.standing.kept.items() if self._may_go(name, launch)},
            allow_moves=self.allow_moves,
        )

    def _may_go(self, replica: str, launch: Launch) -> bool:
        """Whether it may be asked to leave at all: it runs, and no move of it has failed, or a person asks again."""
        last = self.standing.history.get(replica)
        engine = self.desired.engine(launch.engine_name)
        failed_before = last is not None and last.predecessor == launch.id
        failed_before = failed_before and not (last and engine and self.standing.changes(engine, last))
        asked_again = self.tried is not None and replica not in self.tried and not (last and last.holds)
        stays = replica in self.refused or replica in self.queued or (self.tried is not None and replica in self.tried)
        return launch.life is Life.ALIVE and not stays and (asked_again or not failed_before)

    def _requests(self) -> list[Request]:
        standing = self.standing
        found = []
        for position, engine in enumerate(self.desired.engines):
            for index, replica in enumerate(engine.replicas()):
                if replica not in standing.kept:
                    last = standing.history.get(replica)
                    returning = replica in standing.drifted or replica in self.moving
                    returning |= last is not None and last.stop_cause in _RETURNING
                    returning |= engine.name in self.rollbacks.found
                    goes_to = last.destination if last is not None and replica not in self.moving else ()
                    found.append(Request(engine, index, position, returning, goes_to if self.on_their_way else ()))
        return found

    def _placed(self, requests: list[Request]) -> Results:
        places = place(self.desired, self.expected, requests, self._leaving)
        moves = in_order(self._moves(places), self.desired)
        elsewhere = {move.launch.replica for move in moves if move.start_first} | self.first.keys()
        ports = Ports(self.desired, self.observed, self._leaving)
        results: Results = {}
        for request in sorted(requests, key=lambda r: (not r.returning, -r.engine.spec.priority)):
            found, before = places[request.replica], self._last(request.replica)
            if isinstance(found, Refusal):
                results[request.replica] = found
                continue
            first = request.replica in elsewhere
            lease = ports.lease(request.engine, request.index, None if first else before)
            if first and before and not isinstance(lease, Refusal) and set(lease.ports) & set(before.ports):
                lease = Refusal("no other ports are free, and it cannot start elsewhere first with those that it has")
            results[request.replica] = lease if isinstance(lease, Refusal) else (found, lease)
        return results

    def _last(self, replica: str) -> Launch | None:
        """The launch in whose place a replica is started."""
        if replica in self.standing.drifted:
            return self.standing.drifted[replica][0]
        if replica in self.displaced:
            return self.displaced[replica][0]
        return self.moving.get(replica) or self.standing.history.get(replica)

    def _moves(self, results: Mapping[str, Placement | Refusal | tuple[Placement, Lease]]) -> list[Move]:
        found = []
        for replica, launch in self.moving.items():
            result = results[replica]
            placement = result[0] if isinstance(result, tuple) else result
            if isinstance(placement, Placement):
                found.append(as_move(launch, placement, self.expected))
        return found

    def _actions(
        self, requests: list[Request], results: Results, first: list[Move]
    ) -> tuple[list[Action], list[Unplaced]]:
        """All actions in order; what is started elsewhere first comes before what waits for it to leave."""
        lanes = Lanes(self.standing, self.desired.host.concurrent_starts)
        actions, unplaced = list(self.standing.actions), []
        by_name = {request.replica: request for request in requests}
        for replica in self.first:
            spawn = self._spawn(by_name.pop(replica), results, lanes, predecessor=self.standing.drifted[replica][0].id)
            stop = self._stop_changed(replica, after=(spawn.id,))
            lanes.ends(stop, self.standing.drifted[replica][0])
            actions += [spawn, stop]
        for move in first:
            spawn = self._spawn(by_name.pop(move.launch.replica), results, lanes, predecessor=move.launch.id)
            stop = self._stop_moved(move, after=(spawn.id,))
            lanes.ends(stop, move.launch)
            actions += [spawn, stop]
        for request in sorted(by_name.values(), key=lambda r: r.rank()[1:]):
            result = results[request.replica]
            if isinstance(result, Refusal):
                unplaced.append(Unplaced(request.replica, result.reason, ways=result.ways))
            else:
                actions.append(self._spawn(request, results, lanes))
        self.standing.waiting += sorted(lanes.late)
        return actions, unplaced

    def _stop_moved(self, move: Move, after: tuple[str, ...] = ()) -> Action:
        cause = f"makes room for {self.room_for}"
        return end("stop", move.launch, cause, StopCause.MOVED, after=after, goes_to=move.to_gpus)

    def _spawn(self, request: Request, results: Results, lanes: Lanes, predecessor: str = "") -> Action:
        replica = request.replica
        result = results[replica]
        assert isinstance(result, tuple), "what is spawned has a place and ports"
        placement, lease = result
        keys = (replica, *lease.ports, *(gpu.uuid for gpu in placement.gpus))
        retry = self._history(request, placement)
        breakdown, kv_bytes = promise_of(request.engine, placement, self.observed)
        after, waiting = lanes.waits(keys, placement)
        if self.stranded and not request.returning:
            waiting = (*waiting, f"{', '.join(self.stranded)} to have a place again")
        if retry.not_before is not None:
            waiting = (*waiting, f"its back-off ({retry.failures} failed in a row)")
        if retry.stalled:
            waiting = ("an edit of its entry, or `apply`, since it cannot get better by itself",)
        tried = self._tried_already(replica)
        held_back = retry.stalled or retry.not_before is not None or tried
        if untold := self._untold(request.engine.name):
            waiting, held_back = (*waiting, untold), True
        if held_back and not waiting:
            waiting = ("the next `apply`, since it was tried just now",)
        action = Action(
            id=f"spawn {replica}",
            kind="spawn",
            replica=replica,
            cause=retry.cause,
            after=after,
            waits_for=", ".join(waiting),
            not_before=retry.not_before,
            gpus=placement.gpus,
            memory_mib=placement.memory_mib,
            port=lease.port,
            inner_ports=lease.inner_ports,
            restarts=retry.restarts,
            failures=retry.failures,
            stalled=retry.stalled,
            predecessor=predecessor,
            blocked=placement.blocked,
            made_of=breakdown,
            kv_bytes=kv_bytes,
            host_memory_mib=placement.host.mib,
            kv_space_gib=placement.host.kv_gib,
            revision=request.engine if request.engine.name in self.rolled_back else None,
            restart_s=self._restart_s(request, placement, self._last(replica)),
        )
        if not (held_back or action.blocked):
            lanes.starts(action)
        return action

    def _history(self, request: Request, placement: Placement) -> Retry:
        """What a start has to know of what became of the one before it."""
        replica, standing = request.replica, self.standing
        if replica in standing.drifted and not self._held_back(replica):
            return Retry("its entry changed")
        if replica in self.moving:
            return Retry(f"makes room for {self.room_for}", restarts=self.moving[replica].restarts)
        if replica in self.displaced:
            launch, cause = self.displaced[replica]
            return Retry(cause, restarts=launch.restarts)
        last = standing.history.get(replica)
        if request.engine.name in self.rolled_back and (last is None or standing.changes(request.engine, last)):
            return Retry("rolled back to the revision before")
        if last is None or standing.changes(request.engine, last):
            return Retry("wanted, and its last process is ending" if last and last.holds else "wanted, and not running")
        edited, asked = request.engine.record != last.spec, self.tried is not None
        return after(last, placement.gpus, placement.memory_mib, self.now, edited=edited, asked=asked)
