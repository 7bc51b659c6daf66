"""Is a server ready? Asked over HTTP on loopback, in threads, so that a slow answer holds up nobody."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from sage_reconcile.host.metrics import EngineMetrics, read_metrics

TIMEOUT_S = 2.0
PERIOD_S = 10.0
_UNDER_WAY_S = 0.02
"""So soon it is looked whether a probe under way has come back, since when the next is due depends on it."""
FAILURES = 3
"""This many failed probes in a row take a ready replica for not ready; one good probe takes it back."""


def loopback(bind: str) -> str:
    """Where to reach a server that listens on ``bind``."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind, bind)  # noqa: S104 - compared with, not bound to


def is_ready(host: str, port: int, timeout_s: float = TIMEOUT_S) -> bool:
    """Whether the server answers: ``/health`` with 2xx or, where it has no such page, ``/v1/models``."""
    status = _get(host, port, "/health", timeout_s)
    if status in (404, 405, 501):
        status = _get(host, port, "/v1/models", timeout_s)
    return status is not None and 200 <= status < 300


def _get(host: str, port: int, path: str, timeout_s: float) -> int | None:
    import http.client  # noqa: PLC0415 - 10 ms of every start, and needed only where something runs

    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


@dataclass(frozen=True, slots=True)
class Target:
    """A replica to ask, where, and whether it has been ready before."""

    launch_id: str
    host: str
    port: int
    was_ready: bool


@dataclass(slots=True)
class _State:
    target: Target
    since: float
    next_at: float
    ready: bool
    failures: int = 0
    asking: Future[None] | None = None
    metrics: EngineMetrics | None = None
    """What it said of itself when it first answered."""


class Prober:
    """Keeps asking the replicas it is told of, each at its own pace: often while it loads, then every 10 s.

    ``changed`` is called from a probing thread when a replica has become ready, or is so no more.
    """

    def __init__(self, clock: Callable[[], float], changed: Callable[[], None] = lambda: None) -> None:
        self._clock = clock
        self._changed = changed
        self._states: dict[str, _State] = {}
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="probe")

    def close(self) -> None:
        """Stops asking; a probe under way ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def follow(self, targets: Iterable[Target]) -> None:
        """Takes in which replicas there are. One that was ready before counts as ready until it is known better."""
        now = self._clock()
        known = {target.launch_id: target for target in targets}
        for gone in self._states.keys() - known.keys():
            del self._states[gone]
        for launch_id, target in known.items():
            self._states.setdefault(launch_id, _State(target, now, now, target.was_ready))
        self.ask()

    def ask(self) -> float:
        """Starts the probes that are due; returns when the next one will be, infinity where none will."""
        now = self._clock()
        for state in list(self._states.values()):
            if now >= state.next_at and (state.asking is None or state.asking.done()):
                state.next_at = now + TIMEOUT_S
                state.asking = self._threads.submit(self._probe, state)
        return min((self._look_at(state, now) for state in self._states.values()), default=math.inf)

    @staticmethod
    def _look_at(state: _State, now: float) -> float:
        under_way = state.asking is not None and not state.asking.done()
        return min(state.next_at, now + _UNDER_WAY_S) if under_way else state.next_at

    def ready(self, launch_id: str) -> bool:
        """Whether the replica is ready as far as is known."""
        state = self._states.get(launch_id)
        return state is not None and state.ready

    def metrics(self, launch_id: str) -> EngineMetrics | None:
        """What a ready replica said of itself when it was first seen so; None where it has not been seen so yet."""
        state = self._states.get(launch_id)
        return state.metrics if state else None

    def _probe(self, state: _State) -> None:
        answer = is_ready(state.target.host, state.target.port)
        if answer and state.metrics is None:  # before it counts as ready: who is told of that finds them here
            state.metrics = read_metrics(state.target.host, state.target.port) or EngineMetrics()
        now = self._clock()
        state.failures = 0 if answer else state.failures + 1
        before, state.ready = state.ready, answer or (state.ready and state.failures < FAILURES)
        if answer:  # all at the same moments, so that an idle daemon wakes up seldom
            state.next_at = (now // PERIOD_S + 1) * PERIOD_S
        else:
            state.next_at = now + (1.0 if state.ready else _pace(now - state.since))
        if before != state.ready:
            self._changed()


def ask_once(targets: Sequence[Target]) -> set[str]:
    """The ids of the replicas that are ready, each asked once."""
    if not targets:
        return set()
    with ThreadPoolExecutor(max_workers=min(16, len(targets))) as threads:
        answers = threads.map(lambda target: is_ready(target.host, target.port), targets)
        return {target.launch_id for target, ready in zip(targets, answers, strict=True) if ready}


def _pace(elapsed_s: float) -> float:
    """Seconds until a replica that is not ready is asked again: a tenth of the time it has taken, 0.05 to 2 s."""
    return min(2.0, max(0.05, elapsed_s / 10))
