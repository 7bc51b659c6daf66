"""YAML files as plain data with the place of every value, or everything that is wrong with them at once.

::

    file --content--> bytes --_decoded--> text --_events--> events --Composer--> nodes --Expansion--> data

What the fields mean is checked elsewhere.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from sage_reconcile.errors import Fault, FileFaults
from sage_reconcile.host.yaml_nodes import MAX_DEPTH, Composer, Expansion, Path_, Place, place_of, shown

MAX_BYTES = 1 << 20
MAX_DIRECTIVES = 20

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NOWHERE = Place(0, 0)
_LEAST = "the least file is the two lines `version: 1` and `engines: {}`"
_BREAK = re.compile(r"\r\n|\r|\n")
_CONTROL = re.compile("[^\t\n\r -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_UTF_16 = re.compile(rb"\xff\xfe|\xfe\xff|[^\0]\0[^\0]\0|\0[^\0]\0[^\0]")
_DIRECTIVE = re.compile(r"(?:^|[\r\n])%")

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
    ("nesting depth", False, f"more than {MAX_DEPTH} levels deep", "make it flatter"),  # libyaml's own limit, 1000
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
    return parse(content(path, "`sage-reconcile init` writes one"), str(path))


def parse(content: bytes, file_name: str) -> Document:
    """Reads the content of a YAML file; ``file_name`` is for the faults.

    Raises:
        FileFaults: it cannot be used, with everything that is wrong with it; where the faults leave a whole
            tree (a key given twice, say), its ``partial`` is the document without what is at fault.
    """
    text = _decoded(content, file_name)
    if len(_DIRECTIVE.findall(text)) > MAX_DIRECTIVES:
        raise _refusal(file_name, f"more than {MAX_DIRECTIVES} lines begin with `%`", "indent or remove them")
    composer = Composer()
    for event in _events(text, composer.faults) if text.strip() else ():
        composer.feed(event)
        if composer.done:
            break
    root = composer.root
    digest = hashlib.sha256(content).hexdigest()
    parts = Expansion()
    if composer.faults:
        whole = root is not None and root.tag == "map" and not composer.done
        data = parts.value(root, ()) if whole and root else None
        partial = _document(data, parts, digest, text) if isinstance(data, dict) else None
        raise FileFaults(file_name, composer.faults, partial)
    if root is None or root.tag == "null":
        raise _refusal(file_name, "the file is empty", _LEAST)
    data = parts.value(root, ())
    if not isinstance(data, dict):
        spaceless = isinstance(data, str) and re.match(r"[\w.-]+:\S", data)
        fix = "write a space after the colon" if spaceless else _LEAST
        raise _refusal(file_name, "the file is not made of `key: value` lines", fix, root.place)
    return _document(data, parts, digest, text)


def _document(data: dict[str, object], parts: Expansion, digest: str, text: str) -> Document:
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
    text = _decoded(content(path, "write it, or correct its name"), str(path))
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


def _refusal(file_name: str, problem: str, fix: str, place: Place = _NOWHERE) -> FileFaults:
    return FileFaults(file_name, [Fault(place.line, place.column, "", problem, fix)])


def content(path: Path, missing: str) -> bytes:
    """The bytes of a regular file, one more than allowed at most; never waits for a pipe or a device.

    ``missing`` is what to do where it does not exist.

    Raises:
        FileFaults: it cannot be read.
    """
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
    said, at = f"{error.context}: {error.problem}", place_of(error.problem_mark)
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
        begin, end = place_of(last.start_mark), place_of(last.end_mark)
        if end.line == at.line == begin.line:
            message, fix = "text follows the closing quote", "put all of it in quotes"
        elif end.line == at.line:
            message, fix = f"the quote opened here is closed only in line {end.line}", "close it where it should end"
            at = begin
    elif is_opening and error.context_mark:
        at = place_of(error.context_mark)
        rest = lines[at.line - 1][at.column - 1 :]
        key = re.match(r"[\w.-]+:(?=\S)", rest)
        if key and "expected ':'" in said:
            message, fix = "there is no space after the colon", f"write `{shown(key[0])} …`"
    return Fault(at.line, at.column, "", message.format(char=rest[:1]), fix)
