"""How vLLM, the shell that leads its session and the driver behave. What each rests on was measured on real ones.

A killed leader leaves its EngineCore and workers, and they hold their memory. SIGTERM while an engine loads is lost.
Any death of a worker ends the leader, with 0, five seconds later. /health answers 200 whatever has hung. The driver
gives memory back late.
"""

from __future__ import annotations

import math
import signal

from tests.simulation.entries import parse_arguments
from tests.simulation.world import Gpu, Launch, Process, Violation, World

_CONTEXT_MIB = 500
"""What a process has on a GPU before and beside what it is told to take."""
_GIVES_UP_S = 5.0
_OUTLIVES_S = 10.0


def stat_line(process: Process) -> str:
    """``/proc/PID/stat``."""
    state = "Z" if process.zombie else "S"
    head = f"{process.pid} ({process.command}) {state} {process.parent} {process.session} {process.session}"
    return f"{head} 0 -1 4194304 {'0 ' * 12}{process.start_ticks} 0 0\n"


class Machine(World):
    """The world with what lives in it."""

    # -- the shell and its leader ---------------------------------------------------------------------------------

    def spawn(self, argv: list[str], environ: dict[str, str], run: int, log: int) -> Process:
        """The shell of a launch begins; ``run`` and ``log`` are its open files."""
        launch_id = environ["SAGE_RECONCILE_LAUNCH"]
        marks = b"\0".join(f"{key}={value}".encode() for key, value in environ.items())
        shell = self.start("shell", self.daemon_pid, None, command="sh", launch=launch_id, environ=marks)
        for number in (run, log):
            self.descriptions[number].owners.add(shell.pid)
        self.launches[launch_id] = Launch(
            launch_id,
            environ["SAGE_RECONCILE_REPLICA"],
            shell.pid,
            argv,
            [uuid for uuid in environ["CUDA_VISIBLE_DEVICES"].split(",") if uuid],
            self.now,
            self.descriptions[run].node,
            self.descriptions[log].node,
        )
        self.later(self.manners.shell_s, "shell_forks", launch_id)
        return shell

    def _shell(self, launch: Launch) -> Process | None:
        return next(iter(self.of(launch.id, "shell")), None)

    def _write_run(self, launch: Launch, text: str) -> bool:
        try:
            self.disk.write(self.disk.nodes[launch.run_node], text.encode(), self.wall, "run file")
        except OSError:
            return False
        return True

    def shell_forks(self, launch_id: str) -> None:
        launch = self.launches[launch_id]
        shell = self._shell(launch)
        if shell is None:
            launch.phase = "over"
            return
        leader = self.start("leader", shell.pid, shell.pid, command="python", launch=launch_id, environ=shell.environ)
        launch.leader, launch.phase = leader.pid, "importing"
        if not self._write_run(launch, stat_line(leader).replace("(python)", "(sh)")):
            self.end(leader.pid, 1)
            return
        self.later(0.03, "bind", launch_id)
        self.later(self.manners.import_s, "load", launch_id)

    def shell_ends(self, launch_id: str, code: int) -> None:
        launch = self.launches[launch_id]
        shell = self._shell(launch)
        if shell is not None:
            self._write_run(launch, f"exit {code}\n")
            self.end(shell.pid, 0)

    # -- the engine -----------------------------------------------------------------------------------------------

    def _leads(self, launch: Launch) -> bool:
        return launch.phase != "over" and bool(self.of(launch.id, "leader"))

    def bind(self, launch_id: str) -> None:
        launch = self.launches[launch_id]
        if self._leads(launch) and self.ports.setdefault(launch.port, launch.leader) != launch.leader:
            self.say(f"{launch_id} finds port {launch.port} in use")
            self.end(launch.leader, 1)

    def load(self, launch_id: str) -> None:
        launch = self.launches[launch_id]
        if not self._leads(launch) or launch.phase != "importing":
            return
        launch.phase = "loading"
        marks = self.processes[launch.leader].environ if self.manners.marks_kept else b"\0" * 100
        core = self.start(
            "core", launch.leader, launch.shell, command="VLLM::EngineCor", launch=launch_id, environ=marks
        )
        self.later(0.1, "take_gpus", launch_id, core.pid)

    def take_gpus(self, launch_id: str, core_pid: int) -> None:
        """Each worker looks whether its share is free, and takes it."""
        launch = self.launches[launch_id]
        core = self.processes.get(core_pid)
        if core is None or core.zombie or core.launch != launch_id:
            return
        share = float(parse_arguments(launch.argv).get("--gpu-memory-utilization", "0"))
        for gpu in (gpu for gpu in self.gpus if gpu.uuid in launch.gpus):
            worker = self.start(
                "worker", core_pid, launch.shell, command="VLLM::Worker", launch=launch_id, environ=core.environ
            )
            asked = math.ceil(gpu.total_mib * share)
            if gpu.lost or gpu.used_mib + _CONTEXT_MIB + asked > gpu.total_mib:
                self._refused(launch, gpu, asked)
                return
            gpu.holds[worker.pid] = _CONTEXT_MIB + asked
        if self.manners.own_session and launch.gpus:
            helper = self.start("helper", core_pid, None, command="python", launch=launch_id, environ=core.environ)
            gpu = next(gpu for gpu in self.gpus if gpu.uuid in launch.gpus)
            worker_pid = self.of(launch_id, "worker")[0].pid
            gpu.holds[worker_pid] -= 400
            gpu.holds[helper.pid] = 400
        if self.manners.fails_loading > 0:
            self.manners.fails_loading -= 1
            self.later(self.manners.load_s / 2, "collapse", launch_id, 1)
        else:
            self.later(self.manners.load_s, "get_ready", launch_id)

    def _refused(self, launch: Launch, gpu: Gpu, asked_mib: int) -> None:
        """The start check of vLLM fails. Only what came after the start can be to blame."""
        since = self.stranger_came.get(gpu.uuid, -1.0)
        text = f"{launch.replica} asked {asked_mib} MiB of GPU {gpu.index}, of which {gpu.used_mib} MiB are taken"
        if not gpu.lost and since < launch.started_at - 1:
            raise Violation(f"started where there was no room: {text}")
        self.say(text)
        self.collapse(launch.id, 1)

    def collapse(self, launch_id: str, code: int) -> None:
        """All of it ends by itself."""
        for role in ("helper", "worker", "core", "leader"):
            for process in self.of(launch_id, role):
                if role == "leader":
                    self.launches[launch_id].phase = "ending"
                self.end(process.pid, code)

    def get_ready(self, launch_id: str) -> None:
        launch = self.launches[launch_id]
        workers = self.of(launch_id, "worker")
        whole = self.of(launch_id, "core") and len(workers) == len(launch.gpus)
        if self._leads(launch) and launch.phase == "loading" and whole:
            launch.phase = "ready"
            self.say(f"{launch_id} is ready: {launch.replica}")

    def give_up(self, launch_id: str) -> None:
        """The leader has seen that its engine is dead; a worker may outlive it."""
        launch = self.launches[launch_id]
        for process in self.of(launch_id, "leader"):
            self.end(process.pid, 0)
        for process in self.of(launch_id, "core", "worker", "helper"):
            self.later(_OUTLIVES_S if process.role == "worker" else 0.1, "end_of", process.pid, launch_id)
        launch.phase = "over"

    def end_of(self, pid: int, launch_id: str) -> None:
        """A process ends by itself, if it is still the same."""
        if pid in self.processes and self.processes[pid].launch == launch_id:
            self.end(pid, 0)

    def ended(self, process: Process, code: int) -> None:
        launch = self.launches.get(process.launch)
        if launch is None:
            return
        if process.role == "leader":
            asked = launch.phase == "ending"
            launch.phase = "over"
            self.later(0.003, "shell_ends", launch.id, code)
            if asked:
                return
        if process.role in ("core", "worker") and launch.phase in ("loading", "ready") and launch.failed_at is None:
            launch.failed_at = self.now
            self.later(_GIVES_UP_S, "give_up", launch.id)

    # -- signals and answers --------------------------------------------------------------------------------------

    def signal(self, pid: int, number: int) -> None:
        process = self.processes[pid]
        process.signals.append(number)
        self.say(f"signal {number} to {pid}: {process.role} {process.launch}")
        if process.zombie:
            return
        if number == signal.SIGKILL:
            self.kills += 1
            self.end(pid, 137)
        elif process.role == "leader":
            launch = self.launches[process.launch]
            if launch.phase == "importing":
                self.end(pid, 143)
            elif launch.phase == "ready" and not self.manners.ignores_term and launch.failed_at is None:
                launch.phase = "ending"
                self.later(0.8, "finish", launch.id)

    def finish(self, launch_id: str) -> None:
        launch = self.launches[launch_id]
        if launch.phase == "ending" and self.of(launch_id, "leader"):
            self.collapse(launch_id, 0)

    def health(self, port: int) -> int | None:
        """What ``/health`` on this port answers; None where nobody does."""
        owner = self.processes.get(self.ports.get(port, 0))
        if owner is None:
            return None
        if owner.role == "stranger":
            return 200
        launch = self.launches[owner.launch]
        if launch.phase not in ("ready", "ending"):
            return None
        return 200 if launch.failed_at is None else 503
