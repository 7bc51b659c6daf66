"""How the GPUs of this machine are joined, as ``nvidia-smi topo -m`` says it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from types import ModuleType

from sage_reconcile.core.observed import Link, Links

_LEVELS = {0: Link.PIX, 10: Link.PIX, 20: Link.PXB, 30: Link.PHB, 40: Link.NODE, 50: Link.SYS}
"""NVML's topology levels: INTERNAL, SINGLE, MULTIPLE, HOSTBRIDGE, NODE, SYSTEM."""
_MOST_NVLINKS = 18


class LinkReader:
    """Reads the links once for each set of GPUs, since they do not change while it is the same."""

    def __init__(self) -> None:
        self._known: tuple[frozenset[str], Links] = (frozenset(), {})

    def read(self, nvml: ModuleType | None, cards: Mapping[str, tuple[object, str]]) -> Links:
        """The link of each pair of cards, given as handle and PCI id by UUID; a pair that cannot be told is left out.

        NVLink is what joins two cards whose active NVLinks end at each other, or both at something that is
        no GPU here: a switch.
        """
        if nvml is None or len(cards) < 2:
            return {}
        if self._known[0] != cards.keys():
            self._known = (frozenset(cards), _links(nvml, cards))
        return self._known[1]


def _links(nvml: ModuleType, cards: Mapping[str, tuple[object, str]]) -> Links:
    addresses = {_address(pci): uuid for uuid, (_, pci) in cards.items() if pci}
    ends = {uuid: _nvlink_ends(nvml, handle, addresses) for uuid, (handle, _) in cards.items()}
    links: dict[frozenset[str], Link] = {}
    for one, other in combinations(cards, 2):
        if other in ends[one] or one in ends[other] or "" in ends[one] & ends[other]:
            links[frozenset((one, other))] = Link.NVLINK
            continue
        try:
            level = nvml.nvmlDeviceGetTopologyCommonAncestor(cards[one][0], cards[other][0])
        except nvml.NVMLError:
            continue  # not told: it satisfies only engines to which the link does not matter
        if level in _LEVELS:
            links[frozenset((one, other))] = _LEVELS[level]
    return links


def _nvlink_ends(nvml: ModuleType, handle: object, addresses: Mapping[tuple[int, str], str]) -> frozenset[str]:
    """Where the active NVLinks of a card end: the UUIDs of GPUs, and an empty text for a switch."""
    ends: set[str] = set()
    for link in range(_MOST_NVLINKS):
        try:
            if nvml.nvmlDeviceGetNvLinkState(handle, link):
                pci = nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId
                ends.add(addresses.get(_address(pci), ""))
        except nvml.NVMLError:
            break  # this card has no more links, or none
    return frozenset(ends)


def _address(pci: str | bytes) -> tuple[int, str]:
    """A PCI id in one form: drivers write its domain with four digits or with eight."""
    text = pci.decode() if isinstance(pci, bytes) else pci
    domain, _, rest = text.lower().partition(":")
    return int(domain, 16), rest
