"""What is learned from each start: kept in ``measured.json``, and why one failed, read from its log.

Only the one who holds the state folder's lock writes. A file that is damaged, or from another version, gives what of
it can be understood.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from sage_reconcile.core.failure import Failure, FailureKind, Started
from sage_reconcile.core.measured import Measured, beside_kv_mib, counting_marks, newest, subject
from sage_reconcile.core.observed import Gpu
from sage_reconcile.core.promise import outside_mib
from sage_reconcile.core.resolve import secret_marks
from sage_reconcile.core.spec import Engine
from sage_reconcile.core.startup_figures import StartupFigures, startup_figures
from sage_reconcile.errors import StateError
from sage_reconcile.host import logs, oom
from sage_reconcile.host.metrics import EngineMetrics
from sage_reconcile.host.records import Record, write_atomically

VERSION = 1
MOST = 256
"""Kinds of starts that are kept, those of the latest."""
_GROWN_MIB = 16
"""So much more is held before it is written again."""
_LOG_BYTES = 1 << 20
_LOG_LINES = 20_000
_KILLED_HERE = "the kernel killed a process for want of memory in this cgroup while it ran"
_SECRET_NAMES = re.compile(r"TOKEN|KEY|SECRET|PASSW", re.IGNORECASE)
_T = TypeVar("_T", Measured, StartupFigures, Failure)


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """One look at a launch. ``gpus`` are all of the machine's; ``failure`` is why it has ended, if it has just failed.

    ``engine`` is its entry as the file has it now, by which it is told whether hidden values are the same.
    """

    now: float
    gpus: Sequence[Gpu]
    ready: bool = False
    failure: Failure | None = None
    metrics: EngineMetrics | None = None
    engine: Engine | None = None


def held_mib(launch_id: str, gpus: Iterable[Gpu]) -> int | None:
    """The most that the processes of a launch hold on one GPU; None where the driver does not tell, or shows none."""
    most: int | None = None
    for gpu in gpus:
        told = [process.memory_mib for process in gpu.processes if process.launch == launch_id]
        if told and None not in told:
            most = max(most or 0, sum(mib for mib in told if mib is not None))
    return most


def _gpu_name(record: Record, gpus: Iterable[Gpu]) -> str | None:
    """The model of the GPUs that a launch is on; empty where it has none, None where they are not listed."""
    names = {gpu.uuid: gpu.name for gpu in gpus}
    return names.get(record.gpus[0]) if record.gpus else ""


class Learned:
    """The file of what was measured, read again only when it has changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, ...] | None = None
        self._known: Mapping[str, Measured] = types.MappingProxyType({})

    def read(self) -> Mapping[str, Measured]:
        """All that is known, by ``Measured.key``; empty where there is no such file, or it cannot be read."""
        try:
            status = self.path.stat()
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if stamp != self._stamp:
                entries = _entries(json.loads(self.path.read_bytes()))
                self._known = types.MappingProxyType({entry.key: entry for entry in entries})
                self._stamp = stamp
        except (OSError, ValueError, RecursionError):
            self._stamp, self._known = None, types.MappingProxyType({})
        return self._known

    def take_in(self, record: Record, seen: Seen) -> None:
        """Keeps what a start took when it has got ready, what it grows to later, and what one that failed lacked.

        Before the record says that it was ready, or has ended; the tokens of its KV cache are put into the record.
        """
        gpu_name = _gpu_name(record, seen.gpus)
        if gpu_name is None or record.spec.get("runtime") == "command":
            return
        held = held_mib(record.id, seen.gpus)
        with contextlib.suppress(StateError):  # the records tell of a full disk; what is learned can wait
            if seen.ready and record.ready_at is None:
                record.kv_tokens = self._ready(record, gpu_name, held, seen)
            elif seen.ready and held is not None:
                self._holds(record, gpu_name, held)
            elif seen.failure is not None and not record.ended:
                self._failed(record, gpu_name, seen)

    def _ready(self, record: Record, gpu_name: str, held: int | None, seen: Seen) -> int | None:
        figures = startup_figures(logs.start(Path(record.log_path)))
        metrics = seen.metrics or EngineMetrics()
        new = Measured(
            subject=subject(record.spec, gpu_name),
            vllm_version=figures.vllm_version or "",
            promised_mib=record.memory_mib,
            held_mib=held,
            beside_kv_mib=_beside_kv_mib(record, figures, held),
            kv_tokens=figures.kv_tokens if figures.kv_tokens is not None else metrics.kv_tokens,
            kv_blocks=metrics.kv_blocks,
            block_tokens=metrics.block_tokens,
            figures=figures,
            at=seen.now,
            startup_s=max(0.0, seen.now - record.created_at),
            starts=1,
            salt=record.id,
            marks=counting_marks(record.secret_marks),
        )
        before = self._same(record, new, seen.engine)
        self._write(_joined(before, new) if before else new)
        return new.kv_tokens

    def _holds(self, record: Record, gpu_name: str, held: int) -> None:
        wanted = subject(record.spec, gpu_name)
        for entry in self.read().values():
            same = entry.subject == wanted and entry.promised_mib == record.memory_mib
            if same and entry.salt == record.id and held >= (entry.held_mib or 0) + _GROWN_MIB:
                beside = _larger(entry.beside_kv_mib, _beside_kv_mib(record, entry.figures, held))
                self._write(dataclasses.replace(entry, held_mib=held, beside_kv_mib=beside))
                return

    def _failed(self, record: Record, gpu_name: str, seen: Seen) -> None:
        failure = seen.failure
        if failure is None or failure.memory_mib is None or failure.memory_mib <= record.memory_mib:
            return
        figures = startup_figures(logs.start(Path(record.log_path)))
        new = Measured(
            subject=subject(record.spec, gpu_name),
            vllm_version=figures.vllm_version or "",
            promised_mib=record.memory_mib,
            figures=figures,
            at=seen.now,
            needed_mib=failure.memory_mib,
            salt=record.id,
            marks=counting_marks(record.secret_marks),
        )
        before = self._same(record, new, seen.engine)
        self._write(dataclasses.replace(before, needed_mib=failure.memory_mib) if before else new)

    def _same(self, record: Record, new: Measured, engine: Engine | None) -> Measured | None:
        """What is known under this key, where its hidden values are the same."""
        before = self.read().get(new.key)
        if before is None or before.marks.keys() != new.marks.keys():
            return None
        if not new.marks or before.salt == new.salt:
            return before
        if _hidden(record, engine) is None or engine is None:
            return None
        return before if before.marks == counting_marks(secret_marks(engine.secrets, before.salt)) else None

    def _write(self, entry: Measured) -> None:
        kept = newest([*(item for key, item in self.read().items() if key != entry.key), entry], MOST)
        data = {"version": VERSION, "entries": [asdict(item) for item in kept.values()]}
        write_atomically(self.path, json.dumps(data))


def _larger(one: int | None, other: int | None) -> int | None:
    return max((mib for mib in (one, other) if mib is not None), default=None)


def _beside_kv_mib(record: Record, figures: StartupFigures, held: int | None) -> int | None:
    ranks = int(record.spec.get("tensor_parallel_size") or 1) * int(record.spec.get("pipeline_parallel_size") or 1)
    return beside_kv_mib(figures, held, record.kv_bytes, outside_mib(str(record.spec.get("runtime")), ranks))


def _joined(before: Measured, new: Measured) -> Measured:
    """A start after others: what it did not tell (a pinned KV cache is not measured again) is still what it was."""
    alike = before.promised_mib == new.promised_mib
    kept = {} if alike else {"pin_kv_cache_bytes", "requested_mib", "kv_available_mib", "kv_tokens", "max_concurrency"}
    told = {name: value for name, value in asdict(new.figures).items() if value is not None}
    known = {name: value for name, value in asdict(before.figures).items() if name not in kept}
    return dataclasses.replace(
        new,
        held_mib=_larger(before.held_mib, new.held_mib) if alike else new.held_mib,
        beside_kv_mib=_larger(before.beside_kv_mib, new.beside_kv_mib),
        figures=StartupFigures(**{**known, **told}),
        starts=before.starts + 1,
    )


def why_it_failed(
    record: Record, code: int | None, members: set[int], engine: Engine | None, environ: Mapping[str, str]
) -> Failure:
    """Why a launch ended that nobody asked to, with nothing in it that must not be shown.

    ``members`` are the pids that it had. ``engine`` is its entry as the file has it now: its hidden values are taken
    out of what the log says. Where they have changed since, nothing of the log is quoted.
    """
    from sage_reconcile.core.diagnosis import diagnose  # noqa: PLC0415 - 3 ms of every start, and wanted seldom

    lines = logs.tail(Path(record.log_path), _LOG_LINES, _LOG_BYTES) if record.log_path else []
    started = Started(record.spec, record.memory_mib, record.port)
    since_s = time.monotonic() - (time.time() - record.created_at) - 1
    failure = diagnose(code, lines, started, oom_kill=oom.killed(members, since_s))
    if failure.kind in (FailureKind.KILLED, FailureKind.UNKNOWN) and oom.kills() > record.oom_kills:
        failure = diagnose(code, lines, started, oom_kill=_KILLED_HERE)
    hidden = _hidden(record, engine)
    if hidden is None:
        fix = "correct `args`" if failure.kind is FailureKind.WRONG_FLAG else failure.fix
        return dataclasses.replace(failure, line="", fix=fix)
    hidden |= {value for name, value in environ.items() if _SECRET_NAMES.search(name) and len(value) >= 8}
    return dataclasses.replace(failure, line=_without(failure.line, hidden), fix=_without(failure.fix, hidden))


def _hidden(record: Record, engine: Engine | None) -> set[str] | None:
    """The hidden values that a launch was started with; None where they are not known any more."""
    if not record.secret_marks:
        return set()
    if engine is None or secret_marks(engine.secrets, record.id) != record.secret_marks:
        return None
    return set(engine.secrets.values())


def _without(text: str, hidden: set[str]) -> str:
    """The text with each hidden value as ``***``; of a short one only where it stands alone."""
    for value in sorted(hidden, key=len, reverse=True):
        if len(value) > 3:
            text = text.replace(value, "***")
        elif len(value) > 1:
            text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", "***", text)
    return text


def failure_data(failure: Failure) -> dict[str, Any]:
    """A failure as a record keeps it."""
    return asdict(failure)


def read_failure(data: Mapping[str, object]) -> Failure | None:
    """A failure from a record; None where there is none that can be understood."""
    try:
        values = {**data, "kind": FailureKind(str(data.get("kind")))}
    except ValueError:
        return None
    return _read(Failure, values)


def _entries(data: object) -> list[Measured]:
    listed = data.get("entries") if isinstance(data, Mapping) else None
    entries: list[Measured] = []
    for item in listed if isinstance(listed, list) else []:
        if not isinstance(item, Mapping):
            continue
        figures = item.get("figures")
        read = _read(StartupFigures, figures) if isinstance(figures, Mapping) else None
        entry = _read(Measured, {**item, "figures": read or StartupFigures()})
        if entry is not None:
            entries.append(entry)
    return entries[-MOST:]


_KINDS: Mapping[str, Callable[[object], bool]] = {
    "str": lambda value: isinstance(value, str),
    "str | None": lambda value: value is None or isinstance(value, str),
    "int": lambda value: type(value) is int,
    "int | None": lambda value: value is None or type(value) is int,
    "float": lambda value: type(value) in (int, float),
    "float | None": lambda value: value is None or type(value) in (int, float),
    "bool": lambda value: isinstance(value, bool),
    "Mapping[str, str]": lambda value: (
        isinstance(value, Mapping) and all(isinstance(item, str) for pair in value.items() for item in pair)
    ),
}


def _read(kind: type[_T], data: Mapping[str, object]) -> _T | None:
    """A value from JSON: fields that are not known are left out; None where one is of the wrong kind, or missing."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(kind):
        if item.name in data:
            check = _KINDS.get(str(item.type))
            if check is not None and not check(data[item.name]):
                return None
            values[item.name] = data[item.name]
    with contextlib.suppress(TypeError):
        return kind(**values)
    return None
