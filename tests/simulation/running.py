"""A daemon in the world: it boots, is killed, boots again, until all is as it shall be and stays so."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

from sage_reconcile.daemon import Daemon
from sage_reconcile.errors import LockHeld, SageReconcileError
from sage_reconcile.host.state import StateFolder, this_process
from tests.simulation import invariants
from tests.simulation.files_seam import SEAT, Crash, Director, SimulatedPath, Undisturbed
from tests.simulation.loop import SimulatedLoop
from tests.simulation.manners import Machine
from tests.simulation.seam import forget_boot
from tests.simulation.world import FILE, STATE, Violation

RESTART_S = 0.7
"""So long after its end a daemon is started again."""
ENVIRON = {"PATH": "/usr/bin", "HOME": "/root"}


class Over(BaseException):
    """All is as it shall be, and stayed so."""


class Log:
    """The daemon's log goes to the trace."""

    def info(self, event: str, **said: object) -> None:
        SEAT.machine.say(f"LOG {event} {said}")

    warning = error = info


@dataclass
class Run:
    """One world on its way to rest. ``steady_s`` is how long it has to stay as it shall be."""

    machine: Machine
    director: Director
    steady_s: float = 31.0
    limit_s: float = 1500.0
    settled_at: float | None = None
    lives: int = 0

    def to_rest(self) -> Machine:
        """Lives of the daemon, one after another.

        Raises:
            Violation: something must not be, or did not become as it shall be in time.
        """
        self.limit = self.machine.now + self.limit_s
        while not self._one_life():
            self.machine.advance(RESTART_S)
            self.settled_at = None
        invariants.records_know_all(self.machine)
        invariants.at_end(self.machine)
        return self.machine

    def _one_life(self) -> bool:
        """Whether it was the last: whether all is at rest."""
        world = self.machine
        self.lives += 1
        sit_down(world, self.director)
        state = StateFolder(SimulatedPath(STATE))
        loop: SimulatedLoop | None = None
        task: Any = None
        try:
            state.take_lock(this_process("daemon", SimulatedPath(FILE)))
            loop = SimulatedLoop(self._idle)
            task = loop.create_task(Daemon(SimulatedPath(FILE), state, ENVIRON, Log()).run())
            loop.run_until_complete(task)
        except Over:
            return True
        except Crash:
            self.machine = crashed(self.director) or world
            self.machine.say("CRASH")
        except SageReconcileError as error:
            world.say(f"the daemon ends: {error}")
            self._idle()
        finally:
            if loop is not None:
                put_away(loop, task)
        self.machine.end(self.machine.daemon_pid, 137)
        return False

    def _idle(self) -> None:
        world = self.machine
        invariants.gpus_hold(world)
        invariants.never_twice(world)
        invariants.records_know_all(world)
        wrong = "the story goes on" if world.stories_left else invariants.settled(world) or invariants.told(world)
        if world.now > self.limit:
            raise Violation(f"after {self.limit_s:g}s: {wrong or 'the status is wrong'}")
        if wrong:
            self.settled_at = None
        elif self.settled_at is None:
            self.settled_at = world.now
        elif world.now - self.settled_at >= self.steady_s:
            raise Over


def crashed(director: Director) -> Machine | None:
    """The world at the moment of the crash, whatever was done on the way out."""
    kept: bytes | None = getattr(director, "kept", None)
    if kept is None:
        return None
    director.kept = None  # type: ignore[attr-defined]
    return copied(kept)


def copied(kept: bytes) -> Machine:
    found = pickle.loads(kept)  # noqa: S301 - our own
    assert isinstance(found, Machine)
    return found


def sit_down(world: Machine, director: Director) -> None:
    """A new process of the daemon takes the seat."""
    process = world.start("daemon", 1, None, command="sage-reconcile")
    world.daemon_pid = process.pid
    SEAT.machine, SEAT.pid, SEAT.director, SEAT.descriptors = world, process.pid, director, {}
    forget_boot()


def second_daemon(world: Machine) -> bool:
    """Another daemon tries while one runs; whether it was told to go."""
    mine = (SEAT.pid, SEAT.descriptors, SEAT.director)
    other = world.start("daemon", 1, None, command="sage-reconcile")
    SEAT.pid, SEAT.descriptors, SEAT.director = other.pid, {}, Undisturbed()
    try:
        StateFolder(SimulatedPath(STATE)).take_lock(this_process("daemon", SimulatedPath(FILE)))
    except LockHeld as error:
        told = world.disk.node(f"{STATE}/lock").content  # a moment after it was taken it does not say by whom
        return error.exit_code == 75 and (f"pid {mine[0]}" in str(error) or not told)
    else:
        return False
    finally:
        SEAT.pid, SEAT.descriptors, SEAT.director = mine
        world.end(other.pid, 75)
        world.processes.pop(other.pid, None)


def put_away(loop: SimulatedLoop, task: Any) -> None:
    """Drops what is left of a daemon that was killed, without letting it do anything more."""
    kept = SEAT.machine
    SEAT.machine, SEAT.director = copied(pickle.dumps(kept)), Undisturbed()
    if not task.done():
        task._log_destroy_pending = False
        task.get_coro().close()
    loop.close()
    SEAT.machine = kept
