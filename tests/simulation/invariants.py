"""What must hold: at every spawn, signal and change of a record, and at the end of a story."""

from __future__ import annotations

import json
import signal

from tests.simulation.manners import Machine
from tests.simulation.world import STATE, Launch, Violation


def at_spawn(world: Machine, launch: Launch) -> None:
    """No replica twice, and no start before the old one is gone: but for one that takes over from what serves."""
    for other in world.launches.values():
        if other.replica != launch.replica or other.id == launch.id:
            continue
        there = [f"{process.role} {process.pid}" for process in world.members(other.id)]
        if world.of(other.id, "shell") and not other.leader:
            there.append("its shell, which is about to start it")
        if there and not (_predecessor(world, launch) == other.id and other.port != launch.port):
            raise Violation(f"{launch.replica} is started while {', '.join(there)} of {other.id} are there")


def _predecessor(world: Machine, launch: Launch) -> str:
    """The id of the launch that it is to take over from, as its record says."""
    path = f"{STATE}/launches/{launch.id}.json"
    return json.loads(world.disk.node(path).content)["predecessor"] if world.disk.exists(path) else ""


def alone_while_it_loads(world: Machine, launch: Launch) -> None:
    """vLLM measures free memory while it loads, so nothing else of ours may load on its GPUs meanwhile."""
    for other in world.launches.values():
        loads = other.phase in ("shell", "importing", "loading") and other.failed_at is None and world.of(other.id)
        if other.id != launch.id and loads and set(other.gpus) & set(launch.gpus):
            raise Violation(f"{launch.replica} is started while {other.replica} ({other.id}) loads on its GPU")


def at_signal(world: Machine, pid: int, number: int) -> None:
    """Nobody but ours is signalled, and no server is killed that was not asked to end before."""
    process = world.processes[pid]
    if not process.launch:
        raise Violation(f"a stranger is signalled: pid {pid} ({process.role})")
    if number == signal.SIGKILL and process.role == "leader" and signal.SIGTERM not in process.signals:
        raise Violation(f"pid {pid} is killed, and was never asked to end")


def records_know_all(world: Machine) -> None:
    """Of every process that is ours a record tells, which is of this boot and not closed."""
    for launch in world.launches.values():
        about_to = not launch.leader and world.of(launch.id, "shell")
        there = world.members(launch.id)
        if not (there or about_to):
            continue
        path = f"{STATE}/launches/{launch.id}.json"
        who = f"{launch.replica} ({launch.id}) lives"
        if not world.disk.exists(path):
            raise Violation(f"{who} and there is no record of it")
        try:
            record = json.loads(world.disk.node(path).content)
        except ValueError:
            raise Violation(f"{who} and its record cannot be read") from None
        if record["ended"] or record["boot_id"] != world.boot_id:
            raise Violation(f"{who} and its record says that it ended")


def gpus_hold(world: Machine) -> None:
    for gpu in world.gpus:
        if gpu.used_mib > gpu.total_mib:
            raise Violation(f"GPU {gpu.index} holds {gpu.used_mib} of {gpu.total_mib} MiB")


def never_twice(world: Machine) -> None:
    """Two that serve as one replica: only while one takes over from the other."""
    for replica, revisions in world.live().items():
        mine = [launch for launch in world.launches.values() if launch.replica == replica]
        over = any(_predecessor(world, launch) in {other.id for other in mine} for launch in mine)
        if len(revisions) > 2 or (len(revisions) == 2 and not over):
            raise Violation(f"{replica} serves {len(revisions)} times")


def settled(world: Machine) -> str:
    """What is still not as it shall be in the end; empty where all is."""
    live = world.live()
    if live != world.expected():
        return f"{live} serve, and {world.expected()} shall"
    for launch in world.launches.values():
        members = world.members(launch.id)
        if launch.phase != "ready" and members:
            return f"left of {launch.replica} ({launch.id}): {', '.join(f'{m.role} {m.pid}' for m in members)}"
    for gpu in world.gpus:
        if gpu.late:
            return f"GPU {gpu.index} has not given back {gpu.late}"
    return ""


def at_end(world: Machine) -> None:
    """live == desired - unplaced, nothing else of ours is there, and the status says so."""
    wrong = settled(world)
    if wrong:
        raise Violation(f"not as it shall be in the end: {wrong}")
    holding = {pid for gpu in world.gpus for pid in gpu.holds}
    if gone := [pid for pid in holding if pid not in world.processes]:
        raise Violation(f"memory is held by {gone}, who are not there")
    if wrong := told(world):
        raise Violation(wrong)
    names = world.disk.children(f"{STATE}/launches")
    records = {name.removesuffix(".json") for name in names if name.endswith(".json")}
    for name in records:
        try:
            json.loads(world.disk.node(f"{STATE}/launches/{name}.json").content)
        except ValueError:
            raise Violation(f"the record of {name} cannot be read, and nobody will ever drop it") from None
    orphans = [name for name in names if name.rpartition(".")[0] not in records]
    if not world.disk_failed:  # what could not be removed when its record was dropped stays
        orphans += [name for name in world.disk.children(f"{STATE}/tmp") if name not in records]
    if orphans:
        raise Violation(f"the state folder keeps {orphans}, which belong to nothing")


def told(world: Machine) -> str:
    """What the status gets wrong of what serves; empty where nothing."""
    told = {
        replica["name"]: replica["phase"]
        for engine in world.status().get("engines", ())  # type: ignore[attr-defined]
        for replica in engine["replicas"]
        if replica["phase"] in ("Ready", "Degraded")
    }
    if told.keys() != world.expected().keys():
        return f"the status tells of {told}, and {world.expected()} serve"
    return ""
