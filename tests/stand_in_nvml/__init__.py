"""A stand-in for NVIDIA's management library, so that the real ``pynvml`` runs without a GPU.

``build`` compiles it; a program started with that folder in ``LD_LIBRARY_PATH`` (``environment``)
then sees the machine that a ``Machine`` describes. The description is read anew on every call, so
writing it again changes the machine under the running program.

A value left at None is one the GPU does not have: asking for it is "Not Supported".
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Literal

LIBRARY = "libnvidia-ml.so.1"
GIB = 1 << 30


class Code(IntEnum):
    """The NVML errors that tests provoke."""

    NOT_SUPPORTED = 3
    NO_PERMISSION = 4
    DRIVER_NOT_LOADED = 9
    GPU_IS_LOST = 15
    RESET_REQUIRED = 16
    VERSIONS_DIFFER = 18
    UNKNOWN = 999


class Mode(IntEnum):
    """The compute modes of a GPU."""

    DEFAULT = 0
    PROHIBITED = 2
    EXCLUSIVE_PROCESS = 3


@dataclass(frozen=True)
class Process:
    """A process on a GPU. ``used`` is in bytes; None is NVML's "value not available"."""

    pid: int
    used: int | None
    kind: Literal["compute", "graphics", "mps"] = "compute"

    def line(self) -> str:
        return f"process {self.kind} {self.pid} {-1 if self.used is None else self.used}"


@dataclass
class MigDevice:
    """A MIG device of a GPU, in slot ``slot``. Memory is in bytes."""

    uuid: str
    slot: int
    name: str = "NVIDIA H100 80GB HBM3 MIG 3g.40gb"
    total: int = 40 * GIB
    reserved: int = 0
    used: int = 0
    processes: Sequence[Process] = ()
    faults: Mapping[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        values = _values(self, ("uuid", "name", "total", "reserved", "used"))
        return [f"mig {self.slot}", *values, *_repeated(self.processes, self.faults)]


@dataclass
class StandInGpu:
    """A GPU. Memory is in bytes, power in milliwatts, temperature in degrees Celsius.

    ``used`` is without ``reserved``. ``remapped`` is (corrected, uncorrected, pending, failed),
    ``retired`` the pages as (cause, address). ``faults`` gives an error code by function name,
    ``*`` for every function; from call number ``lost_after`` + 1 on the GPU is lost.
    ``ancestors`` is the topology level by the other GPU's index, ``nvlinks`` (link, active, PCI id
    and, unless the driver is too old to tell, type of the other end: 0 a GPU, 2 a switch).
    """

    uuid: str
    pci: str = "00000000:1B:00.0"
    name: str = "NVIDIA H100 80GB HBM3"
    total: int = 80 * GIB
    reserved: int = 0
    used: int = 0
    processes: Sequence[Process] = ()
    utilization: int | None = 0
    temperature: int | None = 35
    power: int | None = 70_000
    compute_mode: int | None = Mode.DEFAULT
    capability: str | None = "9.0"
    numa_node: int | None = None
    numa_node_id: int | None = None
    uncorrected_volatile: int | None = 0
    uncorrected_aggregate: int | None = 0
    remapped: tuple[int, int, int, int] | None = (0, 0, 0, 0)
    retired_pending: int | None = None
    retired: Sequence[tuple[int, int]] = ()
    mig_mode: int | None = 0
    mig: Sequence[MigDevice] = ()
    ancestors: Mapping[int, int] = field(default_factory=dict)
    nvlinks: Sequence[tuple[int, bool, str] | tuple[int, bool, str, int]] = ()
    faults: Mapping[str, int] = field(default_factory=dict)
    lost_after: int | None = None

    def lines(self) -> list[str]:
        lines = ["gpu", *_values(self, _GPU_VALUES), *_repeated(self.processes, self.faults)]
        if self.remapped is not None:
            lines.append("remapped " + " ".join(map(str, self.remapped)))
        lines += [f"retired {cause} {address:x}" for cause, address in self.retired]
        lines += [f"ancestor {other} {level}" for other, level in self.ancestors.items()]
        lines += [f"nvlink {link} {int(active)} {' '.join(map(str, end))}" for link, active, *end in self.nvlinks]
        return lines + [line for device in self.mig for line in device.lines()]


_GPU_VALUES = (
    *("uuid", "pci", "name", "total", "reserved", "used", "utilization", "temperature", "power"),
    *("compute_mode", "capability", "numa_node", "numa_node_id", "uncorrected_volatile"),
    *("uncorrected_aggregate", "retired_pending", "mig_mode", "lost_after"),
)


@dataclass
class Machine:
    """A machine with GPUs, in the order of NVML's index. ``faults`` hold for the machine as a whole.

    ``loaded`` tells one loading of the driver from the next: when it changes, NVML fails until it
    is initialized again.
    """

    gpus: Sequence[StandInGpu] = ()
    driver: str = "570.86.10"
    loaded: int = 0
    faults: Mapping[str, int] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Puts the description in place at once, never half of it."""
        lines = [f"driver {self.driver}", f"loaded {self.loaded}", *_repeated((), self.faults)]
        lines += [line for gpu in self.gpus for line in gpu.lines()]
        draft = path.with_name(path.name + ".draft")
        text = "".join(f"{line}\n" for line in lines)
        draft.write_text(text, encoding="utf-8", errors="surrogateescape")
        draft.replace(path)


def build(folder: Path, without: Sequence[str] = ()) -> Path:
    """Compiles the library into ``folder``; the functions named in ``without`` it does not have."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / LIBRARY
    source = Path(__file__).with_name("nvml.c")
    renamed = [f"-D{name}=absent_{name}" for name in without]
    options = ["-std=c11", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC"]
    subprocess.run(["gcc", *options, *renamed, "-o", str(library), str(source)], check=True)
    return library


def environment(library_folder: Path, description: Path, calls: Path | None = None) -> dict[str, str]:
    """The environment for a program that shall see the described machine.

    ``calls`` is a file that gets the name of every NVML function called, one a line.
    """
    env = os.environ | {"LD_LIBRARY_PATH": str(library_folder), "STAND_IN_NVML": str(description)}
    return env if calls is None else env | {"STAND_IN_NVML_CALLS": str(calls)}


def _values(source: object, names: Sequence[str]) -> list[str]:
    found = [(name, getattr(source, name)) for name in names]
    return [
        f"{name} {value:d}" if isinstance(value, int) else f"{name} {value}"
        for name, value in found
        if value is not None
    ]


def _repeated(processes: Sequence[Process], faults: Mapping[str, int]) -> list[str]:
    return [process.line() for process in processes] + [f"fault {name} {code:d}" for name, code in faults.items()]
