"""YAML's events as nodes with their places, and nodes as plain data.

The composer keeps its own stack and counts what aliases would multiply, so depth and expanded size are known
before anything recurses or is copied.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import yaml
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

from sage_reconcile.errors import Fault

MAX_NODES = 100_000
MAX_DEPTH = 40
MAX_FAULTS = 200
MAX_TEXT = 64  # characters of a number, and of anything quoted in a message

Path_ = tuple[str | int, ...]
"""The way to a value: ``("engines", "chat", "gpus", 0)``."""

_UNUSABLE = re.compile("[\0\ud800-\udfff]")
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands; both count from 1, the column in characters."""

    line: int
    column: int


class Mark(Protocol):
    """Where the parser stands; both count from 0."""

    line: int
    column: int


def shown(part: object) -> str:
    """Something of the file for a message: printable, in one line, not too long."""
    text = str(part)[:MAX_TEXT]
    return (text if text.isprintable() else repr(text)[1:-1]) + "…" * (len(str(part)) > MAX_TEXT)


def place_of(mark: Mark | None) -> Place:
    """The place of one of the parser's marks."""
    assert mark is not None, "the parser marks every event and error"
    return Place(mark.line + 1, mark.column + 1)


@dataclass(slots=True)
class Node:
    """A value as written. ``tag`` is str, int, …, map or seq, or empty where it could not be read.

    ``children`` are (key, place of the key, value) of a map, where the key None merges the value in, and
    (None, place, value) of a list. ``size`` and ``height`` are those with all aliases filled in.
    """

    place: Place
    tag: str
    value: object = None
    written: str | None = None
    children: list[tuple[str | None, Place, Node]] = field(default_factory=list)
    size: int = 1
    height: int = 1
    is_open: bool = False


@dataclass(slots=True)
class _Frame:
    """A collection whose end has not come: where its keys stand, and the key whose value comes next."""

    node: Node
    seen: dict[object, Place] = field(default_factory=dict)
    key: Node | None = None

    def step(self) -> str:
        """The part of the way to the value being read that lies in this collection."""
        if self.node.tag == "seq":
            return str(len(self.node.children))
        return shown(self.key.value) if self.key and self.key.tag == "str" else ""


class Composer:
    """Makes nodes of events without recursion, and notes every fault on the way."""

    def __init__(self) -> None:
        self.root: Node | None = None
        self.faults: list[Fault] = []
        self.done = False
        self._anchors: dict[str, Node] = {}
        self._stack: list[_Frame] = []
        self._nodes = 0
        self._natural: dict[str, str] = {}  # what unquoted texts are: most keys come a thousand times
        self._resolve: Callable[..., str] = Resolver().resolve
        self._constructor = SafeConstructor()

    def feed(self, event: yaml.Event) -> None:
        """Takes the next event; ``done`` says that no more are wanted."""
        place = place_of(event.start_mark)
        match event:
            case yaml.ScalarEvent():
                node = self._anchored(event.anchor, self._scalar(event, place))
            case yaml.AliasEvent():
                node = self._alias(event.anchor or "", place)
            case yaml.CollectionStartEvent():
                self._count(1, place)
                self._stack.append(_Frame(self._anchored(event.anchor, self._collection(event, place))))
                return
            case yaml.CollectionEndEvent():
                node = self._stack.pop().node
                node.is_open = False
            case yaml.DocumentStartEvent() if self.root:
                self._bad(place, "a second document begins here", "keep one, without `---` between", stop=True)
                return
            case _:
                return
        if self._stack:
            self._attach(self._stack[-1], node)
        else:
            self.root = node

    def _anchored(self, anchor: str | None, node: Node) -> Node:
        if anchor:
            self._anchors[anchor] = node
        return node

    def _scalar(self, event: yaml.ScalarEvent, place: Place) -> Node:
        """A scalar as PyYAML reads it, but ``8000:8000`` and ``2024-01-01`` stay text."""
        self._count(1, place)
        text = str(event.value)
        if (natural := self._natural.get(text)) is None:
            natural = self._resolve(yaml.ScalarNode, text, (True, False)).removeprefix(_TAG)
            self._natural[text] = natural
        tag = natural if event.implicit[0] else (event.tag or "!").removeprefix(_TAG)
        if _UNUSABLE.search(text):
            return self._bad(place, "a NUL or half a character in the text", "remove the escape")
        if tag not in (natural, "str", "!") and (tag, natural) != ("float", "int"):
            return self._unknown_tag(str(event.tag), place)
        if tag not in ("int", "float", "bool", "null") or ":" in text:
            return Node(place, "merge" if tag == "merge" else "str", text)
        try:
            construct = getattr(self._constructor, f"construct_yaml_{tag}")
            value = construct(yaml.ScalarNode(_TAG + tag, text)) if len(text) <= MAX_TEXT else math.nan
        except ValueError:
            value = math.nan
        if isinstance(value, float) and not math.isfinite(value):
            problem = f"{shown(text)} is not a number that can be used"
            return self._bad(place, problem, "correct it, or quote it if text is meant")
        return Node(place, tag, value, None if event.style else text)

    def _collection(self, event: yaml.CollectionStartEvent, place: Place) -> Node:
        tag = "map" if isinstance(event, yaml.MappingStartEvent) else "seq"
        if event.tag not in (None, "!", _TAG + tag):
            self._unknown_tag(event.tag, place)
        if len(self._stack) >= MAX_DEPTH:
            self._bad(place, f"more than {MAX_DEPTH} levels deep", "make it flatter", stop=True)
        return Node(place, tag, is_open=True)

    def _alias(self, name: str, place: Place) -> Node:
        """A copy of what the alias names, sharing everything below it."""
        target, label = self._anchors.get(name), shown(name)
        if target is None:
            fix = f"write `&{label}` before the value that is meant, or quote the `*`"
            return self._bad(place, f"the alias `*{label}` names nothing above it", fix)
        if target.is_open:
            return self._bad(place, f"the alias `*{label}` is inside what it names", "write the value out")
        if len(self._stack) + target.height > MAX_DEPTH:
            self._bad(place, f"aliases make it more than {MAX_DEPTH} levels deep", "make it flatter", stop=True)
        self._count(target.size, place)
        return replace(target, place=place)

    def _attach(self, frame: _Frame, node: Node) -> None:
        """Puts a finished value where it belongs: into a list, or into a map as a key or a value."""
        parent, key = frame.node, frame.key
        parent.size += node.size
        parent.height = max(parent.height, node.height + 1)
        if parent.tag == "seq":
            parent.children.append((None, node.place, node))
        elif key is None:
            frame.key = node
            self._check_key(frame, node)
        else:
            is_merge = key.tag == "merge"
            if is_merge and any(source.tag not in ("map", "") for source in _sources(node)):
                self._bad(node.place, "`<<` merges only a map or a list of maps", "name an anchor of a map")
            parent.children.append((None if is_merge else str(key.value), key.place, node))
            frame.key = None

    def _check_key(self, frame: _Frame, key: Node) -> None:
        is_text = key.tag in ("str", "merge")
        if is_text and (first := frame.seen.setdefault(key.value, key.place)) is key.place:
            return
        text = shown(key.value if key.written is None else key.written)
        if is_text:
            problem = f"the key `{text}` is given twice, first in line {first.line}, column {first.column}"
            self._bad(key.place, problem, "merge as `<<: [*a, *b]`" if key.tag == "merge" else "keep one")
        elif key.tag in ("map", "seq"):
            self._bad(key.place, "a map or a list cannot be a key", "quote it if text such as `{{ }}` is meant")
        elif key.tag == "null":
            self._bad(key.place, "a key is empty or null", "write a name before the colon")
        elif key.tag:
            read_as = str(key.value).lower() if isinstance(key.value, bool) else "a number"
            self._bad(key.place, f"YAML reads the key `{text}` as {read_as}", f'quote it: "{text}"')

    def _unknown_tag(self, tag: str, place: Place) -> Node:
        problem = f"the tag `{shown(tag.replace(_TAG, '!!'))}` does not fit here"
        return self._bad(place, problem, "remove it, or quote the value if it is text")

    def _count(self, nodes: int, place: Place) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            problem = f"more than {MAX_NODES:,} values, those of aliases included"
            self._bad(place, problem, "use fewer", stop=True)

    def _bad(self, place: Place, problem: str, fix: str, *, stop: bool = False) -> Node:
        """Notes a fault of the field being read; returns what stands for its value."""
        where = ".".join(filter(None, (frame.step() for frame in self._stack)))
        if len(self.faults) == MAX_FAULTS:
            where, problem, fix, stop = "", "there are more faults from here on", "correct those above", True
        self.faults.append(Fault(place.line, place.column, where, problem, fix))
        self.done = self.done or stop
        return Node(place, "")


@dataclass(slots=True)
class Expansion:
    """The data of nodes whose depth and expanded size are known to be bearable."""

    places: dict[Path_, Place] = field(default_factory=dict)
    key_places: dict[Path_, Place] = field(default_factory=dict)
    written: dict[Path_, str] = field(default_factory=dict)

    def value(self, node: Node, path: Path_) -> object:
        """The data of a node that stands at a path, noting the places of everything in it."""
        self.places[path] = node.place
        if node.written is not None:
            self.written[path] = node.written
        if node.tag == "seq":
            return [self.value(child, (*path, index)) for index, (_, _, child) in enumerate(node.children)]
        if node.tag != "map":
            return node.value
        data: dict[str, object] = {}
        for key, (place, child) in _merged(node).items():
            self.key_places[*path, key] = place
            data[key] = self.value(child, (*path, key))
        return data


def _merged(node: Node) -> dict[str, tuple[Place, Node]]:
    """The keys of a map: what it merges first, where its own keys win and earlier sources before later."""
    merged: dict[str, tuple[Place, Node]] = {}
    own: dict[str, tuple[Place, Node]] = {}
    for key, place, child in node.children:
        if key is not None:
            own[key] = (place, child)
            continue
        for source in reversed(_sources(child)):
            merged |= _merged(source)
    return merged | own if merged else own


def _sources(node: Node) -> list[Node]:
    """The maps that a value of ``<<`` names."""
    return [child for _, _, child in node.children] if node.tag == "seq" else [node]
