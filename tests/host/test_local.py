"""The machine as one pass needs it: real processes, real files, and crashes between any two steps."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import pytest

from sage_reconcile.core.failure import FailureKind
from sage_reconcile.core.lifecycle import StopCause
from sage_reconcile.core.measured import find
from sage_reconcile.core.observed import Gpu, Launch, Life, Observed
from sage_reconcile.core.plan import Action
from sage_reconcile.core.spec import Desired
from sage_reconcile.daemon import Passes, settle
from sage_reconcile.host import learned, oom, ports, processes
from sage_reconcile.host.local import LocalHost
from sage_reconcile.host.probes import Prober
from sage_reconcile.host.processes import LAUNCH_VARIABLE
from sage_reconcile.host.state import StateFolder
from sage_reconcile.reconcile import Pass, run_pass
from sage_reconcile.simulator import gpus as simulated_gpus
from tests.host.world import ROOT, eventually, free_port, record, session_members, stranger
from tests.reading import desired

NO_GPU = "version: 1\nhost: {gpus: none}\n"
SERVER = """
import http.server, subprocess, sys
subprocess.Popen(["sleep", "600"])
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *a): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
"""
CLAIM = """
import sys, time
from pathlib import Path
from sage_reconcile.simulator import gpus
gpus.claim(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
print("claimed", flush=True)
time.sleep(600)
"""


class Place:
    """A state folder, and hosts that come and go as daemons do."""

    def __init__(self, folder: Path, **environ: str) -> None:
        self.folder = folder
        self.state = StateFolder(folder / "s")
        self.state.create()
        self.environ = {**os.environ, **environ}
        self.hosts: list[LocalHost] = []
        self.shells: list[subprocess.Popen[bytes]] = []
        self.host = self.another()

    def another(self) -> LocalHost:
        """A host that knows nothing but what is on disk."""
        self.host = LocalHost(self.state, self.folder, self.environ, Prober(time.monotonic))
        self.hosts.append(self.host)
        return self.host

    def looker(self) -> LocalHost:
        return LocalHost(self.state, self.folder, self.environ)

    def run(self, wanted: Desired) -> Pass:
        assert self.host.prober
        self.host.prober.ask()
        return run_pass(self.host, wanted)

    def until(self, wanted: Desired, **expected: object) -> Launch:
        """Runs passes until there is one launch, and it is so."""

        def seen() -> Launch | None:
            launches = self.run(wanted).observed.launches
            fits = len(launches) == 1 and all(getattr(launches[0], k) == v for k, v in expected.items())
            return launches[0] if fits else None

        return eventually(seen, str(expected))

    def records(self) -> dict[str, dict[str, object]]:
        return {path.stem: json.loads(path.read_text()) for path in self.state.launches.glob("*.json")}

    def clean(self) -> None:
        for host in self.hosts:
            assert host.prober
            host.prober.close()
            self.shells += host._children
        while marked := [stat.pid for stat in processes.scan() if stat.running and self._is_marked(stat.pid)]:
            for pid in marked:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
        for shell in self.shells:
            shell.wait()

    def _is_marked(self, pid: int) -> bool:
        with suppress(OSError):
            return f"PLACE={self.folder}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return False


@pytest.fixture(name="place")
def _place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path, PLACE=str(tmp_path))
    yield made
    made.clean()


def command(words: list[str], **more: object) -> Desired:
    """An engine that is any program, on no GPU."""
    entry = {"runtime": "command", "device": "cpu", "command": words, "port": free_port(), **more}
    return desired(f"{NO_GPU}engines: {json.dumps({'chat': entry})}")


def sleeping(**more: object) -> Desired:
    return command(["sleep", "600"], **more)


def nothing() -> Desired:
    return desired(f"{NO_GPU}engines: {{}}")


def alive(observed: Observed) -> list[Launch]:
    return [launch for launch in observed.launches if launch.life is Life.ALIVE]


def test_the_intent_is_on_disk_before_the_process_exists(place: Place) -> None:
    copy = f'cp "{place.state.launches}/${LAUNCH_VARIABLE}.json" seen; sleep 600'
    result = place.run(command(["sh", "-c", copy]))
    assert [action.kind for action in result.done] == ["spawn"]
    seen = eventually(lambda: (place.folder / "seen").exists() and (place.folder / "seen").read_text())
    known = json.loads(seen)
    assert (known["engine_name"], known["index"], known["ended"]) == ("chat", 0, False)
    assert known["port"] == result.done[0].port
    assert known["spec"]["command"] == ["sh", "-c", copy]


def test_what_is_learned_is_put_on_record(place: Place) -> None:
    wanted = command([sys.executable, "-c", SERVER, "{port}"])
    place.run(wanted)
    launch = place.until(wanted, life=Life.ALIVE, ready=True)
    known = place.records()[launch.id]
    full = processes.identify(launch.pid or 0)
    assert full
    assert known["leader"] == [full.pid, full.start_ticks, full.inode]
    members = {member[0] for member in known["members"]}  # type: ignore[attr-defined]
    assert members >= {full.pid}
    assert len(members) == 2
    assert known["ready_at"] == pytest.approx(time.time(), abs=60)
    assert place.run(wanted).plan.in_sync
    os.kill(full.pid, signal.SIGKILL)
    after = eventually(lambda: [x for x in place.run(wanted).observed.launches if x.life is Life.EXITED])
    assert after[0].exit
    assert after[0].exit.code == 137
    ended = place.records().get(launch.id) or {"ended": True, "exit_code": 137}
    assert (ended["ended"], ended["exit_code"]) == (True, 137)
    assert not place.state.temporary(launch.id).exists()


def test_a_look_tells_what_starts_took_and_what_they_hold_now(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the one who acted, by one who only looks, and by one who comes later."""
    monkeypatch.setattr(oom, "kills", lambda: 3)
    entry = "{model: m, runtime: simulator, memory: 10GiB, args: {simulate-weights-mib: 4000}}"
    port = free_port()
    wanted = desired(f"version: 1\nhost: {{gpus: 2xH100-80GB, ports: {port}-{port}}}\nengines:\n  chat: {entry}\n")
    place.run(wanted)
    launch = place.until(wanted, ready=True)
    held = (10 * 1024, 10 * 1024 - 1)  # the share is rounded down
    tokens = [(mib - 4000 - 256 - 512) * 8 // 16 * 16 for mib in held]
    for host in (place.host, place.looker(), place.another()):
        seen = host.observe(wanted)
        [now] = seen.launches
        assert now.held_mib in held
        assert now.kv_tokens in tokens
        found = find(seen.measured, wanted.engines[0].record, "H100-80GB")
        assert found is not None
        assert (found.held_mib, found.starts, found.kv_tokens) == (now.held_mib, 1, now.kv_tokens)
        assert (found.block_tokens, found.kv_blocks) == (16, now.kv_tokens // 16)
    assert place.records()[launch.id]["oom_kills"] == 3


def test_why_it_failed_is_put_on_record_once(place: Place) -> None:
    wanted = command(["sh", "-c", "echo 'OSError: [Errno 98] Address already in use'; exit 1"])
    place.run(wanted)
    ended = place.until(wanted, life=Life.EXITED)
    assert ended.failure
    assert ended.failure.kind is FailureKind.PORT_TAKEN
    [known] = place.records().values()
    assert learned.read_failure(known["failure"]) == ended.failure  # type: ignore[arg-type]
    Path(ended.log_path).unlink()
    for host in (place.looker(), place.another()):
        assert host.observe(wanted).launches[0].failure == ended.failure


def test_an_end_that_was_asked_for_is_no_failure(place: Place) -> None:
    wanted = sleeping()
    place.run(wanted)
    place.until(wanted, life=Life.ALIVE)
    seen = eventually(lambda: [x for x in place.run(nothing()).observed.launches if x.life is Life.EXITED])
    assert seen[0].stop_cause == StopCause.REMOVED
    assert seen[0].failure is None


def test_a_new_host_adopts_what_runs_and_starts_nothing_twice(place: Place) -> None:
    wanted = command([sys.executable, "-c", SERVER, "{port}"])
    place.run(wanted)
    first = place.until(wanted, ready=True)
    place.another()
    result = place.run(wanted)
    assert not result.done
    assert [(x.id, x.pid, x.life) for x in result.observed.launches] == [(first.id, first.pid, Life.ALIVE)]
    assert result.observed.launches[0].ready, "it was ready before, and counts as ready until it is known better"


def test_an_exit_is_learned_by_the_next_host(place: Place) -> None:
    wanted = command(["sh", "-c", "until [ -e go ]; do sleep 0.01; done; exit 9"])
    place.run(wanted)
    place.until(wanted, life=Life.ALIVE)
    (place.folder / "go").touch()
    eventually(lambda: processes.read_run(next(place.state.launches.glob("*.run"))).exit_code == 9)
    launches = place.another().observe(wanted).launches
    assert [(x.life, x.exit and x.exit.code) for x in launches] == [(Life.EXITED, 9)]


def test_a_start_that_never_happened_is_undone_by_who_acts_and_left_by_who_looks(place: Place) -> None:
    place.host.records.save(record())
    place.state.temporary("1a2b3c4d").mkdir()
    seen = place.looker().observe(sleeping())
    assert [x.life for x in seen.launches] == [Life.EXITED]
    assert list(place.records()) == ["1a2b3c4d"]
    assert place.host.observe(sleeping()).launches == ()
    assert place.records() == {}
    assert not place.state.temporary("1a2b3c4d").exists()


def test_who_only_looks_writes_nothing(place: Place) -> None:
    wanted = command([sys.executable, "-c", SERVER, "{port}"])
    place.run(wanted)
    looker = place.looker()
    eventually(lambda: [x for x in looker.observe(wanted).launches if x.ready])
    assert not looker.writes
    known = next(iter(place.records().values()))
    assert (known["leader"], known["ready_at"], known["members"]) == ([], None, [])


def test_records_of_another_boot_are_history_and_their_pids_strangers(place: Place) -> None:
    with stranger() as other:
        now = processes.identify(other.pid)
        assert now
        old = record(boot_id="earlier", leader=[now.pid, now.start_ticks, now.inode], stopping_since=1.0)
        place.host.records.save(old)
        result = place.run(sleeping())
        assert place.records()["1a2b3c4d"]["ended"] is True
        assert [action.kind for action in result.done] == ["spawn"]


def test_neither_stop_nor_kill_nor_reap_touch_a_process_that_is_not_ours(place: Place) -> None:
    """The record has the pid of a stranger, as after the pid was used again."""
    with stranger("sh", "-c", "sleep 600 & wait", PLACE=str(place.folder)) as other:
        eventually(lambda: session_members(other.pid))
        now = processes.identify(other.pid)
        child = processes.identify(session_members(other.pid)[0].pid)
        assert now
        assert child
        lies = [
            record(leader=[now.pid, now.start_ticks - 1, now.inode]),
            record(leader=[now.pid, now.start_ticks + 1, now.inode]),
            record(leader=[child.pid, child.start_ticks - 9, 0], members=[[child.pid, child.start_ticks - 9, 0]]),
        ]
        line = f"{child.pid} (sh) S {now.pid} {now.pid} {now.pid} " + "0 " * 15 + f"{child.start_ticks - 9} 0\n"
        for lie in lies:
            place.host.records.save(lie)
            place.host.records.run_file(lie.id).write_text(line)
            seen = place.host.observe(nothing())
            assert [x.life for x in seen.launches] == [Life.EXITED]
            for kind in ("stop", "kill", "reap"):
                action = Action(kind, kind, "chat/0", "", launch=lie.id, stop_cause=StopCause.REMOVED)  # type: ignore[arg-type]
                place.host.carry_out(action, nothing())
            assert processes.alive(now)
            assert processes.alive(child)
            place.host.forget(lie.id)


def test_a_pid_used_again_between_look_and_act_is_left_alone(place: Place) -> None:
    wanted = sleeping()
    place.run(wanted)
    launch = place.until(wanted, life=Life.ALIVE)
    with stranger() as other:
        now = processes.identify(other.pid)
        assert now
        found = place.host._found[launch.id]
        found.leader = processes.ProcessId(now.pid, now.start_ticks - 1, 0)
        stop = Action("stop", "stop", "chat/0", "", launch=launch.id, stop_cause=StopCause.REMOVED)
        place.host.carry_out(stop, wanted)
        kill = Action("kill", "kill", "chat/0", "", launch=launch.id)
        place.host.carry_out(kill, wanted)
        assert processes.alive(now)


def test_a_stop_is_asked_once_and_known_to_the_next_host(place: Place) -> None:
    stubborn = "trap 'echo asked >> asked' TERM; echo up > up; while :; do sleep 0.01; done"
    wanted = command(["sh", "-c", stubborn])
    place.run(wanted)
    place.until(wanted, life=Life.ALIVE)
    eventually((place.folder / "up").exists)
    result = place.run(nothing())
    assert [action.kind for action in result.done] == ["stop"]
    eventually((place.folder / "asked").exists)
    place.another()
    for _ in range(3):
        assert not place.run(nothing()).done
    assert (place.folder / "asked").read_text() == "asked\n"
    known = next(iter(place.records().values()))
    assert known["stop_cause"] == StopCause.REMOVED
    assert known["stopping_since"] == pytest.approx(time.time(), abs=60)


@pytest.mark.parametrize("when", ["before it is sent", "after it is sent"])
def test_a_stop_interrupted_by_a_crash_is_asked_again(place: Place, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    wanted = command(["sh", "-c", "trap 'echo asked >> asked' TERM; echo up > up; while :; do sleep 0.01; done"])
    place.run(wanted)
    place.until(wanted, life=Life.ALIVE)
    eventually((place.folder / "up").exists)
    send = processes.send

    def crash(process: processes.ProcessId, number: signal.Signals) -> bool:
        if when == "after it is sent":
            send(process, number)
        raise SystemExit

    with monkeypatch.context() as crashing:
        crashing.setattr(processes, "send", crash)
        with pytest.raises(SystemExit):
            place.run(nothing())
    place.another()
    assert [action.kind for action in place.run(nothing()).done] == ["stop"]
    eventually((place.folder / "asked").exists)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_right_after_the_start_loses_no_process(
    place: Place, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    wanted, spawn = sleeping(), processes.spawn

    def interrupted(*args: object, **more: object) -> None:
        place.shells.append(spawn(*args, **more))  # type: ignore[arg-type]
        raise error

    with monkeypatch.context() as crashing:
        crashing.setattr(processes, "spawn", interrupted)
        with pytest.raises(error):
            place.run(wanted)
    place.another()
    assert not place.run(wanted).done
    assert place.until(wanted, life=Life.ALIVE)


def test_a_start_that_fails_is_reported_and_leaves_nothing(place: Place) -> None:
    gone = place.folder / "gone"
    place.host.folder = gone
    result = place.run(sleeping())
    assert not result.done
    assert [str(gone) in reason for _, reason in result.failed] == [True]
    assert place.records() == {}
    assert list((place.state.path / "tmp").iterdir()) == []
    assert list(place.state.launches.iterdir()) == []
    place.host.folder = place.folder
    (place.state.path / "logs/chat.0").rmdir()
    (place.state.path / "logs").rmdir()
    (place.state.path / "logs").write_text("in the way")
    result = place.run(sleeping())
    assert ["cannot be made: Not a directory" in reason for _, reason in result.failed] == [True]
    assert list(place.state.launches.iterdir()) == []


def test_a_state_folder_that_takes_no_record_starts_nothing(place: Place) -> None:
    wanted = sleeping()
    place.state.launches.rmdir()
    place.state.launches.symlink_to(place.folder / "nowhere")
    result = place.run(wanted)
    assert not result.done
    assert ["cannot be written" in reason for _, reason in result.failed] == [True]
    assert not (place.state.path / "logs/chat.0").exists()


def test_unreadable_records_are_told_in_every_plan(place: Place) -> None:
    (place.state.launches / "torn.json").write_text("{")
    result = place.run(nothing())
    assert any("torn.json: not a readable record" in note for note in result.plan.notes)


def test_the_environment_of_an_engine(tmp_path: Path) -> None:
    outside = {"SAGE_RECONCILE_FILE": "/f", "VLLM_PORT": "1", "KEPT": "yes", "BOTH": "outside", "PLACE": str(tmp_path)}
    place = Place(tmp_path, **outside)
    try:
        wanted = command(["sh", "-c", "env > env.part; mv env.part env; sleep 600"], env={"BOTH": "inside", "OWN": "1"})
        place.run(wanted)
        eventually((tmp_path / "env").exists)
        environ = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
        launch_id = environ[LAUNCH_VARIABLE]
        assert launch_id in place.records()
        assert environ["SAGE_RECONCILE_REPLICA"] == "chat/0"
        assert (environ["KEPT"], environ["BOTH"], environ["OWN"]) == ("yes", "inside", "1")
        assert environ["CUDA_VISIBLE_DEVICES"] == ""
        assert not {"SAGE_RECONCILE_FILE", "VLLM_PORT", "SAGE_RECONCILE_SIMULATED_GPUS"} & environ.keys()
        private = place.state.temporary(launch_id)
        if len(str(private)) <= 70:
            assert environ["TMPDIR"] == environ["VLLM_RPC_BASE_PATH"] == str(private)
        else:
            assert environ.get("TMPDIR") != str(private), "a socket in it would have too long a name"
        assert private.stat().st_mode & 0o777 == 0o700
    finally:
        place.clean()


@contextmanager
def silent_holder(port: int = 0) -> Iterator[int]:
    """A port that is bound, so that it can be bound by others too, and that nobody listens on."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", port))
        yield holder.getsockname()[1]


def auto_port(low: int) -> Desired:
    """An engine that takes the first of two ports."""
    host = f"{{gpus: none, ports: {low}-{low + 1}, inner_ports: 9-9}}"
    entry = {"runtime": "command", "device": "cpu", "command": ["sleep", "600"]}
    return desired(f"version: 1\nhost: {host}\nengines: {json.dumps({'chat': entry})}")


def test_a_port_taken_since_the_look_is_passed_over_by_the_next_one(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the kernel does not tell of it, and for as long as it is taken."""
    monkeypatch.setattr(ports, "_BOUND", ports._LISTEN)
    with silent_holder() as port:
        wanted = auto_port(port)
        first = place.run(wanted)
        assert [reason for _, reason in first.failed] == [
            (
                f"cannot start chat/0: port {port} has been taken by another program meanwhile; end that program or "
                "choose another port (`port: auto` takes another one by itself)"
            )
        ]
        assert first.untried == {"chat/0"}
        assert not place.records()
        assert not (place.state.path / "logs/chat.0").exists()
        assert [port.number for port in place.host.observe(wanted).ports] == [port]
        assert port in [found.number for found in place.host.observe(sleeping(port=port)).ports]
    assert place.host.observe(wanted).ports == (), "it is free again"
    with silent_holder(port):
        assert place.run(wanted).untried == {"chat/0"}
        second = place.run(wanted)
        assert [(action.kind, action.port) for action in second.done] == [("spawn", port + 1)]
        assert not second.untried


def test_what_is_asked_for_once_is_tried_on_another_port_where_the_first_is_taken(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``apply`` does it, which starts each replica once."""
    monkeypatch.setattr(ports, "_BOUND", ports._LISTEN)

    async def work(wanted: Desired) -> list[Pass]:
        passes = Passes(place.state, place.folder, place.environ)
        place.hosts.append(passes.host)
        seen: list[Pass] = []
        try:
            await settle(passes, wanted, seen.append)
        finally:
            passes.close()
        return seen

    words = [sys.executable, "-c", SERVER, "{port}"]
    with silent_holder() as port:
        wanted = command(words, port="auto")
        wanted = dataclasses.replace(wanted, host=wanted.host.model_copy(update={"ports": f"{port}-{port + 1}"}))
        seen = asyncio.run(work(wanted))
        assert [bool(result.failed) for result in seen[:2]] == [True, False]
        [kept] = seen[-1].plan.kept
        assert kept.launch.ready
        assert kept.launch.port == port + 1
        again = asyncio.run(work(command(words, port=port)))
        assert [bool(result.failed) for result in again].count(True) == 1
        assert f"port {port} is taken by another program" in again[-1].plan.unplaced[0].reason


def test_the_inner_ports_of_vllm_are_kept_on_record(place: Place) -> None:
    """Those of what runs, told again by a host that knows nothing else; and those of its next launch."""
    serves = place.folder / "python"
    serves.write_text("#!/bin/sh\nenv > env.part; mv env.part env; exec sleep 600\n")
    serves.chmod(0o755)
    entry = {"model": "a/b", "device": "cpu", "python": str(serves), "port": free_port()}
    wanted = desired(f"{NO_GPU}engines: {json.dumps({'chat': entry})}")
    [action] = place.run(wanted).done
    eventually((place.folder / "env").exists)
    assert f"VLLM_PORT={action.inner_ports.start}" in (place.folder / "env").read_text().splitlines()
    place.another()
    launch = place.until(wanted, life=Life.ALIVE)
    assert launch.inner_ports == action.inner_ports
    assert len(launch.inner_ports) == 8
    assert launch.pid
    os.kill(launch.pid, signal.SIGKILL)
    [again] = eventually(lambda: [action for action in place.run(wanted).plan.actions if action.kind == "spawn"])
    assert again.inner_ports == action.inner_ports


def test_memory_is_given_to_whose_session_holds_it_and_strangers_are_named(place: Place) -> None:
    text = (
        "version: 1\nhost: {gpus: [{name: X, memory: 80GiB, count: 1}]}\n"
        f"engines: {{chat: {{runtime: simulator, model: a/b-7B, memory: 20GiB, port: {free_port()}}}}}"
    )
    wanted = desired(text)
    place.run(wanted)
    launch = place.until(wanted, ready=True)
    session = place.host._found[launch.id].session
    # what ended once in a session of the same number takes nothing away from what runs in it now
    old = record("ffffffff", engine_name="zz")
    place.host.records.save(old)
    line = f"4194001 (sh) S 1 {session} {session} " + "0 " * 15 + "5 0\nexit 0\n"
    place.host.records.run_file(old.id).write_text(line)
    words = [sys.executable, "-c", CLAIM, str(place.state.simulated_gpus), "GPU-simulated-0", "1000"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) as other:
        assert other.stdout
        assert other.stdout.readline() == b"claimed\n"
        try:
            gpu = place.looker().observe(wanted).gpus[0]
            owners = {process.launch: process for process in gpu.processes}
            assert owners.keys() == {launch.id, None}
            assert owners[launch.id].memory_mib == 20 * 1024
            unmanaged = owners[None]
            assert (unmanaged.pid, unmanaged.memory_mib) == (other.pid, 1000)
            assert "python" in unmanaged.command
            assert unmanaged.user
            assert simulated_gpus.usage(place.state.simulated_gpus)
        finally:
            other.kill()


def test_the_size_of_a_model_is_read_from_its_folder_and_again_when_it_changes(place: Place) -> None:
    model = place.folder / "model"
    model.mkdir()
    config = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": 320,
        "num_attention_heads": 2,
        "intermediate_size": 128,
    }
    (model / "config.json").write_text(json.dumps(config))
    wanted = desired(f"{NO_GPU}engines: {{chat: {{model: model, device: cpu, replicas: 0}}}}")
    first = place.host.observe(wanted).models["model"]
    assert first.config is not None
    assert first.source.endswith("/model")
    assert place.host.observe(wanted).models["model"] is first
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    second = place.host.observe(wanted).models["model"]
    assert second.config is not None
    assert len(second.config.layers) == 4
    for broken in ("{", "[]", "\ud800"):
        (model / "config.json").write_bytes(broken.encode(errors="surrogatepass"))
        assert place.another().observe(wanted).models["model"].config is None


def test_logs_of_what_runs_are_kept_small_and_old_ones_few(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from sage_reconcile.host import logs

    monkeypatch.setattr(logs, "LIMIT_BYTES", 1000)
    monkeypatch.setattr(logs, "_KEEP_BYTES", 100)
    folder = place.state.path / "logs/chat.0"
    folder.mkdir()
    for number in range(9):
        (folder / f"20200101T00000{number}-ab.log").touch()
    wanted = command(["sh", "-c", "i=0; while [ $i -lt 500 ]; do echo line; i=$((i+1)); done; echo up > up; sleep 600"])
    place.run(wanted)
    assert len(list(folder.iterdir())) == logs.KEPT
    eventually((place.folder / "up").exists)
    launch = place.until(wanted, life=Life.ALIVE)
    place.host.tidy()
    assert Path(launch.log_path).stat().st_size < 300
    assert asdict(launch)["log_path"] == str(logs.newest(folder)[0])


def test_from_whom_a_launch_takes_over_and_where_one_goes_outlive_who_decided_it(place: Place) -> None:
    wanted = sleeping()
    place.run(wanted)
    old = place.until(wanted, life=Life.ALIVE)
    takes_over = Action("spawn chat/0", "spawn", "chat/0", "", port=free_port(), predecessor=old.id)
    place.host.carry_out(takes_over, wanted)
    goes_to = (Gpu("GPU-7", 7, "H100", "", 1024), Gpu("GPU-5", 5, "H100", "", 1024))
    moved = Action("stop", "stop", "chat/0", "", launch=old.id, stop_cause=StopCause.MOVED, goes_to=goes_to)
    place.host.carry_out(moved, wanted)
    launches = {launch.id == old.id: launch for launch in place.another().observe(wanted).launches}
    assert (launches[False].predecessor, launches[False].destination) == (old.id, ())
    assert (launches[True].predecessor, launches[True].destination) == ("", ("GPU-7", "GPU-5"))
