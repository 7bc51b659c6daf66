"""Whoever is killed at any moment, reconciling process or part of an engine: all ends where the file says.

Judged by the world alone: the processes that run, the GPU memory they hold, the records on disk. Every process
that comes from a box carries a mark of the test's own, so that one whose record was lost is found too.

``python -m tests.e2e.kills --daemon 300 --engines 300`` does it at length; the tests do a little of it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from sage_reconcile.host import documents
from sage_reconcile.host.processes import LAUNCH_VARIABLE, scan
from sage_reconcile.simulator import gpus
from tests.e2e.box import REPOSITORY, Box, box

MARK = "KILLED_DAEMON_TEST"
HOST = "gpus: [{name: H100-80GB, memory: 80GiB, count: 6}]\nguard: off"
LOOKS_LIKE_AN_ENGINE = """
import sys, time
print("up", flush=True)
time.sleep(600)
"""
IS_TITLED_LIKE_A_CORE = """
import sys, time
from sage_reconcile.simulator.title import set_title
set_title("VLLM::EngineCore")
print("up", flush=True)
time.sleep(600)
"""


@dataclass(frozen=True)
class Entry:
    """An engine of the file. With 45 GiB each rank has a GPU for itself, so that starts go on side by side."""

    tp: int
    cpu: bool
    replicas: int = 1
    length: int = 1024

    def text(self) -> str:
        place = "device: cpu" if self.cpu else f"memory: 45GiB, tensor_parallel_size: {self.tp}"
        return (
            f"{{runtime: simulator, model: a/b-7B, {place}, replicas: {self.replicas}, "
            f"args: {{max-model-len: {self.length}}}}}"
        )


POOL = {"one": Entry(1, cpu=False), "pair": Entry(2, cpu=False), "small": Entry(1, cpu=True)}


@dataclass(frozen=True)
class Seen:
    """A process that carries the box's mark."""

    pid: int
    parent: int
    session: int
    launch: str
    words: tuple[str, ...]


def edited(entries: dict[str, Entry], chance: random.Random) -> dict[str, Entry]:
    """Another file: something added, removed, changed or scaled, or several of these."""
    new = dict(entries)
    while new == entries:
        for name in chance.sample(sorted(POOL), chance.choice((1, 2))):
            if name not in new:
                new[name] = POOL[name]
            else:
                kind = chance.choice(("change", "change", "scale", "remove"))
                if kind == "change":
                    new[name] = replace(new[name], length=new[name].length + 1)
                elif kind == "scale":
                    new[name] = replace(new[name], replicas=3 - new[name].replicas if new[name].tp == 1 else 1)
                else:
                    del new[name]
    return new


def marked(box: Box) -> list[Seen]:
    """The processes that come from this box, the reconciling ones excepted."""
    found = []
    ours = {daemon.pid for daemon in box.daemons}
    for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()):
        with suppress(OSError):
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if pid in ours or f"{MARK}={box.folder}".encode() not in environ:
                continue
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            launch = next((v for k, _, v in (e.decode().partition("=") for e in environ) if k == LAUNCH_VARIABLE), "")
            if stat[0] not in "ZX":
                found.append(Seen(pid, int(stat[1]), int(stat[3]), launch, tuple(words)))
    return found


def judge(box: Box, entries: dict[str, Entry]) -> None:
    """The world is as the file says: nothing missing, nothing twice, nothing left over."""
    wanted = {f"{name}/{index}": entry for name, entry in entries.items() for index in range(entry.replicas)}
    launches: dict[str, list[Seen]] = defaultdict(list)
    for seen in marked(box):
        launches[seen.launch].append(seen)
    records = {record["id"]: record for record in box.records()}
    living = {key: record for key, record in records.items() if not record["ended"]}
    assert set(launches) == set(living), "each launch that runs has a record, and each record not ended runs"
    assert sorted(f"{r['engine_name']}/{r['index']}" for r in living.values()) == sorted(wanted)
    claims: Counter[str] = Counter()
    for launch, processes in launches.items():
        record = living[launch]
        entry = wanted[f"{record['engine_name']}/{record['index']}"]
        shell = next(seen for seen in processes if seen.pid == seen.session)
        leaders = [seen for seen in processes if seen.parent == shell.pid]
        assert {seen.session for seen in processes} == {shell.pid}
        assert len(processes) == 3 + (entry.tp if entry.tp > 1 else 0), "shell, server, core, and workers where several"
        assert [leader.pid for leader in leaders] == [record["leader"][0]]
        words = leaders[0].words
        assert words[words.index("--port") + 1] == str(record["port"])
        assert words[words.index("--served-model-name") + 1] == record["engine_name"]
        assert words[words.index("--max-model-len") + 1] == str(entry.length), "it runs what the file says now"
        assert len(record["gpus"]) == (0 if entry.cpu else entry.tp)
        claims.update(record["gpus"])
    ports = Counter(record["port"] for record in living.values())
    assert all(count == 1 for count in ports.values())
    held = {uuid: pids for uuid, pids in gpus.usage(box.state / "simulated-gpus").items() if pids}
    assert {uuid: len(pids) for uuid, pids in held.items()} == claims
    running = {seen.pid for processes in launches.values() for seen in processes}
    assert {pid for pids in held.values() for pid, _ in pids} <= running
    folder = box.state / "launches"
    assert {path.stem for path in folder.iterdir()} == set(records), "no run file without a record, no draft"
    assert {path.name for path in (box.state / "tmp").iterdir()} == set(living)


class Rounds:
    """Edits, kills and judgements, one after another on one box."""

    def __init__(self, box: Box, seed: int) -> None:
        self.box = box
        self.chance = random.Random(seed)
        self.entries: dict[str, Entry] = {}
        self.digest = ""
        self.daemon: subprocess.Popen[bytes] | None = None
        self.stages: Counter[str] = Counter()
        self._until_begun_s = self._until_settled_s = 0.0
        box.environ[MARK] = str(box.folder)

    def edit(self) -> None:
        self.entries = edited(self.entries, self.chance)
        self.box.write("\n".join(f"{name}: {entry.text()}" for name, entry in self.entries.items()), HOST)
        self.digest = documents.read(self.box.file).digest

    def started(self, how: str) -> subprocess.Popen[bytes]:
        """The one who shall work the edit in: a new daemon, a new ``apply``, or the daemon that runs."""
        if how == "running daemon":
            if self.daemon is None:
                self.edit()
                self.daemon = self.box.start_daemon()
            victim, self.daemon = self.daemon, None
            self.box.until("the daemon has settled", lambda: self.converged(victim))
            self.edit()
            return victim
        self.kill_daemon()
        self.edit()
        if how == "daemon":
            return self.box.start_daemon()
        with (self.box.folder / "apply.log").open("ab") as log:
            victim = subprocess.Popen(
                [sys.executable, "-m", "sage_reconcile", "apply", "--yes"],
                cwd=self.box.folder,
                env=self.box.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.box.daemons.append(victim)
        return victim

    def converged(self, daemon: subprocess.Popen[bytes]) -> bool:
        """Whether this daemon has taken up the file and says that all is as it asks."""
        with suppress(FileNotFoundError):
            told = json.loads((self.box.state / "status.json").read_text(encoding="utf-8"))
            mine = told["pid"] == daemon.pid and told["digest"] == self.digest
            return mine and bool(told.get("converged"))
        return False

    def taken_up(self) -> bool:
        """Whether what the file says now is in force."""
        with suppress(FileNotFoundError):
            known = json.loads((self.box.state / "generation.json").read_text(encoding="utf-8"))
            return bool(known["digest"] == self.digest)
        return False

    def undisturbed(self, how: str) -> None:
        """One edit that nobody disturbs, to learn how long that takes."""
        started = time.monotonic()
        worker = self.started(how)
        self.box.until("begun", self.taken_up, every_s=0.002)
        begun = time.monotonic()
        if how == "apply":
            assert worker.wait(60) == 0
        else:
            self.box.until("settled", lambda: self.converged(worker), every_s=0.01)
            self.daemon = worker
        self._until_begun_s, self._until_settled_s = begun - started, time.monotonic() - begun
        judge(self.box, self.entries)

    def killed(self, how: str, part: float) -> None:
        """An edit whose worker is killed after this part of the time that it takes; the next one finishes.

        The first fifth is the time until it begins, the rest that until all is settled.
        """
        victim = self.started(how)
        if part < 0.2:
            delay = part / 0.2 * self._until_begun_s
        else:
            self.box.until("begun", self.taken_up, every_s=0.002)
            delay = (part - 0.2) / 0.8 * self._until_settled_s
        with suppress(subprocess.TimeoutExpired):
            victim.wait(delay)
        self.stages[self._stage(victim)] += 1
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        self.daemon = daemon = self.box.start_daemon()
        self.box.until("the next one has settled", lambda: self.converged(daemon))
        judge(self.box, self.entries)

    def _stage(self, victim: subprocess.Popen[bytes]) -> str:
        if not self.taken_up():
            return "not begun"
        return "settled" if victim.poll() is not None or self.converged(victim) else "under way"

    @contextmanager
    def ended(self) -> Iterator[None]:
        """At the end, however it came, nothing of the box runs, not even what has lost its record."""
        try:
            yield
        finally:
            for process in self.box.daemons:
                process.kill()
                process.wait()
            while left := marked(self.box):
                for seen in left:
                    with suppress(ProcessLookupError):
                        os.kill(seen.pid, signal.SIGKILL)
                time.sleep(0.01)

    def kill_daemon(self) -> None:
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon.wait()
            self.daemon = None


def role(seen: Seen) -> str:
    """What a process is in the tree of its engine."""
    name = " ".join(seen.words)
    if seen.pid == seen.session:
        return "shell"
    return next((part for part in ("Worker", "EngineCore") if part in name), "server")


class EngineRounds(Rounds):
    """Kills of parts of engines under a daemon, some while it works an edit in."""

    def __init__(self, box: Box, seed: int) -> None:
        super().__init__(box, seed)
        self.roles: Counter[str] = Counter()

    def kill(self, wanted: str) -> None:
        """Kills one process of that role, and with a shell the server, so that nobody can tell how that ended."""
        found = [seen for seen in marked(self.box) if seen.launch and role(seen) == wanted]
        if not found:
            return
        victim = self.chance.choice(found)
        pids = [victim.pid]
        if wanted == "shell":
            pids += [seen.pid for seen in marked(self.box) if seen.parent == victim.pid]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self.roles[wanted] += 1
                wanted = "server"
        self._hit.add(victim.launch)

    def round(self) -> None:
        """One to three kills at any moment, and all is as the file says again."""
        self._hit: set[str] = set()
        if self.chance.random() < 0.4:
            self.edit()
        for _ in range(self.chance.choice((1, 1, 2, 3))):
            time.sleep(self.chance.choice((0.0, 0.05, 0.3, 0.6)) * self.chance.random())  # any moment is the point
            self.kill(self.chance.choice(("server", "server", "EngineCore", "EngineCore", "Worker", "shell")))
        daemon = self.daemon
        assert daemon is not None
        self.box.until("all is well again", lambda: self._well(daemon), every_s=0.1)
        judge(self.box, self.entries)

    def _well(self, daemon: subprocess.Popen[bytes]) -> bool:
        assert daemon.poll() is None, "the daemon lives"
        daemon.send_signal(signal.SIGHUP)  # as a person does who does not want to wait for a back-off
        if not self.converged(daemon):
            return False
        told = json.loads((self.box.state / "status.json").read_text(encoding="utf-8"))
        serving = {replica["launch"] for engine in told.get("engines", ()) for replica in engine["replicas"]}
        return not self._hit & (serving | {seen.launch for seen in marked(self.box)})


@contextmanager
def decoys(launch: str = "0badcafe") -> Iterator[None]:
    """Strangers that look like ours by name, command line, mark or session; at the end they must be as they were."""
    look = ["-m", "sage_reconcile.simulator", "--model", "a/b-7B", "--served-model-name", "one"]
    environ = {key: value for key, value in os.environ.items() if key != LAUNCH_VARIABLE}
    environ |= {"PYTHONPATH": str(REPOSITORY), "SPT_NOENV": "1"}
    mark = {LAUNCH_VARIABLE: launch, "SAGE_RECONCILE_REPLICA": "one/0"}
    titled = [sys.executable, "-c", IS_TITLED_LIKE_A_CORE]
    shell = ["/bin/sh", "-s", "sage-reconcile one/0"]
    strangers = [
        subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**environ, **more}, start_new_session=True
        )
        for words, more in (
            ([sys.executable, "-c", LOOKS_LIKE_AN_ENGINE, *look], {}),
            ([*titled, *look], {}),
            (titled, mark),
            (shell, mark),
        )
    ]
    session = strangers[-1]
    assert session.stdin
    session.stdin.write(b"sleep 600 & echo up; wait\n")
    for stranger in strangers:
        assert stranger.stdin
        stranger.stdin.close()
    try:
        for stranger in strangers:
            assert stranger.stdout
            assert stranger.stdout.readline() == b"up\n"
        before = [stat for stat in scan() if stat.session in {stranger.pid for stranger in strangers}]
        assert len(before) == len(strangers) + 1
        yield
        assert [stranger.poll() for stranger in strangers] == [None] * len(strangers), "strangers run on"
        after = {(stat.pid, stat.start_ticks) for stat in scan() if stat.state not in "ZXT"}
        assert {(stat.pid, stat.start_ticks) for stat in before} <= after, "and so do their children"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(session.pid, signal.SIGKILL)
        for stranger in strangers:
            stranger.kill()
            stranger.wait()
            assert stranger.stdout
            stranger.stdout.close()


def moments(count: int, chance: random.Random) -> list[float]:
    """Parts of the time that an edit takes: one in each of ``count`` equal stretches, in any order."""
    parts = [(number + chance.random()) / count for number in range(count)]
    chance.shuffle(parts)
    return parts


def kill_the_reconciler(box: Box, how: str, seed: int, count: int) -> Counter[str]:
    """So many kills of a daemon, or of ``apply``, spread over its work; how far it was each time."""
    rounds = Rounds(box, seed)
    with decoys(), rounds.ended():
        rounds.undisturbed(how)
        for number, part in enumerate(moments(count, rounds.chance)):
            if number in (0, count // 2):
                rounds.undisturbed(how)
            rounds.killed(how, part)
    return rounds.stages


def kill_engines(box: Box, seed: int, count: int) -> Counter[str]:
    """So many kills, at least, of processes of engines; how many of each role."""
    rounds = EngineRounds(box, seed)
    with rounds.ended():
        rounds.undisturbed("daemon")
        while rounds.roles.total() < count:
            launches = [record["id"] for record in box.records() if not record["ended"]]
            with decoys(rounds.chance.choice(launches or ["0badcafe"])):  # the mark of an engine that runs
                for _ in range(5):
                    rounds.round()
    return rounds.roles


def main() -> None:
    """The long run."""
    parser = argparse.ArgumentParser(description="Kill daemons and engines, and see that nothing is lost or doubled.")
    parser.add_argument("--daemon", type=int, default=300, help="kills of the reconciling process")
    parser.add_argument("--engines", type=int, default=300, help="kills of processes of engines")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    stages: Counter[str] = Counter()
    roles: Counter[str] = Counter()
    begun, seed = time.monotonic(), asked.seed
    while stages.total() < asked.daemon or roles.total() < asked.engines:
        with tempfile.TemporaryDirectory(prefix="sr-") as folder, box(Path(folder)) as made:
            if stages.total() < asked.daemon:
                how = ("running daemon", "daemon", "apply")[seed % 3]
                stages += kill_the_reconciler(made, how, seed, min(25, asked.daemon - stages.total()))
            else:
                roles += kill_engines(made, seed, min(50, asked.engines - roles.total()))
        seed += 1
        print(f"{time.monotonic() - begun:6.0f}s  daemon {dict(stages)}  engines {dict(roles)}", flush=True)
    print("nothing lost, nothing doubled, nothing left over, no stranger touched")


if __name__ == "__main__":
    main()
