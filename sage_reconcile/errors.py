"""Every error the product raises on purpose, as one small tree.

::

    SageReconcileError          what went wrong, where, and what to do about it
    ├── FileFaults              engines.yaml cannot be used: every fault in it, each with its place
    ├── LockHeld                another process is reconciling with this state folder
    ├── StateError              the state folder cannot be read or written
    ├── SpawnError              a process could not be started
    │   └── PortTaken           … since another program has its port by now
    ├── StalePlan               file or machine are not as they were when the plan was shown; nothing was done
    ├── UnsafePlan              a plan failed its independent check; nothing of it was carried out
    ├── EditRefused             the file cannot be changed as asked; it is as it was
    ├── NotFound                an engine or replica of that name does not exist
    └── UnknownModel            nothing on this machine tells how large a model is

Each class carries the exit code with which the command line ends for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """One thing that is wrong with the file.

    ``line`` and ``column`` count from 1; 0 means the fault belongs to the file as a whole.
    ``where`` is the path of the field (``engines.chat.memory``), ``fix`` what would be right.
    """

    line: int
    column: int
    where: str
    message: str
    fix: str = ""

    def text(self, file_name: str) -> str:
        """One line as compilers write it: ``file:line:column: field: message; fix``."""
        place = f"{file_name}:{self.line}:{self.column}" if self.line else file_name
        where = f"{self.where}: " if self.where else ""
        fix = f"; {self.fix}" if self.fix else ""
        return f"{place}: {where}{self.message}{fix}"


class SageReconcileError(Exception):
    """What went wrong, where, and what to do about it."""

    exit_code: ClassVar[int] = 1


class FileFaults(SageReconcileError):
    """``engines.yaml`` cannot be used; ``faults`` holds everything wrong with it, in file order.

    ``partial`` is what could be read all the same, so that its meaning can be checked too.
    """

    def __init__(self, file_name: str, faults: Sequence[Fault], partial: object = None) -> None:
        self.partial = partial
        self.file_name = file_name
        self.faults = tuple(sorted(set(faults)))
        super().__init__("\n".join(fault.text(file_name) for fault in self.faults))


class LockHeld(SageReconcileError):
    """Another process is reconciling with this state folder."""

    exit_code = 75


class StateError(SageReconcileError):
    """The state folder, or a record in it, cannot be read or written."""


class SpawnError(SageReconcileError):
    """A process could not be started; the message names the program and the reason."""


class PortTaken(SpawnError):
    """A process was not started, since another program has its port; the message names both."""


class StalePlan(SageReconcileError):
    """File or machine are not as they were when the plan was shown; nothing of it was carried out."""


class UnsafePlan(SageReconcileError):
    """A plan failed its independent check, so nothing of it was carried out."""


class EditRefused(SageReconcileError):
    """``engines.yaml`` cannot be changed as asked; nothing was written. The message says why, and what to do."""


class NotFound(SageReconcileError):
    """No engine or replica of that name exists."""


class UnknownModel(SageReconcileError):
    """Nothing on this machine tells how large a model is; the message says what to give."""
