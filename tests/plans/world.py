"""A machine written down in a few readable lines of YAML, turned into what the planner is given.

Times are ages: ``ready: 5m`` is "ready for five minutes". Launches run what the case's ``ran`` file says
(its ``file`` where it has none), so that drift is real.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from sage_reconcile.core.declared import declared_gpus, declared_links
from sage_reconcile.core.failure import LASTING, Failure, FailureKind
from sage_reconcile.core.host_needs import host_need
from sage_reconcile.core.lifecycle import StopCause
from sage_reconcile.core.model_config import read_model_config
from sage_reconcile.core.observed import (
    ComputeMode,
    Exit,
    Gpu,
    GpuProcess,
    HostMemory,
    Launch,
    Life,
    Link,
    ModelFacts,
    Observed,
    Port,
)
from sage_reconcile.core.promise import Known, promised_mib
from sage_reconcile.core.resolve import secret_marks
from sage_reconcile.core.spec import Desired
from sage_reconcile.core.units import read_seconds, size_mib
from tests.reading import desired

NOW = 1_000_000.0
READY_AFTER_S = 60.0


@dataclass(frozen=True)
class Case:
    """One golden case."""

    path: Path
    about: str
    desired: Desired
    observed: Observed
    now: float
    tried: frozenset[str] | None
    allow_moves: bool
    plan: str


def load(path: Path) -> Case:
    data = yaml.safe_load(path.read_text())
    unknown = data.keys() - {
        "about",
        "file",
        "ran",
        "environ",
        "ran_environ",
        "observed",
        "now",
        "tried",
        "moves",
        "plan",
    }
    assert not unknown, f"{path.name}: unknown keys {sorted(unknown)}"
    environ = data.get("environ", {})
    now = float(data.get("now", NOW))
    wanted = desired(data["file"], environ)
    ran = desired(data.get("ran", data["file"]), data.get("ran_environ", environ))
    observed = world(data.get("observed", {}), ran, now, wanted)
    tried = frozenset(data["tried"]) if "tried" in data else None
    return Case(path, data["about"], wanted, observed, now, tried, data.get("moves", False), data.get("plan", ""))


def world(data: Mapping[str, Any], ran: Desired, now: float, wanted: Desired | None = None) -> Observed:
    """``now: true`` in a launch: it runs what the case's ``file`` says, not what its ``ran`` does."""
    unknown = data.keys() - {"gpus", "gpu_note", "launches", "ports", "models", "links", "declared", "host"}
    assert not unknown, f"observed: unknown keys {sorted(unknown)}"
    if data.get("declared"):
        assert data.keys() == {"declared"}, "a declared box is empty"
        gpus = declared_gpus(ran.host.declared, simulated=True)
        return Observed(gpus, links=declared_links(ran.host.declared, gpus))
    models = {name: _facts(facts) for name, facts in data.get("models", {}).items()}
    bare = tuple(_gpu(index, item) for index, item in enumerate(data.get("gpus", [])))
    launches: list[Launch] = []
    held: dict[str, list[GpuProcess]] = {}
    for number, item in enumerate(data.get("launches", [])):
        host = _host(data.get("host"))
        runs = wanted if "now" in item and wanted else ran
        launch = _launch(item, number, ran=runs, gpus=bare, models=models, now=now, host=host)
        launches.append(launch)
        for process, uuid in _held(item, launch):
            held.setdefault(uuid, []).append(process)
    gpus = tuple(
        _filled(gpu, item, held.get(gpu.uuid, [])) for gpu, item in zip(bare, data.get("gpus", []), strict=True)
    )
    ports = tuple(Port(int(number), holder or "") for number, holder in data.get("ports", {}).items())
    return Observed(
        gpus,
        tuple(launches),
        ports,
        models,
        _links(data.get("links", {})),
        data.get("gpu_note", ""),
        host_memory=_host(data.get("host")),
    )


def _host(text: str | None) -> HostMemory | None:
    """``24GiB, 20GiB available``."""
    if text is None:
        return None
    total, available = text.removesuffix(" available").split(", ")
    return HostMemory(size_mib(total), size_mib(available))


def _links(data: Mapping[str, list[list[int]]]) -> dict[frozenset[str], Link]:
    """``nvlink: [[0, 1], [2, 3]]``: groups of GPUs whose pairs are so linked; the best told of a pair counts."""
    return {
        frozenset((f"GPU-{one}", f"GPU-{other}")): link
        for link in reversed(Link)
        for group in data.get(link.value, [])
        for one, other in combinations(group, 2)
    }


def _facts(facts: Mapping[str, Any]) -> ModelFacts:
    return ModelFacts("config.json", read_model_config(facts["config"]))


def _gpu(index: int, item: Any) -> Gpu:
    """``H100 80GiB``, or a map with that under ``gpu``. One that is ``lost`` tells why, and nothing else."""
    fields = item if isinstance(item, dict) else {"gpu": item}
    unknown = fields.keys() - {"gpu", "reserve", "strangers", "problem", "lost", "mode", "simulated", "used", "pci"}
    assert not unknown, f"gpu: unknown keys {sorted(unknown)}"
    name, size = fields["gpu"].rsplit(" ", 1)
    return Gpu(
        uuid=f"GPU-{index}",
        index=index,
        name=name,
        pci_id=fields.get("pci", f"0000:{index:02x}:00.0"),
        memory_total_mib=size_mib(size),
        memory_reserved_mib=size_mib(fields["reserve"]) if "reserve" in fields else 0,
        problem=fields.get("lost") or fields.get("problem", ""),
        faulty="lost" in fields,
        memory_told="lost" not in fields,
        compute_mode=ComputeMode(fields["mode"]) if "mode" in fields else None,
        simulated=fields.get("simulated", False),
    )


def _filled(gpu: Gpu, item: Any, ours: list[GpuProcess]) -> Gpu:
    fields = item if isinstance(item, dict) else {}
    strangers = [_stranger(text) for text in fields.get("strangers", [])]
    processes = () if "lost" in fields else (*ours, *strangers)
    used = (
        gpu.memory_total_mib - gpu.memory_reserved_mib
        if "lost" in fields
        else sum(process.memory_mib or 0 for process in processes)
    )
    return Gpu(
        **{name: getattr(gpu, name) for name in gpu.__slots__}
        | {"processes": processes, "memory_used_mib": size_mib(fields["used"]) if "used" in fields else used}
    )


def _stranger(text: str) -> GpuProcess:
    """``812 alice python 10GiB``; ``?`` for a size that is not told."""
    pid, user, command, size = text.split()
    return GpuProcess(int(pid), None if size == "?" else size_mib(size), user, command)


_LAUNCH_KEYS = {
    *("run", "gpu", "port", "state", "age", "ready", "stopping", "why", "exit", "ended", "failures", "restarts"),
    *("memory", "holds", "id", "pid", "bind", "without", "with", "predecessor", "inner", "host", "host_holds"),
    *("failure", "released", "now"),
}
_LIFE = {"ready": Life.ALIVE, "loading": Life.ALIVE, "degraded": Life.ALIVE, "stopping": Life.ALIVE}


def _launch(
    item: Mapping[str, Any],
    number: int,
    *,
    ran: Desired,
    gpus: tuple[Gpu, ...],
    models: Mapping[str, ModelFacts],
    now: float,
    host: HostMemory | None,
) -> Launch:
    unknown = item.keys() - _LAUNCH_KEYS
    assert not unknown, f"launch: unknown keys {sorted(unknown)}"
    name, index = re.fullmatch(r"(.+)/(\d+)", item["run"]).groups()
    engine = ran.engine(name)
    assert engine is not None, f"{name} is in neither `ran` nor `file`"
    uuids = tuple(f"GPU-{gpu}" for gpu in _list(item.get("gpu", [])))
    there = [gpu for gpu in gpus if gpu.uuid in uuids]
    promised = promised_mib(engine.spec, there[0], Known(models.get(engine.spec.model or ""))) if there else 0
    of_host = host_need(engine, models.get(engine.spec.model or ""), host).mib
    of_host = size_mib(item["host"]) if "host" in item else of_host
    state = item.get("state", "ready")
    created = now - read_seconds(item.get("age", "1h"))
    launch_id = item.get("id", f"{name}-{index}-{number}")
    record = {key: value for key, value in engine.record.items() if key not in item.get("without", [])}
    has_been_ready = state in ("ready", "degraded") or "ready" in item
    exited = "exit" in item or "ended" in item
    return Launch(
        id=launch_id,
        engine_name=name,
        index=int(index),
        spec=record | item.get("with", {}),
        secret_marks=secret_marks(engine.secrets, launch_id),
        gpus=uuids,
        memory_mib=size_mib(item["memory"]) if "memory" in item else promised or 0,
        port=item["port"],
        bind=item.get("bind", ran.host.bind),
        life=_LIFE.get(state) or Life(state),
        created_at=created,
        pid=item.get("pid", 5000 + number),
        ready=state == "ready",
        ready_at=(now - read_seconds(item["ready"]) if "ready" in item else created + READY_AFTER_S)
        if has_been_ready
        else None,
        stopping_since=now - read_seconds(item["stopping"]) if "stopping" in item else None,
        stop_cause=StopCause[item["why"]] if "why" in item else "",
        exit=Exit(item.get("exit"), now - read_seconds(item["ended"]) if "ended" in item else None) if exited else None,
        restarts=item.get("restarts", 0),
        failures=item.get("failures", 0),
        predecessor=item.get("predecessor", ""),
        inner_ports=_range(item["inner"]) if "inner" in item else range(0),
        host_memory_mib=of_host,
        host_held_mib=size_mib(item["host_holds"]) if "host_holds" in item else 0,
        failure=_failure(item["failure"]) if "failure" in item else None,
        released=item.get("released", False),
    )


def _failure(kind: str) -> Failure:
    return Failure(FailureKind(kind), can_recover=FailureKind(kind) not in LASTING)


def _range(text: str) -> range:
    """``20000-20007``."""
    low, high = text.split("-")
    return range(int(low), int(high) + 1)


def _held(item: Mapping[str, Any], launch: Launch) -> list[tuple[GpuProcess, str]]:
    """What NVML shows of a launch on each of its GPUs: as much as promised, unless the case says otherwise."""
    holds = item.get("holds")
    if (launch.life in (Life.EXITED, Life.INTENT, Life.UNPROVEN) and holds is None) or holds == "nothing":
        return []
    mib = None if holds == "unknown" else launch.memory_mib if holds is None else size_mib(holds)
    launch_id = None if launch.life is Life.UNPROVEN else launch.id
    process = GpuProcess(launch.pid or 0, mib, "inference", "VLLM::EngineCor", launch_id)
    return [(process, uuid) for uuid in launch.gpus]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
