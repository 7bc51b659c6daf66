"""YAML files as plain data with the place of every value, or everything that is wrong with them at once.

::

    file --_content--> bytes --_decoded--> text --_events--> events --_Composer--> nodes --_Expansion--> data

The composer keeps its own stack and counts what aliases would multiply, so depth and expanded size are known
before anything recurses or is copied. What the fields mean is checked elsewhere.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import yaml
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

from sage_reconcile.errors import Fault, FileFaults

MAX_BYTES = 1 << 20
MAX_NODES = 100_000
MAX_DEPTH = 40
MAX_FAULTS = 200
MAX_TEXT = 64  # characters of a number, and of anything quoted in a message
MAX_DIRECTIVES = 20

Path_ = tuple[str | int, ...]
"""The way to a value: ``("engines", "chat", "gpus", 0)``."""

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_LEAST = "the least file is the two lines `version: 1` and `engines: {}`"
_BREAK = re.compile(r"\r\n|\r|\n")
_CONTROL = re.compile("[^\t\n\r -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_UTF_16 = re.compile(rb"\xff\xfe|\xfe\xff|[^\0]\0[^\0]\0|\0[^\0]\0[^\0]")
_UNUSABLE = re.compile("[\0\ud800-\udfff]")
_DIRECTIVE = re.compile(r"(?:^|[\r\n])%")
_TAG = "tag:yaml.org,2002:"

# What the parser says; whether the place of the opening is meant; what is wrong; what would be right.
_CAUSES: tuple[tuple[str, bool, str, str], ...] = (
    ("quoted scalar.*end of stream", True, "the quote opened here is never closed", "close it"),
    ("expected ':'", True, "this line is not `key: value`", "write a colon and a space after the key"),
    ("mapping values", False, "this is indented below a line that has a value", "correct its indentation"),
    ("flow sequence", True, "the `[` opened here is not closed, or lacks a comma", "close it with `]`"),
    ("flow mapping", True, "the `{{` opened here is not closed, or lacks a comma", "close it with `}`"),
    ("cannot start any token", False, "a value cannot begin with `{char}`", "put it in quotes"),
    ("alphabetic or num", True, "a `{char}` here needs a name after it", "put it in quotes if text is meant"),
    ("escape", False, "this backslash means nothing in double quotes", r"use single quotes, or write `\\`"),
    ("a tag|tag handle", False, "tags are not supported", "remove the tag, or quote the value if it is text"),
    ("sequence entries", False, "a list cannot begin here", "begin it on the next line"),
    ("node content", False, "`{char}` does not belong here", "remove it, or put it in quotes"),
    ("block scalar", False, "after `|` or `>` the text begins on the next line", "or put it in quotes"),
    ("directive|incompatible", False, "this `%` line is not known", "remove it"),
    ("document start", False, "this stands beside the top-level keys", "write `key: value` lines only"),
    ("'-' indicator", False, "this is in a list, and is not an item", "correct its indentation"),
    ("expected key|block end", False, "this line fits no line above it", "correct its indentation"),
    ("", False, "YAML cannot read this", "correct this line"),
)

_ENV_LINE = re.compile(
    r"""(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=(?!\s+\#)\s*+
        (?: '([^']*)'(?:\s+\#.*)? | "((?:[^"\\]|\\.)*)"(?:\s+\#.*)? | (?!['"])((?:(?!\s\#).)*) )""",
    re.VERBOSE,
)
_ENV_CAUSES = (
    (r"[^=]*$", "this line has no `=`", "write NAME=value, or `#` before a comment"),
    (r"(?!(?:export\s+)?[A-Za-z_][A-Za-z0-9_]*=)", "no name before `=`", "use letters, digits and `_`, no space"),
    (r"[^=]*=\s*+['\"]", "the quoted value does not end with the line", "close it, and put nothing after it"),
    (r"", "` #` in an unquoted value", "quote the value, or put the comment in a line of its own"),
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands; both count from 1, the column in characters."""

    line: int
    column: int


class _Mark(Protocol):
    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Document:
    """A file as plain data, where each part of it is written, and its text.

    ``places`` has every value: an aliased value stands where the alias is, what is in it where it is written.
    ``key_places`` has every key of a map. ``written`` has the original text of every unquoted value that
    YAML reads as something else than text. ``text`` is without a byte order mark, ``digest`` of all bytes.
    """

    data: dict[str, object]
    places: Mapping[Path_, Place]
    key_places: Mapping[Path_, Place]
    digest: str
    text: str
    written: Mapping[Path_, str]


def read(path: Path) -> Document:
    """Reads a YAML file.

    Raises:
        FileFaults: it cannot be read or used, with everything that is wrong with it.
    """
    return parse(_content(path, "`sage-reconcile init` writes one"), str(path))


def parse(content: bytes, file_name: str) -> Document:
    """Reads the content of a YAML file; ``file_name`` is for the faults.

    Raises:
        FileFaults: it cannot be used, with everything that is wrong with it.
    """
    text = _decoded(content, file_name)
    if len(_DIRECTIVE.findall(text)) > MAX_DIRECTIVES:
        raise _refusal(file_name, f"more than {MAX_DIRECTIVES} lines begin with `%`", "indent or remove them")
    composer = _Composer()
    for event in _events(text, composer.faults) if text.strip() else ():
        composer.feed(event)
        if composer.done:
            break
    root = composer.root
    if composer.faults:
        raise FileFaults(file_name, composer.faults)
    if root is None or root.tag == "null":
        raise _refusal(file_name, "the file is empty", _LEAST)
    parts = _Expansion()
    data = parts.value(root, ())
    if not isinstance(data, dict):
        spaceless = isinstance(data, str) and re.match(r"[\w.-]+:\S", data)
        fix = "write a space after the colon" if spaceless else _LEAST
        raise _refusal(file_name, "the file is not made of `key: value` lines", fix, root.place)
    digest = hashlib.sha256(content).hexdigest()
    return Document(data, parts.places, parts.key_places, digest, text, parts.written)


def read_env_file(path: Path) -> dict[str, str]:
    """Reads ``NAME=value`` lines as docker and systemd have them; of a repeated name the last counts.

    Values may be quoted; in double quotes a backslash protects ``"``, a backslash, ``$`` and a backtick.
    Nothing is expanded. The faults never show any of the content, for it may be secret.

    Raises:
        FileFaults: it cannot be read, with every line that is wrong.
    """
    values: dict[str, str] = {}
    faults: list[Fault] = []
    text = _decoded(_content(path, "write it, or correct its name"), str(path))
    for number, whole in enumerate(_BREAK.split(text), start=1):
        line = whole.strip()
        if not line or line[0] in "#;":
            continue
        if match := _ENV_LINE.fullmatch(line):
            name, single, double, bare = match.groups()
            values[name] = single or bare or re.sub(r'\\(["\\$`])', r"\1", double or "")
        else:
            problem, fix = next(cause[1:] for cause in _ENV_CAUSES if re.match(cause[0], line))
            faults.append(Fault(number, whole.index(line[0]) + 1, "", problem, fix))
    if faults:
        raise FileFaults(str(path), faults)
    return values


def _refusal(file_name: str, problem: str, fix: str, place: Place = Place(0, 0)) -> FileFaults:
    return FileFaults(file_name, [Fault(place.line, place.column, "", problem, fix)])


def _content(path: Path, missing: str) -> bytes:
    """The bytes of a regular file, one more than allowed at most; never waits for a pipe or a device."""
    try:
        _check_kind(path, path.stat())
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            _check_kind(path, os.fstat(descriptor))
            return stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        problem, fix = "the file does not exist, or is a link to nothing", missing
    except PermissionError:
        problem, fix = f"user {os.geteuid()} may not read it", "allow that for the file and its folders"
    except OSError as error:
        problem, fix = f"it cannot be read: {os.strerror(error.errno or errno.EIO)}", "check its path"
    except ValueError:
        problem, fix = "its name holds a NUL character", "correct the name"
    raise _refusal(str(path), problem, fix)


def _check_kind(path: Path, found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise _refusal(str(path), "this is a folder", "name a file in it")
    if not stat.S_ISREG(found.st_mode):
        raise _refusal(str(path), "this is a pipe, socket or device", "name a file")
    _check_size(str(path), found.st_size)


def _check_size(file_name: str, size: int) -> None:
    if size > MAX_BYTES:
        problem = f"the file has {size:,} bytes, and the limit is {MAX_BYTES:,} (1 MiB)"
        raise _refusal(file_name, problem, "check that it is the right file")


def _decoded(content: bytes, file_name: str) -> str:
    """The text of a file in UTF-8, without a byte order mark."""
    _check_size(file_name, len(content))
    if _UTF_16.match(content):
        raise _refusal(file_name, "the file is UTF-16 or UTF-32", "save it as UTF-8")
    content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        problem = f"the byte 0x{content[error.start]:02X} is not UTF-8 text"
        place = _end_of(content[: error.start].decode())
        raise _refusal(file_name, problem, "save the file as UTF-8", place) from None
    faults = []
    for match in list(_CONTROL.finditer(text))[:20]:
        place = _end_of(text[: match.start()])
        problem = f"the invisible character U+{ord(match[0]):04X}"
        faults.append(Fault(place.line, place.column, "", problem, "remove it"))
    if faults:
        raise FileFaults(file_name, faults)
    return text


def _end_of(text: str) -> Place:
    """The place of what follows this text."""
    lines = _BREAK.split(text)
    return Place(len(lines), len(lines[-1]) + 1)


def _shown(part: object) -> str:
    """Something of the file for a message: printable, in one line, not too long."""
    text = str(part)[:MAX_TEXT]
    return (text if text.isprintable() else repr(text)[1:-1]) + "…" * (len(str(part)) > MAX_TEXT)


def _events(text: str, faults: list[Fault]) -> Iterator[yaml.Event]:
    """The parser's events up to the end, or up to the first place that it cannot make sense of."""
    last: yaml.Event | None = None
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            last = event
            yield event
    except yaml.MarkedYAMLError as error:
        faults.append(_syntax_fault(error, [*_BREAK.split(text), ""], last))
    except (yaml.YAMLError, ValueError, OverflowError):
        faults.append(Fault(0, 0, "", "a tag or a `\\U` escape cannot be read", "remove it"))


def _syntax_fault(error: yaml.MarkedYAMLError, lines: list[str], last: yaml.Event | None) -> Fault:
    """The parser's complaint in plain words, at the place that has to be changed."""
    said, at = f"{error.context}: {error.problem}", _place(error.problem_mark)
    line = lines[at.line - 1]
    before, rest = line[: at.column - 1], line[at.column - 1 :]
    is_opening, message, fix = next(cause[1:] for cause in _CAUSES if re.search(cause[0], said))
    if rest.startswith("\t") and before.strip(" "):
        message, fix = "a tab cannot stand here", "write a space"
    elif rest.startswith("\t"):
        more = sum(bool(re.match(" *\t", line)) for line in lines[at.line :])
        message = "this line begins with a tab" + f" (and so do {more} below)" * (more > 0)
        fix = "indent with spaces"
    elif "mapping values" in said and ": " in before:
        message, fix = "a second `: ` in one line", "put the value in quotes"
    elif isinstance(last, yaml.ScalarEvent) and last.style in ("'", '"') and "block" in said and before.strip():
        begin, end = _place(last.start_mark), _place(last.end_mark)
        if end.line == at.line == begin.line:
            message, fix = "text follows the closing quote", "put all of it in quotes"
        elif end.line == at.line:
            message, fix = f"the quote opened here is closed only in line {end.line}", "close it where it should end"
            at = begin
    elif is_opening and error.context_mark:
        at = _place(error.context_mark)
        rest = lines[at.line - 1][at.column - 1 :]
        key = re.match(r"[\w.-]+:(?=\S)", rest)
        if key and "expected ':'" in said:
            message, fix = "there is no space after the colon", f"write `{_shown(key[0])} …`"
    return Fault(at.line, at.column, "", message.format(char=rest[:1]), fix)


def _place(mark: _Mark | None) -> Place:
    assert mark is not None, "the parser marks every event and error"
    return Place(mark.line + 1, mark.column + 1)


@dataclass(slots=True)
class _Node:
    """A value as written. ``tag`` is str, int, …, map or seq, or empty where it could not be read.

    ``children`` are (key, place of the key, value) of a map, where the key None merges the value in, and
    (None, place, value) of a list. ``size`` and ``height`` are those with all aliases filled in.
    """

    place: Place
    tag: str
    value: object = None
    written: str | None = None
    children: list[tuple[str | None, Place, _Node]] = field(default_factory=list)
    size: int = 1
    height: int = 1
    is_open: bool = False


@dataclass(slots=True)
class _Frame:
    """A collection whose end has not come: where its keys stand, and the key whose value comes next."""

    node: _Node
    seen: dict[object, Place] = field(default_factory=dict)
    key: _Node | None = None

    def step(self) -> str:
        """The part of the way to the value being read that lies in this collection."""
        if self.node.tag == "seq":
            return str(len(self.node.children))
        return _shown(self.key.value) if self.key and self.key.tag == "str" else ""


class _Composer:
    """Makes nodes of events without recursion, and notes every fault on the way."""

    def __init__(self) -> None:
        self.root: _Node | None = None
        self.faults: list[Fault] = []
        self.done = False
        self._anchors: dict[str, _Node] = {}
        self._stack: list[_Frame] = []
        self._nodes = 0
        self._natural: dict[str, str] = {}  # what unquoted texts are: most keys come a thousand times
        self._resolve: Callable[..., str] = Resolver().resolve
        self._constructor = SafeConstructor()

    def feed(self, event: yaml.Event) -> None:
        """Takes the next event; ``done`` says that no more are wanted."""
        place = _place(event.start_mark)
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

    def _anchored(self, anchor: str | None, node: _Node) -> _Node:
        if anchor:
            self._anchors[anchor] = node
        return node

    def _scalar(self, event: yaml.ScalarEvent, place: Place) -> _Node:
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
            return _Node(place, "merge" if tag == "merge" else "str", text)
        try:
            construct = getattr(self._constructor, f"construct_yaml_{tag}")
            value = construct(yaml.ScalarNode(_TAG + tag, text)) if len(text) <= MAX_TEXT else math.nan
        except ValueError:
            value = math.nan
        if isinstance(value, float) and not math.isfinite(value):
            problem = f"{_shown(text)} is not a number that can be used"
            return self._bad(place, problem, "correct it, or quote it if text is meant")
        return _Node(place, tag, value, None if event.style else text)

    def _collection(self, event: yaml.CollectionStartEvent, place: Place) -> _Node:
        tag = "map" if isinstance(event, yaml.MappingStartEvent) else "seq"
        if event.tag not in (None, "!", _TAG + tag):
            self._unknown_tag(event.tag, place)
        if len(self._stack) >= MAX_DEPTH:
            self._bad(place, f"more than {MAX_DEPTH} levels deep", "make it flatter", stop=True)
        return _Node(place, tag, is_open=True)

    def _alias(self, name: str, place: Place) -> _Node:
        """A copy of what the alias names, sharing everything below it."""
        target, shown = self._anchors.get(name), _shown(name)
        if target is None:
            fix = f"write `&{shown}` before the value that is meant, or quote the `*`"
            return self._bad(place, f"the alias `*{shown}` names nothing above it", fix)
        if target.is_open:
            return self._bad(place, f"the alias `*{shown}` is inside what it names", "write the value out")
        if len(self._stack) + target.height > MAX_DEPTH:
            self._bad(place, f"aliases make it more than {MAX_DEPTH} levels deep", "make it flatter", stop=True)
        self._count(target.size, place)
        return replace(target, place=place)

    def _attach(self, frame: _Frame, node: _Node) -> None:
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

    def _check_key(self, frame: _Frame, key: _Node) -> None:
        is_text = key.tag in ("str", "merge")
        if is_text and (first := frame.seen.setdefault(key.value, key.place)) is key.place:
            return
        text = _shown(key.value if key.written is None else key.written)
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

    def _unknown_tag(self, tag: str, place: Place) -> _Node:
        problem = f"the tag `{_shown(tag.replace(_TAG, '!!'))}` does not fit here"
        return self._bad(place, problem, "remove it, or quote the value if it is text")

    def _count(self, nodes: int, place: Place) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            problem = f"more than {MAX_NODES:,} values, those of aliases included"
            self._bad(place, problem, "use fewer", stop=True)

    def _bad(self, place: Place, problem: str, fix: str, *, stop: bool = False) -> _Node:
        """Notes a fault of the field being read; returns what stands for its value."""
        where = ".".join(filter(None, (frame.step() for frame in self._stack)))
        if len(self.faults) == MAX_FAULTS:
            where, problem, fix, stop = "", "there are more faults from here on", "correct those above", True
        self.faults.append(Fault(place.line, place.column, where, problem, fix))
        self.done = self.done or stop
        return _Node(place, "")


@dataclass(slots=True)
class _Expansion:
    """The data of nodes whose depth and expanded size are known to be bearable."""

    places: dict[Path_, Place] = field(default_factory=dict)
    key_places: dict[Path_, Place] = field(default_factory=dict)
    written: dict[Path_, str] = field(default_factory=dict)

    def value(self, node: _Node, path: Path_) -> object:
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


def _merged(node: _Node) -> dict[str, tuple[Place, _Node]]:
    """The keys of a map: what it merges first, where its own keys win and earlier sources before later."""
    merged: dict[str, tuple[Place, _Node]] = {}
    own: dict[str, tuple[Place, _Node]] = {}
    for key, place, child in node.children:
        if key is not None:
            own[key] = (place, child)
            continue
        for source in reversed(_sources(child)):
            merged |= _merged(source)
    return merged | own if merged else own


def _sources(node: _Node) -> list[_Node]:
    """The maps that a value of ``<<`` names."""
    return [child for _, _, child in node.children] if node.tag == "seq" else [node]
