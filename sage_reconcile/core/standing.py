"""What becomes of everything that runs: it stays, is replaced, gives its place to a successor, or ends."""

from __future__ import annotations

from collections.abc import Iterator

from sage_reconcile.core.drift import Change, changes
from sage_reconcile.core.lifecycle import StopCause, failed, fault_note, how_it_failed, stop_deadline
from sage_reconcile.core.memory import lingering
from sage_reconcile.core.memory_report import outgrown
from sage_reconcile.core.observed import Gpu, Launch, Life, Observed
from sage_reconcile.core.plan import Action, Kind
from sage_reconcile.core.reasons import gpu_names
from sage_reconcile.core.spec import Desired, Engine


class Standing:
    """Every launch that was observed, sorted.

    ``kept`` run on and ``drifted`` are replaced, by replica; ``ending`` will be gone, by launch id. ``history`` is
    the last launch of a replica that does not run. ``actions`` are what ends them. ``lingering`` is memory, in
    MiB by GPU, that launches which have just ended held and that is not back yet. ``superseded`` serve, by replica,
    until the launch that takes over from them is ready. The records of ``retained`` are kept.
    """

    def __init__(
        self, desired: Desired, observed: Observed, now: float, retained: frozenset[str] = frozenset()
    ) -> None:
        self.desired, self.observed, self.now, self.retained = desired, observed, now, retained
        self.kept: dict[str, Launch] = {}
        self.drifted: dict[str, tuple[Launch, tuple[Change, ...]]] = {}
        self.ending: dict[str, Launch] = {}
        self.superseded: dict[str, Launch] = {}
        self.history: dict[str, Launch] = {}
        self.actions: list[Action] = []
        self.waiting: list[str] = []
        self.forget: list[str] = []
        self.notes: list[str] = list(observed.problems)
        self.launches = {launch.id: launch for launch in observed.launches}
        self.lingering = {
            gpu.uuid: mib for gpu in observed.gpus if (mib := lingering(gpu, observed.launches, now)) is not None
        }
        self._engines = {engine.name: engine for engine in desired.engines}
        self._gpus = {gpu.uuid: gpu for gpu in observed.gpus}
        self._successors = {launch.predecessor: launch for launch in observed.launches if self._takes_over(launch)}
        for launch in sorted(self.launches.values(), key=lambda x: (x.engine_name, x.index, x.created_at, x.id)):
            self._sort(launch, self._engines.get(launch.engine_name))

    @property
    def leaving(self) -> frozenset[str]:
        """Ids of launches that will have gone before anything is started in their place."""
        return frozenset(self.ending) | {launch.id for launch, _ in self.drifted.values()}

    @property
    def under_way(self) -> bool:
        """Whether a replica is just being moved: until it has arrived no other room is made."""
        return any(launch.id in self._successors for launch in self.ending.values())

    def failed_moves(self) -> Iterator[str]:
        """Of whom a start in another place failed, so that it stays where it is until a person asks again."""
        for replica, launch in self.kept.items():
            last = self.history.get(replica)
            if last is not None and last.predecessor == launch.id and failed(last):
                yield (
                    f"{replica}: its start elsewhere failed ({how_it_failed(last)}), so it stays; `logs` shows why, "
                    "and the next `apply` may try it again"
                )

    def changes(self, engine: Engine, launch: Launch) -> tuple[Change, ...]:
        """The differences for which a launch must be replaced."""
        return changes(self.desired, engine, launch, self.observed.gpus, self.observed.links)

    def _wanted(self, launch: Launch) -> Engine | None:
        engine = self._engines.get(launch.engine_name)
        return engine if engine is not None and launch.index < engine.spec.replicas else None

    def _takes_over(self, launch: Launch) -> bool:
        """Whether it was started so that the one before it can end, and nothing has come between."""
        engine = self._wanted(launch)
        runs = launch.life is Life.INTENT or (launch.life is Life.ALIVE and launch.stopping_since is None)
        if not (launch.predecessor and runs) or engine is None or self.changes(engine, launch):
            return False
        before = self.launches.get(launch.predecessor)
        return before is not None and before.replica == launch.replica and not self._late(launch, engine)

    def _late(self, launch: Launch, engine: Engine) -> bool:
        never_ready = not (launch.ready or launch.ready_at)
        return never_ready and self.now >= launch.created_at + engine.spec.startup_timeout

    def _sort(self, launch: Launch, engine: Engine | None) -> None:
        wanted = self._wanted(launch)
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
        self.notes += [note for note in (fault_note(launch, self.observed), outgrown(launch)) if note]

    def _sort_ended(self, launch: Launch, wanted: Engine | None) -> None:
        """Of a replica that is wanted the last ended launch stays known: its port, failures and log.

        Of any other too as long as the memory that it held is not back: it tells whose that is.
        """
        if wanted is None:
            if launch.id not in self.retained and not any(
                launch.id in self.lingering[uuid].launches for uuid in launch.gpus if uuid in self.lingering
            ):
                self.forget.append(launch.id)
            return
        earlier = self.history.get(launch.replica)
        if earlier is not None and earlier.life is Life.EXITED and earlier.id not in self.retained:
            self.forget.append(earlier.id)
        self.history[launch.replica] = launch

    def _sort_alive(self, launch: Launch, engine: Engine | None, wanted: Engine | None) -> None:
        if launch.stopping_since is not None:
            self._sort_stopping(launch, engine)
        elif launch.id in self._successors:
            self._sort_superseded(launch, self._successors[launch.id])
        elif wanted is not None and launch.predecessor and self._late(launch, wanted):
            self._end_late(launch, wanted)
        elif wanted is None or launch.replica in self.kept or launch.replica in self.drifted:
            self._end("stop", launch, _why_unwanted(self.desired, launch, engine), StopCause.REMOVED)
        elif differences := self.changes(wanted, launch):
            self.drifted[launch.replica] = (launch, differences)
        elif self._late(launch, wanted):
            self._end_late(launch, wanted)
        else:
            self.kept[launch.replica] = launch

    def _end_late(self, launch: Launch, wanted: Engine) -> None:
        cause = f"not ready after {wanted.spec.startup_timeout:g}s (`startup_timeout`)"
        self._end("stop", launch, cause, StopCause.STARTUP_TIMEOUT)

    def _sort_superseded(self, launch: Launch, successor: Launch) -> None:
        """It serves until its successor does, or as long as it can where that has hung since it was ready."""
        self.ending[launch.id] = self.superseded[launch.replica] = launch
        seen = [self._gpus[uuid] for uuid in successor.gpus if uuid in self._gpus]
        there = gpu_names(seen) if seen else "its new place"
        takes_over = successor.ready or (successor.ready_at is not None and not launch.ready)
        waits_for = "" if takes_over else f"{launch.replica} to be ready on {there}"
        engine = self._wanted(launch)
        differences = self.changes(engine, launch) if engine is not None else ()
        if differences:
            why = "changed: " + ", ".join(change.field for change in differences)
            self.actions.append(
                end("stop", launch, why, StopCause.CHANGED, differences=differences, waits_for=waits_for)
            )
            return
        self.actions.append(end("stop", launch, f"moved to {there}", StopCause.MOVED, waits_for=waits_for))

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
        self.actions.append(end(kind, launch, cause, why))


def end(
    kind: Kind,
    launch: Launch,
    cause: str,
    why: StopCause | None,
    *,
    differences: tuple[Change, ...] = (),
    after: tuple[str, ...] = (),
    waits_for: str = "",
    goes_to: tuple[Gpu, ...] = (),
) -> Action:
    """The action that ends a launch; ``goes_to`` is where its replica is started again."""
    return Action(
        id=f"{kind} {launch.replica} {launch.id}",
        kind=kind,
        replica=launch.replica,
        cause=cause,
        after=after,
        waits_for=waits_for,
        launch=launch.id,
        stop_cause=why,
        changes=differences,
        goes_to=goes_to,
        memory_mib=launch.memory_mib,
        host_memory_mib=launch.host_memory_mib,
        port=launch.port,
        inner_ports=launch.inner_ports,
    )


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
