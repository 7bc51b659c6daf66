"""The commands on a machine with GPUs, which a stand-in for NVIDIA's library describes."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.box import Box
from tests.stand_in_nvml import GIB, LIBRARY, Code, Machine, Process, StandInGpu, build

UUIDS = ("GPU-aaaaaaaa-1111-2222-3333-444444444444", "GPU-bbbbbbbb-1111-2222-3333-444444444444")
HOST = "gpus: auto"
SERVES = """
import http.server, json, os, subprocess, sys
from pathlib import Path
words = sys.argv[1:]
port = int(words[words.index("--port") + 1])
child = subprocess.Popen(["sleep", "600"])
draft = Path(f"seen.{port}.part")
draft.write_text(json.dumps({"words": words, "environ": dict(os.environ), "child": child.pid}))
draft.rename(f"seen.{port}.json")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *_):
        pass

http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class Gpus:
    """The machine's GPUs as the stand-in shows them: two H100, by default empty."""

    def __init__(self, box: Box) -> None:
        self.path = box.folder / "machine"
        self.faults: dict[str, dict[str, int]] = {uuid: {} for uuid in UUIDS}
        self.held: dict[str, dict[int, int]] = {uuid: {} for uuid in UUIDS}
        self.late = 0
        self.write()

    def write(self, **faults: int) -> None:
        gpus = [
            StandInGpu(
                uuid,
                f"00000000:{bus}:00.0",
                used=(sum(self.held[uuid].values()) + (self.late if uuid == UUIDS[0] else 0)) * GIB,
                processes=[Process(pid, gib * GIB) for pid, gib in self.held[uuid].items()],
                faults=self.faults[uuid],
            )
            for uuid, bus in zip(UUIDS, ("1B", "3B"), strict=True)
        ]
        Machine(gpus, faults=faults).write(self.path)

    def hold(self, number: int, pid: int, gib: int) -> None:
        self.held[UUIDS[number]][pid] = gib
        self.write()

    def ends_late(self, number: int, pid: int) -> None:
        """From now on nobody is named for what this process held, and it is not free."""
        self.late = self.held[UUIDS[number]].pop(pid)
        self.write()

    def gives_back(self) -> None:
        self.late = 0
        self.write()

    def lose(self, number: int) -> None:
        self.faults[UUIDS[number]] = {"*": Code.GPU_IS_LOST}
        self.write()


@pytest.fixture(name="library", scope="module")
def _library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nvml")
    build(folder)
    return folder


@pytest.fixture(name="gpus")
def _gpus(box: Box, library: Path) -> Gpus:
    made = Gpus(box)
    box.environ |= {"LD_LIBRARY_PATH": str(library), "STAND_IN_NVML": str(made.path)}
    interpreter = box.folder / "fake-python"
    interpreter.write_text(f"#!{sys.executable}\n{SERVES}")
    interpreter.chmod(0o755)
    return made


@contextmanager
def stranger() -> Iterator[int]:
    """The pid of a program that is not ours; it has to live on."""
    with subprocess.Popen(["sleep", "600"]) as program:
        try:
            yield program.pid
            assert program.poll() is None
        finally:
            program.kill()


def vllm(memory: str, more: str = "") -> str:
    return f"{{model: a/b-7B, python: ./fake-python, memory: {memory}{more}}}"


def seen(box: Box, port: int) -> Any:
    """What the interpreter that serves on this port was started with."""
    return json.loads((box.folder / f"seen.{port}.json").read_text())


def placed(plan: Any) -> dict[str, list[tuple[int, str]]]:
    return {action["replica"]: [(gpu["index"], gpu["uuid"]) for gpu in action["gpus"]] for action in plan["actions"]}


def test_a_stranger_that_holds_memory_is_placed_around_and_named(box: Box, gpus: Gpus) -> None:
    with stranger() as pid:
        gpus.hold(0, pid, 60)
        box.write(
            f"chat: {vllm('40GiB')}\nsmall: {vllm('15GiB')}\nwide: {vllm('30GiB', ', tensor_parallel_size: 2')}", HOST
        )
        plan = box.json("diff", expect=3)
        assert placed(plan) == {"chat/0": [(1, UUIDS[1])], "small/0": [(0, UUIDS[0])]}
        user = pwd.getpwuid(os.geteuid()).pw_name
        assert plan["unplaced"][0]["replica"] == "wide/0"
        text = box.run("diff", expect=3)
        assert f"GPU 0 has 5.0GiB of 80GiB free (small/0 15.0GiB, unmanaged (pid {pid} {user} sleep) 60.0GiB)" in text
        box.run("apply", "--yes", expect=3)
        rows = box.status()["gpus"]
        assert [row["unmanaged_mib"] for row in rows] == [60 * 1024, 0]
        assert [row["unmanaged"] for row in rows] == [
            [{"pid": pid, "user": user, "command": "sleep", "memory_mib": 60 * 1024}],
            [],
        ]
        assert [row["memory_promised_mib"] for row in rows] == [15 * 1024, 40 * 1024]


def test_vllm_is_started_as_planned(box: Box, gpus: Gpus) -> None:
    """One rank leaves 614 MiB of its promise for the CUDA context, several 2,150 MiB."""
    del gpus
    more = ", args: {max-model-len: 4096, enforce-eager: true}, env: {MINE: '1'}, served_model_name: [x, y]"
    box.environ |= {"VLLM_PORT": "1", "CUDA_VISIBLE_DEVICES": "7"}
    box.write(f"one: {vllm('24GiB', more)}\ntwo: {vllm('50%', ', tensor_parallel_size: 2')}", HOST)
    box.run("apply", "--yes")
    rows = box.replicas()
    ports = {name: str(row["port"]) for name, row in rows.items()}
    one, two = (seen(box, rows[name]["port"]) for name in ("one/0", "two/0"))
    share = (24 * 1024 - 614) / 81920
    assert one["words"] == [
        *("-m", "vllm.entrypoints.openai.api_server", "--model", "a/b-7B", "--host", "127.0.0.1"),
        *("--port", ports["one/0"], "--served-model-name", "x", "y"),
        *("--gpu-memory-utilization", f"{int(share * 1e6) / 1e6:.6f}", "--shutdown-timeout", "25"),
        *("--max-model-len", "4096", "--enforce-eager"),
    ]
    share = (40 * 1024 - 2150) / 81920
    assert two["words"] == [
        *("-m", "vllm.entrypoints.openai.api_server", "--model", "a/b-7B", "--host", "127.0.0.1"),
        *("--port", ports["two/0"], "--served-model-name", "two", "--tensor-parallel-size", "2"),
        *("--gpu-memory-utilization", f"{int(share * 1e6) / 1e6:.6f}", "--shutdown-timeout", "25"),
    ]
    assert one["environ"]["CUDA_VISIBLE_DEVICES"] == rows["one/0"]["gpus"][0]["uuid"]
    assert two["environ"]["CUDA_VISIBLE_DEVICES"] == ",".join(UUIDS)
    blocks = {record["engine_name"]: (record["inner_port"], record["inner_count"]) for record in box.records()}
    assert blocks["one"][1] == blocks["two"][1] == 8
    assert abs(blocks["one"][0] - blocks["two"][0]) >= 8
    for name, environ in (("one", one["environ"]), ("two", two["environ"])):
        assert environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        assert environ["SPT_NOENV"] == "1"
        assert environ["VLLM_PORT"] == str(blocks[name][0])
    assert one["environ"]["MINE"] == "1"
    assert box.json("diff")["in_sync"]


def test_any_other_server_sees_its_gpus_by_uuid_too(box: Box, gpus: Gpus) -> None:
    gpus.held[UUIDS[0]] = {}
    command = "command: [./fake-python, --name, '{name}', --port, '{port}'], runtime: command"
    box.write(f"mine: {{{command}, memory: 30GiB, gpus: [1]}}\ncpu: {{{command}, device: cpu}}", HOST)
    box.run("apply", "--yes")
    rows = box.replicas()
    mine, cpu = (seen(box, rows[name]["port"]) for name in ("mine/0", "cpu/0"))
    assert mine["words"] == ["--name", "mine", "--port", str(rows["mine/0"]["port"])]
    assert mine["environ"]["CUDA_VISIBLE_DEVICES"] == UUIDS[1]
    assert cpu["environ"]["CUDA_VISIBLE_DEVICES"] == "", "a CPU engine sees no GPU"


def test_memory_of_our_processes_is_ours_and_counts_once(box: Box, gpus: Gpus) -> None:
    """What the leader and a child of it hold belongs to the engine, and as much of the promise is not counted again."""
    box.write(f"chat: {vllm('40GiB')}", HOST)
    box.run("apply", "--yes")
    row = box.replicas()["chat/0"]
    child = seen(box, row["port"])["child"]
    number = row["gpus"][0]["index"]
    gpus.hold(number, row["pid"], 2)
    gpus.hold(number, child, 30)
    shown = box.status()["gpus"][number]
    assert (shown["memory_used_mib"], shown["unmanaged_mib"], shown["unmanaged"]) == (32 * 1024, 0, [])
    assert shown["memory_free_mib"] == 40 * 1024
    with stranger() as pid:
        gpus.hold(number, pid, 7)
        shown = box.status()["gpus"][number]
        assert (shown["unmanaged_mib"], [p["pid"] for p in shown["unmanaged"]]) == (7 * 1024, [pid])
        assert shown["memory_free_mib"] == 33 * 1024
    gpus.held[UUIDS[number]] = {child: 50}
    gpus.write()
    shown = box.status()["gpus"][number]
    assert (shown["unmanaged_mib"], shown["memory_free_mib"]) == (0, 30 * 1024), "it holds more than it was promised"


def test_nothing_starts_where_an_ended_engine_still_holds_memory(box: Box, gpus: Gpus) -> None:
    """The driver gives memory back late: until then the old one is not gone."""
    box.write(f"chat: {vllm('60GiB')}\nother: {vllm('60GiB')}", HOST)
    box.run("apply", "--yes")
    row = box.replicas()["chat/0"]
    number = row["gpus"][0]["index"]
    gpus.hold(number, row["pid"], 60)
    box.start_daemon()
    box.until("the daemon has looked", (box.state / "status.json").exists)
    box.write(f"next: {vllm('60GiB')}\nother: {vllm('60GiB')}", HOST)
    box.until("all of its processes are gone", lambda: not Path(f"/proc/{row['pid']}").exists())
    rows = box.replicas()
    assert rows["chat/0"]["phase"] == "Stopping"
    assert rows["next/0"]["phase"] == "Pending"
    gpus.held[UUIDS[number]] = {}
    gpus.write()
    box.until("the memory is back", lambda: set(box.ready()) == {"next/0", "other/0"})
    assert box.replicas()["next/0"]["gpus"][0]["index"] == number


def test_a_gpu_that_is_lost_while_in_use_is_told_and_takes_nothing_new(box: Box, gpus: Gpus) -> None:
    box.write(f"chat: {vllm('20GiB', ', gpus: [0]')}", HOST)
    box.start_daemon()
    before = box.until("ready", box.ready)
    gpus.lose(0)
    chat, wide = vllm("20GiB", ", gpus: [0]"), vllm("20GiB", ", tensor_parallel_size: 2")
    box.write(f"chat: {chat}\nsmall: {vllm('20GiB')}\nwide: {wide}", HOST)

    def told() -> Any:
        status = json.loads((box.state / "status.json").read_text())
        rows = {row["name"]: row for engine in status["engines"] for row in engine["replicas"]}
        return (status, rows) if rows.get("small/0", {}).get("phase") == "Ready" else None

    status, rows = box.until("what fits elsewhere runs there", told)
    lost = next(gpu for gpu in status["gpus"] if gpu["uuid"] == UUIDS[0])
    assert "the GPU is lost" in lost["problem"]
    assert (lost["index"], lost["memory_free_mib"], lost["memory_total_mib"]) == (0, 0, 81920)
    assert rows["chat/0"]["pid"] == before["chat/0"], "what runs there is not touched"
    assert rows["chat/0"]["phase"] == "Degraded"
    assert rows["chat/0"]["reason"].startswith("GPU 0: the GPU is lost")
    assert not status["converged"]
    assert rows["small/0"]["gpus"] == [{"index": 1, "uuid": UUIDS[1]}]
    assert rows["wide/0"]["unplaced"]
    assert "GPU 0" in rows["wide/0"]["reason"]
    assert "the GPU is lost" in rows["wide/0"]["reason"]


def test_apply_ends_and_says_so_where_what_runs_is_on_a_gpu_at_fault(box: Box, gpus: Gpus) -> None:
    """A command that sees the GPU only after it was lost cannot know which it is."""
    box.write(f"chat: {vllm('20GiB')}", HOST)
    box.run("apply", "--yes")
    number = box.replicas()["chat/0"]["gpus"][0]["index"]
    gpus.lose(number)
    text = box.run("apply", "--yes", expect=1)
    assert "error: not everything is as the file says: 1 not ready" in text
    assert f"chat/0 is Degraded: {UUIDS[number]} is not listed any more (GPU {number}: the GPU is lost" in text
    assert f"note: chat/0: runs on a GPU at fault: {UUIDS[number]}" in box.run("diff")
    gpus.faults[UUIDS[number]] = {"nvmlDeviceGetTotalEccErrors": Code.UNKNOWN}
    gpus.write()
    box.run("apply", "--yes")
    assert list(box.ready()) == ["chat/0"]


def test_a_driver_that_cannot_be_used_is_told_with_the_reason(box: Box, gpus: Gpus, tmp_path: Path) -> None:
    box.write(f"chat: {vllm('20GiB')}\ncpu: {{model: a/b-7B, device: cpu, replicas: 0}}", HOST)
    gpus.write(nvmlInitWithFlags=Code.DRIVER_NOT_LOADED)
    assert "installed but not loaded: load it with modprobe nvidia" in box.run("diff", expect=3)
    gpus.write(nvmlInitWithFlags=Code.NO_PERMISSION)
    assert "no permission to use the NVIDIA driver" in box.run("diff", expect=3)
    (tmp_path / LIBRARY).touch()  # no library at all, also where there is one
    box.environ["LD_LIBRARY_PATH"] = str(tmp_path)
    text = box.run("diff", expect=3)
    assert (
        "chat/0  unplaced   needs 1 GPU, but this machine has none: no NVIDIA driver: libnvidia-ml.so.1 was not found"
        in text
    )
    assert "`device: cpu` runs it without" in text
    assert not box.json("diff", expect=3)["actions"]


def test_init_writes_what_fits_the_gpus_of_this_machine(box: Box, gpus: Gpus) -> None:
    gpus.write()
    box.run("init")
    text = box.file.read_text()
    assert "found: 2 x NVIDIA H100 80GB HBM3" in text
    assert placed(box.json("diff", expect=2)) in ({"chat/0": [(number, UUIDS[number])]} for number in (0, 1))


def test_a_start_waits_until_the_memory_of_the_one_before_is_back(box: Box, gpus: Gpus) -> None:
    box.write(f"chat: {vllm('60GiB', ', gpus: [0]')}", HOST)
    box.start_daemon()
    pid = box.until("chat is ready", lambda: box.ready().get("chat/0"))
    gpus.hold(0, pid, 60)
    box.write(f"chat: {vllm('60GiB', ', gpus: [0], args: {seed: 1}')}", HOST)
    box.until("the old one has ended", lambda: not Path(f"/proc/{pid}").exists())
    gpus.ends_late(0, pid)
    told = "waits for GPU 0 to give back 60.0GiB that chat/0 held"
    box.until("the new one waits", lambda: box.replicas()["chat/0"]["reason"].endswith(told))
    note = "GPU 0: 60.0GiB that chat/0 held are not back yet"
    assert note in box.status()["notes"]
    assert "chat/0" not in box.ready()
    gpus.gives_back()
    box.until("the new one is ready", lambda: box.ready().get("chat/0") not in (None, pid), 10)
