"""GPUs in words, and what is known of them by their names."""

from __future__ import annotations

from dataclasses import astuple
from itertools import combinations

import pytest
from pydantic_core import PydanticCustomError

from sage_reconcile.core.declared import declared_gpus, declared_links
from sage_reconcile.core.gpu_models import MODELS, Declared, Joined, find, joined, read_gpus, size_text
from sage_reconcile.core.observed import Gpu, GpuProcess, Link, link_groups


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8xH100-80GB", [("H100-80GB", 81559, 8)]),
        ("H100", [("H100-80GB", 81559, 1)]),
        ("2xA100-80GB,4xL4", [("A100-80GB", 81920, 2), ("L4", 23034, 4)]),
        (" 2 x A100-80GB , L4 ", [("A100-80GB", 81920, 2), ("L4", 23034, 1)]),
        ("2X4090,3×4090,1*4090", [("RTX-4090", 24564, 2), ("RTX-4090", 24564, 3), ("RTX-4090", 24564, 1)]),
        ("4x24GiB", [("24GiB", 24576, 4)]),
        ("24GB", [("24GB", 22889, 1)]),
        ("4xMyCard:48GiB", [("MyCard", 49152, 4)]),
        ("2xH100:96GiB", [("H100", 98304, 2)]),
        ("1024xT4", [("T4", 15360, 1024)]),
    ],
)
def test_gpus_are_read_from_words(text: str, expected: list[tuple[str, int, int]]) -> None:
    assert [astuple(group) for group in read_gpus(text)] == expected


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("A100", "'A100' may be A100-80GB or A100-40GB", "write which"),
        ("V100-PCIE", "'V100-PCIE' may be V100-PCIe-16GB or V100-PCIe-32GB", "write which"),
        (
            "4xH100-96GB",
            "'H100-96GB' names no known GPU",
            "write H100-80GB, H100-PCIe or H100-NVL, or give its memory, as in 4xMyCard:48GiB or 4x48GiB",
        ),
        (
            "4xB20O",
            "'B20O' names no known GPU",
            "did you mean B200? or give its memory, as in 4xMyCard:48GiB or 4x48GiB",
        ),
        ("xyzzy", "'xyzzy' names no known GPU", "give its memory, as in 4xMyCard:48GiB or 4x48GiB"),
        ("H100x8", "'H100x8' names no known GPU", "write the number first, as in 8xH100-80GB"),
        ("0xH100", "0 GPUs are impossible", "write a number from 1 to 1024"),
        ("1025xT4", "1025 GPUs are impossible", "write a number from 1 to 1024"),
        ("X:0GiB", "a GPU without memory is impossible", "write its memory, such as 24GiB"),
        ("X:48", "expected a size, got the text '48'", "write a size with its unit, such as 24GiB"),
        *(
            (text, "a declaration of GPUs is empty", "write GPUs as 8xH100-80GB, 2xA100-80GB,4xL4, 4x24GiB or ")
            for text in ("", "8xH100,", ",", "8xH100,,L4")
        ),
    ],
)
def test_what_is_not_understood_is_told_with_what_would_be(text: str, what: str, fix: str) -> None:
    with pytest.raises(PydanticCustomError) as caught:
        read_gpus(text)
    told = caught.value.context or {}
    assert told["what"] == what
    assert told["fix"].startswith(fix)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, "H100-80GB") for name in ("h100", "H100-80GB", "h100_sxm", "H100 SXM5 80GB", "NVIDIA H100 80GB HBM3")),
        *((name, "H100-PCIe") for name in ("NVIDIA H100 PCIe", "h100-pcie-80gb")),
        *((name, "H100-NVL") for name in ("NVIDIA H100 NVL", "H100-94GB", "H100 NVL 94GB")),
        *((name, "A100-40GB") for name in ("A100-40GB", "NVIDIA A100-SXM4-40GB", "a100-40g")),
        *((name, "A100-80GB") for name in ("NVIDIA A100-SXM4-80GB", "DGX A100 80GiB")),
        *((name, "A100-PCIe-80GB") for name in ("NVIDIA A100 80GB PCIe",)),
        *((name, "A100-PCIe-40GB") for name in ("NVIDIA A100-PCIE-40GB",)),
        *((name, "RTX-4090") for name in ("RTX-4090", "4090", "rtx4090", "NVIDIA GeForce RTX 4090", "RTX 4090 24GB")),
        *((name, "RTX-PRO-6000") for name in ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000")),
        ("NVIDIA RTX 6000 Ada Generation", "RTX-6000-Ada"),
        ("NVIDIA RTX A6000", "RTX-A6000"),
        ("NVIDIA GeForce RTX 3090 Ti", "RTX-3090-Ti"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200-NVL"),
        ("NVIDIA B300 SXM6 AC", "B300"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA L40S", "L40S"),
    ],
)
def test_names_are_understood_as_the_driver_and_as_people_write_them(name: str, expected: str) -> None:
    assert find(name).name == expected


def test_every_known_gpu_is_found_by_its_own_name_and_sold_size() -> None:
    assert len({model.name for model in MODELS}) == len(MODELS)
    for model in MODELS:
        assert find(model.name) is model
        assert model.sizes[0] * 0.88 <= model.memory_mib / 1024 <= model.sizes[0] * 1.03, model.name


def test_a_size_is_told_as_it_is_sold() -> None:
    assert [size_text(mib) for mib in (81920, 81559)] == ["80GiB", "79.6GiB"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, Joined.SWITCH) for name in ("H100", "A100", "B200", "V100-SXM2-16GB", "H200")),
        *((name, Joined.PAIRS) for name in ("H100-NVL", "H200-NVL", "A100-PCIE-80GB")),
        *((name, Joined.PCIE) for name in ("L4", "L40S", "T4", "4090", "3090", "24GiB", "Mine")),
    ],
)
def test_how_gpus_are_joined_is_known_by_their_name(name: str, expected: Joined) -> None:
    assert joined(name) is expected


def links(text: str) -> dict[tuple[int, int], str]:
    declared = read_gpus(text)
    gpus = declared_gpus(declared, simulated=True)
    found = declared_links(declared, gpus)
    return {
        (one.index, other.index): found[frozenset((one.uuid, other.uuid))].value
        for one, other in combinations(gpus, 2)
        if frozenset((one.uuid, other.uuid)) in found
    }


def test_a_switch_joins_all_gpus_of_one_declaration() -> None:
    assert set(links("8xH100").values()) == {"nvlink"}
    two = links("2xH100,2xH100")
    assert {pair for pair, link in two.items() if link == "nvlink"} == {(0, 1), (2, 3)}


def test_bridges_join_two_by_two_from_the_first_of_the_declaration() -> None:
    assert {pair for pair, link in links("L4,5xH100-NVL").items() if link == "nvlink"} == {(1, 2), (3, 4)}


def test_without_nvlink_the_numa_node_decides() -> None:
    assert set(links("4xL4").values()) == {"node"}
    five = links("5xL4")
    assert {pair for pair, link in five.items() if link == "node"} == {(0, 1), (0, 2), (1, 2), (3, 4)}
    assert {pair for pair, link in five.items() if link == "sys"} == {(0, 3), (0, 4), (1, 3), (1, 4), (2, 3), (2, 4)}


@pytest.mark.parametrize(
    ("text", "nvlink", "node"),
    [("100xL4", 100, 2), ("101x24GiB", 101, 2), ("60xH100-NVL,40xH100", 31, 2), ("40xH100-NVL,60xH100", 21, 1)],
)
def test_of_many_gpus_only_neighbours_are_told_and_the_same_are_joined(text: str, nvlink: int, node: int) -> None:
    declared = read_gpus(text)
    gpus = declared_gpus(declared, simulated=True)
    found = declared_links(declared, gpus)
    assert len(found) == len(gpus) - 1
    groups = {
        link: len(set(link_groups([gpu.uuid for gpu in gpus], found, link).values()))
        for link in (Link.NVLINK, Link.NODE, Link.SYS)
    }
    assert groups == {Link.NVLINK: nvlink, Link.NODE: node, Link.SYS: 1}


def test_declared_gpus_are_numbered_across_the_declarations_with_what_is_on_them() -> None:
    declared = [Declared("Big", 81_920, 2), Declared("Small", 24_576, 1)]
    usage = {"GPU-simulated-2": [(9, 100), (3, 50)], "GPU-simulated-7": [(1, 1)]}
    gpus = declared_gpus(declared, usage, simulated=True)
    assert gpus[:2] == tuple(
        Gpu(f"GPU-simulated-{n}", n, "Big", f"simulated:000{n}", 81_920, simulated=True, numa_node=0) for n in range(2)
    )
    assert gpus[2] == Gpu(
        "GPU-simulated-2",
        2,
        "Small",
        "simulated:0002",
        24_576,
        memory_used_mib=150,
        processes=(GpuProcess(3, 50), GpuProcess(9, 100)),
        simulated=True,
        numa_node=0,
    )
    assert declared_gpus([], simulated=True) == ()
    assert [gpu.numa_node for gpu in declared_gpus(read_gpus("5xL4"), simulated=False)] == [0, 0, 0, 1, 1]


def test_a_box_to_plan_for_is_told_apart_from_one_for_the_simulator() -> None:
    (gpu,) = declared_gpus(read_gpus("L4"), simulated=False)
    assert (gpu.uuid, gpu.simulated) == ("GPU-declared-0", False)
