"""What ``engines.yaml`` says in a simulation, kept as the world's own truth beside the text that the product reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """An engine. ``revision`` is told by its ``max-model-len``, so that a command line shows what runs."""

    name: str
    revision: int = 1000
    replicas: int = 1
    memory_gib: int = 24
    ranks: int = 1
    port: int = 0
    more: tuple[str, ...] = ()
    """Further lines of the entry."""


def engines_yaml(entries: Iterable[Entry], guard: str = "off") -> str:
    lines = ["version: 1", "host:", "  gpus: auto", "  ports: 8000-8019", f"  guard: {guard}", "engines:"]
    for entry in entries:
        lines += [
            f"  {entry.name}:",
            f"    model: org/{entry.name}",
            f"    replicas: {entry.replicas}",
            f"    memory: {entry.memory_gib}GiB",
            f"    tensor_parallel_size: {entry.ranks}",
            "    rollback: off",  # a start that fails by chance would bring the older revision back for good
            f"    args: {{max-model-len: {entry.revision}}}",
            *([f"    port: {entry.port}"] if entry.port else []),
            *(f"    {line}" for line in entry.more),
        ]
    if lines[-1] == "engines:":
        lines[-1] = "engines: {}"
    return "\n".join(lines) + "\n"


def expected(entries: Iterable[Entry], unplaced: frozenset[str]) -> dict[str, list[str]]:
    """What shall serve in the end: the revision of each replica, once."""
    return {
        name: [str(entry.revision)]
        for entry in entries
        for index in range(entry.replicas)
        if (name := f"{entry.name}/{index}") not in unplaced
    }


def parse_arguments(argv: Sequence[str]) -> dict[str, str]:
    return {word: value for word, value in zip(argv, [*argv[1:], ""], strict=True) if word.startswith("--")}
