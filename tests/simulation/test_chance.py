"""Random stories from fixed seeds, and a state machine of which Hypothesis makes the stories.

``python -m tests.simulation --seeds 1000`` goes on from here.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sage_reconcile.daemon import Daemon
from sage_reconcile.errors import SageReconcileError
from sage_reconcile.host.state import StateFolder, this_process
from tests.simulation import chance, invariants
from tests.simulation.entries import Entry
from tests.simulation.files_seam import SEAT, Crash, SimulatedPath, Undisturbed
from tests.simulation.loop import SimulatedLoop
from tests.simulation.manners import Machine
from tests.simulation.running import ENVIRON, Log, Run, put_away, sit_down
from tests.simulation.seam import installed
from tests.simulation.stories import Story
from tests.simulation.world import FILE, STATE


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_random_stories_end_as_the_file_says(first: int) -> None:
    with installed():
        counts, wrong = chance.runs(iter(range(first, first + 10)))
    assert not wrong, "\n".join(wrong)
    assert counts["crashes"] > 10
    assert counts["faults"] > 5


def test_a_seed_is_told_again_word_for_word() -> None:
    with installed():
        traces = [chance.run(7)[0].trace for _ in range(2)]
    assert traces[0] == traces[1]
    assert len(traces[0]) > 100


ENTRIES = st.lists(
    st.builds(
        Entry,
        name=st.sampled_from(("chat", "code")),
        revision=st.sampled_from((1000, 2000)),
        replicas=st.integers(0, 2),
        memory_gib=st.sampled_from((10, 14)),
        ranks=st.sampled_from((1, 2)),
    ),
    max_size=2,
    unique_by=lambda entry: entry.name,
).map(tuple)
REPLICAS = st.sampled_from(("chat/0", "chat/1", "code/0", "code/1"))


class Box(RuleBasedStateMachine):
    """A machine to which anything happens while a daemon runs, or none does."""

    @initialize(entries=ENTRIES)
    def begin(self, entries: tuple[Entry, ...]) -> None:
        self.patches = installed()
        self.patches.__enter__()
        self.loop: SimulatedLoop | None = None
        self.task: Any = None
        self.machine = Story("box", entries, gpus=3).begin()
        SEAT.machine = self.machine
        self.start_daemon()

    def start_daemon(self) -> None:
        sit_down(self.machine, Undisturbed())
        state = StateFolder(SimulatedPath(STATE))
        try:
            state.take_lock(this_process("daemon", SimulatedPath(FILE)))
        except SageReconcileError:
            self.machine.end(self.machine.daemon_pid, 1)
            return
        self.loop = SimulatedLoop(lambda: None)
        self.task = self.loop.create_task(Daemon(SimulatedPath(FILE), state, ENVIRON, Log()).run())

    @rule()
    @precondition(lambda self: self.loop is None)
    def daemon_is_started(self) -> None:
        self.start_daemon()

    @rule()
    @precondition(lambda self: self.loop is not None)
    def daemon_is_killed(self) -> None:
        self.machine.end(self.machine.daemon_pid, 137)
        self.drop_daemon()

    def drop_daemon(self) -> None:
        if self.loop is not None:
            put_away(self.loop, self.task)
        self.loop = self.task = None

    @rule(seconds=st.sampled_from((0.001, 0.02, 0.3, 1.0, 7.0, 40.0)))
    def time_passes(self, seconds: float) -> None:
        if self.loop is None:
            self.machine.advance(seconds)
            return
        try:
            self.loop.run_until_complete(asyncio.sleep(seconds))
        except Crash:
            self.drop_daemon()
            return
        if self.task.done():
            self.task.result()

    @rule(entries=ENTRIES)
    def file_is_edited(self, entries: tuple[Entry, ...]) -> None:
        self.machine.edit(entries)

    @rule(role=st.sampled_from(("leader", "core", "worker", "shell")), replica=REPLICAS)
    def process_is_killed(self, replica: str, role: str) -> None:
        self.machine.kill(replica, role)

    @rule(replica=REPLICAS)
    def pid_is_used_again(self, replica: str) -> None:
        self.machine.reuse_pid(replica)

    @rule()
    def gpu_is_lost(self) -> None:
        self.machine.lose_gpu(2)

    @rule(port=st.integers(8000, 8003))
    def port_is_taken(self, port: int) -> None:
        self.machine.take_port(port)

    @rule(full=st.booleans())
    def disk_fills_or_is_freed(self, full: bool) -> None:
        self.machine.disk.full = full
        self.machine.disk_failed = True

    @rule(seconds=st.sampled_from((-1e6, -60.0, 60.0, 1e6)))
    def clock_jumps(self, seconds: float) -> None:
        self.machine.set_clock(seconds)

    @rule()
    def machine_is_booted_again(self) -> None:
        self.drop_daemon()
        self.machine.reboot()

    @invariant()
    def all_is_known_and_fits(self) -> None:
        machine: Machine | None = getattr(self, "machine", None)
        if machine is not None:
            invariants.records_know_all(machine)
            invariants.gpus_hold(machine)
            invariants.never_twice(machine)

    def teardown(self) -> None:
        if not hasattr(self, "patches"):
            return
        try:
            self.machine.end(self.machine.daemon_pid, 137)
            self.drop_daemon()
            self.machine.free_disk()
            self.machine.strangers_leave()
            Run(self.machine, Undisturbed(), steady_s=1.0).to_rest()
        finally:
            self.patches.__exit__(None, None, None)


Box.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class TestBox(Box.TestCase):  # type: ignore[misc, valid-type, name-defined]
    pass
