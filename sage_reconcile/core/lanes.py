"""What each start has to wait for: for what ends in its place, for its GPU's lane, for memory to come back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from sage_reconcile.core.host_memory import host_occupancy, taken_mib
from sage_reconcile.core.memory import launches_by_gpu, occupancy
from sage_reconcile.core.observed import Gpu, Launch
from sage_reconcile.core.placement import Placement
from sage_reconcile.core.plan import Action
from sage_reconcile.core.reasons import gib
from sage_reconcile.core.standing import Standing


class Lanes:
    """The starts of one plan in the order in which they are asked for, and what they share with others.

    vLLM measures the free memory while it loads (a neighbour that allocates meanwhile is charged to it), so starts
    on one GPU go one after another: the next begins when the one before is ready or has failed. ``late`` tells of
    memory that starts wait for.
    """

    def __init__(self, standing: Standing, concurrent_starts: int) -> None:
        self._limit = concurrent_starts
        self._ids: dict[object, list[str]] = defaultdict(list)
        self._texts: dict[object, list[str]] = defaultdict(list)
        self._last: dict[str, str] = {}
        self._on = launches_by_gpu(standing.observed)
        self._gpus_of: dict[str, list[str]] = defaultdict(list)
        for uuid, launches in self._on.items():
            for launch in launches:
                self._gpus_of[launch.id].append(uuid)
        self._host = _HostLane(standing)
        acted_on = {action.launch for action in standing.actions}
        for action in standing.actions:
            self.ends(action, standing.launches[action.launch])
        for launch in standing.ending.values():
            if launch.id not in acted_on:
                for key in self._keys(launch):
                    self._texts[key].append(f"{launch.replica} to end")
        loading = [x for x in standing.kept.values() if not x.ready and x.ready_at is None]
        for launch in loading:
            for uuid in launch.gpus:
                self._texts[uuid].append(f"{launch.replica} to be ready")
        self._starting = len(loading)
        self._lingering = standing.lingering
        self.late: set[str] = set()
        self._room = self._rooms(standing)

    def _rooms(self, standing: Standing) -> dict[str, int]:
        """MiB that can be started on GPUs whose memory is not all back yet."""
        headroom = standing.desired.host.headroom
        return {
            gpu.uuid: occupancy(gpu, self._on[gpu.uuid], headroom, leaving=standing.leaving).free_mib
            for gpu in standing.observed.gpus
            if gpu.uuid in standing.lingering
        }

    def _keys(self, launch: Launch) -> tuple[object, ...]:
        """What it has that a start may need: where it was placed, and where it holds memory all the same."""
        return tuple(dict.fromkeys((launch.replica, *launch.ports, *launch.gpus, *self._gpus_of[launch.id])))

    def ends(self, action: Action, launch: Launch) -> None:
        """From now on, what shares the replica, a port or a GPU with this launch comes after the action."""
        for key in self._keys(launch):
            self._ids[key].append(action.id)
        self._host.ends(action, launch)

    def _after(self, keys: Sequence[object]) -> tuple[str, ...]:
        found = dict.fromkeys(action for key in keys for action in self._ids[key])
        found |= dict.fromkeys(self._last[str(key)] for key in keys if str(key) in self._last)
        return tuple(found)

    def waits(self, keys: Sequence[object], placement: Placement) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The ids of the actions that a start must come after, and what else it waits for, in words.

        ``keys`` are its replica, ports and GPUs. To be asked once for each start, in their order.
        """
        after, host = self._host.start(self._after(keys), placement.host.mib)
        return after, self._texts_for(keys, placement.gpus, placement.memory_mib, host)

    def _texts_for(
        self, keys: Sequence[object], gpus: Sequence[Gpu], memory_mib: int, host: tuple[str, ...]
    ) -> tuple[str, ...]:
        found = [text for key in keys for text in self._texts[key]]
        found += host
        for gpu in gpus:
            late = self._lingering.get(gpu.uuid)
            if late is not None and self._room[gpu.uuid] < memory_mib:
                held = f"{gib(late.mib)} that {', '.join(late.replicas)} held"
                found.append(f"GPU {gpu.index} to give back {held}")
                self.late.add(f"GPU {gpu.index}: {held} are not back yet")
        if not found and self._starting >= self._limit:
            found.append(f"one of {self._starting} starts under way (`host.concurrent_starts: {self._limit}`)")
        return tuple(dict.fromkeys(found))

    def starts(self, action: Action) -> None:
        """Enters a start: the next one on any of its GPUs comes after it."""
        self._last |= {gpu.uuid: action.id for gpu in action.gpus}
        self._starting += action.now
        for gpu in action.gpus:
            if gpu.uuid in self._room:
                self._room[gpu.uuid] -= action.memory_mib


class _HostLane:
    """The host's memory as the starts of a plan take it, one after another, and what they wait for.

    A start waits for no more ends than it, and all before it, need to have room together, first for those for which
    it has to wait anyway, and for those that are under way.
    """

    def __init__(self, standing: Standing) -> None:
        taken = host_occupancy(standing.observed)
        self._known = taken is not None
        self._left = taken.left_mib if taken else 0
        actions = {action.launch: action.id for action in standing.actions}
        going = [standing.launches[launch_id] for launch_id in standing.ending if launch_id not in actions]
        self._stopping = [(f"{launch.replica} to end", taken_mib(launch)) for launch in going if taken_mib(launch)]
        self._ends: dict[str, int] = {}

    def ends(self, action: Action, launch: Launch) -> None:
        """From now on, what this launch has is there for those that come after the action."""
        if mib := taken_mib(launch):
            self._ends[action.id] = mib

    def start(self, after: tuple[str, ...], need_mib: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The same for a start that needs so much: what it comes after, ``after`` first, and what else it waits for."""
        if not need_mib or not self._known:
            return after, ()
        self._left -= need_mib
        left = self._left + sum(self._ends.get(step, 0) for step in after)
        texts: list[str] = []
        for text, mib in self._stopping:
            if left < 0:
                texts.append(text)
                left += mib
        more: list[str] = []
        for step, mib in self._ends.items():
            if left < 0 and step not in after:
                more.append(step)
                left += mib
        return (*after, *more), tuple(texts)
