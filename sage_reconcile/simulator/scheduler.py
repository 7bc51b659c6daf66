"""Requests on their way through the engine: waiting, running, drained, refused.

There is one scheduler in the API server, and each request runs through it in a thread of its own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sage_reconcile.simulator.flags import Options

_LOOK_S = 0.05
"""How often a request that cannot go on looks whether its client is still there."""


class EngineDead(Exception):
    """The engine core is gone: no request will ever be answered."""


class Draining(Exception):
    """The server is ending and takes no new requests."""


class ClientGone(Exception):
    """The client has closed its connection."""


@dataclass(slots=True)
class Counters:
    """What the metrics tell."""

    running: int = 0
    waiting: int = 0
    kv_tokens: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    stop: int = 0
    length: int = 0
    abort: int = 0


class Scheduler:
    """Lets requests in, paces their tokens, and knows when none is left."""

    def __init__(self, options: Options, core_pids: list[int]) -> None:
        self.options = options
        self.counters = Counters()
        self.dead = threading.Event()
        self.draining = False
        self.hanging = options.hang
        self._core_pids = core_pids
        self._changed = threading.Condition()

    @property
    def idle(self) -> bool:
        """Whether no request is in flight; one is until its last byte was sent."""
        return not self.counters.running and not self.counters.waiting

    @contextmanager
    def request(self, prompt_tokens: int, gone: Callable[[], bool]) -> Iterator[Iterator[None]]:
        """Take a request in; each step of what is yielded is a token.

        Args:
            prompt_tokens: how long its prompt is.
            gone: whether its client has left.

        Raises:
            Draining: nothing is taken in any more.
            EngineDead: before or in the middle of the request.
            ClientGone: in the middle of it.
        """
        self._enter(gone)
        held = [prompt_tokens]
        with self._changed:
            self.counters.prompt_tokens += prompt_tokens
            self.counters.kv_tokens += prompt_tokens
        try:
            yield self._tokens(held, gone)
        finally:
            with self._changed:
                self.counters.running -= 1
                self.counters.kv_tokens -= held[0]
                self._changed.notify_all()

    def count_end(self, reason: str) -> None:
        """Count a request that ended by ``stop``, ``length`` or ``abort``."""
        with self._changed:
            setattr(self.counters, reason, getattr(self.counters, reason) + 1)

    def _enter(self, gone: Callable[[], bool]) -> None:
        with self._changed:
            self._check()
            self.counters.waiting += 1
            try:
                while self.counters.running >= self.options.max_num_seqs:
                    self._changed.wait(_LOOK_S)
                    self._check_alive(gone)
                self.counters.running += 1
            finally:
                self.counters.waiting -= 1
                self._changed.notify_all()

    def _check(self) -> None:
        if self.draining:
            raise Draining
        if self.dead.is_set():
            raise EngineDead

    def _check_alive(self, gone: Callable[[], bool]) -> None:
        if self.dead.is_set():
            raise EngineDead
        if gone():
            raise ClientGone

    def _tokens(self, held: list[int], gone: Callable[[], bool]) -> Iterator[None]:
        while True:
            due = time.monotonic() + self.options.token_s
            while (left := due - time.monotonic()) > 0 or self._stuck():
                self.dead.wait(min(left, _LOOK_S) if left > 0 else _LOOK_S)
                self._check_alive(gone)
            self._check_alive(gone)
            with self._changed:
                self.counters.generation_tokens += 1
                self.counters.kv_tokens += 1
                held[0] += 1
            yield

    def _stuck(self) -> bool:
        """Whether the engine makes no progress: by order, or because somebody stopped its core with SIGSTOP."""
        return self.hanging or any(_stopped(pid) for pid in self._core_pids)


def _stopped(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat[stat.rindex(b")") + 2 :][:1] == b"T"
