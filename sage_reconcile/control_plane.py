"""The same from Python: ask how the GPUs and engines are, and have engines started and stopped by writing the file.

::

    plane = ControlPlaneManager("engines.yaml")
    receipt = plane.request_engine_startup("Qwen/Qwen3-8B", tensor_parallel_size=2)
    print(receipt["engine_id"], receipt["note"])        # says where nobody follows the file
    plane.get_instances()                               # those that are ready, with their endpoints

Nothing here holds state or a connection: what is asked is looked up at that moment, what is requested is written into
``engines.yaml``, in place. The daemon does the rest; where none follows the file, ``note`` says so, and ``apply()`` has
it done. On a machine without NVIDIA's driver there are simply no GPUs, and ``note`` says why. Sizes called GB are
GiB (1024 to the third power bytes), as vLLM and nvidia-smi count them.

Raised is what the command line would say, a ``SageReconcileError``; ``FileFaults`` where the file is wrong.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, TypedDict

from sage_reconcile.core import changes
from sage_reconcile.core.changes import Change, Present, Wish
from sage_reconcile.core.estimate import Question, estimate
from sage_reconcile.core.extra_args import flags, literal
from sage_reconcile.core.gpu_report import gpu_rows
from sage_reconcile.core.report import status_document
from sage_reconcile.core.weights import Parallel
from sage_reconcile.core.workload import Workload
from sage_reconcile.errors import LockHeld, NotFound, UnknownModel
from sage_reconcile.host import edits, files
from sage_reconcile.host.local import LocalHost
from sage_reconcile.host.models import ModelReader
from sage_reconcile.host.state import Holder, StateFolder, default_folder
from sage_reconcile.host.yaml_text import read_value
from sage_reconcile.reconcile import Pass, look

_MIB_PER_GB = 1024


class GPUStatus(TypedDict):
    """A GPU. Memory in GB; ``memory_free`` is what a new engine could be given; None is what cannot be read."""

    index: int
    name: str
    memory_total: float | None
    memory_used: float | None
    memory_free: float
    utilization: float | None


class EngineState(StrEnum):
    """Where an engine is; of several replicas the one that is furthest from serving counts."""

    RUNNING = "RUNNING"
    """All of its replicas are ready."""
    STARTING = "STARTING"
    """A process runs and loads."""
    PENDING = "PENDING"
    """Wanted, and not started: nobody follows the file, or it waits for its turn."""
    STOPPING = "STOPPING"
    """Not wanted any more, and still there."""
    STOPPED = "STOPPED"
    """Not wanted, and gone."""
    FAILED = "FAILED"
    """It ended by itself, or it has no place; ``reason`` says why."""


class EngineStatus(TypedDict):
    """An engine. ``pid`` and ``port`` are those of its first replica; ``replicas`` has all, as in the status."""

    engine_id: str
    status: EngineState
    reason: str
    pid: int | None
    port: int | None
    model: str | None
    gpu_ids: list[int]
    replicas: list[dict[str, Any]]


class Instance(TypedDict):
    """A replica that is ready, and where it answers."""

    engine_id: str
    replica: str
    model: str
    endpoint: str
    pid: int


class Receipt(TypedDict):
    """What became of a request: whether the file was changed, its generation, and who follows it."""

    engine_id: str
    changed: bool
    generation: int
    daemon_pid: int | None
    note: str


class _Door:
    """A file and its state folder, by default those of the command line; looked at afresh at every call."""

    def __init__(
        self,
        file: str | Path | None = None,
        state_dir: str | Path | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.environ = os.environ if environ is None else environ
        given = file or self.environ.get("SAGE_RECONCILE_FILE") or files.default_file()
        self.file = Path.cwd() / given
        folder = state_dir or self.environ.get("SAGE_RECONCILE_STATE_DIR") or default_folder(self.environ)
        self.state = StateFolder(Path.cwd() / folder)

    @property
    def daemon(self) -> Holder | None:
        """The daemon that follows this file, or None."""
        holding = self.state.holder()
        return holding if holding and holding.role == "daemon" and holding.file == str(self.file) else None

    def _look(self) -> Pass:
        desired = files.load(self.file, self.environ).desired
        return look(LocalHost(self.state, self.file.parent, self.environ), desired)

    def _status(self) -> dict[str, Any]:
        seen = self._look()
        return status_document(seen.desired, seen.observed, seen.plan, seen.now)

    def _note(self) -> str:
        return "" if self.daemon else f"no daemon follows {self.file}: nothing changes on the machine until apply()"

    def _edit(self, decide: Callable[[Present], tuple[str, Sequence[Change]]]) -> Receipt:
        name = ""

        def decided(present: Present) -> Sequence[Change]:
            nonlocal name
            name, found = decide(present)
            return found

        edited = edits.edit(self.file, self.environ, decided)
        daemon = self.daemon
        return {
            "engine_id": name,
            "changed": edited.is_change,
            "generation": self.state.generation(edited.after.desired.digest)[0],
            "daemon_pid": daemon.pid if daemon else None,
            "note": self._note(),
        }


class GPUResourceManager(_Door):
    """What the GPUs have, and what a model would take. Occupancy is read from the driver at every call."""

    note: str = ""
    """Why no GPU was found at the last call of ``get_system_status``; empty where some were."""

    def get_system_status(self) -> list[GPUStatus]:
        """The GPUs by index; none where there is no driver, and ``note`` then says why."""
        seen = self._look()
        self.note = "" if seen.observed.gpus else (seen.observed.gpu_note or "no GPU is here")
        return [
            {
                "index": row["index"],
                "name": row["name"],
                "memory_total": _gb(row["memory_total_mib"]),
                "memory_used": _gb(row["memory_used_mib"]),
                "memory_free": row["memory_free_mib"] / _MIB_PER_GB,
                "utilization": row["utilization_percent"],
            }
            for row in gpu_rows(seen.desired.host, seen.observed)
        ]

    def check_resource_availability(self, required_memory_gb: float, count: int = 1) -> list[int]:
        """The indices of ``count`` GPUs that each have this much free, the fullest first; empty where there are fewer.

        What is excluded, faulty or kept for one engine alone has nothing free.
        """
        fitting = [gpu for gpu in self.get_system_status() if gpu["memory_free"] >= required_memory_gb]
        fitting.sort(key=lambda gpu: (gpu["memory_free"], gpu["index"]))
        return [gpu["index"] for gpu in fitting[:count]] if len(fitting) >= count else []

    def estimate_model_memory(self, model_name: str, tensor_parallel_size: int = 1) -> float:
        """GB of each GPU for one request of the longest context; see ``sage-reconcile estimate`` for its parts.

        The network is not asked: what is not in a folder or the cache here is guessed from its name.

        Raises:
            UnknownModel: neither a folder, nor the cache, nor the name tells how large the model is.
        """
        work = Workload(parallel=Parallel(tensor_parallel_size))
        facts = ModelReader(self.file.parent, self.environ).facts(model_name)
        document = estimate(Question(model_name, work, None, tensor_told=True, longest=False), facts)
        if document is None:
            raise UnknownModel(
                f"nothing here tells how large {model_name} is: give a folder with its config.json, download it into "
                "the Hugging Face cache (HF_HOME), or use a name that tells, such as org/Model-8B"
            )
        return float(document["total_mib"]) / _MIB_PER_GB


class EngineLifecycleManager(_Door):
    """Engines by their names in the file."""

    def spawn_engine(
        self,
        model_id: str,
        gpu_ids: Sequence[int | str],
        port: int,
        extra_args: Sequence[str] | Mapping[str, object] | None = None,
    ) -> str:
        """Writes an engine on these GPUs (index or UUID) and port into the file; returns its name.

        One replica takes all of the GPUs, by tensor parallelism. ``extra_args`` are vLLM's flags, as words or as a map.
        The same call twice is one engine; the same model on another port is another one.

        Raises:
            EditRefused: the file cannot be changed so.
        """
        fields = [("port", port), *flags(extra_args, read_value)]
        if gpu_ids:
            fields += [("gpus", list(gpu_ids)), ("tensor_parallel_size", len(gpu_ids))]

        def decide(present: Present) -> tuple[str, Sequence[Change]]:
            name = changes.name_for(model_id)
            known = present.desired.engine(name)
            if known is not None and (known.spec.model != model_id or known.spec.port != port):
                name = f"{name}-{port}"
            return changes.start(Wish(literal(model_id), name, fields=fields), present)

        return self._edit(decide)["engine_id"]

    def stop_engine(self, engine_id: str, *, remove: bool = False) -> bool:
        """Asks for no replica of an engine, or takes it out of the file; whether that was not so already.

        Raises:
            NotFound: the file names no such engine.
        """
        return self._edit(lambda now: (engine_id, changes.stop(now, engine_id, remove=remove)))["changed"]

    def get_engine_status(self, engine_id: str) -> EngineStatus:
        """Where an engine is.

        Raises:
            NotFound: the file names no such engine, and nothing of it runs.
        """
        found = next((status for status in self.list_engines() if status["engine_id"] == engine_id), None)
        if found is None:
            raise NotFound(f"the file names no engine {engine_id!r}, and nothing of it runs")
        return found

    def list_engines(self) -> list[EngineStatus]:
        """All engines of the file, in its order, then those of which something still runs."""
        note = self._note()
        return [_engine(row, note) for row in self._status()["engines"]]


class ControlPlaneManager(_Door):
    """Requests, and the whole at a glance."""

    def request_engine_startup(
        self,
        model_id: str,
        *,
        engine_label: str = "",
        replicas: int | None = None,
        tensor_parallel_size: int | None = None,
        pipeline_parallel_size: int | None = None,
        required_memory_gb: float | None = None,
        port: int | None = None,
        gpu_ids: Sequence[int | str] | None = None,
        extra_args: Sequence[str] | Mapping[str, object] | None = None,
    ) -> Receipt:
        """Writes an engine into the file, or brings a stopped one back; twice is once.

        ``model_id`` may be the name of an engine that is stopped. What is None is left as it is, or to the defaults.
        ``required_memory_gb`` is of each GPU.

        Raises:
            EditRefused: the file cannot be changed so.
        """
        memory = None if required_memory_gb is None else f"{round(required_memory_gb * _MIB_PER_GB)}MiB"
        given = {
            "tensor_parallel_size": tensor_parallel_size,
            "pipeline_parallel_size": pipeline_parallel_size,
            "gpus": None if gpu_ids is None else list(gpu_ids),
            "memory": memory,
            "port": port,
        }
        fields = [(name, value) for name, value in given.items() if value is not None]
        wish = Wish(literal(model_id), engine_label, replicas, [*fields, *flags(extra_args, read_value)])
        return self._edit(lambda now: changes.start(wish, now))

    def request_engine_shutdown(self, engine_id: str, *, remove: bool = False) -> Receipt:
        """Asks for no replica of an engine, or takes it out of the file.

        Raises:
            NotFound: the file names no such engine.
        """
        return self._edit(lambda now: (engine_id, changes.stop(now, engine_id, remove=remove)))

    def get_cluster_status(self) -> dict[str, Any]:
        """Engines and GPUs as in ``status -o json``, whether all is as it should be, and who follows the file."""
        document, daemon = self._status(), self.daemon
        return {
            "engines": document["engines"],
            "gpus": document["gpus"],
            "converged": document["converged"],
            "daemon_pid": daemon.pid if daemon else None,
            "note": self._note(),
        }

    def get_instances(self) -> list[Instance]:
        """The replicas that are ready."""
        return [
            {
                "engine_id": engine["name"],
                "replica": replica["name"],
                "model": engine["served_model_name"],
                "endpoint": replica["endpoint"],
                "pid": replica["pid"],
            }
            for engine in self._status()["engines"]
            for replica in engine["replicas"]
            if replica["phase"] == "Ready"
        ]

    def apply(self) -> dict[str, Any]:
        """Has all done that the file asks, by the daemon or else by a process of its own; returns when it is settled.

        What is started belongs to neither this process nor that one, and outlives both.

        Raises:
            LockHeld: somebody else reconciles with this state folder.
        """
        command = [sys.executable, "-m", "sage_reconcile", "apply", "--yes"]
        command += ["--file", str(self.file), "--state-dir", str(self.state.path)]
        done = subprocess.run(command, env=dict(self.environ), check=False, capture_output=True, text=True)
        if done.returncode == LockHeld.exit_code:
            raise LockHeld(done.stderr.strip().removeprefix("error: "))
        return self.get_cluster_status()


def _gb(mib: int | None) -> float | None:
    return None if mib is None else mib / _MIB_PER_GB


def _engine(row: Mapping[str, Any], note: str) -> EngineStatus:
    replicas = row["replicas"]
    first, state = next(iter(replicas), {"pid": None, "port": None}), _state(row)
    reasons = [f"{replica['name']}: {replica['reason']}" for replica in replicas if replica["reason"]]
    return {
        "engine_id": row["name"],
        "status": state,
        "reason": "; ".join(reasons) or (note if state is EngineState.PENDING else ""),
        "pid": first["pid"],
        "port": first["port"],
        "model": row["model"],
        "gpu_ids": sorted({gpu["index"] for one in replicas for gpu in one["gpus"] if gpu["index"] is not None}),
        "replicas": replicas,
    }


def _state(row: Mapping[str, Any]) -> EngineState:
    replicas = row["replicas"]
    phases = {replica["phase"] for replica in replicas}
    if not row["desired"]:
        return EngineState.STOPPING if replicas else EngineState.STOPPED
    if {"BackOff", "Stalled"} & set(phases) or any(replica["unplaced"] for replica in replicas):
        return EngineState.FAILED
    for phase, state in (("Pending", EngineState.PENDING), ("Starting", EngineState.STARTING)):
        if phase in phases:
            return state
    if phases & {"Stopping", "Unknown"}:
        return EngineState.STOPPING
    return EngineState.RUNNING
