"""Links between GPUs through the real pynvml, on a stand-in for NVIDIA's library."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from tests.stand_in_nvml import Code, Machine, StandInGpu, build, environment

ROOT = Path(__file__).parents[2]
ADDRESSES = [f"00000000:{bus:02X}:00.0" for bus in (0x1B, 0x43, 0x52, 0x61)]
SWITCH = "00000000:F1:00.0"

READER = """
import json, sys
from sage_reconcile.host.gpus import NvmlInventory
from sage_reconcile.host.links import LinkReader
inventory, links = NvmlInventory(), LinkReader()
for _ in sys.stdin:
    inventory.read(links.look)
    found = [[sorted(pair), link, links.nvlink_counts.get(pair)] for pair, link in links.links.items()]
    assert links.nvlink_counts.keys() <= links.links.keys()
    print(json.dumps(found), flush=True)
"""


class Reader:
    """A process that reads the links of a machine which can be changed between its reads."""

    def __init__(self, folder: Path, library_folder: Path) -> None:
        self.description, self.calls_log = folder / "machine", folder / "calls"
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", READER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(library_folder, self.description, self.calls_log),
        )

    def read(self, gpus: Sequence[StandInGpu], **faults: int) -> dict[tuple[int, int], str]:
        """The links by the positions of the GPUs: ``sys``, ``nvlink 18``."""
        Machine(gpus=list(gpus), faults=faults).write(self.description)
        self.calls_log.write_text("")
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("read\n")
        self.process.stdin.flush()
        places = {gpu.uuid: place for place, gpu in enumerate(gpus)}
        found = json.loads(self.process.stdout.readline())
        return {
            (places[pair[0]], places[pair[1]]): link if count is None else f"{link} {count}"
            for pair, link, count in found
        }

    def asked(self) -> list[str]:
        """The questions about links of the latest read."""
        return [call for call in self.calls_log.read_text().split() if "NvLink" in call or "Topology" in call]


@pytest.fixture(name="reader_on")
def _reader_on(tmp_path: Path) -> Iterator[Callable[[Path], Reader]]:
    readers: list[Reader] = []

    def start(library_folder: Path) -> Reader:
        readers.append(Reader(tmp_path, library_folder))
        return readers[-1]

    yield start
    for reader in readers:
        reader.process.communicate()
        assert reader.process.returncode == 0


@pytest.fixture(name="reader")
def _reader(reader_on: Callable[[Path], Reader], library: Path) -> Reader:
    return reader_on(library)


@pytest.fixture(scope="session", name="library")
def _library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nvml")).parent


def gpus(count: int) -> list[StandInGpu]:
    return [StandInGpu(uuid=f"GPU-{place}", pci=ADDRESSES[place]) for place in range(count)]


def switched(count: int = 4, links: int = 18, kind: tuple[int, ...] = (2,)) -> list[StandInGpu]:
    return [replace(gpu, nvlinks=[(n, True, SWITCH, *kind) for n in range(links)]) for gpu in gpus(count)]


def test_pcie_levels_are_those_of_nvidia_smi(reader: Reader) -> None:
    levels = {(0, 1): 10, (0, 2): 20, (0, 3): 30, (1, 2): 40, (1, 3): 50, (2, 3): 0}
    box = [
        replace(
            gpu, ancestors={other: levels[min(place, other), max(place, other)] for other in range(4) if other != place}
        )
        for place, gpu in enumerate(gpus(4))
    ]
    assert reader.read(box) == {
        (0, 1): "pix",
        (0, 2): "pxb",
        (0, 3): "phb",
        (1, 2): "node",
        (1, 3): "sys",
        (2, 3): "pix",
    }


@pytest.mark.parametrize("kind", [(), (0,)], ids=["an old driver", "a driver that tells what is at the end"])
def test_nvlinks_from_card_to_card_join_those_two_only(reader: Reader, kind: tuple[int, ...]) -> None:
    """The far end is written with a domain of four digits, as some drivers do; only what is active counts."""
    box = gpus(3)
    ends = [(0, True, "0000:43:00.0", *kind), (2, True, "0000:43:00.0", *kind), (5, False, "0000:43:00.0", *kind)]
    box[0] = replace(box[0], nvlinks=ends, ancestors={1: 50, 2: 50})
    box[1] = replace(box[1], nvlinks=[(0, True, "0000:1b:00.0", *kind)], ancestors={0: 50, 2: 40})
    box[2] = replace(box[2], ancestors={0: 50, 1: 40})
    assert reader.read(box) == {(0, 1): "nvlink 2", (0, 2): "sys", (1, 2): "node"}


@pytest.mark.parametrize(("links", "kind"), [(18, (2,)), (12, ()), (36, (2,))], ids=["H100", "an old driver", "newer"])
def test_a_switch_joins_all_cards_on_it(reader: Reader, links: int, kind: tuple[int, ...]) -> None:
    assert reader.read(switched(4, links, kind)) == dict.fromkeys(combinations(range(4), 2), f"nvlink {links}")


def test_a_card_with_fewer_links_to_the_switch_is_joined_by_so_many(reader: Reader) -> None:
    box = switched(3)
    box[1] = replace(box[1], nvlinks=[(n, n % 3 > 0, SWITCH, 2) for n in range(18)])
    assert reader.read(box) == {(0, 1): "nvlink 12", (0, 2): "nvlink 18", (1, 2): "nvlink 12"}


def test_two_cards_that_are_each_joined_to_one_we_may_not_see_are_not_joined(reader: Reader) -> None:
    box = [replace(gpu, nvlinks=[(0, True, SWITCH, 0)], ancestors={0: 50, 1: 50}) for gpu in gpus(2)]
    assert reader.read(box) == {(0, 1): "sys"}


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("nvmlDeviceGetNvLinkState", "node"),
        ("nvmlDeviceGetNvLinkRemotePciInfo_v2", "nvlink 18"),
        ("nvmlDeviceGetNvLinkRemoteDeviceType", "nvlink 18"),
        ("nvmlDeviceGetTopologyCommonAncestor", "nvlink 18"),
    ],
)
def test_a_function_that_a_driver_lacks_costs_its_answer_only(
    reader_on: Callable[[Path], Reader], tmp_path: Path, missing: str, expected: str
) -> None:
    box = [replace(gpu, ancestors={0: 40, 1: 40}) for gpu in switched(2)]
    reader = reader_on(build(tmp_path / "library", [missing]).parent)
    assert reader.read(box) == {(0, 1): expected}
    assert reader.read(box) == {(0, 1): expected}
    assert not reader.asked(), "what will never be told is not asked again"


def test_what_the_driver_does_not_tell_is_left_out(reader: Reader) -> None:
    assert reader.read(gpus(3)) == {}
    assert reader.read(gpus(1)) == {}


def test_links_of_which_nobody_tells_where_they_end_join_nothing(
    reader_on: Callable[[Path], Reader], tmp_path: Path
) -> None:
    missing = ["nvmlDeviceGetNvLinkRemotePciInfo_v2", "nvmlDeviceGetNvLinkRemoteDeviceType"]
    reader = reader_on(build(tmp_path / "library", missing).parent)
    assert reader.read([replace(gpu, ancestors={0: 40, 1: 40}) for gpu in switched(2)]) == {(0, 1): "node"}


def test_a_card_without_a_pci_id_is_still_known_by_its_own_links(reader: Reader) -> None:
    box = gpus(2)
    box[0] = replace(box[0], nvlinks=[(0, True, ADDRESSES[1], 0)], faults={"nvmlDeviceGetPciInfo_v3": 3})
    box[1] = replace(box[1], nvlinks=[(0, True, ADDRESSES[0], 0)])
    assert reader.read(box) == {(0, 1): "nvlink 1"}


def test_links_are_asked_once_for_the_same_gpus(reader: Reader) -> None:
    first = reader.read(switched(3))
    assert len(reader.asked()) > 3 * 18
    assert reader.read(switched(3)) == first
    assert not reader.asked()
    assert len(reader.read(switched(4))) == 6, "one more GPU"


def test_a_question_that_fails_in_passing_is_asked_again(reader: Reader) -> None:
    box = switched(3)
    box[1] = replace(box[1], faults={"nvmlDeviceGetNvLinkState": Code.UNKNOWN})
    assert reader.read(box) == {(0, 2): "nvlink 18"}
    assert len(reader.read(switched(3))) == 3


def test_a_lost_gpu_takes_no_links_from_the_others_nor_does_a_driver_that_goes(reader: Reader) -> None:
    """NVML is let go after a look that found a GPU lost: the links are read before."""
    box = switched(4)
    box[2] = replace(box[2], faults={"*": Code.GPU_IS_LOST})
    others = dict.fromkeys(combinations((0, 1, 3), 2), "nvlink 18")
    assert reader.read(box) == others
    assert len(reader.read(switched(4))) == 6
    assert len(reader.read(box)) == 6, "how they are joined does not change"
    gone = {"nvmlDeviceGetCount_v2": Code.DRIVER_NOT_LOADED, "nvmlInitWithFlags": Code.DRIVER_NOT_LOADED}
    assert len(reader.read(switched(4), **gone)) == 6


def test_a_gpu_lost_while_the_links_are_read_takes_none_from_the_others(reader: Reader) -> None:
    box = switched(4)
    box[0] = replace(box[0], lost_after=30)
    found = reader.read(box)
    assert {pair: found[pair] for pair in combinations((1, 2, 3), 2)} == dict.fromkeys(
        combinations((1, 2, 3), 2), "nvlink 18"
    )
