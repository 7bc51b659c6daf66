"""Values as the text of YAML, and such text as values.

Text is written without quotes where the ordinary reader then reads that very text, else as JSON has it. So nothing that
is in a value can become anything else than this value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

from sage_reconcile.errors import FileFaults
from sage_reconcile.host import documents

_ESCAPED = re.compile("[^ -~\xa0-\u2027\u202a-\udfff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
"""What the reader takes only as an escape."""
_ELSEWHERE = re.compile(r"\d{4}-\d\d?-\d\d?.*|\d+(:\d+)+|<<|=")
"""Text to us, and a time or a merge to other readers of YAML, or as a key."""


def read_value(text: str) -> object:
    """A value as it would be written behind ``key:``: ``3`` is a number, ``[0, 1]`` a list, ``a/b`` text.

    What YAML would not take there, or of which it would drop a part as a comment, is text.
    """
    try:
        value = documents.parse(f"value: {text}\n".encode(), "").data
    except (FileFaults, UnicodeEncodeError):
        return text
    if set(value) != {"value"} or value["value"] is None or isinstance(value["value"], str):
        return text
    return value["value"]


def in_lines(value: Mapping[str, object], column: int, step: int) -> Iterator[str]:
    """A map as the lines of a block that begins at a column; maps in it are further in by ``step``."""
    for key, item in value.items():
        head = f"{' ' * column}{on_a_line(key)}:"
        if isinstance(item, Mapping) and item:
            yield head
            yield from in_lines(item, column + step, step)
        else:
            yield f"{head} {on_a_line(item)}"


def on_a_line(value: object) -> str:
    """A value behind ``key:`` in a block."""
    if not isinstance(value, str):
        return in_brackets(value)
    return value if _reads_as(f"value: {value}\n", {"value": value}) else in_quotes(value)


def in_brackets(value: object, quoted: bool = False) -> str:
    """A value inside a map or list in brackets; ``quoted`` as JSON has it, which is YAML too."""
    match value:
        case bool() | None:
            return json.dumps(value)
        case float():
            text = repr(value)
            return text if "." in text or "e" not in text else text.replace("e", ".0e")
        case str():
            plain = not quoted and _reads_as(f"value: [{value}]\n", {"value": [value]})
            return value if plain else in_quotes(value)
        case Mapping():
            inner = (f"{in_brackets(str(key), quoted)}: {in_brackets(item, quoted)}" for key, item in value.items())
            return "{" + ", ".join(inner) + "}"
        case list() | tuple():
            return "[" + ", ".join(in_brackets(item, quoted) for item in value) + "]"
    return str(value)


def in_quotes(value: str, mark: str = '"') -> str:
    """A text in quotes, in single ones where that is asked for and it can stand in them."""
    if mark == "'" and value.isprintable():
        return "'" + value.replace("'", "''") + "'"
    written = json.dumps(value, ensure_ascii=False)
    return "".join(f"\\U{ord(mark):08x}" if _ESCAPED.match(mark) else mark for mark in written)


def _reads_as(text: str, data: dict[str, object]) -> bool:
    """Whether the ordinary reader makes this of a text, and others would too."""
    if _ELSEWHERE.fullmatch(text.removeprefix("value: ").strip("[]\n")):
        return False
    try:
        return documents.parse(text.encode(), "").data == data
    except (FileFaults, UnicodeEncodeError):
        return False
