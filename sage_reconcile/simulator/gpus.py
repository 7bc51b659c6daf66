"""Simulated GPUs: a folder in which processes claim memory for as long as they live.

``inventory.json`` lists the GPUs. A claim is a file ``<uuid>/<pid>-<start ticks>`` that holds a number of MiB.
It counts for as long as a process with that id and start time runs, so memory comes back the way a real
GPU's does: when the process is gone, however it ended, and not before. Nobody has to release anything.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

ENVIRONMENT = "SAGE_RECONCILE_SIMULATED_GPUS"
"""The variable that names the folder; without it no GPU is simulated and no memory claimed."""
INVENTORY = "inventory.json"


class UnknownGpu(Exception):
    """The inventory lists no GPU of that UUID."""


class TooLittleFree(Exception):
    """A claim would have taken more than the GPU has left; with what it has, in MiB."""

    def __init__(self, free_mib: int, total_mib: int) -> None:
        self.free_mib = free_mib
        self.total_mib = total_mib
        super().__init__(f"{free_mib} of {total_mib} MiB are free")


def write_inventory(folder: Path, gpus: Sequence[Mapping[str, object]]) -> None:
    """Say which GPUs there are.

    Args:
        folder: created if need be. Claims already in it stay.
        gpus: of each its ``uuid``, ``name`` and ``memory_total_mib``, in the order of the indexes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Readers take no lock: they must find the old list or the new one, never half of it.
    part = folder / f".{INVENTORY}.{os.getpid()}"
    part.write_text(json.dumps([dict(gpu) for gpu in gpus], indent=1), encoding="utf-8")
    part.replace(folder / INVENTORY)


def read_inventory(folder: Path) -> dict[str, int]:
    """The total memory in MiB of each GPU by UUID, in the order of the indexes; empty without an inventory."""
    try:
        listed = json.loads((folder / INVENTORY).read_bytes())
    except FileNotFoundError:
        return {}
    return {gpu["uuid"]: int(gpu["memory_total_mib"]) for gpu in listed}


def claim(folder: Path, uuid: str, need_mib: int, hold_mib: int | None = None) -> None:
    """Take memory on a GPU for the life of this process: ``need_mib`` must be free; ``hold_mib``, if given, is held.

    Raises:
        UnknownGpu: no such GPU is listed.
        TooLittleFree: what living processes hold and what is needed, or to be held, exceed the total.
    """
    with _locked(folder):
        total_mib = read_inventory(folder).get(uuid)
        if total_mib is None:
            raise UnknownGpu(uuid)
        held_mib = sum(mib for _, mib in _claims(folder / uuid, prune=True))
        hold_mib = need_mib if hold_mib is None else hold_mib
        if held_mib + max(need_mib, hold_mib) > total_mib:
            raise TooLittleFree(max(0, total_mib - held_mib), total_mib)
        (folder / uuid).mkdir(exist_ok=True)
        part = folder / uuid / f".{os.getpid()}"
        part.write_text(str(hold_mib), encoding="ascii")
        part.replace(folder / uuid / f"{os.getpid()}-{_start_ticks(os.getpid())}")


def usage(folder: Path) -> dict[str, list[tuple[int, int]]]:
    """Who holds what: for each GPU of the inventory its living claims as (pid, MiB), by pid.

    Reads only and takes no lock: a claim that comes or goes meanwhile is in the answer or is not.
    """
    return {uuid: sorted(_claims(folder / uuid)) for uuid in read_inventory(folder)}


def visible(folder: Path, devices: str | None) -> list[str]:
    """The UUIDs that a process sees, by CUDA's reading of ``CUDA_VISIBLE_DEVICES``.

    Names may be UUIDs, beginnings of UUIDs, or indexes. The first that does not exist hides all that follow.
    """
    every = list(read_inventory(folder))
    if devices is None:
        return every
    seen: list[str] = []
    for word in filter(None, (name.strip() for name in devices.split(","))):
        if word.isdecimal():
            found = every[int(word) : int(word) + 1]
        else:
            found = [word] if word in every else [uuid for uuid in every if uuid.startswith(word)]
        if len(found) != 1:
            break
        seen += found
    return seen


def _claims(folder: Path, *, prune: bool = False) -> Iterator[tuple[int, int]]:
    """The living claims on one GPU; with ``prune``, under the lock only, the files of dead ones go away."""
    try:
        names = os.listdir(folder)  # noqa: PTH208 - this is read many times a second
    except FileNotFoundError:
        return
    for name in names:
        pid, dash, ticks = name.partition("-")
        if not dash or name.startswith("."):
            continue
        path = folder / name
        if _start_ticks(int(pid)) != int(ticks):
            if prune:
                path.unlink(missing_ok=True)
            continue
        try:
            yield int(pid), int(path.read_bytes())
        except FileNotFoundError:
            continue


def _start_ticks(pid: int) -> int | None:
    """When a living process started, in clock ticks since boot; None for one that is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses may hold anything, so fields are counted from the last parenthesis.
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X", b"x") else int(fields[19])


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel lets go of it should this process die."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
