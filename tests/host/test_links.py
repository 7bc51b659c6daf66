"""Links between GPUs through the real pynvml, on a stand-in for NVIDIA's library."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from sage_reconcile.core.observed import Link
from tests.stand_in_nvml import Machine, StandInGpu, build, environment

ROOT = Path(__file__).parents[2]
ADDRESSES = [f"00000000:{bus:02X}:00.0" for bus in (0x1B, 0x43, 0x52, 0x61)]
SWITCH = "00000000:F1:00.0"

READER = """
import json
from sage_reconcile.host.gpus import NvmlInventory
from sage_reconcile.host.links import LinkReader
inventory, links = NvmlInventory(), LinkReader()
inventory.read()
found = links.read(*inventory.cards())
assert not found or links.read(*inventory.cards()) is found, "asked once for the same GPUs"
print(json.dumps([[sorted(pair), link] for pair, link in found.items()]))
"""


@pytest.fixture(scope="session", name="library")
def _library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml")).parent


def links(gpus: Sequence[StandInGpu], folder: Path, library: Path) -> dict[tuple[int, int], Link]:
    """The links by the positions of the GPUs."""
    description = folder / "machine"
    Machine(gpus=list(gpus)).write(description)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", READER],
        env=environment(library, description),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    places = {gpu.uuid: place for place, gpu in enumerate(gpus)}
    found = json.loads(done.stdout)
    return {tuple(sorted(places[uuid] for uuid in pair)): Link(link) for pair, link in found}


def gpus(count: int) -> list[StandInGpu]:
    return [StandInGpu(uuid=f"GPU-{place}", pci=ADDRESSES[place]) for place in range(count)]


def test_pcie_levels_are_those_of_nvidia_smi(tmp_path: Path, library: Path) -> None:
    levels = {(0, 1): 10, (0, 2): 20, (0, 3): 30, (1, 2): 40, (1, 3): 50, (2, 3): 0}
    box = [
        replace(
            gpu, ancestors={other: levels[min(place, other), max(place, other)] for other in range(4) if other != place}
        )
        for place, gpu in enumerate(gpus(4))
    ]
    assert links(box, tmp_path, library) == {
        (0, 1): Link.PIX,
        (0, 2): Link.PXB,
        (0, 3): Link.PHB,
        (1, 2): Link.NODE,
        (1, 3): Link.SYS,
        (2, 3): Link.PIX,
    }


def test_nvlinks_from_card_to_card_join_those_two_only(tmp_path: Path, library: Path) -> None:
    """The far end is written with a domain of four digits, as some drivers do."""
    box = gpus(3)
    box[0] = replace(box[0], nvlinks=[(0, True, "0000:43:00.0")], ancestors={1: 50, 2: 50})
    box[1] = replace(box[1], nvlinks=[(0, True, "0000:1b:00.0"), (1, False, ADDRESSES[2])], ancestors={0: 50, 2: 40})
    box[2] = replace(box[2], ancestors={0: 50, 1: 40})
    assert links(box, tmp_path, library) == {(0, 1): Link.NVLINK, (0, 2): Link.SYS, (1, 2): Link.NODE}


def test_a_switch_joins_all_cards_on_it(tmp_path: Path, library: Path) -> None:
    box = [replace(gpu, nvlinks=[(link, True, SWITCH) for link in range(18)]) for gpu in gpus(4)]
    assert links(box, tmp_path, library) == dict.fromkeys(combinations(range(4), 2), Link.NVLINK)


def test_what_the_driver_does_not_tell_is_left_out(tmp_path: Path, library: Path) -> None:
    assert links(gpus(3), tmp_path, library) == {}
    assert links(gpus(1), tmp_path, library) == {}
