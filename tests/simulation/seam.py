"""The product's other system calls, and NVML's, led to the world. ``installed`` puts them in place.

What is put in place stands right below the product's rooms: everything from reading ``/proc`` to the daemon's loop is
the product's own code.
"""

from __future__ import annotations

import asyncio
import errno
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from sage_reconcile import daemon, telling
from sage_reconcile.host import (
    documents,
    files,
    journal,
    learned,
    local,
    logs,
    metrics,
    observe,
    oom,
    ports,
    probes,
    processes,
    records,
    state,
    watch,
)
from tests.simulation import invariants
from tests.simulation.disk import failing
from tests.simulation.files_seam import OS, SEAT, SimulatedFcntl, SimulatedPath, machine, remove_tree
from tests.simulation.world import Gpu

_MIB = 1 << 20


class SimulatedTime:
    """A clock that only moves when the world does."""

    strftime = staticmethod(time.strftime)
    gmtime = staticmethod(time.gmtime)

    def time(self) -> float:
        return machine().wall

    def monotonic(self) -> float:
        return machine().now

    def sleep(self, seconds: float) -> None:
        SEAT.wait(seconds)


class SimulatedSignal:
    """``signal`` with its one call that reaches another process."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("SIG") or name == "Signals":
            return getattr(signal, name)
        raise AttributeError(f"the simulated system has no signal.{name}")

    def pidfd_send_signal(self, descriptor: int, number: int) -> None:
        found = SEAT.descriptors[descriptor]

        def send() -> None:
            process = machine().processes.get(found.pid)
            if process is None or process.inode != found.inode:
                raise failing(errno.ESRCH, "")
            invariants.at_signal(machine(), found.pid, number)
            machine().signal(found.pid, number)

        SEAT.effect("signal", f"{number} to {found.pid}", send)


class SimulatedPopen:
    """Starts the shell of a launch: the only program that the product starts."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        stdin: int,
        stdout: int,
        stderr: int,
        cwd: SimulatedPath,
        env: dict[str, str],
        start_new_session: bool,
    ) -> None:
        assert words[:2] == ["/bin/sh", "-s"]
        assert start_new_session
        script = SEAT.descriptors[stdin].content.decode()
        command = re.search(r"exec (.+) </dev/null >&2\)", script)
        assert command, f"the shell would start nothing: {script}"
        argv = shlex.split(command[1])

        def spawn() -> tuple[int, int]:
            if not cwd.exists():
                raise failing(errno.ENOENT, str(cwd))
            world = machine()
            run, log = SEAT.descriptors[stdout].description, SEAT.descriptors[stderr].description
            shell = world.spawn(argv, env, run, log)
            invariants.at_spawn(world, world.launches[shell.launch])
            invariants.alone_while_it_loads(world, world.launches[shell.launch])
            invariants.records_know_all(world)
            return shell.pid, shell.inode

        self.pid, self.inode = SEAT.effect("spawn", env["SAGE_RECONCILE_REPLICA"], spawn)

    def poll(self) -> int | None:
        return 0 if machine().reap(self.pid, self.inode) else None


class SimulatedExecutor:
    """Threads that ask: each answer comes a moment later."""

    def __init__(self, **_: object) -> None:
        pass

    def submit(self, asked: Callable[..., None], *arguments: object) -> Any:
        over: list[bool] = []

        def answer() -> None:
            over.append(True)
            asked(*arguments)

        asyncio.get_running_loop().call_later(machine().manners.probe_s, answer)
        return SimpleNamespace(done=lambda: bool(over))

    def shutdown(self, *, wait: bool, cancel_futures: bool) -> None:
        pass


class SimulatedFileWatcher:
    """Tells the daemon of what happens near its file, where this machine notices it at all."""

    current: SimulatedFileWatcher | None = None

    def __init__(self, file: SimulatedPath, changed: Callable[[], None]) -> None:
        self.changed = changed
        SimulatedFileWatcher.current = self

    def refresh(self) -> None:
        pass

    def close(self) -> None:
        SimulatedFileWatcher.current = None


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


class SimulatedNvml(SimpleNamespace):
    """NVIDIA's library as far as it knows these GPUs; what it lacks it never had."""

    NVMLError = NVMLError
    nvmlMemory_v2 = 2  # noqa: N815 - NVML's own name
    NVML_TEMPERATURE_GPU = 0
    NVML_COMPUTEMODE_DEFAULT, NVML_COMPUTEMODE_EXCLUSIVE_THREAD = 0, 1
    NVML_COMPUTEMODE_PROHIBITED, NVML_COMPUTEMODE_EXCLUSIVE_PROCESS = 2, 3
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0
    NVML_NVLINK_MAX_LINKS = 0

    def nvmlInit(self) -> None:  # noqa: N802
        if machine().driver_gone:
            raise NVMLError(9)

    def nvmlShutdown(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self.nvmlInit()
        return len(machine().gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        self._gpu(index)
        return index

    def _gpu(self, index: int) -> Gpu:
        gpu = machine().gpus[index]
        if gpu.lost:
            raise NVMLError(15)
        return gpu

    def nvmlDeviceGetPciInfo_v3(self, index: int) -> Any:  # noqa: N802
        return SimpleNamespace(busId=f"00000000:{0x10 + self._gpu(index).index:02X}:00.0")

    def nvmlDeviceGetName(self, index: int) -> str:  # noqa: N802
        self._gpu(index)
        return "NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetUUID(self, index: int) -> str:  # noqa: N802
        return self._gpu(index).uuid

    def nvmlDeviceGetMemoryInfo(self, index: int, version: int = 1) -> Any:  # noqa: N802
        gpu = self._gpu(index)
        if gpu.silent:
            raise NVMLError(999)
        return SimpleNamespace(total=gpu.total_mib * _MIB, reserved=0, used=gpu.used_mib * _MIB)

    def nvmlDeviceGetComputeRunningProcesses_v3(self, index: int) -> list[Any]:  # noqa: N802
        gpu = self._gpu(index)
        if gpu.silent:
            raise NVMLError(999)
        late = gpu.late.values() if machine().manners.named_when_late else ()
        return [SimpleNamespace(pid=pid, usedGpuMemory=mib * _MIB) for pid, mib in [*gpu.holds.items(), *late]]


def answers(host: str, port: int, path: str, timeout_s: float) -> int | None:
    return machine().health(port)


def says_of_itself(host: str, port: int) -> metrics.EngineMetrics | None:
    """``/metrics`` of an engine that is ready."""
    if machine().health(port) != 200:
        return None
    return metrics.parse('vllm:cache_config_info{block_size="16",num_gpu_blocks="1000"} 1\n')


def can_bind(bind: str, port: int, *, reuse: bool) -> bool:
    return port not in machine().ports


def sockets() -> dict[int, int]:
    return dict(machine().ports)


def user_and_command(pid: int) -> tuple[str, str]:
    process = machine().processes.get(pid)
    return ("root", process.command) if process else ("", "")


def token(size: int) -> str:
    return f"{machine().number():0{2 * size}x}"


@contextmanager
def installed() -> Iterator[None]:
    """The product runs in the world until this is left."""
    clock, numbers, locks = SimulatedTime(), SimulatedSignal(), SimulatedFcntl()
    starts = SimpleNamespace(Popen=SimulatedPopen)
    places: list[tuple[Any, dict[str, Any]]] = [
        (processes, {"os": OS, "time": clock, "signal": numbers, "fcntl": locks, "subprocess": starts}),
        (processes, {"Path": SimulatedPath, "user_and_command": user_and_command}),
        (records, {"os": OS}),
        (state, {"os": OS, "time": clock, "fcntl": locks, "Path": SimulatedPath}),
        (files, {"Path": SimulatedPath}),
        (documents, {"os": OS}),
        (local, {"os": OS, "time": clock, "Path": SimulatedPath, "secrets": SimpleNamespace(token_hex=token)}),
        (local, {"shutil": SimpleNamespace(rmtree=remove_tree)}),
        (observe, {"time": clock}),
        (ports, {"_sockets": sockets, "_can_bind": can_bind, "_table": lambda: (), "_holders": lambda wanted: {}}),
        (probes, {"_get": answers, "read_metrics": says_of_itself, "ThreadPoolExecutor": SimulatedExecutor}),
        (learned, {"time": clock, "Path": SimulatedPath}),
        (oom, {"kills": lambda: 0, "killed": lambda pids, since_s: ""}),
        (logs, {"os": OS}),
        (journal, {"os": OS}),
        (telling, {"os": OS, "time": clock}),
        (watch, {"os": OS}),
        (daemon, {"os": OS, "time": clock, "FileWatcher": SimulatedFileWatcher}),
    ]
    patches = [patch.multiple(room, **values) for room, values in places]
    patches.append(patch.dict(sys.modules, {"pynvml": SimulatedNvml()}))
    with _all(patches):
        yield
    forget_boot()


@contextmanager
def _all(patches: Sequence[Any]) -> Iterator[None]:
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in reversed(patches):
            one.stop()


def forget_boot() -> None:
    """What a process learns of its boot once, the next one learns anew."""
    processes.boot_id.cache_clear()
    processes._inodes_tell.cache_clear()
