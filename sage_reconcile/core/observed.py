"""What one look at the machine records. Plain data: no clock, no I/O.

A value that could not be read is ``None`` and is treated as not available, never as zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from sage_reconcile.core.failure import Failure
from sage_reconcile.core.measured import Measured

if TYPE_CHECKING:
    from sage_reconcile.core.model_config import ModelConfig
    from sage_reconcile.core.weights import Checkpoint


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process holding memory on a GPU, as NVML lists it.

    ``launch`` is the id of our launch it was proven to belong to; None means unmanaged.
    ``memory_mib`` is None where the driver does not say (no permission, an old driver). ``graphics`` tells of one
    that only draws: it does not hold a GPU that is in exclusive-process mode.
    """

    pid: int
    memory_mib: int | None
    user: str = ""
    command: str = ""
    launch: str | None = None
    graphics: bool = False


class ComputeMode(StrEnum):
    """Who may compute on a GPU (``nvidia-smi -c``)."""

    DEFAULT = "default"
    """As many processes as fit."""
    EXCLUSIVE = "exclusive-process"
    """One process at a time."""
    PROHIBITED = "prohibited"
    """None."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU (or one MIG device) and what is on it, in MiB.

    ``memory_used_mib`` is what all processes hold, without the driver's own reserve.
    ``problem`` says why nothing new may be placed here; empty means usable. ``faulty`` tells that what runs here
    suffers from it too: the GPU is lost, or its memory is damaged. Where ``memory_told`` is False, how much is used
    could not be read, and it counts as full.
    ``cuda_total_mib`` is the total that CUDA reports (a little below NVML's) where it is known.
    """

    uuid: str
    index: int
    name: str
    pci_id: str
    memory_total_mib: int
    memory_reserved_mib: int = 0
    memory_used_mib: int = 0
    processes: tuple[GpuProcess, ...] = ()
    simulated: bool = False
    problem: str = ""
    utilization_percent: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    compute_capability: str | None = None
    cuda_total_mib: int | None = None
    numa_node: int | None = None
    compute_mode: ComputeMode | None = None
    faulty: bool = False
    memory_told: bool = True


class Link(StrEnum):
    """The best way between two GPUs, as ``nvidia-smi topo -m`` names it; the best first."""

    NVLINK = "nvlink"
    """NVLink, directly or through a switch."""
    PIX = "pix"
    """At most one PCIe bridge."""
    PXB = "pxb"
    """Several PCIe bridges, and not the host's."""
    PHB = "phb"
    """The PCIe host bridge, that is the CPU."""
    NODE = "node"
    """Several host bridges inside one NUMA node."""
    SYS = "sys"
    """The link between NUMA nodes."""


Links = Mapping[frozenset[str], Link]
"""The link of each pair of GPUs, by their UUIDs; a pair that is not in it has none that is known."""


def link_groups(uuids: Iterable[str], links: Links, worst: Link) -> dict[str, int]:
    """A group's number for each GPU: those of one group are joined by links of which none is worse than ``worst``."""
    order = list(Link)
    near: dict[str, list[str]] = {uuid: [] for uuid in uuids}
    for pair, link in links.items():
        if len(pair) == 2 and order.index(link) <= order.index(worst) and pair <= near.keys():
            one, other = pair
            near[one].append(other)
            near[other].append(one)
    groups: dict[str, int] = {}
    for number, uuid in enumerate(near):
        reached = [] if uuid in groups else [uuid]
        while reached:
            step = reached.pop()
            if step not in groups:
                groups[step] = number
                reached += near[step]
    return groups


class Life(StrEnum):
    """What the kernel says about a launch of ours."""

    INTENT = "intent"
    """Recorded, and the process may be about to exist: neither proven alive nor proven absent."""
    ALIVE = "alive"
    """Its leader runs, and is proven to be ours."""
    LEFTOVER = "leftover"
    """Its leader has ended, but processes of its session still run."""
    EXITED = "exited"
    """Nothing of it runs, and its GPU memory is back."""
    UNPROVEN = "unproven"
    """Something runs in its place that cannot be proven ours: left alone, its memory counted."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a leader ended. ``code`` is as shells give it (128 + signal); None means unknown."""

    code: int | None
    at: float | None

    def text(self) -> str:
        """``exit 1``, ``killed by signal 9`` or ``exit status unknown``."""
        if self.code is None:
            return "exit status unknown"
        if self.code > 128:
            return f"killed by signal {self.code - 128}"
        return f"exit {self.code}"


@dataclass(frozen=True, slots=True)
class Launch:
    """One start of a replica: its durable record, joined with what the kernel says now.

    Times are seconds since the epoch. ``spec`` is the full resolved entry it was started from,
    secrets replaced by their ``${NAME}``; ``secret_marks`` are keyed digests by field path.
    ``failures`` counts the failed launches in a row before this one; ``restarts`` how often the replica
    was started again since its entry last changed. ``predecessor`` is the id of the launch that it takes over
    from: that one ends when this one is ready. ``destination`` are the GPUs, by UUID, on which its replica was
    to be started again when it was stopped. ``inner_ports`` are its own beside ``port``, for what vLLM opens
    inside; none where it is not vLLM, or was started before there were any. ``failure`` is why it ended, where nobody
    asked for that. ``held_mib`` is the most that the driver shows its processes to hold on one GPU now, ``kv_tokens``
    what its KV cache holds; None where it is not told. ``host_memory_mib`` is what it was promised of the host's
    memory, all its processes together, ``host_held_mib`` what these hold of it, shared pages left out.
    ``released`` tells that a person asked for another try since it failed, ``answers_since`` when ``ready`` last
    changed, where that is on record.
    """

    id: str
    engine_name: str
    index: int
    spec: Mapping[str, object]
    secret_marks: Mapping[str, str]
    gpus: tuple[str, ...]
    memory_mib: int
    port: int
    bind: str
    life: Life
    created_at: float
    pid: int | None = None
    ready: bool = False
    ready_at: float | None = None
    stopping_since: float | None = None
    stop_cause: str = ""
    exit: Exit | None = None
    restarts: int = 0
    failures: int = 0
    log_path: str = ""
    stage: str = ""
    predecessor: str = ""
    destination: tuple[str, ...] = ()
    inner_ports: range = range(0)
    failure: Failure | None = None
    held_mib: int | None = None
    kv_tokens: int | None = None
    host_memory_mib: int = 0
    host_held_mib: int = 0
    released: bool = False
    answers_since: float | None = None

    @property
    def replica(self) -> str:
        """``chat/0``: the name of the replica this is a launch of."""
        return f"{self.engine_name}/{self.index}"

    @property
    def ports(self) -> tuple[int, ...]:
        """Every port that is its own: the one it listens on, then the inner ones."""
        return (self.port, *self.inner_ports)

    @property
    def sizes_itself(self) -> bool:
        """Whether it has been ready, and what it takes was left to it: then what it holds is all that it takes."""
        return self.spec.get("memory") == "manual" and self.ready_at is not None

    @property
    def holds(self) -> bool:
        """Whether its GPUs, memory and ports still count as taken."""
        return self.life is not Life.EXITED


@dataclass(frozen=True, slots=True)
class HostMemory:
    """The machine's own memory, or what its cgroup may have of it where that is less, in MiB.

    ``available_mib`` can be had without taking anything from anybody: what only caches files is in it.
    """

    total_mib: int
    available_mib: int


@dataclass(frozen=True, slots=True)
class Port:
    """A TCP port that a process which is not ours listens on, or has bound."""

    number: int
    holder: str = ""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What could be read of a model without loading it.

    ``source`` is the folder it was read from, or where a hub has it; ``config`` what its ``config.json`` says,
    ``checkpoint`` what the headers of its weights say; None where one could not be read, and ``problem`` tells why.
    ``pending`` tells that a hub was asked just now, and that its answer is worth waiting for.
    """

    source: str
    config: ModelConfig | None = None
    checkpoint: Checkpoint | None = None
    problem: str = ""
    pending: bool = False


@dataclass(frozen=True, slots=True)
class Observed:
    """The machine at one moment."""

    gpus: tuple[Gpu, ...] = ()
    launches: tuple[Launch, ...] = ()
    ports: tuple[Port, ...] = ()
    models: Mapping[str, ModelFacts] = field(default_factory=dict)
    links: Links = field(default_factory=dict)
    gpu_note: str = ""
    """Why there are no GPUs, where that is known (no driver, no permission …), or what those there cannot tell."""
    problems: tuple[str, ...] = ()
    """What could not be read, a sentence each."""
    nvlink_counts: Mapping[frozenset[str], int] = field(default_factory=dict)
    """How many NVLinks join a pair whose link is ``NVLINK``, where that is known."""
    measured: Mapping[str, Measured] = field(default_factory=dict)
    """What past starts took, by ``Measured.key``; ``measured.find`` looks up what is known of an engine."""
    host_memory: HostMemory | None = None
    """The host's memory; None where nobody asks for any, or it could not be read."""
