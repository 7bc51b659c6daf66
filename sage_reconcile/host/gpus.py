"""Which GPUs there are, how much of their memory is taken, and by which processes.

Everything is asked of NVIDIA's management library (NVML) through ``pynvml``, and any single
question may fail: a GPU falls off the bus, an old driver lacks a function, a user may not ask.
Such a failure costs that one answer (``None``) or that one GPU (its ``problem``), never the look.

``NvmlInventory.read`` goes over the GPUs by NVML's index. A ``_Card`` is one of them: its handle
and its fixed facts, asked once.
Memory is in MiB; a total is rounded down, what is taken is rounded up.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING

from sage_reconcile.core.observed import ComputeMode, Gpu, GpuProcess
from sage_reconcile.host.nvml import Ask

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import ModuleType

_MIB = 1 << 20
_NUMA_WORDS = 16  # of 64 NUMA nodes each

_DRIVER_NOTES = {
    4: "no permission to use the NVIDIA driver: run as a user who may open /dev/nvidiactl and /dev/nvidia*",
    9: "the NVIDIA driver is installed but not loaded: load it with modprobe nvidia",
    12: "no NVIDIA driver: libnvidia-ml.so.1 was not found (a container is to be started with --gpus all)",
    18: "the NVIDIA driver in the kernel and its library differ in version: reboot after a driver update",
}
"""Why NVML cannot be initialized, by its error code."""

_COMPUTE = ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetComputeRunningProcesses_v2")
_MPS = ("nvmlDeviceGetMPSComputeRunningProcesses_v3", "nvmlDeviceGetMPSComputeRunningProcesses_v2")
_GRAPHICS = ("nvmlDeviceGetGraphicsRunningProcesses_v3", "nvmlDeviceGetGraphicsRunningProcesses_v2")


@dataclass(frozen=True, slots=True)
class _Card:
    """A whole GPU, or a MIG device: ``gpu`` has what does not change, or the problem of reaching it.

    ``handle`` is good until NVML is let go.
    """

    handle: object
    gpu: Gpu


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was last read of a card: its index, and its GPUs (more than one, or none, with MIG)."""

    index: int
    gpus: tuple[Gpu, ...]


@dataclass(slots=True)
class _Look:
    """One read while it is being made: the GPUs so far, the cards they are on, the cards that failed."""

    gpus: list[Gpu] = field(default_factory=list)
    present: set[str] = field(default_factory=set)
    unread: list[Gpu] = field(default_factory=list)

    def add_unreadable(self, gpu: Gpu, problem: str) -> None:
        """Adds a GPU as last read: full, as nothing on it is known to be free; its index if still free."""
        taken = {other.index for other in self.gpus}
        lost = replace(
            gpu,
            index=next(index for index in count(gpu.index) if index not in taken),
            memory_used_mib=gpu.memory_total_mib - gpu.memory_reserved_mib,
            processes=(),
            problem=problem,
            faulty=True,
            memory_told=False,
            utilization_percent=None,
            temperature_c=None,
            power_w=None,
        )
        self.gpus.append(lost)


class NvmlInventory:
    """The machine's NVIDIA GPUs. One caller at a time.

    NVML is initialized at the first read and kept. It is initialized anew after a failure, so a
    driver that comes back is seen; and after a read that found a GPU lost or in want of a reset,
    because a reset is refused as long as anybody has NVML open.
    """

    def __init__(self) -> None:
        self._nvml: ModuleType | None = None
        self._cards: dict[int, _Card] = {}
        self._seen: dict[str, _Seen] = {}

    def read(
        self, also: Callable[[ModuleType, Mapping[str, tuple[object, str]]], None] | None = None
    ) -> tuple[tuple[Gpu, ...], str]:
        """The GPUs in the order of their PCI ids, and why there are none or none can be read.

        ``index`` is NVML's own (the one ``nvidia-smi`` shows). A card in MIG mode is no GPU, its
        MIG devices are; device ``d`` of card ``c`` has the index ``100 * (c + 1) + d``, so it
        changes neither with the other cards nor with the other devices.

        A GPU that was read before and now cannot be keeps its UUID, index and total, counts as
        full, and has a ``problem``; likewise all of them if the driver goes away. If another
        GPU has taken over its index, it gets the next free one. A GPU that could never be read is
        ``unknown-<index>``.

        ``also`` may ask NVML more before it is let go: it is given the handle and PCI id of each card with a UUID.
        """
        kept = self._nvml is not None
        nvml, cards, note = self._open()
        if nvml is None and kept:  # the driver may have been reloaded since
            nvml, cards, note = self._open()
        look = _Look()
        if nvml is None:
            for seen in self._seen.values():
                for gpu in seen.gpus:
                    look.add_unreadable(gpu, note)
            return _in_order(look.gpus), note
        asks = [self._read_card(nvml, index, look) for index in range(cards)]
        self._keep_places(look)
        if also is not None:
            also(nvml, {card.gpu.uuid: (card.handle, card.gpu.pci_id) for card in self._cards.values()})
        if any(ask.renew for ask in asks) or look.unread or self._seen.keys() - look.present:
            self.close()
        return _in_order(look.gpus), "" if look.gpus else _nothing_note(cards)

    def close(self) -> None:
        """Lets go of NVML; the next read starts it again."""
        nvml, self._nvml = self._nvml, None
        self._cards.clear()
        if nvml is not None:
            with suppress(nvml.NVMLError):
                nvml.nvmlShutdown()

    def _open(self) -> tuple[ModuleType | None, int, str]:
        """NVML and the number of cards; or None, and the reason."""
        import pynvml  # noqa: PLC0415 - only where there may be a GPU to ask

        try:
            if self._nvml is None:
                pynvml.nvmlInit()
                self._nvml = pynvml
            return pynvml, pynvml.nvmlDeviceGetCount(), ""
        except pynvml.NVMLError as error:
            self.close()
            return None, 0, _DRIVER_NOTES.get(error.value, f"the NVIDIA driver cannot be used ({error})")

    def _read_card(self, nvml: ModuleType, index: int, look: _Look) -> Ask:
        """Adds the GPUs of one card to the look, or notes that it could not be read."""
        ask = Ask(nvml)
        card = self._cards.get(index) or _meet(ask, index)
        if card.gpu.problem:
            look.unread.append(card.gpu)
            return ask
        if not ask.passing:
            self._cards[index] = card
        seen = self._seen.get(card.gpu.uuid)
        gpus = _read_gpus(ask, card, {gpu.uuid: gpu for gpu in seen.gpus} if seen else {})
        if ask.fatal:
            look.unread.append(replace(card.gpu, problem=ask.fatal))
            return ask
        look.gpus.extend(gpus)
        look.present.add(card.gpu.uuid)
        self._seen[card.gpu.uuid] = _Seen(index, gpus)
        return ask

    def _keep_places(self, look: _Look) -> None:
        """Adds every card that is known but was not read, under the identity it had."""
        gone = {uuid: seen for uuid, seen in self._seen.items() if uuid not in look.present}
        for lost in look.unread:
            there = (uuid for uuid, seen in gone.items() if seen.index == lost.index)
            seen = gone.pop(next(there, "") if lost.uuid == f"unknown-{lost.index}" else lost.uuid, None)
            for gpu in seen.gpus if seen else [lost]:
                look.add_unreadable(gpu, lost.problem)
        for seen in gone.values():
            for gpu in seen.gpus:
                look.add_unreadable(gpu, "the driver no longer lists the GPU: see dmesg, and reboot")


def _meet(ask: Ask, index: int) -> _Card:
    """The card of that index with its fixed facts."""
    gpu = Gpu(f"unknown-{index}", index, "unknown GPU", "", 0)
    handle = ask("nvmlDeviceGetHandleByIndex", index)
    if handle is None:
        why = f"the driver gives no access to the GPU ({ask.why('nvmlDeviceGetHandleByIndex')})"
        return _Card(None, replace(gpu, problem=ask.fatal or why))
    pci = ask("nvmlDeviceGetPciInfo_v3", handle)
    capability = ask("nvmlDeviceGetCudaComputeCapability", handle)
    nodes = ask("nvmlDeviceGetMemoryAffinity", handle, _NUMA_WORDS, 0)
    near = (word * 64 + bit for word, bits in enumerate(nodes or ()) for bit in range(64) if bits >> bit & 1)
    gpu = replace(
        gpu,
        name=ask("nvmlDeviceGetName", handle) or gpu.name,
        pci_id=pci.busId if pci else "",
        compute_capability=f"{capability[0]}.{capability[1]}" if capability else None,
        numa_node=next(near, None),
    )
    uuid = ask("nvmlDeviceGetUUID", handle)
    if uuid is None:
        return _Card(None, replace(gpu, problem=ask.fatal or _no_uuid(ask)))
    return _Card(handle, replace(gpu, uuid=uuid))


def _no_uuid(ask: Ask) -> str:
    return f"the GPU cannot be told apart: its UUID cannot be read ({ask.why('nvmlDeviceGetUUID')})"


def _read_gpus(ask: Ask, card: _Card, before: Mapping[str, Gpu]) -> tuple[Gpu, ...]:
    """The card as a GPU, or its MIG devices; ``before`` is what was last read of them, by UUID."""
    mig = ask("nvmlDeviceGetMigMode", card.handle)
    mode = _compute_mode(ask, card.handle)
    faults = _faults(ask, card)
    card = replace(card, gpu=replace(card.gpu, compute_mode=mode, faulty=bool(faults)))
    faults += _prohibited(card.gpu)
    temperature_c = ask("nvmlDeviceGetTemperature", card.handle, ask.nvml.NVML_TEMPERATURE_GPU)
    if not (mig and mig[0]):
        gpu = _read_gpu(ask, card, before.get(card.gpu.uuid), faults)
        rates = ask("nvmlDeviceGetUtilizationRates", card.handle)
        milliwatts = ask("nvmlDeviceGetPowerUsage", card.handle)
        power_w = None if milliwatts is None else milliwatts / 1000
        percent = None if rates is None else rates.gpu
        return (replace(gpu, temperature_c=temperature_c, power_w=power_w, utilization_percent=percent),)
    gpus = []
    for slot in range(ask("nvmlDeviceGetMaxMigDeviceCount", card.handle) or 0):
        handle = ask("nvmlDeviceGetMigDeviceHandleByIndex", card.handle, slot)
        if handle is None:
            continue
        index = 100 * (card.gpu.index + 1) + slot
        uuid = ask("nvmlDeviceGetUUID", handle)
        name = ask("nvmlDeviceGetName", handle) or f"{card.gpu.name} MIG"
        device = _Card(handle, replace(card.gpu, index=index, uuid=uuid or f"unknown-{index}", name=name))
        gpu = _read_gpu(ask, device, before.get(device.gpu.uuid), faults if uuid else [*faults, _no_uuid(ask)])
        gpus.append(replace(gpu, temperature_c=temperature_c))  # power and load are the whole card's
    return tuple(gpus)


def _read_gpu(ask: Ask, card: _Card, before: Gpu | None, faults: Sequence[str]) -> Gpu:
    """The memory of a card or MIG device and who holds it; ``faults`` are those of the whole card."""
    problems = list(faults)
    memory = _read_memory(ask, card.handle)
    memory_told = memory is not None
    if memory is None:
        ask.renew |= ask.passing
        problems.append(f"its memory cannot be read ({ask.why('nvmlDeviceGetMemoryInfo')})")
        total_mib = before.memory_total_mib if before else 0
        memory = (total_mib, 0, total_mib)
    total_mib, reserved_mib, used_mib = memory
    processes, told = _read_processes(ask, card.handle)
    if card.gpu.compute_mode is ComputeMode.EXCLUSIVE and not told:
        problems.append("it is in exclusive-process mode, and whether a process holds it cannot be read")
    return replace(
        card.gpu,
        memory_total_mib=total_mib,
        memory_reserved_mib=reserved_mib,
        memory_used_mib=used_mib,
        memory_told=memory_told,
        processes=processes,
        problem="; ".join(problems),
    )


def _read_memory(ask: Ask, handle: object) -> tuple[int, int, int] | None:
    """(total, reserved, used) in MiB. An old driver counts its reserve as used: reserved is then 0."""
    memory = ask("nvmlDeviceGetMemoryInfo", handle, ask.nvml.nvmlMemory_v2)
    reserved = 0 if memory is None else memory.reserved
    if memory is None:
        memory = ask("nvmlDeviceGetMemoryInfo", handle)
    if memory is None:
        return None
    return memory.total // _MIB, _ceil_mib(reserved), _ceil_mib(memory.used)


def _read_processes(ask: Ask, handle: object) -> tuple[tuple[GpuProcess, ...], bool]:
    """The processes by pid, and whether those that compute could be read.

    A process that both computes and draws is in two lists: it counts once, with the larger amount.
    """
    lists = [ask.first(functions, handle) for functions in (_COMPUTE, _MPS, _GRAPHICS)]
    held: dict[int, int | None] = {}
    for process in (process for listed in lists for process in listed or ()):
        mib = None if process.usedGpuMemory is None else _ceil_mib(process.usedGpuMemory)
        known = [amount for amount in (mib, held.get(process.pid)) if amount is not None]
        held[process.pid] = max(known, default=None)
    computing = {process.pid for listed in lists[:2] for process in listed or ()}
    found = (GpuProcess(pid, mib, graphics=pid not in computing) for pid, mib in sorted(held.items()))
    return tuple(found), lists[0] is not None


def _compute_mode(ask: Ask, handle: object) -> ComputeMode | None:
    """Who may compute on the card. To one process at a time it makes no difference how many threads it has."""
    nvml = ask.nvml
    modes = {
        nvml.NVML_COMPUTEMODE_DEFAULT: ComputeMode.DEFAULT,
        nvml.NVML_COMPUTEMODE_EXCLUSIVE_THREAD: ComputeMode.EXCLUSIVE,
        nvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS: ComputeMode.EXCLUSIVE,
        nvml.NVML_COMPUTEMODE_PROHIBITED: ComputeMode.PROHIBITED,
    }
    return modes.get(ask("nvmlDeviceGetComputeMode", handle))


def _faults(ask: Ask, card: _Card) -> list[str]:
    """What is damaged of the card; a reset is refused while NVML is open, so that is renewed."""
    faults, reset = [], f"stop what runs on it, then: nvidia-smi --gpu-reset -i {card.gpu.uuid}"
    nvml = ask.nvml
    uncorrected, volatile = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    errors = ask("nvmlDeviceGetTotalEccErrors", card.handle, uncorrected, volatile)
    rows = ask("nvmlDeviceGetRemappedRows", card.handle)  # corrected, uncorrected, pending, failed
    pages = ask("nvmlDeviceGetRetiredPagesPendingStatus", card.handle) if rows is None else 0
    if rows and rows[3]:
        faults.append("faulty memory could not be remapped: have the GPU replaced")
    if errors:
        faults.append(f"{errors} uncorrectable memory error{'s' * (errors > 1)} since the driver was loaded: {reset}")
    elif (rows and rows[2]) or pages:
        faults.append(f"a repair of faulty memory waits for a reset: {reset}")
    ask.renew |= bool(faults)
    return faults


def _prohibited(gpu: Gpu) -> list[str]:
    """Why a GPU on which nobody may compute takes nothing new; what runs there already goes on."""
    if gpu.compute_mode is not ComputeMode.PROHIBITED:
        return []
    return [f"it is in prohibited compute mode; allow processes with: nvidia-smi -c DEFAULT -i {gpu.uuid}"]


def _in_order(gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """By PCI id, unknown ones last; the MIG devices of a card by index."""
    return tuple(sorted(gpus, key=lambda gpu: (not gpu.pci_id, gpu.pci_id.lower(), gpu.index)))


def _nothing_note(cards: int) -> str:
    if cards == 0:
        return "the NVIDIA driver reports no GPU; a container has to be started with them (--gpus all)"
    return "every GPU is in MIG mode and has no MIG device; create one with: nvidia-smi mig -cgi <profile> -C"


def _ceil_mib(size: int) -> int:
    return -(-size // _MIB)
