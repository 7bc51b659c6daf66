"""The inventory as a user sees it, on machines that a stand-in for NVIDIA's library describes."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.e2e.box import REPOSITORY, Box
from tests.stand_in_nvml import GIB, LIBRARY, Code, Machine, MigDevice, Mode, Process, StandInGpu, build

SWITCH = "00000000:F1:00.0"
USER = pwd.getpwuid(os.geteuid()).pw_name
Written = Callable[..., None]


@pytest.fixture(name="library", scope="module")
def _library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nvml")
    build(folder)
    return folder


@pytest.fixture(name="machine")
def _machine(box: Box, library: Path) -> Written:
    """Puts a machine in place."""
    path = box.folder / "machine"
    box.environ |= {"LD_LIBRARY_PATH": str(library), "STAND_IN_NVML": str(path)}

    def write(gpus: Sequence[StandInGpu], **faults: int) -> None:
        Machine(gpus, faults=faults).write(path)

    write([])
    return write


def gpu(number: int, **facts: Any) -> StandInGpu:
    return StandInGpu(**{"uuid": f"GPU-{number}", "pci": f"00000000:{0x1B + number:02X}:00.0"} | facts)


@contextmanager
def stranger(command: str, folder: Path) -> Iterator[int]:
    """The pid of a program of that name which is not ours."""
    path = folder / command
    shutil.copy("/bin/sleep", path)
    with subprocess.Popen([path, "600"]) as program:
        try:
            yield program.pid
        finally:
            program.kill()


def checked(document: Any, name: str) -> None:
    schema = json.loads((REPOSITORY / f"schemas/{name}.schema.json").read_text())
    jsonschema.validate(document, schema, cls=jsonschema.Draft202012Validator)


def lines(text: str) -> dict[str, list[str]]:
    """The columns of a table's lines by their first."""
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if row}


def test_every_gpu_is_told_with_its_memory_load_state_and_who_is_on_it(box: Box, machine: Written) -> None:
    box.write("{}", "gpus: auto\nheadroom: 8GiB\nexclude: [1]")
    mig = [MigDevice("MIG-a", 0), MigDevice("MIG-b", 2, used=GIB, processes=[Process(1, GIB)])]
    with stranger("train", box.folder) as pid, stranger("fill", box.folder) as other:
        held = [Process(pid, 20 * GIB), Process(other, None)]
        machine(
            [
                gpu(0, processes=held, used=24 * GIB, utilization=93, temperature=71, power=612_345, reserved=1),
                gpu(
                    1, faults={"nvmlDeviceGetTemperature": Code.UNKNOWN, "nvmlDeviceGetPowerUsage": Code.NO_PERMISSION}
                ),
                gpu(2, faults={"*": Code.GPU_IS_LOST}),
                gpu(3, uncorrected_volatile=2),
                gpu(4, compute_mode=Mode.EXCLUSIVE_PROCESS, used=GIB, processes=[Process(pid, GIB)]),
                gpu(5, mig_mode=1, mig=mig),
            ]
        )
        text, document = box.run("gpu"), box.json("gpu")
    rows = lines(text)
    name = "NVIDIA H100 80GB HBM3"
    on_it = f"pid {pid} {USER} train 20.0GiB, pid {other} {USER} fill ? MiB, not told of whom 4.0GiB"
    assert rows["0"] == [name, "[++++++--............] 24.0/80.0GiB", "48.0GiB", "93%", "71C", "612W", "ok", on_it]
    assert rows["1"] == [name, "[--..................] 0.0/80.0GiB", "0.0GiB", "0%", "-", "-", "excluded", "-"]
    assert rows["2"] == ["unknown GPU", f"[{'?' * 20}] ?/?GiB", "0.0GiB", "-", "-", "-", "faulty", "-"]
    assert rows["3"][2:] == ["0.0GiB", "0%", "35C", "70W", "faulty", "-"]
    assert rows["4"][-2:] == ["takes nothing new", f"pid {pid} {USER} train 1.0GiB"]
    assert rows["602"][:3] == [f"{name} MIG 3g.40gb", "[----................] 1.0/40.0GiB", "31.0GiB"]
    assert "5" not in rows, "a card in MIG mode is none of its own"
    assert "GPU 2: the GPU is lost" in text
    assert "GPU 3: 2 uncorrectable memory errors" in text
    assert f"GPU 4: it is in exclusive-process mode and held by pid {pid} {USER} train" in text
    checked(document, "gpu")
    told = {row["index"]: row for row in document["gpus"]}
    assert sorted(told) == [0, 1, 2, 3, 4, 600, 602]
    assert [told[0][key] for key in ("utilization_percent", "temperature_c", "power_w")] == [93, 71, 612.345]
    unknown = ("memory_total_mib", "memory_used_mib", "unmanaged_mib", "numa_node", "power_w", "compute_capability")
    assert [told[2][key] for key in unknown] == [None] * len(unknown)
    assert (told[4]["compute_mode"], told[4]["compute_capability"]) == ("exclusive-process", "9.0")
    assert [told[number]["faulty"] for number in (0, 1, 2, 3, 4)] == [False, False, True, True, False]
    assert {"pid": other, "user": USER, "command": "fill", "memory_mib": None} in told[0]["unmanaged"]


def test_topology_is_the_matrix_of_nvidia_smi(box: Box, machine: Written) -> None:
    switched = [(link, True, SWITCH, 2) for link in range(18)]
    pair = [(link, True, "00000000:1E:00.0", 0) for link in range(4)]
    machine(
        [
            gpu(0, nvlinks=switched, ancestors={2: 50, 3: 50}, numa_node=0),
            gpu(1, nvlinks=switched, ancestors={2: 50, 3: 50}, numa_node=0),
            gpu(2, nvlinks=pair, ancestors={4: 30}, numa_node=1, capability="8.0"),
            gpu(3, capability=None),
            gpu(4),
        ]
    )
    matrix = lines(box.run("gpu", "--topology"))
    assert matrix["GPU0"] == ["X", "NV18", "SYS", "SYS", "?", "0", "9.0"]
    assert matrix["GPU1"] == ["NV18", "X", "SYS", "SYS", "?", "0", "9.0"]
    assert matrix["GPU2"] == ["SYS", "SYS", "X", "NV4", "PHB", "1", "8.0"]
    assert matrix["GPU3"] == ["SYS", "SYS", "NV4", "X", "?", "-", "-"]
    assert matrix["GPU4"] == ["?", "?", "PHB", "?", "X", "-", "9.0"]
    assert not any(row.startswith("GPU0") for row in box.run("gpu").splitlines()), "only where it is asked for"
    links = box.json("gpu")["links"]
    assert {"between": ["GPU-0", "GPU-1"], "link": "nvlink", "nvlinks": 18} in links
    assert {"between": ["GPU-2", "GPU-4"], "link": "phb", "nvlinks": None} in links
    assert len(links) == 7


def test_a_file_that_is_missing_or_wrong_hides_no_gpu(box: Box, machine: Written) -> None:
    machine([gpu(0)])
    text = box.run("gpu")
    assert "note: engines.yaml is not there, so no headroom and no exclusion is known" in text
    assert "[....................] 0.0/80.0GiB  80.0GiB" in text
    box.write("chat: {modell: x}", "gpus: auto\nheadroom: 40GiB")
    assert "engines.yaml is not valid (see `sage-reconcile validate`), so no headroom" in box.run("gpu")
    document = box.json("gpu")
    assert "modell" in document["file_error"]
    assert document["gpus"][0]["memory_free_mib"] == 80 * 1024
    checked(document, "gpu")
    box.write("{}", "gpus: auto\nheadroom: 40GiB")
    box.run("apply", "--yes")
    box.write("chat: {modell: x}")
    assert "what was valid last is taken" in box.run("gpu")
    assert box.json("gpu")["gpus"][0]["memory_free_mib"] == 40 * 1024


def test_why_there_are_no_gpus_is_told_and_is_no_error(box: Box, machine: Written, tmp_path: Path) -> None:
    box.write("{}", "gpus: auto")
    machine([], nvmlInitWithFlags=Code.NO_PERMISSION)
    assert box.run("gpu", "--topology").startswith("No GPUs: no permission to use the NVIDIA driver")
    machine([])
    assert box.run("gpu").startswith("No GPUs: the NVIDIA driver reports no GPU")
    (tmp_path / LIBRARY).touch()
    box.environ["LD_LIBRARY_PATH"] = str(tmp_path)
    document = box.json("gpu")
    assert (document["gpus"], document["note"][:16]) == ([], "no NVIDIA driver")
    checked(document, "gpu")
    box.write("{}", "gpus: none")
    assert box.run("gpu") == "No GPUs: `host.gpus: none`\n"


def test_names_of_processes_and_gpus_cannot_speak_to_the_terminal(box: Box, machine: Written) -> None:
    box.write("chat: {model: a/b-7B, memory: 70GiB}", "gpus: auto")
    with stranger("a\x1b[1m\n+ b", box.folder) as pid:
        machine([gpu(0, name="H100\x1b[31m", used=30 * GIB, processes=[Process(pid, 30 * GIB)])])
        for words in (["gpu", "--topology"], ["status"], ["diff"]):
            text = box.run(*words, expect=3 if words == ["diff"] else 0)
            assert "\x1b" not in text
            assert f"pid {pid} {USER} a\\x1b[1m\\n+ b" in text
            assert "H100\\x1b[31m" in text
        assert box.json("gpu")["gpus"][0]["unmanaged"][0]["command"] == "a\x1b[1m\n+ b"


def test_status_tells_load_and_strangers_and_the_daemon_does_not_keep_what_never_stays(
    box: Box, machine: Written
) -> None:
    box.write("{}", "gpus: auto")
    with stranger("train", box.folder) as pid:
        machine([gpu(0, used=20 * GIB, processes=[Process(pid, 20 * GIB)], utilization=93, power=612_345), gpu(1)])
        box.start_daemon()
        path = box.state / "status.json"
        box.until("the daemon has looked", lambda: path.exists() and "gpus" in json.loads(path.read_text()))
        rows, document = lines(box.run("status")), box.status()
        assert rows["0"][-4:] == ["93%", "35C", "612W", f"pid {pid} {USER} train 20.0GiB"]
        checked(document, "status")
        kept = json.loads(path.read_text())["gpus"][0]
        volatile = ("utilization_percent", "temperature_c", "power_w")
        assert [kept[name] for name in volatile] == [None] * 3
        assert {**document["gpus"][0], **dict.fromkeys(volatile)} == kept


def test_what_is_not_known_of_any_gpu_takes_no_column_of_status(box: Box) -> None:
    box.write("{}")
    heads = box.run("status").splitlines()[2].split()
    assert heads == ["GPU", "MODEL", "TOTAL", "PROMISED", "USED", "FREE", "UNMANAGED"]
    assert lines(box.run("gpu"))["1"][3:] == ["-", "-", "-", "ok", "-"]
