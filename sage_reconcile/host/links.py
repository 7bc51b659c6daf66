"""How the GPUs of this machine are joined, as ``nvidia-smi topo -m`` says it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from types import ModuleType

from sage_reconcile.core.observed import Link, Links
from sage_reconcile.host.nvml import Ask

_LEVELS = {0: Link.PIX, 10: Link.PIX, 20: Link.PXB, 30: Link.PHB, 40: Link.NODE, 50: Link.SYS}
"""NVML's topology levels: INTERNAL, SINGLE, MULTIPLE, HOSTBRIDGE, NODE, SYSTEM."""
_MOST_NVLINKS = 18
"""Of one card, up to B200; a newer binding knows of more."""
_SWITCH = ""
"""Stands for the UUID of what a link ends at where that is a switch."""

Cards = Mapping[str, tuple[object, str]]
"""Handle and PCI id of each card, by its UUID."""


class LinkReader:
    """Reads the links once for each set of GPUs, since they do not change while it is the same.

    ``links`` and ``nvlink_counts`` are what was read last; a pair that cannot be told is left out. They stay while a
    GPU, or the driver, is gone.
    """

    def __init__(self) -> None:
        self.links: Links = {}
        self.nvlink_counts: Mapping[frozenset[str], int] = {}
        self._known: frozenset[str] = frozenset()

    def look(self, nvml: ModuleType, cards: Cards) -> None:
        """Reads the links between these cards unless they are known; where a question failed in passing, again.

        NVLink is what joins two cards whose active NVLinks end at each other, or both at a switch.
        """
        if len(cards) < 2 or cards.keys() <= self._known:
            return
        asks = {uuid: Ask(nvml) for uuid in cards}
        self.nvlink_counts = _nvlink_counts(asks, cards)
        self.links = _links(asks, cards, self.nvlink_counts)
        if not any(ask.passing for ask in asks.values()):
            self._known = frozenset(cards)


def _links(asks: Mapping[str, Ask], cards: Cards, nvlinks: Mapping[frozenset[str], int]) -> Links:
    links: dict[frozenset[str], Link] = dict.fromkeys(nvlinks, Link.NVLINK)
    for one, other in combinations(cards, 2):
        if frozenset((one, other)) in links:
            continue
        level = asks[one]("nvmlDeviceGetTopologyCommonAncestor", cards[one][0], cards[other][0])
        if level in _LEVELS:  # where it is not told, it satisfies only engines to which the link does not matter
            links[frozenset((one, other))] = _LEVELS[level]
    return links


def _nvlink_counts(asks: Mapping[str, Ask], cards: Cards) -> dict[frozenset[str], int]:
    """How many active NVLinks join each pair: from card to card, else those of either to a switch."""
    addresses = {address: uuid for uuid, (_, pci) in cards.items() if (address := _address(pci))}
    ends = {uuid: _nvlink_ends(asks[uuid], handle, addresses) for uuid, (handle, _) in cards.items()}
    counts: dict[frozenset[str], int] = {}
    for one, other in combinations(cards, 2):
        direct = max(ends[one][other], ends[other][one])  # one of the two may not have told
        if links := direct or min(ends[one][_SWITCH], ends[other][_SWITCH]):
            counts[frozenset((one, other))] = links
    return counts


def _nvlink_ends(ask: Ask, handle: object, addresses: Mapping[tuple[int, str], str]) -> Counter[str]:
    """How many active NVLinks of a card end at which GPU, by its UUID, and at switches.

    What is none of these cards is a switch where the driver says so, or is too old to say: it may also be a GPU
    that we may not see.
    """
    ends: Counter[str] = Counter()
    for link in range(max(_MOST_NVLINKS, getattr(ask.nvml, "NVML_NVLINK_MAX_LINKS", 0))):
        if not ask("nvmlDeviceGetNvLinkState", handle, link):
            continue  # not active, or the card has no such link
        pci = ask("nvmlDeviceGetNvLinkRemotePciInfo", handle, link)
        address = _address(pci.busId) if pci else None
        if address and address in addresses:
            ends[addresses[address]] += 1
            continue
        kind = ask("nvmlDeviceGetNvLinkRemoteDeviceType", handle, link)
        if kind == ask.nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH or (kind is None and address):
            ends[_SWITCH] += 1
    return ends


def _address(pci: str | bytes) -> tuple[int, str] | None:
    """A PCI id in one form, as drivers write its domain with four digits or with eight; None where it is none."""
    text = pci.decode(errors="replace") if isinstance(pci, bytes) else pci
    domain, _, rest = text.lower().partition(":")
    try:
        return int(domain, 16), rest
    except ValueError:
        return None
