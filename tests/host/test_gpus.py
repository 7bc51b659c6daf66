"""The inventory through the real pynvml, on a stand-in for NVIDIA's library and in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from sage_reconcile.core.observed import ComputeMode, Gpu, GpuProcess
from tests.stand_in_nvml import (
    GIB,
    LIBRARY,
    Code,
    Machine,
    MigDevice,
    Mode,
    Process,
    StandInGpu,
    build,
    environment,
)

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
TOTAL_MIB = 80 * 1024
MEMORY = ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMemoryInfo_v2")

READER = """
import dataclasses, json, sys
from sage_reconcile.host.gpus import NvmlInventory
inventory = NvmlInventory()
for _ in sys.stdin:
    gpus, note = inventory.read()
    print(json.dumps([[dataclasses.asdict(gpu) for gpu in gpus], note]), flush=True)
inventory.close()
inventory.close()
"""


class Reader:
    """A process with one inventory in it, on a machine that can be changed between its reads."""

    def __init__(self, folder: Path, library_folder: Path) -> None:
        self.description = folder / "machine"
        self.calls_log = folder / "calls"
        self.library_folder = library_folder
        self.process: subprocess.Popen[str] | None = None

    def read(self, machine: Machine | None = None) -> tuple[list[Gpu], str]:
        if machine is not None:
            machine.write(self.description)
        self.calls_log.write_text("")
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", "-c", READER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=environment(self.library_folder, self.description, self.calls_log),
            )
        self.process.stdin.write("read\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the inventory ended with an error"
        gpus, note = json.loads(answer)
        return [_gpu(gpu) for gpu in gpus], note

    def calls(self) -> list[str]:
        """The NVML functions called by the latest read."""
        return self.calls_log.read_text().split()

    def end(self) -> int:
        if self.process is None:
            return 0
        self.process.communicate()
        return self.process.returncode


def _gpu(fields: dict) -> Gpu:
    processes = tuple(GpuProcess(**process) for process in fields.pop("processes"))
    return Gpu(**fields, processes=processes)


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Callable[..., Path]:
    """The folder of the library without some functions; each variant is built once."""

    @cache
    def variant(*without: str) -> Path:
        return build(tmp_path_factory.mktemp("nvml"), without).parent

    return variant


@pytest.fixture
def reader_on(tmp_path) -> Iterator[Callable[[Path], Reader]]:
    readers = []

    def start(library_folder: Path) -> Reader:
        readers.append(Reader(tmp_path, library_folder))
        return readers[-1]

    yield start
    assert [reader.end() for reader in readers] == [0] * len(readers)


@pytest.fixture
def reader(reader_on, library) -> Reader:
    return reader_on(library())


def gpu(number: int = 0, **facts) -> StandInGpu:
    return StandInGpu(**{"uuid": f"GPU-{number}", "pci": f"00000000:{0x1B + number:02X}:00.0"} | facts)


def read_one(reader: Reader, **facts) -> Gpu:
    gpus, _ = reader.read(Machine([gpu(0, **facts)]))
    assert len(gpus) == 1
    return gpus[0]


def test_eight_gpus_with_their_processes_in_the_order_of_their_pci_ids(reader):
    busy = gpu(
        7,
        total=80 * GIB + MIB - 1,
        reserved=500 * MIB + 1,
        used=30 * GIB + 1,
        processes=[Process(4711, 20 * GIB + 1), Process(12, 10 * GIB)],
        utilization=93,
        temperature=71,
        power=612_345,
        numa_node=65,
    )
    gpus, note = reader.read(Machine([busy, *(gpu(number) for number in (6, 5, 4, 3, 2, 1, 0))]))

    assert note == ""
    assert [(gpu.uuid, gpu.index) for gpu in gpus] == [(f"GPU-{n}", 7 - n) for n in range(8)]
    assert gpus[7] == Gpu(
        uuid="GPU-7",
        index=0,
        name="NVIDIA H100 80GB HBM3",
        pci_id="00000000:22:00.0",
        memory_total_mib=TOTAL_MIB,
        memory_reserved_mib=501,
        memory_used_mib=30 * 1024 + 1,
        processes=(GpuProcess(12, 10 * 1024), GpuProcess(4711, 20 * 1024 + 1)),
        utilization_percent=93,
        temperature_c=71,
        power_w=612.345,
        compute_capability="9.0",
        numa_node=65,
        compute_mode=ComputeMode.DEFAULT,
    )
    assert all(gpu.processes == () and gpu.problem == "" and gpu.numa_node is None for gpu in gpus[:7])


def test_fixed_facts_are_asked_once_and_changing_ones_every_time(reader):
    machine = Machine([gpu(n) for n in range(8)])
    reader.read(machine)
    assert reader.calls().count("nvmlDeviceGetUUID") == 8
    machine.gpus[3].used = 5 * GIB

    gpus, _ = reader.read(machine)

    assert gpus[3].memory_used_mib == 5 * 1024
    fixed = {"UUID", "Name", "PciInfo_v3", "CudaComputeCapability", "MemoryAffinity", "HandleByIndex_v2"}
    assert not fixed & {call.removeprefix("nvmlDeviceGet") for call in reader.calls()}
    assert not [call for call in reader.calls() if "Init" in call or "Shutdown" in call]
    assert len(reader.calls()) <= 1 + 8 * 12


def test_a_process_in_several_lists_counts_once_with_the_larger_amount(reader):
    listed = [
        Process(1, 3 * GIB, "graphics"),
        Process(1, 2 * GIB, "compute"),
        Process(2, None, "compute"),
        Process(2, GIB, "mps"),
        Process(3, MIB // 2, "graphics"),
    ]
    read = read_one(reader, processes=listed)
    assert read.processes == (GpuProcess(1, 3 * 1024), GpuProcess(2, 1024), GpuProcess(3, 1, graphics=True))


def test_process_memory_that_the_driver_does_not_tell_is_unknown_not_zero(reader):
    read = read_one(reader, used=9 * GIB, processes=[Process(77, None)])
    assert read.processes == (GpuProcess(77, None),)
    assert read.memory_used_mib == 9 * 1024
    assert read.problem == ""


def test_more_processes_than_fit_at_the_first_try(reader):
    read = read_one(reader, processes=[Process(pid, pid * MIB) for pid in range(100, 140)])
    assert read.processes == tuple(GpuProcess(pid, pid) for pid in range(100, 140))


OLD_DRIVER = (
    "nvmlDeviceGetMemoryInfo_v2",
    "nvmlDeviceGetComputeRunningProcesses_v3",
    "nvmlDeviceGetMPSComputeRunningProcesses_v3",
    "nvmlDeviceGetGraphicsRunningProcesses_v3",
)


def test_an_old_driver_counts_its_reserve_as_used(reader_on, library):
    read = read_one(
        reader_on(library(*OLD_DRIVER)),
        reserved=600 * MIB,
        used=2 * GIB,
        processes=[Process(5, GIB), Process(6, GIB, "graphics"), Process(7, GIB, "mps")],
    )
    assert (read.memory_total_mib, read.memory_reserved_mib, read.memory_used_mib) == (TOTAL_MIB, 0, 2048 + 600)
    assert [process.pid for process in read.processes] == [5, 6, 7]
    assert read.problem == ""


def test_a_driver_that_has_next_to_no_function_still_gives_a_usable_gpu(reader_on, library):
    missing = [
        *OLD_DRIVER,
        *(name.replace("_v3", "_v2") for name in OLD_DRIVER[1:]),
        *(f"nvmlDeviceGet{name}" for name in ("Name", "PciInfo_v3", "CudaComputeCapability", "MemoryAffinity")),
        *(f"nvmlDeviceGet{name}" for name in ("UtilizationRates", "Temperature", "PowerUsage", "ComputeMode")),
        *(f"nvmlDeviceGet{name}" for name in ("MigMode", "TotalEccErrors", "RemappedRows")),
        "nvmlDeviceGetRetiredPagesPendingStatus",
    ]
    reader = reader_on(library(*missing))
    read = read_one(reader, used=GIB, numa_node=1)
    assert read == Gpu("GPU-0", 0, "unknown GPU", "", TOTAL_MIB, 0, 1024)

    reader.read()
    assert "nvmlDeviceGetUUID" not in reader.calls()


@pytest.mark.parametrize(
    ("function", "field"),
    [
        ("nvmlDeviceGetUtilizationRates", "utilization_percent"),
        ("nvmlDeviceGetTemperature", "temperature_c"),
        ("nvmlDeviceGetPowerUsage", "power_w"),
        ("nvmlDeviceGetCudaComputeCapability", "compute_capability"),
        ("nvmlDeviceGetMemoryAffinity", "numa_node"),
        ("nvmlDeviceGetComputeMode", "compute_mode"),
    ],
)
def test_one_failing_question_costs_that_answer_only(reader_on, library, function, field):
    whole = read_one(reader_on(library()), numa_node=1)
    assert getattr(whole, field) is not None
    partial = read_one(reader_on(library()), numa_node=1, faults={function: Code.UNKNOWN})
    assert partial == replace(whole, **{field: None})


def test_a_fixed_fact_that_failed_in_passing_is_asked_again(reader):
    assert read_one(reader, faults={"nvmlDeviceGetName": Code.UNKNOWN}).name == "unknown GPU"
    assert read_one(reader).name == "NVIDIA H100 80GB HBM3"


def test_a_name_that_is_not_text_does_not_take_the_read_down(reader):
    assert read_one(reader, name="\udcf8\udcff").name == "unknown GPU"


def test_no_driver_library_is_said(reader_on, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / LIBRARY).touch()
    gpus, note = reader_on(broken).read(Machine())
    assert gpus == []
    assert note.startswith("no NVIDIA driver: libnvidia-ml.so.1 was not found")


@pytest.mark.parametrize(
    ("code", "note"),
    [
        (Code.DRIVER_NOT_LOADED, "the NVIDIA driver is installed but not loaded"),
        (Code.NO_PERMISSION, "no permission to use the NVIDIA driver"),
        (Code.VERSIONS_DIFFER, "reboot after a driver update"),
        (Code.UNKNOWN, "the NVIDIA driver cannot be used (Unknown Error)"),
        (4242, "the NVIDIA driver cannot be used (Unknown Error)"),
    ],
)
def test_a_driver_that_cannot_be_used_is_said_and_seen_when_it_comes(reader, code, note):
    gpus, said = reader.read(Machine([gpu()], faults={"nvmlInitWithFlags": code}))
    assert gpus == []
    assert note in said
    gpus, said = reader.read(Machine([gpu()]))
    assert [gpu.uuid for gpu in gpus] == ["GPU-0"]
    assert said == ""


def test_a_driver_without_gpus_is_said(reader):
    gpus, note = reader.read(Machine())
    assert gpus == []
    assert note.startswith("the NVIDIA driver reports no GPU")


def test_a_driver_that_goes_away_leaves_its_gpus_listed_as_unusable_until_it_is_back(reader):
    machine = Machine([gpu(0, used=GIB, processes=[Process(1, GIB)]), gpu(1)])
    healthy, _ = reader.read(machine)
    gone = Code.DRIVER_NOT_LOADED

    faults = {"nvmlDeviceGetCount_v2": gone, "nvmlInitWithFlags": gone}
    gpus, note = reader.read(Machine(machine.gpus, faults=faults))

    assert [(gpu.uuid, gpu.index, gpu.memory_total_mib) for gpu in gpus] == [
        (gpu.uuid, gpu.index, gpu.memory_total_mib) for gpu in healthy
    ]
    assert note.startswith("the NVIDIA driver is installed but not loaded")
    assert all(gpu.problem == note for gpu in gpus)
    assert reader.read(machine) == (healthy, "")


def test_a_driver_reloaded_between_two_reads_is_not_noticed_by_the_caller(reader):
    reader.read(Machine([gpu(0), gpu(1)]))
    gpus, note = reader.read(Machine([gpu(0, used=GIB), gpu(1)], loaded=1))
    assert note == ""
    assert [(gpu.uuid, gpu.memory_used_mib, gpu.problem) for gpu in gpus] == [("GPU-0", 1024, ""), ("GPU-1", 0, "")]


def test_a_driver_unloaded_in_the_middle_of_a_read_is_started_anew_by_the_next(reader):
    gpus, _ = reader.read(Machine([gpu(faults={"nvmlDeviceGetMemoryInfo_v2": 1})]))
    assert gpus[0].problem == "the driver was unloaded while in use"
    assert read_one(reader).problem == ""
    assert "nvmlInitWithFlags" in reader.calls()


@pytest.mark.parametrize("calls", [0, 1, 4, 9, 14])
def test_a_gpu_lost_in_its_first_read_is_listed_and_the_others_are_read(reader, calls):
    gpus, note = reader.read(Machine([gpu(0), gpu(1, lost_after=calls), gpu(2, used=GIB)]))
    assert note == ""
    by_index = {gpu.index: gpu for gpu in gpus}
    assert sorted(by_index) == [0, 1, 2]
    assert by_index[0].problem == ""
    assert by_index[2].memory_used_mib == 1024
    assert by_index[2].problem == ""
    assert "the GPU is lost" in by_index[1].problem
    assert by_index[1].uuid == ("GPU-1" if calls > 5 else "unknown-1")


@pytest.mark.parametrize("calls", [0, 4, 8])
def test_a_gpu_lost_in_a_later_read_keeps_its_place_and_counts_as_full(reader, calls):
    machine = Machine([gpu(0), gpu(1, reserved=MIB, used=GIB, processes=[Process(1, GIB)]), gpu(2)])
    healthy, _ = reader.read(machine)
    assert [gpu.problem for gpu in healthy] == ["", "", ""]

    machine.gpus[1].lost_after = len([call for call in reader.calls() if "Device" in call]) // 3 + calls
    gpus, _ = reader.read(machine)

    assert [gpus[0], gpus[2]] == [healthy[0], healthy[2]]
    assert gpus[1].problem.startswith("the GPU is lost")
    assert gpus[1] == replace(
        healthy[1],
        memory_used_mib=TOTAL_MIB - 1,
        processes=(),
        problem=gpus[1].problem,
        faulty=True,
        memory_told=False,
        utilization_percent=None,
        temperature_c=None,
        power_w=None,
    )
    again, _ = reader.read()
    assert again == gpus
    machine.gpus[1].lost_after = None
    assert reader.read(machine) == (healthy, "")


def test_a_lost_gpu_is_asked_no_further_and_stands_last_where_its_place_is_unknown(reader):
    lost = gpu(0, faults={"nvmlDeviceGetHandleByIndex_v2": Code.GPU_IS_LOST})
    dying = gpu(1, faults={"nvmlDeviceGetMigMode": Code.GPU_IS_LOST})
    gpus, _ = reader.read(Machine([lost, dying]))
    assert [(gpu.uuid, gpu.index) for gpu in gpus] == [("GPU-1", 1), ("unknown-0", 0)]
    assert reader.calls()[-2:] == ["nvmlDeviceGetMigMode", "nvmlShutdown"]


@pytest.mark.parametrize(
    ("faults", "problem"),
    [
        ({"*": Code.GPU_IS_LOST}, "the GPU is lost"),
        ({"*": Code.RESET_REQUIRED}, "the GPU needs a reset"),
        ({"*": Code.UNKNOWN}, "gives no access to the GPU (Unknown Error)"),
        (
            {"nvmlDeviceGetHandleByIndex_v2": Code.NO_PERMISSION},
            "gives no access to the GPU (Insufficient Permissions)",
        ),
        ({"nvmlDeviceGetUUID": Code.UNKNOWN}, "its UUID cannot be read (Unknown Error)"),
    ],
)
def test_a_gpu_that_the_driver_does_not_hand_out_keeps_its_uuid_where_it_was_known(reader, faults, problem):
    never = Machine([gpu(0), gpu(1, faults=faults)])
    gpus, _ = reader.read(never)
    assert {gpu.uuid for gpu in gpus} == {"GPU-0", "unknown-1"}
    assert next(gpu.problem for gpu in gpus if gpu.uuid == "unknown-1").count(problem) == 1

    reader.read(Machine([gpu(0), gpu(1)]))
    reader.read(Machine([gpu(0), gpu(1, lost_after=0)]))  # lets go of the session, as a failure does
    gpus, _ = reader.read(never)

    assert [(gpu.uuid, gpu.index, gpu.memory_total_mib) for gpu in gpus] == [
        ("GPU-0", 0, TOTAL_MIB),
        ("GPU-1", 1, TOTAL_MIB),
    ]
    assert problem in gpus[1].problem


def test_a_gpu_that_the_driver_drops_from_its_list_stays_listed_under_an_index_of_its_own(reader):
    reader.read(Machine([gpu(n) for n in range(4)]))
    for _ in range(2):
        gpus, _ = reader.read(Machine([gpu(0), gpu(2), gpu(3)], loaded=1))
        assert [(gpu.uuid, gpu.index) for gpu in gpus] == [("GPU-0", 0), ("GPU-1", 3), ("GPU-2", 1), ("GPU-3", 2)]
        assert "no longer lists the GPU" in gpus[1].problem
        assert [gpu.problem for gpu in gpus if gpu.uuid != "GPU-1"] == ["", "", ""]
    gpus, _ = reader.read(Machine([gpu(n) for n in range(4)], loaded=1))
    assert [(gpu.uuid, gpu.index, gpu.problem) for gpu in gpus] == [(f"GPU-{n}", n, "") for n in range(4)]


def test_a_lost_gpu_with_a_uuid_of_its_own_does_not_pass_for_the_one_it_replaced(reader):
    reader.read(Machine([gpu(0), gpu(1)]))
    dying = gpu(9, faults={"nvmlDeviceGetMigMode": Code.GPU_IS_LOST})
    gpus, _ = reader.read(Machine([gpu(0), dying], loaded=1))
    assert {(gpu.uuid, gpu.index) for gpu in gpus} == {("GPU-0", 0), ("GPU-9", 1), ("GPU-1", 2)}


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ({"uncorrected_volatile": 1}, "1 uncorrectable memory error since the driver was loaded"),
        ({"uncorrected_volatile": 2, "remapped": (0, 1, 1, 0)}, "2 uncorrectable memory errors since"),
        ({"remapped": (0, 1, 1, 0)}, "a repair of faulty memory waits for a reset"),
        ({"remapped": (0, 8, 0, 1)}, "have the GPU replaced"),
        ({"remapped": None, "retired_pending": 1}, "a repair of faulty memory waits for a reset"),
        ({"compute_mode": Mode.PROHIBITED}, "nvidia-smi -c DEFAULT -i GPU-0"),
        ({"total": None}, "its memory cannot be read (Not Supported)"),
        ({"uncorrected_aggregate": 3, "remapped": (1, 2, 0, 0)}, ""),
        ({"remapped": None, "retired_pending": 0}, ""),
        ({"uncorrected_volatile": None, "remapped": None, "compute_mode": None}, ""),
    ],
)
def test_what_makes_a_gpu_unfit_is_its_problem(reader, facts, problem):
    read = read_one(reader, **facts)
    assert problem in read.problem
    assert bool(problem) == bool(read.problem)


def test_several_problems_are_all_said(reader):
    read = read_one(reader, uncorrected_volatile=1, compute_mode=Mode.PROHIBITED)
    assert "uncorrectable memory error" in read.problem
    assert "prohibited" in read.problem


@pytest.mark.parametrize("code", [Code.NO_PERMISSION, Code.UNKNOWN])
def test_a_gpu_whose_memory_can_no_longer_be_read_counts_as_full(reader, code):
    read_one(reader, used=GIB)
    read = read_one(reader, faults=dict.fromkeys(MEMORY, code))
    assert "its memory cannot be read" in read.problem
    assert read.memory_used_mib == read.memory_total_mib == TOTAL_MIB


UNREADABLE = dict.fromkeys((f"nvmlDeviceGetComputeRunningProcesses_v{n}" for n in (2, 3)), Code.NO_PERMISSION)


@pytest.mark.parametrize(
    ("mode", "known"),
    [
        (Mode.DEFAULT, ComputeMode.DEFAULT),
        (1, ComputeMode.EXCLUSIVE),
        (Mode.PROHIBITED, ComputeMode.PROHIBITED),
        (Mode.EXCLUSIVE_PROCESS, ComputeMode.EXCLUSIVE),
        (77, None),
        (None, None),
    ],
)
def test_who_may_compute_is_told(reader, mode, known):
    read = read_one(reader, compute_mode=mode, processes=[Process(9, GIB)])
    assert read.compute_mode == known
    assert bool(read.problem) == (mode == Mode.PROHIBITED), "whose the process is, is not known here"
    assert not read.faulty


def test_who_only_draws_is_told_from_who_computes(reader):
    listed = [Process(9, GIB, "graphics"), Process(8, GIB), Process(8, GIB, "graphics"), Process(7, None, "mps")]
    read = read_one(reader, compute_mode=Mode.EXCLUSIVE_PROCESS, processes=listed)
    assert [(process.pid, process.graphics) for process in read.processes] == [(7, False), (8, False), (9, True)]


def test_exclusive_mode_is_a_problem_of_its_own_only_where_nobody_tells_who_computes(reader):
    assert read_one(reader, faults=UNREADABLE).problem == ""
    read = read_one(reader, compute_mode=Mode.EXCLUSIVE_PROCESS, faults=UNREADABLE)
    assert read.problem == "it is in exclusive-process mode, and whether a process holds it cannot be read"
    assert not read.faulty


@pytest.mark.parametrize(
    ("facts", "faulty", "told"),
    [
        ({}, False, True),
        ({"compute_mode": Mode.PROHIBITED}, False, True),
        ({"total": None}, False, False),
        ({"uncorrected_volatile": 1}, True, True),
        ({"remapped": (0, 1, 1, 0)}, True, True),
        ({"faults": {"*": Code.GPU_IS_LOST}}, True, False),
        ({"faults": {"*": Code.RESET_REQUIRED}}, True, False),
        ({"mig_mode": 1, "mig": [MigDevice("MIG-a", 0)], "uncorrected_volatile": 1}, True, True),
    ],
)
def test_what_runs_on_a_gpu_suffers_from_damage_and_loss_only(reader, facts, faulty, told):
    read = read_one(reader, **facts)
    assert (read.faulty, read.memory_told) == (faulty, told)


@pytest.mark.parametrize(
    ("facts", "lets_go"),
    [
        ({}, False),
        ({"compute_mode": Mode.PROHIBITED}, False),
        ({"total": None}, False),
        ({"faults": {"nvmlDeviceGetPowerUsage": Code.UNKNOWN}}, False),
        ({"uncorrected_volatile": 1}, True),
        ({"remapped": (0, 1, 1, 0)}, True),
        ({"faults": dict.fromkeys(MEMORY, Code.NO_PERMISSION)}, False),
        ({"faults": dict.fromkeys(MEMORY, Code.UNKNOWN)}, True),
        ({"faults": {"nvmlDeviceGetUtilizationRates": Code.RESET_REQUIRED}}, True),
        ({"faults": {"*": Code.UNKNOWN}}, True),
    ],
)
def test_nvml_is_let_go_only_when_a_gpu_may_have_to_be_reset_or_may_come_back(reader, facts, lets_go):
    reader.read(Machine([gpu(0), gpu(1, **facts)]))
    assert ("nvmlShutdown" in reader.calls()) == lets_go


def mig_machine() -> Machine:
    devices = [
        MigDevice("MIG-a", 0, reserved=10 * MIB, used=GIB, processes=[Process(31, GIB)]),
        MigDevice("MIG-b", 2, total=10 * GIB, name="NVIDIA H100 80GB HBM3 MIG 1g.10gb"),
    ]
    return Machine([gpu(0), gpu(1, mig_mode=1, mig=devices, numa_node=1), gpu(2)])


def test_mig_devices_take_the_place_of_their_card(reader):
    gpus, note = reader.read(mig_machine())
    assert note == ""
    assert [(gpu.uuid, gpu.index) for gpu in gpus] == [("GPU-0", 0), ("MIG-a", 200), ("MIG-b", 202), ("GPU-2", 2)]
    assert gpus[1] == Gpu(
        uuid="MIG-a",
        index=200,
        name="NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        pci_id="00000000:1C:00.0",
        memory_total_mib=40 * 1024,
        memory_reserved_mib=10,
        memory_used_mib=1024,
        processes=(GpuProcess(31, 1024),),
        temperature_c=35,
        compute_capability="9.0",
        numa_node=1,
        compute_mode=ComputeMode.DEFAULT,
    )
    assert gpus[2].memory_total_mib == 10 * 1024
    assert gpus[2].processes == ()


def test_mig_devices_of_a_faulty_card_are_all_unfit_and_of_a_lost_card_keep_their_places(reader):
    machine = mig_machine()
    machine.gpus[1].uncorrected_volatile = 4
    gpus, _ = reader.read(machine)
    assert [bool(gpu.problem) for gpu in gpus] == [False, True, True, False]
    assert "nvidia-smi --gpu-reset -i GPU-1" in gpus[1].problem

    machine.gpus[1].lost_after = 0
    gpus, _ = reader.read(machine)

    assert [(gpu.uuid, gpu.index) for gpu in gpus] == [("GPU-0", 0), ("MIG-a", 200), ("MIG-b", 202), ("GPU-2", 2)]
    assert all(gpu.problem.startswith("the GPU is lost") for gpu in gpus[1:3])
    assert [gpu.memory_used_mib for gpu in gpus[1:3]] == [40 * 1024 - 10, 10 * 1024]


def test_a_mig_device_whose_uuid_or_memory_cannot_be_read_is_unfit_alone(reader):
    machine = mig_machine()
    machine.gpus[1].mig[0].faults = {"nvmlDeviceGetUUID": Code.NO_PERMISSION}
    machine.gpus[1].mig[1].faults = dict.fromkeys(MEMORY, Code.NO_PERMISSION)
    gpus, _ = reader.read(machine)
    assert [gpu.uuid for gpu in gpus] == ["GPU-0", "unknown-200", "MIG-b", "GPU-2"]
    assert "its UUID cannot be read (Insufficient Permissions)" in gpus[1].problem
    assert gpus[2].problem == "its memory cannot be read (Insufficient Permissions)"
    assert [gpus[0].problem, gpus[3].problem] == ["", ""]


def test_mig_devices_that_are_made_and_unmade_come_and_go(reader):
    machine = mig_machine()
    device = machine.gpus[1].mig[1]
    machine.gpus[1].mig = []
    gpus, _ = reader.read(machine)
    assert [gpu.uuid for gpu in gpus] == ["GPU-0", "GPU-2"]
    machine.gpus[1].mig = [device]
    gpus, _ = reader.read(machine)
    assert [gpu.uuid for gpu in gpus] == ["GPU-0", "MIG-b", "GPU-2"]
    machine.gpus[1].lost_after = 0
    gpus, _ = reader.read(machine)
    assert [gpu.uuid for gpu in gpus] == ["GPU-0", "MIG-b", "GPU-2"]


def test_a_card_in_mig_mode_without_devices_is_no_gpu(reader):
    gpus, note = reader.read(Machine([gpu(0, mig_mode=1)]))
    assert gpus == []
    assert note.startswith("every GPU is in MIG mode and has no MIG device")


LINKS = """
import json, pynvml as n
n.nvmlInit()
one, two = (n.nvmlDeviceGetHandleByIndex(i) for i in (0, 1))
by_uuid = n.nvmlDeviceGetHandleByUUID("GPU-1")
print(json.dumps([
    n.nvmlSystemGetDriverVersion(), n.nvmlDeviceGetIndex(by_uuid), n.nvmlDeviceGetNumaNodeId(one),
    n.nvmlDeviceGetTopologyCommonAncestor(one, two),
    n.nvmlDeviceGetNvLinkState(one, 0), n.nvmlDeviceGetNvLinkState(one, 1),
    n.nvmlDeviceGetNvLinkRemotePciInfo(one, 0).busId, n.nvmlDeviceGetNvLinkCapability(one, 0, 0),
    n.nvmlDeviceGetRetiredPages(one, 1), n.nvmlDeviceGetTemperatureV(one, 0),
    n.nvmlDeviceGetMemoryInfo(one).used, n.nvmlDeviceGetMemoryInfo(one, n.nvmlMemory_v2).used,
]))
"""


def test_the_stand_in_answers_what_the_real_library_would(library, tmp_path):
    links = [(0, True, "00000000:1C:00.0"), (1, False, "00000000:1C:00.0")]
    first = gpu(0, ancestors={1: 40}, nvlinks=links, numa_node_id=1, retired=[(1, 0xBEEF), (0, 1)], reserved=7, used=1)
    Machine([first, gpu(1)], driver="535.1").write(tmp_path / "machine")
    env = environment(library(), tmp_path / "machine")
    said = subprocess.run([sys.executable, "-c", LINKS], env=env, capture_output=True, text=True, check=True)
    assert json.loads(said.stdout) == [
        *("535.1", 1, 1, 40),
        *(1, 0, "00000000:1C:00.0", 1),
        *([0xBEEF], 35, 8, 1),
    ]
