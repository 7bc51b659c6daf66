"""The Python door: the same file, with a daemon and without, with a driver and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sage_reconcile.control_plane import ControlPlaneManager, EngineLifecycleManager, EngineState, GPUResourceManager
from sage_reconcile.errors import EditRefused, FileFaults, LockHeld, NotFound, UnknownModel
from sage_reconcile.host import files
from tests.e2e.box import Box

HEAD = """\
version: 1
# ours
host: {{gpus: [{{name: H100-80GB, memory: 80GiB, count: 2}}], ports: {ports}}}
defaults: {{runtime: simulator, memory: 20GiB}}
"""


def write(box: Box, engines: str = "engines: {}\n") -> None:
    box.file.write_text(HEAD.format(ports=box.ports) + engines)


def doors(box: Box) -> tuple[GPUResourceManager, EngineLifecycleManager, ControlPlaneManager]:
    where = (box.file, box.state, box.environ)
    return GPUResourceManager(*where), EngineLifecycleManager(*where), ControlPlaneManager(*where)


def test_without_a_daemon_requests_are_written_and_apply_does_them(box: Box) -> None:
    write(box)
    gpus, engines, plane = doors(box)
    receipt = plane.request_engine_startup(
        "Qwen/Qwen3-8B",
        replicas=2,
        required_memory_gb=24,
        extra_args=["--max-model-len", "4096", "--enable-prefix-caching"],
    )
    assert (receipt["engine_id"], receipt["changed"], receipt["daemon_pid"]) == ("qwen3-8b", True, None)
    assert receipt["note"] == f"no daemon follows {box.file}: nothing changes on the machine until apply()"
    entry = yaml.safe_load(box.file.read_text())["engines"]["qwen3-8b"]
    assert entry == {
        "model": "Qwen/Qwen3-8B",
        "replicas": 2,
        "memory": "24576MiB",
        "args": {"max-model-len": 4096, "enable-prefix-caching": True},
    }
    assert "# ours" in box.file.read_text()
    assert not plane.request_engine_startup("Qwen/Qwen3-8B", replicas=2)["changed"], "twice is once"
    pending = engines.get_engine_status("qwen3-8b")
    assert (pending["status"], pending["pid"]) == (EngineState.PENDING, None)

    done = plane.apply()
    assert done["converged"]
    running = engines.get_engine_status("qwen3-8b")
    assert (running["status"], running["model"]) == (EngineState.RUNNING, "Qwen/Qwen3-8B")
    assert running["pid"] == box.ready()["qwen3-8b/0"]
    assert [one["replica"] for one in plane.get_instances()] == ["qwen3-8b/0", "qwen3-8b/1"]
    assert plane.get_instances()[0]["endpoint"] == f"http://127.0.0.1:{running['port']}"
    assert sum(gpu["memory_free"] < 80 - 24 for gpu in gpus.get_system_status()) >= 1

    assert engines.stop_engine("qwen3-8b")
    assert not engines.stop_engine("qwen3-8b")
    assert engines.get_engine_status("qwen3-8b")["status"] is EngineState.STOPPING
    plane.apply()
    assert engines.get_engine_status("qwen3-8b")["status"] is EngineState.STOPPED
    assert not box.processes()
    plane.request_engine_shutdown("qwen3-8b", remove=True)
    assert engines.list_engines() == []
    with pytest.raises(NotFound, match="no engine 'qwen3-8b'"):
        engines.get_engine_status("qwen3-8b")
    with pytest.raises(NotFound):
        engines.stop_engine("qwen3-8b")


def test_flags_are_taken_as_words_or_as_a_map_and_mean_themselves(box: Box) -> None:
    write(box)
    plane = doors(box)[2]
    words = ["--stop=a", "b", "--x=${HOME}", "--n", "-1", "--off=false", "--text", "a: b # c"]
    plane.request_engine_startup("x/${HOME}", engine_label="words", extra_args=words)
    flags = {"stop": ["a", "b"], "x": "${HOME}", "n": -1, "off": False, "text": "a: b # c"}
    plane.request_engine_startup("x/${HOME}", engine_label="map", extra_args=flags)
    assert not plane.request_engine_startup("x/${HOME}", engine_label="map", extra_args=flags)["changed"]
    seen = plane.get_cluster_status()["engines"]
    assert [row["model"] for row in seen] == ["x/${HOME}", "x/${HOME}"], "nothing is taken from the environment"
    desired = files.load(box.file, box.environ).desired
    assert [engine.spec.args for engine in desired.engines] == [flags, flags]


def test_with_a_daemon_it_follows(box: Box) -> None:
    write(box)
    daemon = box.start_daemon()
    box.until("the daemon is up", lambda: box.status()["daemon"])
    gpus, engines, plane = doors(box)
    port = int(box.ports.split("-")[0]) + 5
    name = engines.spawn_engine("a/b-7B", [0, 1], port)
    assert name == engines.spawn_engine("a/b-7B", [0, 1], port) == "b-7b"
    box.until("ready", lambda: engines.get_engine_status(name)["status"] is EngineState.RUNNING)
    status = engines.get_engine_status(name)
    assert (status["port"], status["gpu_ids"]) == (port, [0, 1])
    other = engines.spawn_engine("a/b-7B", [1], port + 1)
    assert other == f"b-7b-{port + 1}"
    box.until("both", lambda: len(plane.get_instances()) == 2)
    assert plane.get_cluster_status()["daemon_pid"] == daemon.pid
    assert plane.get_cluster_status()["note"] == ""
    assert plane.apply()["converged"], "the daemon does it"
    bad = plane.request_engine_startup("x/bad-1B", extra_args={"simulate-fail": "load"})["engine_id"]
    failed = box.until("it failed", lambda: (s := engines.get_engine_status(bad))["status"] is EngineState.FAILED and s)
    assert "ended" in failed["reason"]
    large = plane.request_engine_startup("x/l-1B", required_memory_gb=79)["engine_id"]
    box.until("no place", lambda: "needs 79.0GiB" in engines.get_engine_status(large)["reason"])
    assert engines.get_engine_status(large)["status"] is EngineState.FAILED
    engines.stop_engine(large)
    engines.stop_engine(bad, remove=True)
    assert engines.stop_engine(name)
    box.until("stopped", lambda: engines.get_engine_status(name)["status"] is EngineState.STOPPED)
    box.until("its memory is back", lambda: gpus.check_resource_availability(70) == [0])
    assert gpus.check_resource_availability(60) == [1]


def test_gpus_are_found_by_what_is_free_on_them(box: Box) -> None:
    write(box, "engines:\n  a: {model: m-1B, memory: 50GiB, gpus: [1]}\n")
    gpus, _, plane = doors(box)
    assert [gpu["index"] for gpu in gpus.get_system_status()] == [0, 1]
    assert gpus.get_system_status()[0] == {
        "index": 0,
        "name": "H100-80GB",
        "memory_total": 80.0,
        "memory_used": 0.0,
        "memory_free": 80.0,
        "utilization": None,
    }
    plane.apply()
    assert gpus.check_resource_availability(20) == [1], "the fullest that has it"
    assert gpus.check_resource_availability(30, 2) == [1, 0]
    assert gpus.check_resource_availability(30.1, 2) == []
    assert gpus.check_resource_availability(30.1) == [0]
    assert gpus.check_resource_availability(80.1) == []


def test_a_model_is_estimated(box: Box) -> None:
    write(box)
    gpus, _, _ = doors(box)
    one, two = gpus.estimate_model_memory("org/Model-8B"), gpus.estimate_model_memory("org/Model-8B", 2)
    assert one > 16
    assert two < one
    with pytest.raises(UnknownModel, match="nothing here tells how large"):
        gpus.estimate_model_memory("org/unknown")


def test_without_a_driver_there_are_no_gpus_and_the_note_says_why(tmp_path: Path) -> None:
    file = tmp_path / "engines.yaml"
    file.write_text("version: 1\nengines: {}\n")
    gpus = GPUResourceManager(file, tmp_path / "s", {})
    assert gpus.get_system_status() == []
    assert gpus.note
    assert gpus.check_resource_availability(1) == []
    assert ControlPlaneManager(file, tmp_path / "s", {}).get_cluster_status()["gpus"] == []


def test_what_cannot_be_is_refused_and_nothing_written(box: Box) -> None:
    write(box, "engines:\n  chat: {model: a/b-7B}\n")
    before = box.file.read_text()
    _, engines, plane = doors(box)
    for label, args, told in (
        ("../x", None, "cannot be the name"),
        ("x", ["stray"], "belongs to no flag"),
        ("x", ["--api-key", "s3cret"], "VLLM_API_KEY"),
        ("chat", None, "chat is in the file, with the model a/b-7B"),
    ):
        with pytest.raises(EditRefused, match=told) as raised:
            plane.request_engine_startup("x/y-1B", engine_label=label, extra_args=args)
        assert "s3cret" not in str(raised.value)
    with pytest.raises(EditRefused, match="65536 is not a port"):
        engines.spawn_engine("x/y-1B", [0], 65536)
    assert box.file.read_text() == before
    box.file.unlink()
    with pytest.raises(FileFaults, match="does not exist"):
        plane.request_engine_startup("x/y-1B")


def test_apply_waits_its_turn(box: Box) -> None:
    write(box)
    other = box.folder / "other.yaml"
    other.write_text(box.file.read_text())
    daemon = box.start_daemon()
    box.until("the daemon is up", lambda: box.status()["daemon"])
    with pytest.raises(LockHeld, match=rf"in use by daemon \(pid {daemon.pid}, following {box.file}\)"):
        ControlPlaneManager(other, box.state, box.environ).apply()
