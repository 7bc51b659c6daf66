"""This machine: all the rooms joined into what one pass needs."""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from sage_reconcile.core import startup_log
from sage_reconcile.core.command import command_line, environment, inner_base
from sage_reconcile.core.declared import declared_gpus, declared_links, inventory
from sage_reconcile.core.failure import Failure
from sage_reconcile.core.measured import cuda_totals
from sage_reconcile.core.observed import Exit, Gpu, GpuProcess, Launch, Life, Links, Observed, Port
from sage_reconcile.core.plan import Action
from sage_reconcile.core.resolve import secret_marks
from sage_reconcile.core.spec import Desired, EngineSpec
from sage_reconcile.errors import PortTaken, SpawnError, StateError
from sage_reconcile.host import learned, logs, observe, oom, ports, processes
from sage_reconcile.host.gpus import NvmlInventory
from sage_reconcile.host.hub import Hub
from sage_reconcile.host.learned import Learned, Seen
from sage_reconcile.host.links import LinkReader
from sage_reconcile.host.models import ModelReader, unread
from sage_reconcile.host.observe import Found
from sage_reconcile.host.probes import Prober, Target, ask_once, loopback
from sage_reconcile.host.processes import ProcessId
from sage_reconcile.host.records import Record, Records
from sage_reconcile.host.state import StateFolder
from sage_reconcile.simulator import gpus as simulated_gpus

_FAMILY_S = 5.0
"""So often it is looked who of ours has left its session: a scan of all processes, some 20 ms for 1,000 of them."""
_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


class LocalHost:
    """The machine this runs on. Only the one who holds the state folder's lock may act or let it write.

    ``folder`` is that of ``engines.yaml``: engines start there, so that relative paths in it mean what they say.
    """

    def __init__(
        self,
        state: StateFolder,
        folder: Path,
        environ: Mapping[str, str],
        prober: Prober | None = None,
        hub: Hub | None = None,
    ) -> None:
        self.state = state
        self.folder = folder
        self.environ = environ
        self.prober = prober
        self.records = Records(state.launches)
        self._nvml = NvmlInventory()
        self._links = LinkReader()
        self._children: list[subprocess.Popen[bytes]] = []
        self._found: dict[str, Found] = {}
        self._logs: list[Path] = []
        self._found_bound: set[int] = set()
        self._models = ModelReader(folder, environ, hub)
        self._learned = Learned(state.measured)
        self._family_due_s = 0.0

    @property
    def writes(self) -> bool:
        """Whether this host acts; one that has no prober only looks."""
        return self.prober is not None

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def observe(self, desired: Desired) -> Observed:
        """One look at the machine.

        Raises:
            StateError: the records cannot be read, or what was learned cannot be written.
        """
        # we are the parent of the shells we started: those that have ended must be reaped
        self._children = [child for child in self._children if child.poll() is None]
        gpus, links, note = self._gpus(desired)
        holding = frozenset(process.pid for gpu in gpus for process in gpu.processes)
        (records, problems), now = self.records.load(), self.now()
        found = {record.id: observe.examine(record, self.records.run_file(record.id), holding) for record in records}
        if self.writes:
            records = [record for record in records if not self._undo(record, found[record.id])]
        self._found = {record.id: found[record.id] for record in records}
        self._logs = [Path(record.log_path) for record in records if not record.ended]
        held = observe.host_held(records, self._found)
        host_memory = observe.host_memory(desired, records, problems)
        ready = self._ready(records, found)
        totals = cuda_totals(self._learned.read())
        gpus = tuple(dataclasses.replace(gpu, cuda_total_mib=totals.get(gpu.name)) for gpu in gpus)
        owned = tuple(self._owned(gpu, records) for gpu in gpus)
        failures = {record.id: self._failure(record, found[record.id], desired) for record in records}
        if self.writes:
            self._track(records)
            for record in records:
                metrics = self.prober.metrics(record.id) if self.prober else None
                engine, failure = desired.engine(record.engine_name), failures[record.id]
                seen = Seen(now, owned, ready=record.id in ready, failure=failure, metrics=metrics, engine=engine)
                self._learned.take_in(record, seen)
                self._note(record, found[record.id], record.id in ready, failures[record.id], now)
        launches = [
            dataclasses.replace(
                self._launch(record, found[record.id], record.id in ready),
                failure=failures[record.id],
                held_mib=learned.held_mib(record.id, owned),
                host_held_mib=held.get(record.id, 0),
            )
            for record in records
        ]
        models = self._models.read(desired)
        return Observed(
            gpus=owned,
            launches=tuple(launches),
            ports=self._ports(desired, launches),
            models=models,
            gpu_note=note,
            links=links,
            nvlink_counts=self._links.nvlink_counts,
            problems=(*problems, *unread(desired, models)),
            measured=self._learned.read(),
            host_memory=host_memory,
        )

    def _ports(self, desired: Desired, launches: Iterable[Launch]) -> tuple[Port, ...]:
        ours = {port for launch in launches if launch.holds for port in launch.ports}
        self._found_bound = {port for port in self._found_bound if ports.is_bound(desired.host.bind, port)}
        return ports.in_use(desired, ours, self._found_bound)

    def _gpus(self, desired: Desired) -> tuple[tuple[Gpu, ...], Links, str]:
        if desired.host.gpus == "none":
            return (), {}, "`host.gpus: none`"
        if desired.host.gpus == "auto":
            gpus, note = self._nvml.read(self._links.look)
            return gpus, self._links.links, note
        usage = simulated_gpus.usage(self.state.simulated_gpus)
        gpus = declared_gpus(desired.host.declared, usage, simulated=True)
        return gpus, declared_links(desired.host.declared, gpus), ""

    def _owned(self, gpu: Gpu, records: Iterable[Record]) -> Gpu:
        """The GPU with each process given to the launch in whose session it is, and strangers named."""
        # what cannot be proven ours is counted once, with the launch in whose place it runs
        here = [record for record in records if self._found[record.id].life is not Life.EXITED]
        sessions = {found.session: record.id for record in here if (found := self._found[record.id]).session}
        members = {member[0]: record.id for record in here for member in [record.leader, *record.members] if member}
        escaped = {(m[0], m[1]): record.id for record in here for m in [record.leader, *record.members] if m}
        owned: list[GpuProcess] = []
        for process in gpu.processes:
            stat = processes.read_stat(process.pid)
            if stat is None:
                launch = members.get(process.pid)
            else:
                launch = sessions.get(stat.session) or escaped.get((stat.pid, stat.start_ticks))
            user, command = ("", "") if launch else processes.user_and_command(process.pid)
            owned.append(dataclasses.replace(process, user=user, command=command, launch=launch))
        return dataclasses.replace(gpu, processes=tuple(owned))

    def _undo(self, record: Record, found: Found) -> bool:
        """A start that was recorded and never happened leaves nothing but the record."""
        if found.never_started and not record.ended and record.boot_id == processes.boot_id():
            self.forget(record.id)
            return True
        return False

    def _ready(self, records: Iterable[Record], found: Mapping[str, Found]) -> set[str]:
        running = [
            Target(record.id, loopback(record.bind), record.port, record.ready_at is not None)
            for record in records
            if found[record.id].life is Life.ALIVE
        ]
        if self.prober is None:
            return ask_once(running)
        self.prober.follow(running)
        return {target.launch_id for target in running if self.prober.ready(target.launch_id)}

    def _launch(self, record: Record, found: Found, ready: bool) -> Launch:
        ended = found.life in (Life.EXITED, Life.LEFTOVER)
        starting = found.life is Life.ALIVE and record.ready_at is None and not ready
        return Launch(
            id=record.id,
            engine_name=record.engine_name,
            index=record.index,
            spec=record.spec,
            secret_marks=record.secret_marks,
            gpus=tuple(record.gpus),
            memory_mib=record.memory_mib,
            port=record.port,
            bind=record.bind,
            life=found.life,
            created_at=record.created_at,
            pid=found.leader.pid if found.leader else None,
            ready=ready,
            ready_at=record.ready_at or (self.now() if ready else None),
            stopping_since=record.stopping_since,
            stop_cause=record.stop_cause,
            exit=Exit(found.exit_code, found.ended_at or record.ended_at) if ended else None,
            restarts=record.restarts,
            failures=record.failures,
            log_path=record.log_path,
            predecessor=record.predecessor,
            destination=tuple(record.destination),
            stage=startup_log.stage(logs.tail(Path(record.log_path), 40)) if starting else "",
            inner_ports=range(record.inner_port, record.inner_port + record.inner_count),
            kv_tokens=record.kv_tokens,
            host_memory_mib=record.host_memory_mib,
            released=record.released,
            answers_since=record.answers_since if record.answers == ready else None,
        )

    def _failure(self, record: Record, found: Found, desired: Desired) -> Failure | None:
        """Why a launch ended that nobody asked to; read from its log once, by the one who writes."""
        if found.life is not Life.EXITED or record.stop_cause:
            return None
        if record.ended:
            return learned.read_failure(record.failure)
        members = {member[0] for member in [record.leader, *record.members] if member}
        return learned.why_it_failed(record, found.exit_code, members, desired.engine(record.engine_name), self.environ)

    def _track(self, records: Iterable[Record]) -> None:
        """Puts on record, now and then, who of ours left the session while its parent lives."""
        if time.monotonic() < self._family_due_s or not self._found:
            return
        self._family_due_s = time.monotonic() + _FAMILY_S
        stats = list(processes.scan())
        for record in records:
            found = self._found[record.id]
            if found.life is Life.ALIVE and found.leader is not None:
                members = observe.with_escaped(record, found.session, found.leader, stats)
                if members != record.members:
                    record.members = members
                    self.records.save(record)

    def _note(self, record: Record, found: Found, ready: bool, failure: Failure | None, now: float) -> None:
        """Puts on record what was learned: who the leader is, that it got ready, how and why it ended."""
        before = dataclasses.replace(record)
        if found.life is Life.ALIVE and not record.leader and found.leader is not None:
            full = processes.identify(found.leader.pid)
            if full is not None and full.start_ticks == found.leader.start_ticks:
                record.leader = [full.pid, full.start_ticks, full.inode]
        if ready and record.ready_at is None:
            record.ready_at = now
            record.members = observe.members(record, found.session, found.leader) if found.leader else []
        if found.life is Life.EXITED and not record.ended:
            record.ended = True
            record.exit_code = found.exit_code
            record.ended_at = found.ended_at or now
            record.failure = learned.failure_data(failure) if failure else {}
            shutil.rmtree(self.state.temporary(record.id), ignore_errors=True)
        if record.answers != ready:
            record.answers, record.answers_since = ready, now
        if before != record:
            self.records.save(record)

    def watched(self) -> dict[tuple[str, int], ProcessId]:
        """The leaders whose end should wake the daemon, by launch and pid."""
        return {
            (launch_id, found.leader.pid): found.leader
            for launch_id, found in self._found.items()
            if found.life is Life.ALIVE and found.leader is not None
        }

    def carry_out(self, action: Action, desired: Desired) -> str:
        """Does what the action says, and nothing else; returns the id of the launch that it was done to.

        Raises:
            PortTaken: another program has its port by now; nothing was done, and the next look tells of it.
            SpawnError: the process could not be started; its record is taken back.
            StateError: the intent could not be written; nothing was done.
        """
        if action.kind == "spawn":
            try:
                return self._spawn(action, desired)
            except PortTaken:
                self._found_bound.add(action.port)
                raise
        if action.kind == "stop":
            self._stop(action)
        else:
            self._kill(action.launch)
        return action.launch

    def _spawn(self, action: Action, desired: Desired) -> str:
        name, _, index = action.replica.rpartition("/")
        engine = action.revision or desired.engine(name)
        assert engine is not None, "check_plan lets no engine through that is not in the file"
        ports.check_free(action.replica, desired.host.bind, action.port)
        launch_id, now = secrets.token_hex(4), self.now()
        log = self.state.log(name, int(index), now, launch_id)
        record = Record(
            id=launch_id,
            engine_name=name,
            index=int(index),
            spec=dict(engine.record),
            secret_marks=secret_marks(engine.secrets, launch_id),
            gpus=[gpu.uuid for gpu in action.gpus],
            memory_mib=action.memory_mib,
            port=action.port,
            bind=desired.host.bind,
            created_at=now,
            boot_id=processes.boot_id(),
            restarts=action.restarts,
            failures=action.failures,
            log_path=str(log),
            predecessor=action.predecessor,
            inner_port=action.inner_ports.start,
            inner_count=len(action.inner_ports),
            oom_kills=oom.kills(),
            kv_bytes=action.kv_bytes,
            host_memory_mib=action.host_memory_mib,
        )
        argv = command_line(
            engine.spec,
            name,
            python=sys.executable,
            bind=desired.host.bind,
            port=action.port,
            gpus=action.gpus,
            memory_mib=action.memory_mib,
            kv_bytes=action.kv_bytes,
            inner_ports=action.inner_ports,
        )
        self.records.save(record)
        try:
            for folder in (self.state.temporary(launch_id), log.parent):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            environ = self._environment(engine.spec, engine.env, action, launch_id, desired)
            run_file = self.records.run_file(launch_id)
            shell = processes.spawn(action.replica, argv, environ, folder=self.folder, log=log, run_file=run_file)
            self._children.append(shell)
        except OSError as error:
            self.forget(launch_id)
            raise StateError(f"{error.filename}: cannot be made: {error.strerror}") from error
        except SpawnError:  # nothing else: after an interruption the process may exist, and the record must stay
            logs.remove(log)  # nobody has written to it, and each new try would leave another
            self.forget(launch_id)
            raise
        logs.prune(log.parent)
        return launch_id

    def _environment(
        self, spec: EngineSpec, overlay: Mapping[str, str], action: Action, launch_id: str, desired: Desired
    ) -> dict[str, str]:
        base = inner_base(spec, action.inner_ports)
        environ = environment(self.environ, overlay, action.gpus, base, action.kv_space_gib)
        environ[processes.LAUNCH_VARIABLE] = launch_id
        environ["SAGE_RECONCILE_REPLICA"] = action.replica
        environ["PYTHONSAFEPATH"] = "1"  # a folder called vllm beside engines.yaml must not shadow the package
        temporary = str(self.state.temporary(launch_id))
        if len(temporary) <= 70:  # a socket's path may have 107 bytes, and vLLM adds a name of 37
            environ["TMPDIR"] = environ["VLLM_RPC_BASE_PATH"] = temporary
        if spec.runtime == "simulator":
            environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_PACKAGE_PARENT, environ.get("PYTHONPATH"))))
            if desired.host.declared and action.gpus:
                simulated_gpus.write_inventory(self.state.simulated_gpus, inventory(desired.host.declared))
                environ["SAGE_RECONCILE_SIMULATED_GPUS"] = str(self.state.simulated_gpus)
        return environ

    def _stop(self, action: Action) -> None:
        """SIGTERM, and only then the note that it was sent: after a crash between the two it is sent again."""
        record, found = self.records.get(action.launch), self._found.get(action.launch)
        if record is None or found is None or found.leader is None:
            return
        record.members = observe.members(record, found.session, found.leader)
        record.destination = [gpu.uuid for gpu in action.goes_to]
        self.records.save(record)
        processes.send(found.leader, signal.SIGTERM)
        record.stopping_since, record.stop_cause = self.now(), str(action.stop_cause)
        self.records.save(record)

    def _kill(self, launch_id: str) -> None:
        """SIGKILL to all that is proven to be of this launch; what is born meanwhile is found by the next pass."""
        record, found = self.records.get(launch_id), self._found.get(launch_id)
        if record is None or found is None or found.leader is None:
            return
        members, _ = observe.proven_members(record, found.session, found.leader)
        processes.kill_all([found.leader, *observe.identities(members)])

    def forget(self, launch_id: str) -> None:
        """Drops the record of a launch that has ended, and what it left; not its log. ``StateError`` if it cannot."""
        shutil.rmtree(self.state.temporary(launch_id), ignore_errors=True)
        self.records.drop(launch_id)

    def tidy(self) -> None:
        """Keeps the logs of the launches seen last below their size limit."""
        for path in self._logs:
            logs.limit(path)
