"""What status and inventory tell, from a machine written down as the golden cases write it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from sage_reconcile.core.failure import Failure, FailureKind
from sage_reconcile.core.gpu_report import gpu_document, gpu_rows, lasting_rows
from sage_reconcile.core.host_spec import HostSpec
from sage_reconcile.core.observed import GpuProcess, Link, Observed
from sage_reconcile.core.planner import make_plan
from sage_reconcile.core.report import status_document
from tests.plans.world import NOW, world
from tests.reading import desired

ROOT = Path(__file__).parents[2]
FILE = """
version: 1
host: {headroom: 1GiB, exclude: [2]}
engines:
  chat: {model: c, memory: 40GiB}
  wide: {model: w, memory: 20GiB, tensor_parallel_size: 2}
"""
LAUNCHES = """
  - {run: chat/0, gpu: 0, port: 8000, id: chat}
  - {run: wide/0, gpu: [1, 2], port: 8001, id: wide}
"""
FINE = "H100 80GiB"
LOST = "{gpu: H100 80GiB, lost: the GPU is lost}"


def machine(*gpus: str, launches: str = LAUNCHES, **more: str) -> Observed:
    text = f"gpus: [{', '.join(gpus)}]\nlaunches: {launches}\n"
    return world(yaml.safe_load(text) | more, desired(FILE), NOW)


def status(observed: Observed) -> tuple[dict[str, Any], dict[str, tuple[str, str]]]:
    wanted = desired(FILE)
    document = status_document(wanted, observed, make_plan(wanted, observed, NOW), NOW)
    rows = {row["name"]: (row["phase"], row["reason"]) for engine in document["engines"] for row in engine["replicas"]}
    return document, rows


def test_what_runs_on_an_excluded_gpu_is_as_ready_as_any() -> None:
    document, rows = status(machine(FINE, FINE, FINE))
    assert rows == {"chat/0": ("Ready", ""), "wide/0": ("Ready", "")}
    assert document["converged"]
    assert [gpu["excluded"] for gpu in document["gpus"]] == [False, False, True]
    assert [gpu["memory_free_mib"] for gpu in document["gpus"]] == [39 * 1024, 59 * 1024, 0]


@pytest.mark.parametrize(
    ("gpus", "degraded"),
    [
        ((LOST, FINE, FINE), {"chat/0": "GPU 0: the GPU is lost"}),
        ((FINE, FINE, LOST), {"wide/0": "GPU 2: the GPU is lost"}),
        ((FINE, FINE), {"wide/0": "GPU-2 is not listed any more"}),
        (
            (LOST,),
            {
                "chat/0": "GPU 0: the GPU is lost",
                "wide/0": "; ".join(f"GPU-{index} is not listed any more" for index in (1, 2)),
            },
        ),
        (("{gpu: H100 80GiB, problem: prohibited}", FINE, FINE), {}),
        (("{gpu: H100 80GiB, mode: exclusive-process}", FINE, FINE), {}),
    ],
)
def test_what_runs_on_a_gpu_at_fault_is_degraded_and_not_ready(gpus: tuple[str, ...], degraded: dict[str, str]) -> None:
    document, rows = status(machine(*gpus))
    assert rows == {
        name: ("Degraded", degraded[name]) if name in degraded else ("Ready", "") for name in ("chat/0", "wide/0")
    }
    assert document["converged"] == (not degraded)
    assert [engine["ready"] for engine in document["engines"]] == [int(name not in degraded) for name in rows]
    assert document["notes"] == [], "said once, with the replica"


def test_a_start_on_a_gpu_that_was_lost_tells_so() -> None:
    launches = "[{run: chat/0, gpu: 0, port: 8000, state: loading, age: 5s}]"
    _, rows = status(machine(LOST, FINE, FINE, launches=launches))
    assert rows["chat/0"] == ("Starting", "GPU 0: the GPU is lost")


def test_why_there_is_no_gpu_is_told_with_what_ran_there() -> None:
    _, rows = status(machine(gpu_note="no driver", launches="[{run: chat/0, gpu: 0, port: 8000, memory: 40GiB}]"))
    assert rows["chat/0"] == ("Degraded", "GPU-0 is not listed any more (no driver)")


def test_a_row_adds_up_and_leaves_unknown_what_is() -> None:
    launches = LAUNCHES.replace("id: chat", "id: chat, holds: 44GiB").replace("id: wide", "id: wide, holds: unknown")
    first, second, third = gpu_rows(
        desired(FILE).host,
        machine("{gpu: H100 80GiB, reserve: 1GiB, strangers: [812 alice python 4GiB]}", FINE, LOST, launches=launches),
    )
    assert (first["memory_reserved_mib"], first["memory_headroom_mib"]) == (1024, 1024)
    assert (first["memory_used_mib"], first["unmanaged_mib"]) == (48 * 1024, 4 * 1024)
    assert first["memory_free_mib"] == (80 - 2 - 44 - 4) * 1024
    assert first["engines"] == [{"replica": "chat/0", "promised_mib": 40 * 1024, "held_mib": 44 * 1024}]
    assert first["unmanaged"] == [{"pid": 812, "user": "alice", "command": "python", "memory_mib": 4 * 1024}]
    assert second["engines"] == [{"replica": "wide/0", "promised_mib": 20 * 1024, "held_mib": None}]
    unknown = ("memory_used_mib", "unmanaged_mib", "utilization_percent", "temperature_c", "power_w", "numa_node")
    assert [third[name] for name in unknown] == [None] * len(unknown)
    assert third["engines"] == [{"replica": "wide/0", "promised_mib": 20 * 1024, "held_mib": None}]
    assert (third["memory_free_mib"], third["problem"], third["faulty"]) == (0, "the GPU is lost", True)


def test_exclusive_mode_names_who_holds_the_gpu() -> None:
    exclusive = "{gpu: H100 80GiB, mode: exclusive-process%s}"
    stranger = exclusive % ", strangers: [812 alice python 4GiB]"
    rows = gpu_rows(HostSpec(), machine(exclusive % "", stranger, exclusive % "", launches="[]"))
    held = "it is in exclusive-process mode and held by pid 812 alice python"
    assert [row["problem"] for row in rows] == ["", held, ""]
    assert [row["memory_free_mib"] // 1024 for row in rows] == [80, 0, 80]
    rows = gpu_rows(HostSpec(), machine(exclusive % "", stranger, exclusive % ""))
    assert [row["problem"] for row in rows] == [
        "it is in exclusive-process mode and held by chat/0",
        "it is in exclusive-process mode and held by wide/0, pid 812 alice python",
        "it is in exclusive-process mode and held by wide/0",
    ]
    assert not any(row["faulty"] for row in rows)
    observed = machine(exclusive % "", launches="[]")
    draws = replace(observed.gpus[0], processes=(GpuProcess(7, 100, "alice", "Xorg", graphics=True),))
    assert gpu_rows(HostSpec(), replace(observed, gpus=(draws,)))[0]["problem"] == ""


def test_links_are_told_of_each_pair_with_how_many_where_that_is_known() -> None:
    pairs = [frozenset((f"GPU-{one}", f"GPU-{other}")) for one, other in ((0, 1), (0, 2), (1, 2))]
    observed = replace(
        machine(FINE, FINE, FINE),
        links={pairs[0]: Link.NVLINK, pairs[1]: Link.SYS},
        nvlink_counts={pairs[0]: 18},
    )
    assert gpu_document(HostSpec(), observed)["links"] == [
        {"between": ["GPU-0", "GPU-1"], "link": "nvlink", "nvlinks": 18},
        {"between": ["GPU-0", "GPU-2"], "link": "sys", "nvlinks": None},
    ]


def test_what_changes_at_every_look_is_not_kept() -> None:
    observed = machine(FINE)
    warm = replace(observed.gpus[0], utilization_percent=90, temperature_c=70, power_w=600.5, numa_node=1)
    (kept,) = lasting_rows(gpu_rows(HostSpec(), replace(observed, gpus=(warm,))))
    assert (kept["utilization_percent"], kept["temperature_c"], kept["power_w"]) == (None, None, None)
    assert (kept["numa_node"], kept["memory_total_mib"]) == (1, 80 * 1024)


def test_a_replica_that_is_being_moved_says_so_until_it_has_arrived() -> None:
    launches = (
        "[{run: chat/0, gpu: 0, port: 8000, id: old},"
        " {run: chat/0, gpu: 1, port: 8001, id: new, predecessor: old, state: loading, age: 5s}]"
    )
    _, rows = status(machine(FINE, FINE, FINE, launches=launches))
    assert rows["chat/0"] == ("Ready", "moved to GPU 1: waits for chat/0 to be ready on GPU 1")
    launches = launches.replace("state: loading, age: 5s", "ready: 1s")
    _, rows = status(machine(FINE, FINE, FINE, launches=launches))
    assert rows["chat/0"] == ("Ready", "")


def test_a_failure_tells_its_class_its_line_and_what_to_do() -> None:
    launches = "[{run: chat/0, gpu: 0, port: 8000, exit: 1, ended: 2s, state: exited}]"
    observed = machine(FINE, FINE, FINE, launches=launches)
    why = Failure(FailureKind.KV_CACHE_TOO_SMALL, "the line", "write `memory: 50000MiB`", 50000, 3000, 4096)
    document, rows = status(replace(observed, launches=(replace(observed.launches[0], failure=why),)))
    assert rows["chat/0"] == ("Stalled", "ended: exit 1: KV cache too small: write `memory: 50000MiB`")
    [row] = document["engines"][0]["replicas"]
    assert row["failure"] == {
        "class": "KV cache too small",
        "line": "the line",
        "fix": "write `memory: 50000MiB`",
        "memory_mib": 50000,
        "kv_cache_mib": 3000,
        "context_tokens": 4096,
        "can_recover": False,
    }
    schema = json.loads((ROOT / "schemas/status.schema.json").read_text(encoding="utf-8"))
    replica = schema["properties"]["engines"]["items"]["properties"]["replicas"]["items"]
    kinds = replica["properties"]["failure"]["anyOf"][1]["properties"]["class"]["enum"]
    assert kinds == [item.value for item in FailureKind]
    _, rows = status(observed)
    assert rows["chat/0"] == ("BackOff", "ended: exit 1")


def test_an_end_that_was_asked_for_tells_why() -> None:
    launches = "[{run: chat/0, gpu: 0, port: 8000, exit: 0, ended: 9s, state: exited, why: DISPLACED}]"
    _, rows = status(machine(launches=launches))
    assert rows["chat/0"][1].startswith("ended: exit 0 (gave way to a higher priority); needs 1 GPU, but")
