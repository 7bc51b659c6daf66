"""The engine core and its workers: what they hold, how they load, and whom they outlive.

As in vLLM the API server starts an engine core for each data-parallel rank, and the core a worker for each
tensor and pipeline rank; a single rank is worked by the core itself. All stay in the leader's session and group.
Two pipes lead from each parent to each child: over *control* the parent says stop, over *status* the child
says how it is doing, and the end of either says that the other process is no more.

* A core whose leader is gone without a word stays, with all it holds.
* A worker whose core is gone ends.
* A core that loses a worker ends, and takes the other workers along.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from sage_reconcile.simulator import gpus, log
from sage_reconcile.simulator.flags import Options
from sage_reconcile.simulator.title import set_title

READY, FAILED, STOP = b"R", b"F", b"S"
_WORKER_END_S = 3.0
"""A core gives its workers that long to end, then kills them."""
_CORE_END_S = 5.0
"""A leader gives its cores that long, which is more."""


class StartFailed(Exception):
    """The engine cannot start; the message is the exception that vLLM would print."""


class Stopped(Exception):
    """The parent said stop, or is gone and the child is not one to outlive it."""


@dataclass(slots=True)
class Child:
    """A child as its parent sees it."""

    name: str
    pid: int
    control: int
    status: int

    def stop(self) -> None:
        """Ask it to end; one that is gone already has nothing against it."""
        try:
            os.write(self.control, STOP)
        except BrokenPipeError:
            return


class Parent:
    """The parent as a child sees it."""

    def __init__(self, control: int, status: int, *, outlived: bool) -> None:
        self.control = control
        self.status = status
        self.outlived = outlived
        self.gone = False

    def report(self, word: bytes) -> None:
        """Say how it goes; a parent that is gone does not hear it."""
        try:
            os.write(self.status, word)
        except BrokenPipeError:
            return

    def wait(self, seconds: float | None, others: Iterable[int] = ()) -> list[int]:
        """Wait for one of ``others`` to say something, or for the time to pass.

        Raises:
            Stopped: it is time to end.
        """
        ends = None if seconds is None else time.monotonic() + seconds
        while True:
            poll = select.poll()
            for descriptor in [*others] if self.gone else [self.control, *others]:
                poll.register(descriptor, select.POLLIN)
            left_ms = None if ends is None else max(0, (ends - time.monotonic()) * 1000)
            said = [descriptor for descriptor, _ in poll.poll(left_ms)]
            if self.control in said:
                said.remove(self.control)
                if os.read(self.control, 1) == STOP or not self.outlived:
                    raise Stopped
                self.gone = True
            elif not said and ends is not None:
                return []
            if said:
                return said


def start(name: str, run: Callable[[Parent], None], *, outlives: bool) -> Child:
    """Fork a child that runs ``run`` and never returns here."""
    control_read, control_write = os.pipe()
    status_read, status_write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(control_read)
        os.close(status_write)
        return Child(name, pid, control_write, status_read)
    # vLLM's children are spawned and have nothing of their parent's: not the port, not the ends of other pipes.
    for descriptor in [int(entry) for entry in os.listdir("/proc/self/fd")]:  # noqa: PTH208
        if descriptor > 2 and descriptor not in (control_read, status_write):
            _close(descriptor)
    code = 1
    try:
        run(Parent(control_read, status_write, outlived=outlives))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        error = sys.exc_info()
        if error[0] is not None:
            sys.excepthook(*error)
        # Nothing of the parent's may run on in the child, not even what Python does at its end.
        os._exit(code)


def _close(descriptor: int) -> None:
    try:
        os.close(descriptor)
    except OSError:
        return


def stop(children: list[Child], within_s: float, *, wait: bool) -> None:
    """Make children end, by force after a while; with ``wait`` come back when no trace is left of them."""
    for child in children:
        child.stop()
    ends = time.monotonic() + within_s
    for child in children:
        poll = select.poll()
        poll.register(child.status, select.POLLIN)
        while poll.poll(max(0, (ends - time.monotonic()) * 1000)):
            if not os.read(child.status, 64):
                break
        else:
            os.kill(child.pid, signal.SIGKILL)  # not reaped yet, so the id is still its own
        if wait:
            os.waitpid(child.pid, 0)


def start_core(options: Options, index: int) -> Child:
    """Start the engine core of a data-parallel rank."""
    name = f"EngineCore_DP{index}" if options.data_parallel_size > 1 else "EngineCore"
    return start(name, lambda leader: _Core(options, index, name, leader).run(), outlives=True)


def stop_cores(options: Options, cores: list[Child]) -> None:
    """Take the whole engine down. With a linger time its last processes are left to themselves."""
    stop(cores, _CORE_END_S, wait=not options.linger_s)


def held_mib(options: Options) -> int:
    """What each rank takes of its GPU, in MiB; 0 without simulated GPUs, and the smallest GPU's where they differ."""
    folder = os.environ.get(gpus.ENVIRONMENT)
    if not folder:
        return 0
    totals = gpus.read_inventory(Path(folder))
    seen = gpus.visible(Path(folder), os.environ.get("CUDA_VISIBLE_DEVICES"))
    return min((_need_mib(options, totals[uuid]) for uuid in seen), default=0)


def _need_mib(options: Options, total_mib: int) -> int:
    # 0.29 x 100 is 28.999999999999996 to a computer: a hair is added, so that whole numbers stay whole.
    return int(total_mib * options.gpu_memory_utilization + 1e-6)


class _Core:
    """An engine core."""

    def __init__(self, options: Options, index: int, name: str, leader: Parent) -> None:
        self.options = options
        self.index = index
        self.name = name
        self.leader = leader
        self.workers: list[Child] = []

    def run(self) -> None:
        """Load, say so, and hold the memory until told to stop."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._terminated)
        set_title(f"VLLM::{self.name}")
        lines = log.Log(self.name)
        config = f"model='{self.options.model}', max_seq_len={self.options.max_model_len}"
        lines.info(
            "core.py:133", f"Initializing a V1 LLM engine (v{log.VERSION}) with config: {config}, simulated=True"
        )
        try:
            self._load(lines)
            self.leader.report(READY)
            self._hold(lines)
        except StartFailed as failure:
            lines.error("core.py:1510", "EngineCore failed to start.", *str(failure).splitlines())
            self.leader.report(FAILED)
            stop(self.workers, _WORKER_END_S, wait=True)
            raise SystemExit(1) from None
        except Stopped:
            self._stop(lines)

    def _terminated(self, _signal: int, _frame: FrameType | None) -> None:
        """While it has a leader, the leader decides when to end; an orphan goes."""
        if self.leader.gone:
            os._exit(0)

    def _load(self, lines: log.Log) -> None:
        options = self.options
        ranks = options.tensor_parallel_size * options.pipeline_parallel_size
        device, held = _device(self.index * ranks), held_mib(options)
        if ranks == 1:
            _load_rank(options, self.index, lines, self.leader)
        else:
            self.workers = [self._start_worker(rank, ranks) for rank in range(ranks)]
            self._await_workers()
        if fault := log.kv_cache_fault(options, held):
            raise StartFailed(fault)
        for share in log.capturing(lines, options, held, device):
            self._wait(share * options.load_s)

    def _start_worker(self, rank: int, ranks: int) -> Child:
        pipeline, tensor = divmod(rank, self.options.tensor_parallel_size)
        name = "Worker"
        for letters, size, number in (
            ("DP", self.options.data_parallel_size, self.index),
            ("PP", self.options.pipeline_parallel_size, pipeline),
            ("TP", self.options.tensor_parallel_size, tensor),
        ):
            name += f"_{letters}{number}" if size > 1 else ""
        device = self.index * ranks + rank
        return start(name, lambda core: _work(self.options, name, device, core), outlives=False)

    def _await_workers(self) -> None:
        waiting = {worker.status: worker for worker in self.workers}
        while waiting:
            for status in self.leader.wait(None, waiting):
                if os.read(status, 1) != READY:
                    text = "WorkerProc initialization failed due to an exception in a background process."
                    raise StartFailed(f"Exception: {text} See stack trace for root cause.")
                del waiting[status]

    def _wait(self, seconds: float) -> None:
        """Let time pass during the start; a worker that dies meanwhile fails it."""
        if self.leader.wait(seconds, [worker.status for worker in self.workers]):
            raise StartFailed("Exception: a worker died while the engine was being initialized")

    def _hold(self, lines: log.Log) -> None:
        died = self.leader.wait(None, [worker.status for worker in self.workers])
        for worker in [worker for worker in self.workers if worker.status in died]:
            code = os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1])
            lines.error(
                "multiproc_executor.py:315",
                f"Worker proc {worker.name} died unexpectedly (exit code: {code}), shutting down executor.",
            )
            self.workers.remove(worker)
        # The leader learns of it at once; the other workers may take their time to end.
        os.close(self.leader.status)
        stop(self.workers, _WORKER_END_S, wait=True)
        raise SystemExit(1)

    def _stop(self, lines: log.Log) -> None:
        lines.info("core.py:1499", "[shutdown] EngineCore: exiting busy loop")
        linger_s = self.options.linger_s
        if linger_s and not self.workers:
            os.close(self.leader.status)
            time.sleep(linger_s)
        elif linger_s:
            for worker in self.workers:
                worker.stop()
        else:
            stop(self.workers, _WORKER_END_S, wait=True)


def _work(options: Options, name: str, device: int, core: Parent) -> None:
    """A worker: load, say so, and hold the memory until the core says stop or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    set_title(f"VLLM::{name}")
    lines = log.Log(name)
    try:
        _load_rank(options, device, lines, core)
        core.report(READY)
        core.wait(None)
    except StartFailed as failure:
        lines.error("multiproc_executor.py:953", "WorkerProc failed to start.", *str(failure).splitlines())
        core.report(FAILED)
        raise SystemExit(1) from None
    except Stopped:
        lines.info("multiproc_executor.py:843", "Parent process exited, terminating worker queues")
        time.sleep(options.linger_s)


def _load_rank(options: Options, device: int, lines: log.Log, parent: Parent) -> None:
    """Claim the memory of a rank's GPU, and pretend to load the model onto it."""
    held = _claim(options, device)
    for number, share in enumerate(log.loading(lines, options, held)):
        parent.wait(share * options.load_s)
        if number == 2 and options.fail in ("load", "oom"):
            _fail(options, device, held)


def _claim(options: Options, device: int) -> int:
    """Check and take a rank's memory as vLLM does before it loads anything.

    Raises:
        StartFailed: the GPU does not exist, or has too little free.
    """
    folder = os.environ.get(gpus.ENVIRONMENT)
    if not folder:
        return 0
    seen = gpus.visible(Path(folder), os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not seen:
        raise StartFailed("RuntimeError: No CUDA GPUs are available")
    if device >= len(seen):
        raise StartFailed("torch.AcceleratorError: CUDA error: invalid device ordinal")
    need = _need_mib(options, gpus.read_inventory(Path(folder))[seen[device]])
    try:
        gpus.claim(Path(folder), seen[device], need, log.footprint_mib(options, need))
    except gpus.TooLittleFree as little:
        raise StartFailed(
            f"ValueError: Free memory on device cuda:{device} "
            f"({log.gib(little.free_mib)}/{log.gib(little.total_mib)} GiB) on startup "
            f"is less than desired GPU memory utilization ({options.gpu_memory_utilization}, {log.gib(need)} GiB). "
            "Decrease GPU memory utilization or reduce GPU memory used by other processes."
        ) from None
    return need


def _device(number: int) -> log.Device | None:
    """The GPU of a core's first rank before anything of it is taken; None where none is simulated."""
    folder = os.environ.get(gpus.ENVIRONMENT)
    seen = gpus.visible(Path(folder), os.environ.get("CUDA_VISIBLE_DEVICES")) if folder else []
    if not folder or number >= len(seen):
        return None
    total = gpus.read_inventory(Path(folder))[seen[number]]
    taken = sum(mib for _, mib in gpus.usage(Path(folder))[seen[number]])
    return log.Device(max(0, total - taken), total)


def _fail(options: Options, device: int, held: int) -> NoReturn:
    if options.fail == "oom":
        raise StartFailed(
            f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU {device} has a total "
            f"capacity of {log.gib(held)} GiB of which 0 bytes is free. Including non-PyTorch memory, this process has "
            f"{held / 1024:.2f} GiB memory in use."
        )
    raise StartFailed(f"OSError: Can't load the model {options.model!r}: it does not appear to have safetensors files.")
