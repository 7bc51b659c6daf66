"""The world notices what must not be: otherwise nothing above it would show anything."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import pytest

from tests.simulation import invariants
from tests.simulation.files_seam import Undisturbed
from tests.simulation.manners import Machine
from tests.simulation.running import Run
from tests.simulation.seam import installed
from tests.simulation.stories import CHAT, Story
from tests.simulation.world import STATE, Launch, Violation


@pytest.fixture
def machine() -> Iterator[Machine]:
    """One engine, at rest."""
    with installed():
        yield Run(Story("one", (CHAT,)).begin(), Undisturbed(), steady_s=1.0).to_rest()


def only(machine: Machine) -> Launch:
    (launch,) = (launch for launch in machine.launches.values() if machine.of(launch.id))
    return launch


def test_at_rest_nothing_is_wrong(machine: Machine) -> None:
    invariants.at_end(machine)
    invariants.records_know_all(machine)


def test_a_second_start_of_a_replica(machine: Machine) -> None:
    launch = only(machine)
    machine.kill("chat/0", "leader")
    again = Launch("2", "chat/0", 999, launch.argv, launch.gpus, machine.now, 0, 0)
    with pytest.raises(Violation, match="is started while core"):
        invariants.at_spawn(machine, again)


def test_a_signal_to_a_stranger_and_one_too_hard(machine: Machine) -> None:
    with pytest.raises(Violation, match="stranger"):
        invariants.at_signal(machine, machine.stranger(), signal.SIGTERM)
    with pytest.raises(Violation, match="never asked"):
        invariants.at_signal(machine, only(machine).leader, signal.SIGKILL)


def test_a_process_without_a_record(machine: Machine) -> None:
    path = f"{STATE}/launches/{only(machine).id}.json"
    node = machine.disk.node(path)
    whole = node.content
    node.content = json.dumps({**json.loads(whole), "ended": True}).encode()
    with pytest.raises(Violation, match="says that it ended"):
        invariants.records_know_all(machine)
    node.content = whole[:40]
    with pytest.raises(Violation, match="cannot be read"):
        invariants.records_know_all(machine)
    machine.disk.unlink(path)
    with pytest.raises(Violation, match="no record"):
        invariants.records_know_all(machine)


def test_a_gpu_over_its_memory(machine: Machine) -> None:
    machine.gpus[0].holds[machine.stranger()] = machine.gpus[0].total_mib
    with pytest.raises(Violation, match="GPU 0 holds"):
        invariants.gpus_hold(machine)


def test_a_leftover_and_a_missing_engine_at_the_end(machine: Machine) -> None:
    machine.kill("chat/0", "leader")
    with pytest.raises(Violation, match="in the end"):
        invariants.at_end(machine)
    machine.wanted = ()
    with pytest.raises(Violation, match="left of chat/0"):
        invariants.at_end(machine)


def test_an_engine_that_finds_too_little_memory(machine: Machine) -> None:
    launch = only(machine)
    machine.launches["2"] = Launch("2", "code/0", 999, launch.argv, launch.gpus, machine.now, 0, 0)
    core = machine.start("core", 1, None, launch="2")
    with pytest.raises(Violation, match="no room"):
        machine.take_gpus("2", core.pid)
